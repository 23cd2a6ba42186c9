"""Fuyou: states on disk, updated under the backward pass; activations swapped as far as that pays; published rates."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from headway.core.meters import live_bytes, live_peak
from headway.core.surgery import replace_blocks, restore_blocks
from headway.experiments.base import Expectation, Experiment, Measurement, at_least, at_most, between
from headway.experiments.context import Context
from headway.experiments.evidence import Figure, Series
from headway.experiments.statistics import bootstrap
from headway.layers.linear_cross_entropy import linear_cross_entropy
from headway.memory.backends import HostBackend
from headway.memory.fuyou import Activations, GroupFiles, TieredOptimizer, Tiers, WeightsOnDisk, block_groups
from headway.memory.fuyou.plan import plan_tiers
from headway.memory.fuyou.simulator import FITTED, PREDICTED, SEQUENCE, error, simulate
from headway.memory.lanes import Lanes
from headway.memory.store import TieredStore
from headway.models.build import build_model
from headway.models.config import LlamaConfig
from headway.optim.adamw import AdamW
from headway.optim.options import OptimizerOptions

CPU = torch.device("cpu")
VOCAB = 512
SHARE = 0.75
"""Optimizer traffic over backward time, by choice of the injected rate."""
BUFFERS = 4


class Setting:
    """A model, a batch, and the two halves of a step."""

    def __init__(self, hidden: int, layers: int, batch: int, length: int, *, tied: bool = True, device: str = "cpu",
                 heads: int = 8) -> None:  # fmt: skip
        config = LlamaConfig(hidden=hidden, layers=layers, heads=heads, vocab=VOCAB, context=length, tied=tied)
        self.model: Any = build_model(config, seed=0).to(device)
        self.length, self.count, self.device = length, batch * length, device
        self.batch = batch
        self.flops = self.model.flops_per_token(length) / 3 * self.count  # of a forward pass
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def loss(self, number: int = 0) -> Tensor:
        """The loss of one batch."""
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(VOCAB, (self.batch, self.length + 1), generator=generator).to(self.device)
        hidden = self.model.hidden(tokens[:, :-1].contiguous()).flatten(0, 1)
        total = linear_cross_entropy(hidden, self.model.head_weight, tokens[:, 1:].flatten())[0]
        return total / self.count

    def inner(self, dtype: torch.dtype) -> Any:
        """The optimizer in memory."""
        return AdamW.build(self.model, OptimizerOptions(lr=1e-3), dtype)

    def compute_times(self) -> tuple[float, float]:
        """Seconds of a forward and of a backward pass, without any update."""
        found = []
        for number in range(3):
            start = time.perf_counter()
            loss = self.loss(number)
            middle = time.perf_counter()
            loss.backward()
            found.append((middle - start, time.perf_counter() - middle))
            for p in self.model.parameters():
                p.grad = None
        return min(f for f, _ in found), min(b for _, b in found)


@contextmanager
def one_thread() -> Iterator[None]:
    """The computation on one core, so that lanes have the other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Bits.


def _states(setting: Setting, optimizer: Any) -> list[Tensor]:
    if isinstance(optimizer, TieredOptimizer):
        masters, states = optimizer.named_masters(), optimizer.named_states()
        kept = [t for p in setting.model.parameters() for t in (masters[p], *states[p].values())]
        optimizer.close()
    else:
        masters = getattr(optimizer, "masters", {})
        own = [masters.get(p, p) for p in setting.model.parameters()]
        kept = [t for m in own for t in (m, *(optimizer.state[m][key] for key in ("step", "exp_avg", "exp_avg_sq")))]
    return [t.detach().clone() for t in (*kept, *setting.model.parameters())]


def _train(setting: Setting, optimizer: Any, micro: int, overlap: bool, steps: int) -> list[Tensor]:
    for step in range(steps):
        for part in range(micro):
            if isinstance(optimizer, TieredOptimizer) and overlap and part == micro - 1:
                optimizer.arm()
            setting.loss(step * micro + part).backward()
        optimizer.step()
        optimizer.zero_grad()
    return _states(setting, optimizer)


def _different(folder: Path, steps: int) -> dict[str, int]:
    """In how many settings any bit of weights, masters or moments differs from training in memory."""
    settings = different = 0
    for dtype, tied, micro in product((torch.float32, torch.bfloat16), (True, False), (1, 2)):
        make = partial(Setting, 32, 3, 2, 16, tied=tied, heads=2)
        plain = make()
        expected = _train(plain, plain.inner(dtype), micro, False, steps)
        for delay, overlap, on_disk in product((0, 1, 2), (True, False), (True, False)):
            setting = make()
            groups = block_groups(setting.model)
            chosen = frozenset(i for i, g in enumerate(groups) if g.block is not None) if on_disk else frozenset[int]()
            optimizer = TieredOptimizer(setting.inner(dtype), groups, folder, buffers=delay + 1, delay=delay,
                                        weights_on_disk=chosen)  # fmt: skip
            if on_disk:
                WeightsOnDisk(list(setting.model.blocks), optimizer)
            got = _train(setting, optimizer, micro, overlap, steps)
            settings += 1
            different += not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    return {"settings": settings, "different": different}


def _host(folder: Path) -> dict[str, float]:
    """Peak host bytes for states over what the buffers may take, and how they grow with three times the blocks."""
    peaks, limits = [], []
    for layers in (3, 9):
        setting = Setting(64, layers, 2, 32, heads=2)
        optimizer = TieredOptimizer(setting.inner(torch.float32), block_groups(setting.model), folder, buffers=BUFFERS)
        limits.append(BUFFERS * optimizer.buffer_bytes)
        _train_steps(setting, optimizer, 3)
        peaks.append(optimizer.host_bytes)
        optimizer.close()
    return {"of_limit": max(p / limit for p, limit in zip(peaks, limits, strict=True)), "growth": peaks[1] / peaks[0]}


def _train_steps(setting: Setting, optimizer: Any, steps: int, overlap: bool = True) -> None:
    for step in range(steps):
        if overlap and isinstance(optimizer, TieredOptimizer):
            optimizer.arm()
        setting.loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()


def _live(folder: Path, on_disk: bool) -> int:
    """Peak live bytes of a step of twelve blocks: weights, gradients, states and activations."""
    before = live_bytes(CPU)
    setting = Setting(128, 12, 2, 32, heads=2)
    if not on_disk:
        optimizer: Any = setting.inner(torch.float32)
    else:
        groups = block_groups(setting.model)
        chosen = frozenset(i for i, group in enumerate(groups) if group.block is not None)
        optimizer = TieredOptimizer(setting.inner(torch.float32), groups, folder, weights_on_disk=chosen)
        WeightsOnDisk(list(setting.model.blocks), optimizer)
    _train_steps(setting, optimizer, 2)
    peak = live_peak(partial(_train_steps, setting, optimizer, 1))[1] - before
    if on_disk:
        optimizer.close()
    return peak


# Step time.

ARMS = {"after backward": (False, 0), "overlapped": (True, 0), "overlapped, delayed": (True, 1)}


def _step_times(
    make: Callable[[], Setting], folder: Path, dtype: torch.dtype, repeats: int, steps: int
) -> dict[str, Any]:
    """Seconds per step of the three arms, in turns, on one drive that reads or writes."""
    setting = make()
    forward, backward = setting.compute_times()
    moved = 24 * setting.parameters
    rate = moved / (SHARE * backward)
    lanes = Lanes()
    files = GroupFiles(folder)
    optimizer = TieredOptimizer(setting.inner(dtype), block_groups(setting.model), files, lanes=lanes, buffers=BUFFERS)
    files.write_lane = files.read_lane  # one drive: reads and writes take turns
    lanes[files.read_lane].rate = rate
    found: dict[str, list[float]] = {name: [] for name in ARMS}
    try:
        _train_steps(setting, optimizer, 1)
        busy = lanes[files.read_lane].report
        for _ in range(repeats):
            for name, (overlap, delay) in ARMS.items():
                optimizer.delay = delay
                optimizer.drain()
                start = time.perf_counter()
                _train_steps(setting, optimizer, steps, overlap)
                optimizer.drain()  # each arm pays for all that it writes
                found[name].append((time.perf_counter() - start) / steps)
        traffic = busy.busy_seconds / busy.bytes * moved
        return {"times": found, "forward": forward, "backward": backward, "rate": rate, "traffic": traffic,
                "parameters": setting.parameters, "host": optimizer.host_bytes}  # fmt: skip
    finally:
        optimizer.close()
        lanes.close()


# Swap or recompute.


def _sweep(setting: Setting, repeats: int) -> dict[str, Any]:
    """Step times at every prefix of the units, over a link at which the cost model finds an optimum in between."""
    forward, backward = setting.compute_times()
    reached = 3 * setting.flops / (forward + backward)
    blocks = list(setting.model.blocks)
    lanes = Lanes()
    store = TieredStore(HostBackend(), lanes)
    activations = Activations(blocks, store, "swap")
    replace_blocks(setting.model.blocks, lambda block: activations.shell(block, blocks.index(block)), "experiment")
    try:
        setting.loss().backward()
        units = activations.recomputable()
        profile = activations.profile(0.0, setting.flops, weight_bytes=0.0)
        rate = reached / (2 * units[0].benefit)  # twice as dear to swap in the forward pass as it saves in the backward
        tiers = Tiers(reached, float("inf"), float("inf"), rate, rate, shared=False)
        plan = plan_tiers(profile, tiers)
        for name in (store.backend.write_lane, store.backend.read_lane):
            lanes[name].rate = rate
        lanes[store.backend.write_lane].queue_bytes = int(max(unit.nbytes for unit in units))
        times: list[list[float]] = [[] for _ in range(len(units) + 1)]
        for turn in range(repeats + 1):
            for count in range(len(units) + 1):
                activations.choose(count)
                start = time.perf_counter()
                setting.loss().backward()
                took = time.perf_counter() - start
                store.drain()
                for p in setting.model.parameters():
                    p.grad = None
                if turn:  # the first warms up
                    times[count].append(took)
        bytes_ = [sum(unit.nbytes for unit in units[:count]) for count in range(len(units) + 1)]
        return {"times": times, "predicted": len(plan.swapped), "units": len(units), "bytes": bytes_,
                "rate": rate, "flops": reached, "explain": plan.explain()}  # fmt: skip
    finally:
        restore_blocks(setting.model.blocks)
        activations.close()
        lanes.close()


def _sweep_results(sweep: dict[str, Any], context: Context) -> dict[str, Measurement]:
    fastest = [min(times) for times in sweep["times"]]
    measured = min(range(len(fastest)), key=lambda count: fastest[count])
    chosen = sweep["predicted"]
    moved = [nbytes / 2**20 for nbytes in sweep["bytes"]]
    context.show(
        Figure(
            title="Swap or recompute",
            x="activations swapped beyond block inputs, MiB",
            y="seconds of a step",
            series=[
                Series(name="measured", x=moved, y=fastest),
                Series(name="the plan's choice", x=[moved[chosen]], y=[fastest[chosen]]),
            ],
        )
    )
    note = f"measured {measured}, predicted {sweep['predicted']} of {sweep['units']} units"
    return {
        "sweep_gap": Measurement(abs(measured - sweep["predicted"]), unit="units", note=note),
        "sweep_regret": Measurement(fastest[sweep["predicted"]] / fastest[measured],
                                    note="time at the predicted amount over the least measured"),
        "sweep_against_none": Measurement(fastest[sweep["predicted"]] / fastest[0]),
        "sweep_against_all": Measurement(fastest[sweep["predicted"]] / fastest[-1]),
    }  # fmt: skip


def _simulated(context: Context) -> dict[str, Measurement]:
    context.show(
        Figure(
            title="Published and simulated throughput",
            x="measured, TFLOP/s",
            y="simulated, TFLOP/s",
            series=[
                Series(name="13B, one GPU (constants chosen here)", x=[c.measured for c in FITTED],
                       y=[simulate(c) for c in FITTED]),
                Series(name="175B, one GPU (predicted)", x=[c.measured for c in PREDICTED if c.gpus == 1],
                       y=[simulate(c) for c in PREDICTED if c.gpus == 1]),
                Series(name="several GPUs (predicted)", x=[c.measured for c in PREDICTED if c.gpus > 1],
                       y=[simulate(c) for c in PREDICTED if c.gpus > 1]),
            ],
        )
    )  # fmt: skip
    for cell in (*FITTED, *PREDICTED):
        context.say(f"{cell.name}: measured {cell.measured:g}, simulated {simulate(cell):.1f} ({error(cell):+.0%})")
    worst = max(FITTED, key=lambda cell: abs(error(cell)))
    results = {
        "simulator_worst": Measurement(abs(error(worst)), note=worst.name),
        "simulator_mean": Measurement(mean(abs(error(cell)) for cell in FITTED)),
        "cells": Measurement(len(FITTED)),
    }
    for cell in PREDICTED:
        key = f"{cell.parameters / 1e9:.0f}b_{cell.gpus}gpu_{cell.batch}"
        results[f"predicted_{key}"] = Measurement(error(cell), note=f"{cell.name}: {simulate(cell):.1f} for "
                                                  f"{cell.measured:g} TFLOP/s")  # fmt: skip
    return results


def measure(context: Context) -> dict[str, Measurement]:
    """Simulator, bits, host memory, then step times and the sweep."""
    keep, folder, quick = context.keep, context.folder / "states", context.quick
    results = _simulated(context)
    with one_thread():
        bits = keep("bits", partial(_different, folder, 4 if quick else 20))
        results["different"] = Measurement(bits["different"], note=f"of {bits['settings']} settings")
        host = keep("host", partial(_host, folder))
        results["host_of_limit"], results["host_growth"] = Measurement(host["of_limit"]), Measurement(host["growth"])
        live = [keep(f"live {on_disk}", partial(_live, folder, on_disk)) for on_disk in (False, True)]
        results["live"] = Measurement(live[1] / live[0], note=f"{live[1] / 2**20:.1f} of {live[0] / 2**20:.1f} MiB")

        make = partial(Setting, 256, 6, 4, 512) if quick else partial(Setting, 512, 10, 2, 640)
        timed = keep("times", partial(_step_times, make, folder, torch.float32, 2 if quick else 4, 2))
        times = timed["times"]
        context.say(f"{timed['parameters'] / 1e6:.1f}M parameters, forward {timed['forward']:.2f} s, backward "
                    f"{timed['backward']:.2f} s, drive {timed['rate'] / 2**20:.0f} MiB/s")  # fmt: skip
        results["traffic"] = Measurement(
            timed["traffic"] / timed["backward"], note="optimizer traffic over backward time"
        )
        results |= _falls(times)
        results["step_after"] = Measurement.of(bootstrap(times["after backward"]), unit="s")

        size = (256, 2, 2, 256) if quick else (512, 3, 2, 384)
        sweep = keep("sweep", lambda: _sweep(Setting(*size), 2 if quick else 6))
        context.say(sweep["explain"])
        results |= _sweep_results(sweep, context)
    if torch.cuda.is_available():
        make = partial(Setting, 2048, 16, 8, SEQUENCE, device="cuda", heads=16)
        gpu = keep("gpu", partial(_step_times, make, folder, torch.bfloat16, 3, 3))
        results |= {f"gpu_{name}": value for name, value in _falls(gpu["times"]).items()}
    else:
        context.say("the arm on a GPU is left out: torch sees none")
    return results


def _falls(times: dict[str, list[float]]) -> dict[str, Measurement]:
    """By how much each overlapped arm is faster than updating after the backward pass, turn by turn."""
    after = times["after backward"]
    return {
        key: Measurement.of(bootstrap([1 - t / a for t, a in zip(times[name], after, strict=True)]))
        for key, name in (("fall", "overlapped"), ("fall_delayed", "overlapped, delayed"))
    }


experiment = Experiment(
    name="fuyou",
    title="Training from disk",
    paper="Liao et al., Adding NVMe SSDs to Enable and Accelerate 100B Model Fine-tuning on a Single GPU, "
    "arXiv 2403.06504",
    claim="Optimizer states can live on disk and be updated under the backward pass, with no change to any bit.",
    measure=measure,
    expectations=(
        Expectation("different", "synchronous, no stale update", at_most(0),
                    title="settings in which a bit of weights, masters or moments changed"),
        Expectation("host_of_limit", "", at_most(1.0), title="host bytes for states / (buffers x largest group)"),
        Expectation("host_growth", "", at_most(1.0), title="the same bytes, nine blocks / three"),
        Expectation("live", "", at_most(0.5), title="peak live bytes of a step of twelve blocks, on disk / in memory"),
        Expectation("simulator_worst", "13B, one GPU: 37.5 to 155.8 TFLOP/s", at_most(0.15),
                    title="largest error of the simulator over the twenty cells"),
        Expectation("cells", "", between(20, 20), title="cells"),
        Expectation("traffic", "half to once the backward pass", between(0.5, 1.0), only="full",
                    title="optimizer traffic / backward"),
        Expectation("fall", "", between(0.2, 0.4), quick=at_least(0.0),
                    title="fall of step time, updates under the backward pass"),
        Expectation("fall_delayed", "", between(0.2, 0.4), quick=at_least(0.0),
                    title="fall of step time, with delayed write-back too"),
        Expectation("sweep_gap", "the plan finds the amount", at_most(1), only="full",
                    title="units between the predicted and the measured optimum"),
        Expectation("gpu_fall_delayed", "", at_least(0.1), only="cuda", title="fall of step time on a GPU"),
    ),
    minutes=6,
    notes=(
        "A Llama of 32M parameters (quick: 5M) in fp32 on one core, so that the lanes have the other; its states are "
        "on this machine's drive, whose lane is slowed down so that a step's optimizer traffic, reads and writes in "
        "turn as on one drive, takes three quarters of the backward pass. The sweep swaps to host memory over a link "
        "of a rate at which the cost model's optimum lies in between, and takes the fastest of several turns, since "
        "other work only adds to a time. The simulator's constants were chosen in view of the twenty cells of 13B on "
        "one GPU; 175B and several GPUs are predictions, and their errors are printed as they are."
    ),
)  # fmt: skip
