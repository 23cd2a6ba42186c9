"""Runs of the command line in forked processes that are killed or signalled; prints one JSON object.

A process of its own, so that torch is imported once and forked from a single thread: each run is a real process with a
real exit status. Arguments: a folder to work in, a scenario (see the functions at the end).
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import yaml

from headway.cli.main import main
from headway.core.metrics import read_metrics
from headway.core.recipe import Recipe
from headway.core.run import Run
from headway.core.train import train
from headway.resilience.checkpoint import PlainCheckpointer
from tests.conftest import tiny_recipe
from tests.resilience.states import same

STEPS = 30
TIMED = ("tokens_per_second", "step_seconds", "peak_memory_bytes")


def recipe(folder, **sections):
    """A recipe whose losses depend on all that a checkpoint must hold: order of data, dropout's RNG, Adam, a method."""
    path = folder / "recipe.yaml"
    raw = tiny_recipe(
        model={"hidden": 16, "dropout": 0.2},
        train={"steps": STEPS, "micro_batch": 2, "clip": 0.5, **sections.pop("train", {})},
        eval={"every": 7},
        **{"checkpoint": {"every": 3}, "methods": {"ema": {"decay": 0.9}}, **sections},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(raw))
    return path


def start(*arguments, before=None):
    """A forked ``headway ARGUMENTS``; its output goes to ``log`` beside the run."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            log = os.open(Path(arguments[1]).parent / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if before:
                before()
            status = main([str(argument) for argument in arguments])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return child


def wait(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def logged(run):
    """Everything in the metrics that does not depend on the clock."""
    return [{k: v for k, v in line.items() if k not in TIMED} for line in read_metrics(run / "metrics.jsonl")]


def last_state(run):
    state = PlainCheckpointer(PlainCheckpointer.Options(), run / "checkpoints").load()
    state["counters"].pop("seconds")
    return state


def identical(run, reference):
    assert logged(run) == logged(reference), first_difference(logged(run), logged(reference))
    ours, theirs = last_state(run), last_state(reference)
    for key in theirs:
        assert same(ours[key], theirs[key]), f"{key} differs"
    assert Run(run).summary["eval_loss"] == Run(reference).summary["eval_loss"]


def first_difference(a, b):
    pairs = [(x, y) for x, y in zip(a, b) if x != y]
    return f"{len(a)} and {len(b)} lines; first different: {pairs[:1]}"


def at_step(run, step):
    """Wait until the run has logged ``step``."""
    end = time.monotonic() + 180
    while time.monotonic() < end:
        lines = read_metrics(run / "metrics.jsonl")
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.001)
    raise AssertionError(f"step {step} was never logged: {(run.parent / 'log').read_text()[-2000:]}")


def die_while_saving(after):
    """Have this process kill itself before its ``after``-th file operation in a checkpoint that is being written."""

    def hook():
        count = 0

        def watch(event, arguments):
            nonlocal count
            if event in ("open", "os.mkdir", "os.rename") and ".tmp-" in str(arguments[0]):
                count += 1
                if count == after:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)

    return hook


def killed(folder, **sections):
    """Five kills, two of them while a checkpoint is being written; after each the run is started again."""
    path = recipe(folder, **sections)
    reference = train(Recipe.load(path), run=folder / "reference").path
    run, rng, moments = folder / "run", random.Random(str(folder.name)), []
    # Before the first checkpoint, in a first checkpoint, anywhere, in a later checkpoint, near the end.
    for kind in (2, "saving", rng.randrange(8, 16), "saving", rng.randrange(19, 28)):
        if kind == "saving":
            child = start("train", path, "--run", run, before=die_while_saving(rng.randrange(1, 12)))
        else:
            child = start("train", path, "--run", run)
            at_step(run, kind)
            time.sleep(rng.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)
        status = wait(child)
        assert status == -signal.SIGKILL, f"{status}: {(folder / 'log').read_text()[-2000:]}"
        moments.append(logged(run)[-1]["step"] if logged(run) else 0)
    status = wait(start("train", path, "--run", run))
    assert status == 0, (folder / "log").read_text()[-2000:]
    identical(run, reference)
    assert not list((run / "checkpoints").glob(".*")), "rests of killed writers stay"
    # Once more, on the finished run: nothing is done and nothing is lost.
    before = (run / "metrics.jsonl").read_bytes()
    assert wait(start("train", path, "--run", run)) == 0
    assert (run / "metrics.jsonl").read_bytes() == before
    return moments


def kills(folder):
    torch.set_num_threads(1)
    return {precision: killed(folder / precision, train={"precision": precision}) for precision in ("fp32", "bf16")}


def signals(folder):
    """SIGINT and SIGTERM: the step is finished, the run saved, the exit status says which; the run then goes on."""
    path = recipe(folder, checkpoint={"every": None})
    reference = train(Recipe.load(path), run=folder / "reference").path
    statuses = {}
    for signum in (signal.SIGINT, signal.SIGTERM):
        run = folder / signum.name
        child = start("train", path, "--run", run)
        at_step(run, 5)
        os.kill(child, signum)
        statuses[signum.name] = wait(child)
        saved = last_state(run)["counters"]["step"]
        assert saved == logged(run)[-1]["step"] < STEPS and not (run / "summary.json").exists()
        assert wait(start("train", path, "--run", run)) == 0
        identical(run, reference)
    return {"statuses": statuses, "log": (folder / "log").read_text()}


if __name__ == "__main__":
    print(json.dumps({"kills": kills, "signals": signals}[sys.argv[2]](Path(sys.argv[1]))))
