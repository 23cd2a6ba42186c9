"""MEMO: two blocks' activations on the device, attention never computed twice, addresses without fragmentation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headway.core.meters import live_rise, synchronize
from headway.core.surgery import replace_blocks, restore_blocks
from headway.experiments.base import Expectation, Experiment, Measurement, at_least, at_most
from headway.experiments.context import Context
from headway.experiments.evidence import Figure, Series
from headway.experiments.statistics import bootstrap
from headway.layers.linear_cross_entropy import linear_cross_entropy
from headway.memory.lanes import Lanes
from headway.memory.memo import memo_activations, record_trace
from headway.memory.memo.alpha import choose_alpha, gpt_layer, predicted_utilization
from headway.memory.memo.plan_report import report_of
from headway.memory.recompute import RecomputedBlock
from headway.models.build import build_model
from headway.models.config import GPT2Config, LlamaConfig
from headway.plan.dissect.counting import count

CPU = torch.device("cpu")
VOCAB, LAYERS, BUFFERS = 512, 6, 2
CROSSOVER = 4096
"""The link is given the rate at which inputs and outputs of attention just hide at this length."""
BELOW, ABOVE = 512, 8192
WORKED = {64: 0.38, 128: 0.68, 192: 0.98, 256: 1.0, 512: 0.97, 1024: 0.41}
"""Thousands (of 1024) of tokens -> the share that the formula gives for the paper's 7B model on 8 A800."""
EFFICIENCY, PEAK, HIDDEN, DEVICES = 0.6, 312e12, 4096, 8


class Setting:
    """A model, one sequence, and one training step without the update.

    Args:
        width: of a model with blocks of Llama.
    """

    def __init__(self, length: int, width: int = 128, device: torch.device = CPU, dtype: Any = torch.float32) -> None:
        config = LlamaConfig(hidden=width, layers=LAYERS, heads=max(4, width // 128), vocab=VOCAB, context=length)
        self.model: Any = build_model(config, seed=0).to(device, dtype)
        tokens = torch.randint(VOCAB, (1, length + 1), generator=torch.Generator().manual_seed(0)).to(device)
        self.tokens, self.targets = tokens[:, :-1].contiguous(), tokens[0, 1:].contiguous()
        self.length, self.device = length, device

    def step(self) -> Tensor:
        """Loss and gradients."""
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        hidden = self.model.hidden(self.tokens).flatten(0, 1)
        loss = linear_cross_entropy(hidden, self.model.head_weight, self.targets, chunk=256)[0]
        (loss / len(self.targets)).backward()
        return loss.detach()

    @contextmanager
    def arm(self, kind: str, alpha: Any = "auto", rate: float | None = None) -> Iterator[Any]:
        """One of the arms, warmed up: a plan is made where there is one to make."""
        if kind == "memo":
            lanes = Lanes(rates={"device_to_host": rate, "host_to_device": rate} if rate else None)
            try:
                with memo_activations(self.model.blocks, alpha, lanes=lanes, host_budget=1 << 34) as memo:
                    for _ in range(3 if alpha == "auto" else 1):
                        self.step()
                    yield memo
            finally:
                lanes.close(cancel=True)
            return
        if kind == "checkpoint":
            replace_blocks(self.model.blocks, RecomputedBlock, "experiment")
        try:
            self.step()
            yield None
        finally:
            restore_blocks(self.model.blocks)

    def counts(self, kind: str, **options: Any) -> dict[str, float]:
        """Of one arm: bytes saved at the end of the forward pass, the rise to the peak of a step, its operations."""
        with self.arm(kind, **options) as memo:
            return {
                "saved": self._saved(memo),
                "peak": live_rise(self.step, self.device)[1],
                "flops": sum(count(self.step).flops.values()),
            }

    def _saved(self, memo: Any) -> int:
        """Bytes that the blocks have saved when the forward pass is over and nothing moves any more."""
        ends: list[Tensor] = []
        beside = 0

        def forward() -> None:
            nonlocal beside
            x, shared = self.model.embed(self.tokens)
            beside = sum(t.nbytes for t in shared["rope"])
            for block in self.model.blocks:
                x = block(x, **shared)
            if memo is not None:
                memo.store.drain()
            ends.append(x)

        trace = record_trace(forward)
        last = max(one.end for one in trace)
        alive = sum(one.size for one in trace if one.end == last)
        beside += ends[0].nbytes
        ends.pop().sum().backward()
        return alive - beside

    def layer_seconds(self) -> float:
        """One block's forward pass."""
        with self.arm("memo") as memo:
            return float(memo.measured["layer_seconds"])

    def must_leave(self) -> float:
        """Bytes of a block's input and output of attention."""
        with self.arm("memo", alpha=0.0) as memo:
            sizes = memo.sizes[1, self.length]
            return float(sizes.input + sizes.attention)


def _gradient_error() -> float:
    """Largest relative error of a gradient against plain autograd, fp64, over shares of tokens and models."""
    worst, length = 0.0, 96
    tokens = torch.randint(500, (2, length + 1), generator=torch.Generator().manual_seed(0))
    segments = (torch.arange(length) > 50).long().expand(2, -1)
    base = {"hidden": 64, "layers": 5, "heads": 4, "vocab": 500, "context": length}
    configs = [
        LlamaConfig(**base, kv_heads=2, qk_norm=True, window=40),
        LlamaConfig(**base, dropout=0.1, qkv_bias=True),
        GPT2Config(**base, dropout=0.1),
    ]
    for config in configs:
        model = build_model(config, seed=0).double()

        def gradients(model: Any = model) -> dict[str, Tensor]:
            model.zero_grad()
            torch.manual_seed(1)
            hidden = model.hidden(tokens[:, :-1], segments=segments).flatten(0, 1)
            linear_cross_entropy(hidden, model.head_weight, tokens[:, 1:].flatten())[0].backward()
            return {name: p.grad.clone() for name, p in model.named_parameters()}

        plain = gradients()
        for alpha in (0.0, 0.25, 0.5, 1.0):
            with memo_activations(model.blocks, alpha):
                for name, grad in gradients().items():
                    worst = max(worst, float((grad - plain[name]).norm() / plain[name].norm()))
    return worst


def _different_bits() -> int:
    """Of eight bf16 steps with everything swapped over a slow link, those in which any bit of a gradient changed."""
    setting, different = Setting(256, dtype=torch.bfloat16), 0
    setting.step()
    plain = [p.grad.clone() for p in setting.model.parameters()]
    with setting.arm("memo", alpha=1.0, rate=2e8):
        for _ in range(8):
            setting.step()
            different += not all(torch.equal(p.grad, g) for p, g in zip(setting.model.parameters(), plain, strict=True))
    return different


def _counted(length: int, arms: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """What is counted at one length, by arm; beside it the operations that each arm computes again."""
    setting = Setting(length)
    found = {name: setting.counts(_ARMS[name][0], **_ARMS[name][1]) for name in arms}
    for counts in found.values():
        counts["recomputed"] = counts["flops"] - found["none"]["flops"]
    return found


_ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("none", {}),
    "checkpoint": ("checkpoint", {}),
    "memo, 0": ("memo", {"alpha": 0.0}),
    "memo, 0.5": ("memo", {"alpha": 0.5}),
}


def _rate(length: int) -> dict[str, float]:
    """The rate at which what must leave just hides, with the sizes and seconds that make it."""
    setting = Setting(length)
    seconds, must = setting.layer_seconds(), setting.must_leave()
    return {"seconds": seconds, "bytes": must, "rate": must / seconds}


def _times(length: int, rate: float, repeats: int) -> dict[str, Any]:
    """Step time of memo over checkpoint across a link of that rate, in turns; memo's share of stalls, and its plan."""
    ours, theirs = Setting(length), Setting(length)
    with ours.arm("memo", rate=rate) as memo, theirs.arm("checkpoint"):
        ratios, stalls = [], []
        for repeat in range(repeats):
            seconds = {}
            for setting in (ours, theirs) if repeat % 2 == 0 else (theirs, ours):
                before, start = memo.report()["stall_seconds"], time.perf_counter()
                setting.step()
                synchronize(setting.device)
                seconds[setting] = time.perf_counter() - start
                if setting is ours:
                    stalls.append((memo.report()["stall_seconds"] - before) / seconds[ours])
            ratios.append(seconds[ours] / seconds[theirs])
        plan = next(iter(memo.plans.values()))
        return {"ratios": ratios, "stalls": stalls, "alpha": plan.alpha, "unclipped": plan.unclipped,
                "sets": memo.counts.most_sets}  # fmt: skip


def _fragmentation(lengths: tuple[int, ...]) -> dict[str, Any]:
    """The caching allocator and the plan, over steps of mixed lengths as a real run has them."""
    setting = Setting(max(lengths), width=256)
    setting.step()
    tokens, targets, traces = setting.tokens, setting.targets, []
    for length in lengths:
        setting.tokens, setting.targets = tokens[:, :length].contiguous(), targets[:length]
        traces.append(record_trace(setting.step, setting.model.blocks))
    return report_of(*traces, time_limit=5.0)


def _worked() -> dict[str, Any]:
    """The formula's rows for 7B on 8 A800: share, what binds, predicted utilisation."""
    rows = {}
    for thousands in WORKED:
        tokens = thousands * 1024
        sizes, flops = gpt_layer(tokens, HIDDEN, 2, DEVICES)
        seconds = flops / (DEVICES * EFFICIENCY * PEAK)
        plan = choose_alpha(sizes, seconds, 12e9, 2e12 / DEVICES, 32)
        rows[str(thousands)] = {"alpha": plan.alpha, "binding": plan.binding,
                                "mfu": predicted_utilization(tokens, HIDDEN, plan, seconds, EFFICIENCY)}  # fmt: skip
    return rows


def _on_gpu(length: int) -> dict[str, float]:
    """Peak and step time of the arms on a GPU, without an injected rate, over those of keeping everything."""
    setting = Setting(length, width=2048, device=torch.device("cuda"), dtype=torch.bfloat16)
    found: dict[str, float] = {}
    for name in ("none", "checkpoint", "memo"):
        with setting.arm(name):
            found[f"peak {name}"] = live_rise(setting.step, setting.device)[1]
            start = time.perf_counter()
            for _ in range(3):
                setting.step()
            synchronize(setting.device)
            found[f"seconds {name}"] = time.perf_counter() - start
    return found


def measure(context: Context) -> dict[str, Measurement]:
    """Exactness, bytes and operations by length, both sides of the crossover, fragmentation, the formula's table."""
    quick, keep = context.quick, context.keep
    results = {
        "gradient_error": Measurement(keep("gradients", _gradient_error)),
        "different_bits": Measurement(keep("bits", _different_bits)),
    }
    lengths = [512, 2048] if quick else [1024, 2048, 4096, 8192]
    arms = ("none", "checkpoint", "memo, 0")
    counted = {n: keep(f"counted {n}", partial(_counted, n, arms)) for n in lengths}
    half = keep(f"half {lengths[0]}", partial(_counted, lengths[0], ("none", "memo, 0.5")))
    short, long = lengths[0], lengths[-1]
    results["saved_memo_05"] = Measurement(half["memo, 0.5"]["saved"] / half["none"]["saved"])
    for name, key in (("checkpoint", "checkpoint"), ("memo, 0", "memo_0")):
        worst = max(counted[n][name]["saved"] / counted[n]["none"]["saved"] for n in lengths)
        results[f"saved_{key}"] = Measurement(worst, note=f"{counted[long][name]['saved'] / 2**20:.1f} MiB at {long}")
        results[f"peak_{key}"] = Measurement(counted[long][name]["peak"] / counted[long]["none"]["peak"])
    share = {n: counted[n]["memo, 0"]["recomputed"] / counted[n]["checkpoint"]["recomputed"] for n in lengths}
    results["recomputed"] = Measurement(share[long], note=f"{share[short]:.2f} at {short} tokens")
    results["recomputed_widens"] = Measurement(share[short] / share[long])
    context.say(", ".join(f"recomputed at {n}: {share[n]:.2f} of checkpoint's" for n in lengths))
    for title, key, y, unit in (("Saved by the blocks at the end of the forward pass", "saved", "MiB", 2**20),
                                ("Computed again in a step", "recomputed", "GFLOP", 10**9)):  # fmt: skip
        series = [
            Series(name=name, x=list(lengths), y=[counted[n][name][key] / unit for n in lengths]) for name in arms
        ]
        context.show(Figure(title=title, x="sequence length, tokens", y=y, series=series))

    crossover, below, above = (2048, 256, 4096) if quick else (CROSSOVER, BELOW, ABOVE)
    link = keep(f"rate {crossover}", partial(_rate, crossover))
    context.say(f"link of {link['rate'] / 2**20:.0f} MiB/s: inputs and outputs of attention hide from {crossover} on")
    for side, length, repeats in (("below", below, 12), ("above", above, 3 if quick else 6)):
        found = keep(f"times {side} {length}", partial(_times, length, link["rate"], repeats))
        results[f"time_{side}"] = Measurement.of(bootstrap(found["ratios"]), note=f"{length} tokens")
        results[f"stall_{side}"] = Measurement.of(bootstrap(found["stalls"]), note="share of the step")
        results[f"alpha_{side}"] = Measurement(found["unclipped"], note=f"alpha {found['alpha']:.2f} before clipping")
        results["sets"] = Measurement(max(found["sets"], results["sets"].value if "sets" in results else 0))

    mixed = (1024, 640, 384, 896) if quick else (2048, 1280, 640, 1792, 1024, 1536)
    plan = keep(f"fragmentation {mixed}", partial(_fragmentation, mixed))
    results["fragmentation"] = Measurement(
        plan["reserved_over_planned"],
        note=f"{plan['reserved'] / 2**20:.0f} MiB reserved, {plan['allocated'] / 2**20:.0f} allocated, "
        f"{plan['planned'] / 2**20:.0f} planned",
    )
    results["planned"] = Measurement(plan["planned"] / plan["lower_bound"], note=f"{plan['allocations']} allocations")

    rows = _worked()
    results["worked_alpha"] = Measurement(max(abs(rows[str(n)]["alpha"] - alpha) for n, alpha in WORKED.items()))
    for thousands, row in rows.items():
        results[f"mfu_{thousands}k"] = Measurement(
            row["mfu"], note=f"alpha {row['alpha']:.2f}; bound by {row['binding']}"
        )
    if torch.cuda.is_available() and not quick:
        gpu = keep("gpu", partial(_on_gpu, 32_768))
        results["gpu_peak"] = Measurement(gpu["peak memo"] / gpu["peak none"])
        results["gpu_time"] = Measurement(gpu["seconds memo"] / gpu["seconds checkpoint"])
    else:
        context.say("the arm on a GPU is left out: " + ("a quick run" if quick else "there is none"))
    return results


experiment = Experiment(
    name="memo",
    title="Token-wise swapping and recomputation",
    paper="MEMO: Fine-grained Tensor Management for Ultra-long Context LLM Training, SIGMOD 2025, arXiv 2407.12117",
    claim="At long sequences all activations can be swapped or cheaply recomputed: two blocks' memory, full speed.",
    measure=measure,
    expectations=(
        Expectation("gradient_error", "same training", at_most(1e-10),
                    title="largest relative error of a gradient, fp64"),
        Expectation("different_bits", "same training", at_most(0),
                    title="bf16 steps, all swapped, in which a bit of a gradient changed"),
        Expectation("saved_checkpoint", "1/16 (accounting of section 2)", at_most(0.1),
                    title="saved by the blocks, checkpoint / none, at any length"),
        Expectation("saved_memo_0", "two buffers", at_most(BUFFERS / LAYERS + 0.001),
                    title="saved by the blocks, memo / none, nothing but inputs and attention swapped"),
        Expectation("saved_memo_05", "two buffers", at_most(BUFFERS / LAYERS + 0.001),
                    title="the same, half of the tokens swapped"),
        Expectation("recomputed", "attention is over 90 % of a layer beyond 576K tokens", at_most(0.35),
                    quick=at_most(0.6), title="operations computed again, memo / checkpoint, longest sequence"),
        Expectation("recomputed_widens", "the gap widens with the length", at_least(1.5), quick=at_least(1.2),
                    title="that share at the shortest sequence / at the longest"),
        Expectation("time_above", "full overlap beyond 192K tokens", at_most(1.0), quick=at_most(1.5),
                    title="time of a step, memo / checkpoint, above the crossover"),
        Expectation("time_below", "", at_least(1.0), quick=at_least(0.8),
                    title="time of a step, memo / checkpoint, below the crossover"),
        Expectation("sets", "two rounding buffers", at_most(BUFFERS),
                    title="blocks' activations on the device at a time"),
        Expectation("fragmentation", "73.5 GB reserved for 65.7 GB (section 2)", at_least(1.1),
                    title="caching allocator's reserved / planned bytes, mixed lengths"),
        Expectation("planned", "near-optimal", at_most(1.1), title="planned bytes / lower bound"),
        Expectation("worked_alpha", "0.38 to 1.0 and 0.41 (from the formula)", at_most(0.006),
                    title="largest deviation of the share of tokens, 7B on 8 A800, 64K to 1M"),
        Expectation("mfu_1024k", "52.3 % (abstract)", at_least(0.52), title="predicted utilisation at 1M tokens"),
        Expectation("gpu_peak", "", at_most(0.5), only="cuda", title="peak above weights on a GPU, memo / none, 32K"),
        Expectation("gpu_time", "", at_most(1.0), only="cuda", title="time of a step on a GPU, memo / checkpoint, 32K"),
    ),
    minutes=6,
    notes=(
        "A Llama of width 128 with 6 blocks, one sequence, fp32, on a CPU: the device is torch's CPU allocator, whose "
        "live bytes are counted, and the host is memory beside it. The link's rate is injected: that at which inputs "
        "and outputs of attention just hide at 4096 tokens. The predictions for 8 A800 take 60 % of the peak as the "
        "kernels' efficiency, as the worked values do, so that they cannot exceed 60 %. Fragmentation is that of a "
        "model of torch's caching allocator on traces of steps of mixed lengths (width 256); nothing enforces the plan."
    ),
)  # fmt: skip
