"""Trains a small run that is killed again and again, and compares what comes of it with an undisturbed one.

A program of its own (``python -m headway.experiments.killed_runs FOLDER KILLS STEPS``): everything is imported once,
and every attempt is a process forked from it, ended by SIGKILL at a random moment. Prints one JSON line.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from headway.core.metrics import read_metrics
from headway.core.recipe import Recipe
from headway.core.run import Run
from headway.core.train import train
from headway.resilience.reading import SavedStates

_TIMED = ("tokens_per_second", "step_seconds", "peak_memory_bytes")


def recipe(steps: int) -> Recipe:
    """A run whose losses depend on all that a checkpoint must hold, saved at every step."""
    words = ["river", "stone", "lamp", "engine", "wave", "child", "sees", "finds", "moves", "holds"]
    rng = random.Random(0)
    documents = [" ".join(rng.choices(words, k=60)) for _ in range(60)]
    return Recipe.load({
        "name": "killed",
        "model": {"hidden": 64, "layers": 2, "heads": 2, "context": 64, "dropout": 0.2},
        "data": {"source": "memory", "documents": documents, "tokenizer": "byte", "sequence": 32},
        "train": {"steps": steps, "batch": 4, "micro_batch": 2, "precision": "bf16", "device": "cpu"},
        "eval": {"every": 15, "batches": 1},
        "log": {"every": 1, "tensorboard": False},
        "checkpoint": {"mode": "lazy", "every": 1, "host_cache": "128KiB"},
        "methods": {"ema": {"decay": 0.9}},
    })  # fmt: skip


def fork(work: Callable[[], Any], log: Path) -> int:
    """Run ``work`` in a child whose output goes to ``log``; its process id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            work()
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    return child


def outcome(run: Path) -> tuple[Any, ...]:
    """All that a run has come to but for the clock's part: metrics, evaluation and the newest state's bytes."""
    lines = [{k: v for k, v in line.items() if k not in _TIMED} for line in read_metrics(run / "metrics.jsonl")]
    state = SavedStates(run / "checkpoints").load() or {}
    state.get("counters", {}).pop("seconds", None)
    return lines, Run(run).summary["eval_loss"], _plain(state)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def killed(folder: Path, kills: int, steps: int, seed: int = 0) -> dict[str, int]:
    """Kill ``kills`` attempts at runs of ``steps`` steps; what gets through all the same is compared.

    Returns:
        How many were killed, how many of them while a checkpoint was being written, how many attempts went on from a
        checkpoint, runs that were finished, and those that differ in any bit or could not go on.
    """
    rng, log = random.Random(seed), folder / "log"
    train(recipe(steps), run=folder / "reference")
    expected = outcome(folder / "reference")
    gc.collect()
    gc.freeze()  # the children's collector, and their meters, pass over what is there already
    counts = {"kills": 0, "while_writing": 0, "resumed": 0, "runs": 0, "broken": 0}
    while counts["kills"] < kills or counts["runs"] == 0:
        run = folder / f"run-{counts['runs']}"
        counts["resumed"] += any((run / "checkpoints").glob("step-*"))
        child = fork(lambda run=run: train(recipe(steps), run=run), log)  # type: ignore[misc]
        if counts["kills"] < kills:
            _kill(child, run, rng)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == -signal.SIGKILL:
            counts["kills"] += 1
            counts["while_writing"] += any((run / "checkpoints").glob(".step-*"))
        else:
            counts["broken"] += status != 0 or outcome(run) != expected
            counts["runs"] += 1
    return counts


def _kill(child: int, run: Path, rng: random.Random) -> None:
    """Kill ``child``: one in five while it starts, the others some steps after its first."""
    before, end = _lines(run), time.monotonic() + (rng.uniform(0, 0.5) if rng.random() < 0.2 else 60)
    while _lines(run) == before and time.monotonic() < end:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return  # it has come to its end
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.25))
    os.kill(child, signal.SIGKILL)


def _lines(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").stat().st_size
    except OSError:
        return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    sys.stdout.write(json.dumps(killed(target, int(sys.argv[2]), int(sys.argv[3]))) + "\n")
