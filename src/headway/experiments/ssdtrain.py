"""SSDTrain: activations leave for host or disk while the forward pass runs and are back in time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.core.meters import live_bytes, live_peak
from headway.core.surgery import replace_blocks, restore_blocks
from headway.experiments.base import Expectation, Experiment, Measurement, at_least, at_most
from headway.experiments.context import Context
from headway.experiments.evidence import Figure, Series
from headway.experiments.statistics import bootstrap
from headway.layers.linear_cross_entropy import linear_cross_entropy
from headway.memory.backends import Backend, FileBackend, HostBackend
from headway.memory.lanes import Lanes
from headway.memory.recompute import RecomputedBlock
from headway.memory.ssdtrain import ActivationStore, needed_rates
from headway.models.build import build_model
from headway.models.config import LlamaConfig

CPU = torch.device("cpu")
VOCAB = 512
FAST, SLOW = 4.0, 0.25
"""Rates of the injected link, in units of what offloading everything needs on this machine."""


class Setting:
    """A model, a batch, and one training step without the update."""

    def __init__(self, quick: bool) -> None:
        hidden, layers, batch, length = (256, 6, 2, 256) if quick else (512, 8, 4, 512)
        self.model: Any = build_model(
            LlamaConfig(hidden=hidden, layers=layers, heads=8, vocab=VOCAB, context=length), seed=0
        )
        tokens = torch.randint(VOCAB, (batch, length + 1), generator=torch.Generator().manual_seed(0))
        self.tokens, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()
        self.min_bytes = 1 << 16
        self.step()

    def step(self) -> Tensor:
        """Loss and gradients."""
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        hidden = self.model.hidden(self.tokens).flatten(0, 1)
        loss = linear_cross_entropy(hidden, self.model.head_weight, self.targets)[0]
        (loss / len(self.targets)).backward()
        return loss.detach()

    def fingerprint(self) -> list[Tensor]:
        """The loss and every gradient of a step."""
        loss = self.step()
        return [loss, *(p.grad.clone() for p in self.model.parameters())]

    @contextmanager
    def store(self, policy: Any, backend: Backend, rate: float | None = None, queue: int = 1 << 30) -> Iterator[Any]:
        """An activation store over a link of that rate, warmed up: the adaptive one has its plan."""
        names = (backend.write_lane, backend.read_lane)
        lanes = Lanes(rates=dict.fromkeys(names, rate) if rate else None, queue_bytes=queue)
        try:
            with ActivationStore(self.model, backend, policy, min_bytes=self.min_bytes, lanes=lanes) as store:
                for _ in range(3):
                    self.step()
                yield store
        finally:
            lanes.close(cancel=True)

    @contextmanager
    def recomputed(self) -> Iterator[None]:
        """Every block recomputed."""
        replace_blocks(self.model.blocks, RecomputedBlock, "experiment")
        try:
            yield
        finally:
            restore_blocks(self.model.blocks)

    def needs(self) -> tuple[float, int]:
        """Bytes per second at which all of it can be offloaded and be back in time, and the bytes."""
        backend = HostBackend()
        with ActivationStore(self.model, backend, "adaptive", min_bytes=self.min_bytes, bandwidth=1e15) as store:
            for _ in range(2):
                self.step()
            segments = store._pass.segments  # type: ignore[union-attr]
            return max(needed_rates([s.volume for s in segments], [s.seconds for s in segments])), sum(
                s.volume for s in segments
            )


def _peak(setting: Setting, arm: Callable[[], Any]) -> int:
    """Peak live bytes of a step above those of weights and gradients."""
    resting = live_bytes(CPU)
    with arm():
        return live_peak(setting.step)[1] - resting


def _identical(setting: Setting, folder: Path, rate: float) -> int:
    """In how many arms the loss or any gradient differs in any bit from the plain step's."""
    expected, different = setting.fingerprint(), 0
    arms: list[tuple[Any, Backend, float | None]] = [
        ("all", HostBackend(), None),
        ("all", HostBackend(), rate),
        ("adaptive", HostBackend(), None),
        ("all", FileBackend(folder), None),
        ("adaptive", FileBackend(folder), None),
    ]
    for policy, backend, limit in arms:
        with setting.store(policy, backend, limit):
            got = setting.fingerprint()
        different += not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    return different


class PlainAttention(nn.Module):
    """Attention as most codebases write it: three projections of one input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


def _deduplication() -> float:
    """What copying every saved tensor moves (as ``save_on_cpu`` does), over what the store writes, for attention."""
    model = nn.Sequential(*(PlainAttention(128, 4) for _ in range(4)))
    x = torch.randn(2, 128, 128, requires_grad=True)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    copied = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal copied
        copied += 0 if tensor.untyped_storage().data_ptr() in parameters else tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model(x).sum().backward()
    with ActivationStore(model, HostBackend(), "all", min_bytes=1) as store:
        model(x).sum().backward()
        return copied / store.report()["offloaded_bytes"]


def _throttled_disk(setting: Setting, folder: Path, rate: float) -> dict[str, float]:
    """A disk far too slow: what is forwarded, cancelled and written."""
    with setting.store("all", FileBackend(folder), rate) as store:
        report = store.report()
    return {key: float(report[key]) for key in ("forwarded", "cancelled", "stall_seconds", "offloaded_bytes_per_pass")}


def _real_disk(setting: Setting, folder: Path) -> dict[str, float]:
    """The machine's own disk, adaptive: what it takes, and what the plan makes of it."""
    with setting.store("adaptive", FileBackend(folder)) as store:
        report = store.report()
        plan = store.plan
        return {"write_rate": report["write_rate"], "read_rate": report["read_rate"],
                "share": plan.bytes / plan.of_bytes, "per_pass": float(plan.bytes)}  # fmt: skip


def _share(setting: Setting, rate: float) -> float:
    """The share of the activations that the adaptive policy offloads over a link of that rate."""
    with setting.store("adaptive", HostBackend(), rate) as store:
        return store.plan.bytes / store.plan.of_bytes


def _times(setting: Setting, arms: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Each arm's step time over that of the plain steps around it, arms in turns; and its stalls as a share of it."""
    ratios: dict[str, list[float]] = {name: [] for name in arms}
    ratios |= {f"{name} stall": [] for name in arms}
    for _ in range(repeats):
        for name, arm in arms.items():
            start = time.perf_counter()
            setting.step()
            before = time.perf_counter() - start
            with arm() as store:
                stalls = store.report()["stall_seconds"] if store is not None else 0.0
                start = time.perf_counter()
                setting.step()
                took = time.perf_counter() - start
                stalls = store.report()["stall_seconds"] - stalls if store is not None else 0.0
            start = time.perf_counter()
            setting.step()
            plain = (before + time.perf_counter() - start) / 2
            ratios[name].append(took / plain)
            ratios[f"{name} stall"].append(stalls / took)
    return ratios


def measure(context: Context) -> dict[str, Measurement]:
    """Exactness, peaks, bytes, the plan at two rates, then time."""
    setting = Setting(context.quick)
    folder = context.folder / "offload"
    keep = context.keep
    need, volume = keep("needs", setting.needs)
    fast, slow, queue = FAST * need, SLOW * need, max(1 << 20, int(volume) // 8)
    context.say(f"{volume / 2**20:.0f} MiB of activations; to offload all takes {need / 2**20:.0f} MiB/s")

    results = {"different": Measurement(keep("identical", partial(_identical, setting, folder, slow)))}
    arms: dict[str, Callable[[], Any]] = {
        "keep": ExitStack,
        "recompute": setting.recomputed,
        "all": partial(setting.store, "all", HostBackend(), fast),
        "adaptive": partial(setting.store, "adaptive", HostBackend(), fast),
        "all, slow link": partial(setting.store, "all", HostBackend(), slow, queue),
        "adaptive, slow link": partial(setting.store, "adaptive", HostBackend(), slow),
    }
    peaks = {name: keep(f"peak {name}", partial(_peak, setting, arm)) for name, arm in arms.items()}
    context.say(", ".join(f"{name} {peak / 2**20:.0f} MiB" for name, peak in peaks.items()))
    for name, key in (("recompute", "peak_recompute"), ("all", "peak_all"), ("adaptive", "peak_adaptive"),
                      ("adaptive, slow link", "peak_adaptive_slow")):  # fmt: skip
        results[key] = Measurement(peaks[name] / peaks["keep"], note=f"{peaks[name] / 2**20:.0f} MiB")

    results["deduplication"] = Measurement(keep("deduplication", _deduplication))
    throttled = keep("throttled disk", partial(_throttled_disk, setting, folder, slow / 4))
    results["forwarded"] = Measurement(throttled["forwarded"], note=f"{throttled['cancelled']:.0f} cancelled")
    shares = {rate: keep(f"share {name}", partial(_share, setting, rate)) for name, rate in
              (("fast", fast), ("slow", slow))}  # fmt: skip
    results["share_fast"], results["share_slow"] = Measurement(shares[fast]), Measurement(shares[slow])
    disk = keep("real disk", partial(_real_disk, setting, folder))
    results["disk_write"] = Measurement(disk["write_rate"] / 2**20, unit="MiB/s")
    results["disk_read"] = Measurement(disk["read_rate"] / 2**20, unit="MiB/s")
    results["disk_share"] = Measurement(disk["share"], note="offloaded by the adaptive policy to this machine's disk")

    timed = {name: arm for name, arm in arms.items() if name != "keep"}
    timed["recompute"] = partial(_without_store, setting)
    ratios = keep("times", partial(_times, setting, timed, 2 if context.quick else 6))
    for name, key in (("recompute", "time_recompute"), ("adaptive", "time_adaptive"),
                      ("all, slow link", "time_all_slow"), ("adaptive, slow link", "time_adaptive_slow")):  # fmt: skip
        results[key] = Measurement.of(bootstrap(ratios[name]))
    for name, key in (("adaptive", "stall_adaptive"), ("all, slow link", "stall_all_slow")):
        results[key] = Measurement.of(bootstrap(ratios[f"{name} stall"]), note="share of the step spent waiting")
    times = {name: bootstrap(ratios[name]).value for name in timed} | {"keep": 1.0}
    context.show(
        Figure(
            title="Memory against time",
            x="peak above weights and gradients, MiB",
            y="time of a step, keep = 1",
            series=[Series(name=name, x=[peaks[name] / 2**20], y=[times[name]]) for name in arms],
        )
    )
    return results


@contextmanager
def _without_store(setting: Setting) -> Iterator[None]:
    with setting.recomputed():
        yield None


experiment = Experiment(
    name="ssdtrain",
    title="Activation offloading",
    paper="Wu et al., SSDTrain: An Activation Offloading Framework to SSDs, arXiv 2408.10013",
    claim="Activations can leave during the forward pass and be back in time: about half the peak, same speed.",
    measure=measure,
    expectations=(
        Expectation("different", "results unchanged", at_most(0),
                    title="arms in which a bit of loss or gradients changed"),
        Expectation("peak_adaptive", "-47 % (abstract)", at_most(0.6), quick=at_most(0.8),
                    title="peak above weights and gradients, adaptive / keep, fast link"),
        Expectation("peak_all", "", at_most(0.6), quick=at_most(0.8), title="the same, all / keep"),
        Expectation("share_slow", "only what hides is offloaded", at_most(0.7),
                    title="share that adaptive offloads over a link of a quarter of the need"),
        Expectation("deduplication", "no tensor twice", at_least(1.3),
                    title="bytes, every saved tensor of attention / every storage once"),
        Expectation("forwarded", "tensors still being written are handed back", at_least(1),
                    title="tensors forwarded on a throttled disk"),
        Expectation("time_adaptive", "negligible slowdown", at_most(1.15), quick=at_most(3.0),
                    title="time of a step, adaptive / keep, fast link"),
        Expectation("time_all_slow", "", at_least(1.5), only="full",
                    title="time of a step, all / keep, link of a quarter of the need"),
        Expectation("time_adaptive_slow", "adapts", at_most(1.2), only="full",
                    title="time of a step, adaptive / keep, same link"),
    ),
    minutes=10,
    notes=(
        "A Llama of width 512 with 8 blocks, fp32, on a CPU: the device is torch's CPU allocator, whose live bytes "
        "are counted, and the host tier is memory outside of it. The link's rate is injected, in units of that which "
        "brings all activations out and back in time here: 4 (fast) and 1/4 (slow; there, the arm all has room for an "
        "eighth of the activations in its queue). Copying and computing share two cores, so overlap is imperfect. "
        "Peaks depend on how soon writes end, and so vary a little; the rows named disk are this machine's own drive."
    ),
)  # fmt: skip
