"""torchtitan: dimensions compose on unchanged model code, train what one process trains, and can be changed midway."""

from __future__ import annotations

import itertools
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch

from headway.core.errors import MethodError
from headway.core.recipe import Recipe, merge
from headway.core.run import Run
from headway.core.train import train
from headway.experiments.base import Expectation, Experiment, Measurement, Quick, at_least, at_most, between
from headway.experiments.context import Context
from headway.experiments.evidence import Figure, Series
from headway.experiments.llama_1b import WAYS, tokens_per_second, utilization
from headway.experiments.statistics import bootstrap
from headway.experiments.torchtitan_costs import (
    LADDER,
    activation_peaks,
    checkpoint_stalls,
    compile_ratios,
    dry_run_seconds,
    head_peaks,
    interleaving_gain,
    products_run_again,
    time_ratios,
)
from headway.parallel.compose import Compile, Experts, Pipeline, Recompute, Shard, Step, Tensors, in_order
from headway.parallel.local import run_ranks
from headway.parallel.parity import one_process, parity

BASE: dict[str, Any] = {
    "name": "torchtitan",
    "model": {"hidden": 32, "layers": 4, "heads": 4, "kv_heads": 2, "context": 64},
    "data": {"source": "python-stdlib", "tokenizer": "byte", "sequence": 32, "validation_fraction": 0.005},
    "train": {"steps": 50, "batch": 8, "precision": "fp64", "device": "cpu"},
    "optimizer": {"lr": 1e-3},
    "schedule": {"name": "constant", "warmup": 10},
    "eval": {"batches": 2},
    "log": {"tensorboard": False, "every": 1},
}
EXPERTS = {"model": {"family": "moe", "experts": 4, "top_k": 2}}


def _pipeline(schedule: str, chunks: int) -> dict[str, Any]:
    return {"pipeline": {"degree": 2, "schedule": schedule, "chunks": chunks}}


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "fsdp 2": (2, {"shard": 2}),
    "tensor 2": (2, {"tensor": 2}),
    "pipeline 2, 1f1b": (2, _pipeline("1f1b", 1)),
    "sequence 2, ulysses": (2, {"sequence": {"degree": 2, "kind": "ulysses"}}),
    "tensor 2 x pipeline 2": (4, {"tensor": 2, "pipeline": 2}),
    "hsdp 2 x 2": (4, {"replicate": 2, "shard": 2}),
    "tensor 2, whole tokens": (2, {"tensor": {"degree": 2, "sequence": False}}),
    "pipeline 2, gpipe": (2, _pipeline("gpipe", 1)),
    "pipeline 2, interleaved 1f1b": (2, _pipeline("interleaved-1f1b", 2)),
    "pipeline 2, interleaved zero bubble": (2, _pipeline("interleaved-zero-bubble", 2)),
    "pipeline 2, zbv zero bubble": (2, _pipeline("zbv-zero-bubble", 2)),
    "sequence 2, ring": (2, {"sequence": {"degree": 2, "kind": "ring"}}),
    "fsdp 2 x tensor 2": (4, {"shard": 2, "tensor": 2}),
    "pipeline 2 x fsdp 2": (4, {"pipeline": 2, "shard": 2}),
    "sequence 2 x tensor 2": (4, {"sequence": 2, "tensor": 2}),
}
WITH_EXPERTS: dict[str, tuple[int, dict[str, Any]]] = {
    "experts 2 over fsdp 2": (2, {"shard": 2, "experts": 2}),
    "experts 4 folded over fsdp 2 x tensor 2": (4, {"shard": 2, "tensor": 2, "experts": 4}),
}
QUICK = ("fsdp 2", "tensor 2", "pipeline 2, 1f1b", "sequence 2, ulysses", "tensor 2 x pipeline 2")
HALF = ("fsdp 2", "tensor 2", "pipeline 2, 1f1b", "sequence 2, ulysses")
"""Layouts whose losses in bf16 are compared over many steps."""

CHAIN: tuple[tuple[int, dict[str, Any]], ...] = (
    (4, {"shard": 4}),
    (2, _pipeline("interleaved-1f1b", 2)),
    (3, {"shard": 3}),
    (4, {"shard": 2, "tensor": 2}),
    (1, {}),
)
"""Ranks and layouts, each of which resumes what the one before it has saved."""
CHAIN_STEPS = 2


def _recipe(*changes: dict[str, Any]) -> Recipe:
    sections: dict[str, Any] = BASE
    for change in changes:
        sections = merge(sections, change)
    return Recipe.load(sections)


def exactness(names: list[str], steps: int, models: dict[str, Any] | None = None) -> dict[str, list[float]]:
    """By layout, (largest relative difference of a loss, of a gradient) from one process, fp64."""
    model = EXPERTS if models is WITH_EXPERTS else {}
    table = models or LAYOUTS
    control = one_process(_recipe(model), steps)
    found = {}
    for name in names:
        ranks, layout = table[name]
        one = parity(_recipe(model, {"parallel": layout}), ranks, steps, control)
        found[name] = [one.loss_difference, one.gradient_difference]
    return found


def half_precision(steps: int) -> dict[str, list[float]]:
    """By layout, the relative difference of each step's loss from one process's in bf16; and fp32's difference."""
    bf16 = {"train": {"precision": "bf16"}}
    control = one_process(_recipe(bf16), steps)
    full = one_process(_recipe({"train": {"precision": "fp32"}}), steps)
    found = {"one process in fp32": [abs(a - b) / a for a, b in zip(control.losses, full.losses, strict=True)][:-1]}
    for name in HALF:
        ranks, layout = LAYOUTS[name]
        one = parity(_recipe(bf16, {"parallel": layout}), ranks, steps, control)
        found[name] = [abs(a - b) / a for a, b in one.losses][:-1]
    return found


def resumed_elsewhere(folder: Path) -> dict[str, float]:
    """The largest relative difference of a loss from the undisturbed run's where each two steps have other ranks, and
    how many steps saw another number of tokens."""

    def run_as(ranks: int, layout: dict[str, Any], steps: int, run: Path) -> None:
        # 12 sequences can be shared among 4, 3 and 2 ranks.
        changed = _recipe({"parallel": layout, "train": {"steps": steps, "batch": 12}, "schedule": {"warmup": 0},
                           "checkpoint": {"keep": 2}})  # fmt: skip
        run_ranks(ranks, lambda rank: train(changed, run=run) and None)

    run_as(1, {}, CHAIN_STEPS * len(CHAIN), folder / "whole")
    for number, (ranks, layout) in enumerate(CHAIN, start=1):
        run_as(ranks, layout, CHAIN_STEPS * number, folder / "chain")
    pairs = list(zip(Run(folder / "whole").metrics(), Run(folder / "chain").metrics(), strict=True))
    return {"difference": max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in pairs),
            "tokens": sum(a["tokens"] != b["tokens"] for a, b in pairs), "steps": len(pairs)}  # fmt: skip


def legal_orders() -> int:
    """How many of the 720 orders of six steps the order checker accepts."""
    mesh: Any = None
    steps: list[Step] = [Pipeline(mesh, 0), Tensors(mesh), Experts(mesh), Recompute(), Compile(), Shard(mesh)]
    count = 0
    for order in itertools.permutations(steps):
        try:
            in_order(order, strict_order=True)
            count += 1
        except MethodError:
            pass
    return count


def _exact(context: Context) -> dict[str, Measurement]:
    names = list(QUICK) if context.quick else list(LAYOUTS)
    steps = 1 if context.quick else 3
    found = dict(context.keep(f"exact {steps}", partial(exactness, names, steps)))
    found |= context.keep(f"experts {steps}", partial(exactness, list(WITH_EXPERTS), steps, WITH_EXPERTS))
    for name, (loss, gradient) in found.items():
        context.say(f"{name}: losses to {loss:.1e}, gradients to {gradient:.1e}")
    half_steps = 10 if context.quick else 50
    half = context.keep(f"half {half_steps}", partial(half_precision, half_steps))
    context.show(Figure(title="bf16: relative difference of a step's loss from one process's", x="step", y="difference",
                        series=[Series(name=name, x=list(range(1, half_steps + 1)), y=values)
                                for name, values in half.items()]))  # fmt: skip
    fp32 = half.pop("one process in fp32")
    context.say("bf16: " + ", ".join(f"{name} {max(values):.1e}" for name, values in half.items()))
    resumed = context.keep("resumed", partial(resumed_elsewhere, context.folder / "resumed"))
    return {
        "layouts": Measurement(len(found)),
        "loss_difference": Measurement(max(loss for loss, _ in found.values())),
        "gradient_difference": Measurement(max(gradient for _, gradient in found.values())),
        "half_difference": Measurement(max(map(max, half.values())),
                                       note=f"one process in fp32 against bf16: {max(fp32):.1e}"),
        "half_beside_fp32": Measurement(max(map(max, half.values())) / max(fp32)),
        "resumed_difference": Measurement(resumed["difference"], note=f"{resumed['steps']} steps, ranks 4, 2, 3, 4, 1"),
        "resumed_tokens": Measurement(resumed["tokens"]),
        "legal_orders": Measurement(legal_orders()),
    }  # fmt: skip


def _costs(context: Context) -> dict[str, Measurement]:
    quick = context.quick
    peaks = context.keep("peaks", partial(activation_peaks, 256))
    context.say("activations: " + ", ".join(f"{way} {peaks[way] / 2**20:.0f} MiB" for way in LADDER))
    whole, chunked = context.keep("head", partial(head_peaks, 1024))
    again = context.keep("again", products_run_again)
    stalls = context.keep("stalls", partial(checkpoint_stalls, context.folder / "stalls", 2 if quick else 4))
    seconds, peak = context.keep(f"dry run {quick}", partial(dry_run_seconds, 16 if quick else 126))
    gain = context.keep("interleaving", interleaving_gain)
    found = {
        "recompute_peak": Measurement(peaks["nothing"] / peaks["everything"]),
        "products_peak": Measurement(peaks["products"] / peaks["everything"]),
        "selective_peak": Measurement(peaks["attention"] / peaks["everything"]),
        "products_again_selective": Measurement(again["products"]),
        "products_again_full": Measurement(again["nothing"], note="per block: q, k, v, out, gate, up"),
        "head_peak": Measurement(chunked / whole),
        "checkpoint_stall": Measurement(stalls["lazy"] / stalls["plain"], note=f"{stalls['plain']:.2f} s plain"),
        "dry_run": Measurement(seconds, unit="s", note=f"the fullest rank takes {peak / 2**30:.0f} GiB"),
        "interleaving": Measurement(gain),
    }
    if not quick:
        times = context.keep("times", partial(time_ratios, 1024, 4))
        found["recompute_time"] = Measurement.of(bootstrap(times["nothing"]))
        found["selective_time"] = Measurement.of(bootstrap(times["attention"]))
        compiled = context.keep("compiled", partial(compile_ratios, 256, 5))
        found["compile_time"] = Measurement.of(bootstrap(compiled))
    return found


def _gpu(context: Context) -> dict[str, Measurement]:
    if not torch.cuda.is_available():
        context.say("tokens per second of a Llama of 1B parameters beside transformers: skipped, torch sees no GPU")
        return {}
    rates = {
        way: context.keep(f"1B {way}", partial(tokens_per_second, way, 3 if context.quick else 20)) for way in WAYS
    }
    used = context.keep("1B utilization", partial(utilization, rates))
    for way, rate in rates.items():
        context.say(f"1B, {way}: {rate:,.0f} tokens/s, {used[way]:.0%} of the measured peak")
    return {f"gpu_{way}": Measurement(rate / rates["transformers"], note=f"{rate:,.0f} tokens/s, {used[way]:.0%}")
            for way, rate in rates.items() if way != "transformers"}  # fmt: skip


def measure(context: Context) -> dict[str, Measurement]:
    """Exactness, resuming, order; what memory, compilation, checkpoints and dry runs cost; a GPU where there is one."""
    # DTensor warns that gathering what is divided in two ways takes two messages; nobody times that here.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    return {**_exact(context), **_costs(context), **_gpu(context)}


experiment = Experiment(
    name="torchtitan",
    title="Dimensions that compose",
    paper="Liang et al., TorchTitan: One-stop PyTorch native solution for production ready LLM pre-training, "
    "arXiv 2410.06511",
    claim="Data, tensor, sequence, pipeline and expert parallelism, recomputation, compilation and checkpoints combine "
    "on unchanged model code, train what one process trains, and a run goes on in another layout.",
    measure=measure,
    expectations=(
        Expectation("layouts", "", at_least(17), quick=at_least(7), title="layouts compared with one process"),
        Expectation("loss_difference", "loss curves overlay", at_most(1e-9),
                    title="largest relative difference of a loss, ranks / one process, fp64"),
        Expectation("gradient_difference", "", at_most(1e-9),
                    title="largest difference of a gradient relative to the largest, fp64"),
        Expectation("half_difference", "loss curves overlay", at_most(2e-3),
                    title="largest relative difference of a step's loss, ranks / one process, bf16"),
        Expectation("half_beside_fp32", "", at_most(0.5), only="full",
                    title="that, relative to how far fp32 is from bf16 in one process"),
        Expectation("resumed_difference", "checkpoints are resharded", at_most(1e-9),
                    title="largest relative difference of a loss, resumed in other layouts / undisturbed, fp64"),
        Expectation("resumed_tokens", "", at_most(0), title="steps that saw other numbers of tokens"),
        Expectation("legal_orders", "one order", between(1, 1),
                    title="orders of six steps, of 720, that are accepted"),
        Expectation("recompute_peak", "", at_most(0.5),
                    title="peak of activations, blocks recomputed / kept"),
        Expectation("selective_peak", "", between(0.4, 0.8),
                    title="peak of activations, blocks recomputed but for attention / kept"),
        Expectation("products_peak", "", at_most(1.0),
                    title="peak of activations, blocks recomputed but for attention and all products / kept"),
        Expectation("products_again_selective", "exactly what is listed is saved", at_most(0),
                    title="products that a block recomputes, products kept"),
        Expectation("products_again_full", "", at_least(6), title="products that a block recomputes, nothing kept"),
        Expectation("recompute_time", "", at_most(1.5), only="full", title="time of a step, recomputed / kept"),
        Expectation("selective_time", "", at_most(1.3), only="full",
                    title="time of a step, recomputed but for attention / kept"),
        Expectation("compile_time", "8B: +7 % to +15 % tokens per second on H100s", at_most(1.05), only="full",
                    title="time of a step, blocks compiled / eager"),
        Expectation("head_peak", "", at_most(0.4), title="peak of head and loss of 32,000 words, chunked / whole"),
        Expectation("checkpoint_stall", "", at_most(0.2), quick=at_most(0.4),
                    title="what a checkpoint stops training for, lazy / plain"),
        Expectation("dry_run", "", at_most(60),
                    title="seconds to build 405B (quick: 16 of its blocks) on 512 ranks that do not exist"),
        Expectation("interleaving", "1.28 to 1.30 (table 5 of its benchmarks)", between(1.2, 1.4),
                    title="405B on 512 H100s, simulated: speed of interleaved / plain 1F1B"),
        Expectation("gpu_eager", "", at_least(0.9), only="cuda",
                    title="tokens per second of a Llama of 1B parameters, eager / transformers"),
        Expectation("gpu_compiled", "", at_least(1.05), only="cuda", title="the same, blocks compiled / transformers"),
    ),
    minutes=4,
    quick=Quick(minutes=1),
    notes=(
        "A Llama of width 32 with 4 blocks in fp64 shows whether ranks compute what one process computes; two to four "
        "ranks are forked on this machine. Divided runs are slower than one process there, so that no time is given. "
        "bf16 differs by its rounding; where training is unstable (three times this learning rate, no warm-up) that "
        "grows: to 3e-2 within 50 steps, and thirtyfold between two fp32 runs. Memory is counted in bytes of live "
        "tensors, times are paired and interleaved. The simulated gain of interleaving is for 8 x 8 x 8 ranks, 32 "
        "sequences of 8,192 tokens to a data rank and, by assumption, as many micro-batches as pipeline ranks; "
        "products are in bf16 there, where the table has float8. Float8 itself is not part of this."
    ),
)  # fmt: skip
