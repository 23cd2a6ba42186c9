"""DataStates: checkpoints at every step for less than a twentieth of its time; no kill that cannot be gone on from."""

from __future__ import annotations

import contextlib
import io
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from headway.core.build import build_trainer
from headway.core.checkpointer import NoCheckpoints
from headway.core.recipe import Recipe
from headway.experiments.base import Expectation, Experiment, Measurement, at_least, at_most, between
from headway.experiments.context import Context
from headway.experiments.evidence import Figure, Series
from headway.experiments.savers import AsyncSave, Blocking, Watched
from headway.experiments.statistics import bootstrap
from headway.memory.lanes import Lanes
from headway.resilience.checkpoint import PlainCheckpointer
from headway.resilience.cost import ENGINES, Load, bars, stall, time_per_step
from headway.resilience.flatten import flatten
from headway.resilience.lazy import LazyCheckpointer
from headway.resilience.reading import SavedStates

WRITES = 3.75
"""How many steps the throttled disk takes to write one checkpoint."""
RING = 0.2
"""Share of the state that the small ring holds."""


class Setting:
    """A training with fp32 weights and AdamW.

    Args:
        batch: the more, the longer the step beside its state.
    """

    def __init__(self, quick: bool, folder: Path, batch: int) -> None:
        hidden, layers = (256, 4) if quick else (384, 6)
        words = ["river", "stone", "lamp", "engine", "wave", "child", "sees", "finds", "moves", "holds"]
        rng = random.Random(0)
        documents = [" ".join(rng.choices(words, k=400)) for _ in range(60)]
        self.trainer = build_trainer(Recipe.load({
            "model": {"hidden": hidden, "layers": layers, "heads": 8, "context": 256},
            "data": {"source": "memory", "documents": documents, "tokenizer": "byte", "sequence": 256},
            "train": {"steps": 10**6, "batch": batch, "precision": "fp32", "device": "cpu"},
            "optimizer": {"lr": 1e-4},
        }))  # fmt: skip
        self.folder = folder
        self.different = 0
        for _ in range(3):
            self.trainer.train_step()
        self.bytes = sum(tensor.nbytes for tensor in flatten(self.trainer.state_dict())[1].values())

    def steps(self, saver: Any, count: int, every: int | None) -> list[float]:
        """Seconds of each of ``count`` steps, the save after it included."""
        self.trainer.checkpointer = saver
        times = []
        for number in range(count):
            start = time.perf_counter()
            self.trainer.train_step()
            if every and number % every == 0:
                saver.save(self.trainer.step, self.trainer.state_dict())
            times.append(time.perf_counter() - start)
        self.trainer.checkpointer = NoCheckpoints()
        return times

    def lazy(
        self, kind: type[LazyCheckpointer] = LazyCheckpointer, rate: float | None = None, ring: int = 2 << 30
    ) -> Any:
        """A lazy checkpointer on a disk of that rate."""
        lanes = Lanes(rates={"disk_write": rate} if rate else None)
        return kind(LazyCheckpointer.Options(host_cache=ring), self.folder / "lazy", lanes)

    def verify(self) -> None:
        """The newest checkpoint is that of the last save: here, of the present state."""
        state, saved = self.trainer.state_dict(), SavedStates(self.folder / "lazy").load()
        ours, theirs = flatten(state)[1], flatten(saved)[1]
        same = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        self.different += not same


def _every_step(setting: Setting, repeats: int, count: int) -> dict[str, list[float]]:
    """Each way of saving at every step: time of a step over that of the plain steps around it, in turns."""
    arms: dict[str, Callable[[], Any]] = {
        "lazy": setting.lazy,
        "async": lambda: AsyncSave(setting.folder / "async"),
        "blocking": lambda: PlainCheckpointer(PlainCheckpointer.Options(), setting.folder / "plain"),
    }
    ratios: dict[str, list[float]] = {name: [] for name in [*arms, "step"]}
    ratios |= {f"{name} stall": [] for name in arms}
    plain = lambda: statistics.median(setting.steps(NoCheckpoints(), count, None))  # noqa: E731
    before = plain()
    for _ in range(repeats):
        for name, arm in arms.items():
            saver = Watched(arm())
            saver.save(0, setting.trainer.state_dict())  # makes the ring and the folder
            saver.wait()
            setting.steps(saver, 1, 1)  # beside the second step, the first one's save is being written
            saver.stalled = 0.0
            times = setting.steps(saver, count, 1)
            ratios[f"{name} stall"].append(saver.stalled / sum(times))
            saver.wait()
            if name == "lazy":
                setting.verify()
            saver.close()
            after = plain()
            ratios[name].append(statistics.median(times) / ((before + after) / 2))
            ratios["step"].append(after)
            before = after
    return ratios


def _throttled(setting: Setting, rate: float, repeats: int) -> dict[str, list[float]]:
    """On a disk of that rate: what a cycle of ``every`` steps and a checkpoint takes, and its stall, in plain steps."""
    cycles: dict[str, list[float]] = {}
    for every, warm, measured in ((5, 1, 1), (2, 2, 3)):  # where the disk is the limit, it takes two cycles to show
        savers = {
            "blocking": Watched(setting.lazy(Blocking, rate)),
            "lazy": Watched(setting.lazy(LazyCheckpointer, rate)),
        }
        if every == 5:
            savers["async"] = Watched(AsyncSave(setting.folder / "async", rate))
        for _ in range(repeats):
            for name, saver in savers.items():
                unit = statistics.median(setting.steps(NoCheckpoints(), 3, None))
                setting.steps(saver, warm * every, every)
                saver.stalled = 0.0
                took = sum(setting.steps(saver, measured * every, every))
                saver.wait()
                cycles.setdefault(f"{name} {every}", []).append(took / unit / measured)
                cycles.setdefault(f"{name} {every} stall", []).append(saver.stalled / unit / measured)
        setting.steps(savers["lazy"], 1, 1)
        savers["lazy"].wait()
        setting.verify()
        for saver in savers.values():
            saver.close()
    return cycles


def _small_ring(setting: Setting, rate: float, repeats: int) -> list[float]:
    """The measured stall of a checkpoint larger than the ring, over the predicted one."""
    ring = int(RING * setting.bytes)
    saver = Watched(setting.lazy(rate=rate, ring=ring))
    ratios = []
    for _ in range(repeats + 1):
        saver.save(setting.trainer.step, setting.trainer.state_dict())
        began = time.perf_counter()
        setting.steps(saver, 1, None)
        fenced, took = saver.fences[-1]
        ratios.append(took / stall("lazy", Load(setting.bytes, 10e9, rate, fenced - began, 1.0, 5, ring)))
        saver.wait()
    saver.close()
    return ratios[1:]  # the first one makes the ring


def _torn(setting: Setting, count: int) -> int:
    """Of ``count`` saves whose tensors are changed without a fence while they are copied, those not found out."""
    lanes = Lanes(rates={"device_to_host": setting.bytes / 0.2})
    saver = LazyCheckpointer(LazyCheckpointer.Options(keep=100), setting.folder / "torn", lanes)
    state = {str(i): torch.randn(1 << 18) for i in range(8)}
    rng, missed = random.Random(0), 0
    for step in range(count):
        saver._pipeline._unsteady.clear()
        saver.save(step, state)
        victim = state[str(rng.randrange(8))]
        time.sleep(rng.uniform(0, 0.02))
        victim.mul_(-1) if rng.random() < 0.5 else victim.data.mul_(-1)  # the latter raises no counter
        expected = {key: tensor.clone() for key, tensor in state.items()}
        saver._pipeline.drain()
        with contextlib.redirect_stderr(io.StringIO()):  # every torn save is told of
            saver.fence()
        path = setting.folder / "torn" / f"step-{step:08d}"
        if path.exists():
            # Right if the change came after all of that tensor had been copied: then it is the state of the save.
            saved = saver.load_from(path)
            before = {**expected, **{key: -tensor for key, tensor in expected.items() if state[key] is victim}}
            missed += not all(torch.equal(saved[key], before[key]) for key in state)
    saver.close()
    return missed


def _kills(folder: Path, count: int, steps: int) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-m", "headway.experiments.killed_runs", str(folder), str(count), str(steps)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def _on_gpu(folder: Path) -> dict[str, float]:
    """6 GB on a GPU beside matrix products: stalls of lazy and of blocking saves, and what the copies slow down."""
    device = torch.device("cuda")
    state = {str(i): torch.randn(1 << 26, device=device) for i in range(24)}
    matrix = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)

    def window() -> float:
        start = time.perf_counter()
        for _ in range(400):
            matrix @ matrix
        torch.cuda.synchronize()
        return time.perf_counter() - start

    window()
    alone, found = window(), {}
    for name, kind in (("lazy", LazyCheckpointer), ("blocking", Blocking)):
        saver: Any = kind(LazyCheckpointer.Options(host_cache=8 << 30, keep=1), folder / f"gpu-{name}")
        stalls, windows = [], []
        for step in range(4):
            start = time.perf_counter()
            saver.save(step, state)
            stopped = time.perf_counter() - start
            windows.append(window())
            start = time.perf_counter()
            saver.fence()
            stalls.append(stopped + time.perf_counter() - start)
            for tensor in state.values():
                tensor.add_(1)
            saver.wait()
        saver.close()
        found[name] = statistics.median(stalls[1:])
        found[f"{name} window"] = statistics.median(windows[1:]) / alone
    return found


def measure(context: Context) -> dict[str, Measurement]:
    """At every step; on a slow disk; with a small ring; torn on purpose; killed; on paper."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the other core is for those who copy and write
    try:
        return _measure(context)
    finally:
        torch.set_num_threads(threads)


def _measure(context: Context) -> dict[str, Measurement]:
    quick, keep = context.quick, context.keep
    setting = Setting(quick, context.folder, batch=2 if quick else 3)
    size = setting.bytes
    ratios = keep("every step", partial(_every_step, setting, 2 if quick else 5, 3 if quick else 4))
    context.say(f"{size / 2**20:.0f} MiB of state, {statistics.median(ratios['step']):.2f} s a step")
    results = {}
    for name in ("lazy", "async", "blocking"):
        share = statistics.median(ratios[f"{name} stall"])
        results[f"every_{name}"] = Measurement.of(bootstrap(ratios[name]), note=f"{share:.1%} of it in save and fence")

    short = Setting(quick, context.folder, batch=1)
    step = keep("short step", lambda: statistics.median(short.steps(NoCheckpoints(), 5, None)))
    rate = size / (WRITES * step)
    cycles = keep("throttled", partial(_throttled, short, rate, 1 if quick else 3))
    for name in ("lazy", "async"):
        shares = [a / b for a, b in zip(cycles[f"{name} 5 stall"], cycles["blocking 5 stall"], strict=True)]
        results[f"stall_{name}"] = Measurement.of(bootstrap(shares), note="time in save and fence")
    for every in (5, 2):
        ratio = [a / b for a, b in zip(cycles[f"lazy {every}"], cycles[f"blocking {every}"], strict=True)]
        load = Load(size, 10e9, size / WRITES, 0.97, 1.0, every)
        predicted = time_per_step("lazy", load) / time_per_step("blocking", load)
        results[f"end_to_end_{every}"] = Measurement.of(bootstrap(ratio), note=f"cost model: {predicted:.2f}")
    ring = keep("ring", partial(_small_ring, short, rate, 2 if quick else 5))
    results["ring"] = Measurement.of(bootstrap(ring))
    results["different"] = Measurement(keep("different", lambda: setting.different + short.different))
    results["torn"] = Measurement(keep("torn", partial(_torn, setting, 10 if quick else 40)))

    kills = keep("kills", partial(_kills, context.folder / "killed", *((8, 60) if quick else (100, 150))))
    note = f"{kills['while_writing']} with a checkpoint half written, {kills['resumed']} attempts went on from one"
    results["kills"] = Measurement(kills["kills"], note=note)
    results["broken"] = Measurement(kills["broken"], note=f"of {kills['runs']} runs that were killed and went on")

    table = {every: bars(every) for every in (1, 2, 5, 10, 50)}
    wrong = sum(
        [row[e] for e in ENGINES] != sorted((row[e] for e in ENGINES), reverse=True)
        for rows in table.values() for row in rows.values()
    )  # fmt: skip
    results["order"] = Measurement(wrong, note="blocking, staged, pinned, lazy; 5 models at 5 frequencies")
    best = max((row["blocking"] - 1) / max(row["lazy"] - 1, 1e-3) for rows in table.values() for row in rows.values())
    results["cluster_gain"] = Measurement(best, note="cost model: overhead of blocking / lazy, at best")
    models = list(table[1])
    context.show(
        Figure(
            title="Cost model: a checkpoint every step, by model size", x="billion parameters",
            y="time of a step, without checkpoints = 1",
            series=[
                Series(name=e, x=[float(m[:-1]) for m in models], y=[table[1][m][e] for m in models]) for e in ENGINES
            ],
        )
    )  # fmt: skip
    if torch.cuda.is_available():
        gpu = keep("gpu", partial(_on_gpu, context.folder))
        results["gpu_stall"] = Measurement(gpu["lazy"] / gpu["blocking"], note=f"{gpu['blocking']:.2f} s blocking")
        results["gpu_window"] = Measurement(gpu["lazy window"], note="matrix products while copies are made")
    return results


experiment = Experiment(
    name="datastates",
    title="Lazy checkpoints",
    paper="Maurya et al., DataStates-LLM: Lazy Asynchronous Checkpointing for Large Language Models, arXiv 2406.10707",
    claim="Copies made behind the forward and backward pass let training save at every step, almost for free.",
    measure=measure,
    expectations=(
        Expectation("every_lazy", "as often as every iteration", at_most(1.05), quick=at_most(1.5),
                    title="time of a step, lazy checkpoint at every step / none"),
        Expectation("stall_lazy", "", at_most(0.05), quick=at_most(0.3),
                    title="what a checkpoint adds on a slow disk, lazy / blocking"),
        Expectation("stall_async", "", at_most(0.3), only="full",
                    title="the same, torch's async_save / blocking"),
        Expectation("end_to_end_5", "2.2 times shorter (abstract)", at_most(0.65), quick=at_most(0.8),
                    title="five steps and a checkpoint on a slow disk, lazy / blocking"),
        Expectation("end_to_end_2", "", between(0.6, 0.8), quick=between(0.4, 1.0),
                    title="two steps and a checkpoint: the disk is the limit, lazy / blocking"),
        Expectation("ring", "", between(0.8, 1.2), quick=between(0.5, 1.5),
                    title="stall with a ring of a fifth of the state, measured / predicted"),
        Expectation("different", "", at_most(0), title="checkpoints that differ from the state in a bit"),
        Expectation("torn", "", at_most(0), title="saves that were torn on purpose and not found out"),
        Expectation("kills", "", at_least(100), quick=at_least(8), title="runs killed at random moments"),
        Expectation("broken", "", at_most(0), title="of them, not gone on from exactly"),
        Expectation("order", "sync > snapshot > CheckFreq > lazy", at_most(0),
                    title="cells of the cost model out of the paper's order"),
        Expectation("gpu_stall", "up to 48 times (abstract)", at_most(0.02), only="cuda",
                    title="stall of a checkpoint of 6 GB on a GPU, lazy / blocking"),
    ),
    minutes=6,
    notes=(
        "A Llama of width 384 with 6 blocks, fp32, AdamW, on a CPU: one thread trains, the others copy and write. At "
        "every step the disk is this machine's own; the slow disk is a rate on the lane that writes, such that one "
        "checkpoint takes 3.75 steps. Blocking, at every step, is the plain checkpointer, which writes the same files; "
        "on the slow disk it is the same lanes, waited for. async_save has one save under way, as torchtitan uses it, "
        "and writes no checksums. Beside the disk, copies from a CPU's tensors to host memory take far less than a "
        "GPU's, so that async_save's stall is smaller here than there. The cluster's bars are a cost model with rates "
        "of our own choice."
    ),
)  # fmt: skip
