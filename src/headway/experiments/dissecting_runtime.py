"""Dissecting the runtime: what each technique does to time and memory, and where a step's time goes, as ratios here."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch

from headway.core.build import build_trainer
from headway.experiments.base import Arm, Expectation, Experiment, Measurement, Quick, at_least, at_most, between
from headway.experiments.context import Context
from headway.experiments.evidence import Figure, Series
from headway.experiments.statistics import paired_ratio
from headway.plan.dissect.arms import Linear4Bit
from headway.plan.dissect.collectives import bench_collectives, on_ranks
from headway.plan.dissect.memory import memory_breakdown
from headway.plan.dissect.opbench import Product, bench_layers, bench_products, misaligned, products_of
from headway.plan.dissect.sharded import sharded_steps
from headway.plan.dissect.training import dissect_trainer

ARMS = "methods.headway.plan.dissect.arms:"
BLOCKS, STEPS = 8, 2
"""Counted blocks of each interleaved comparison, and the steps in one."""
GROUPS = (1, 2, 4, 8)
"""Micro-batches per optimizer step."""
SHORT = ("data.sequence=128", "train.micro_batch=1")
"""Few tokens per micro-batch, so that the optimizer's time can be seen."""
FEW = ("data.sequence=256", "train.batch=1")
"""Few tokens per step, as a machine short of memory has them."""

Tree = dict[str, Any]


def measure(context: Context) -> Mapping[str, Measurement]:
    """Every part of the study that fits this machine."""
    parts = {
        "recomputation": _recompute,
        "fused attention": _attention,
        "LoRA and 4-bit weights": _adapters,
        "accumulation": _accumulation,
        "sharding over two processes": _sharding,
        "offloading": _offload,
        "a step taken apart": _breakdown,
        "matrix products by width": _widths,
        "single operations": _operations,
    }
    found: dict[str, Measurement] = {}
    for title, part in parts.items():
        context.say(title)
        found |= part(context)
    return found


def _compare(context: Context, of: str, to: str, *overrides: str) -> dict[str, Measurement]:
    """Time per token and live peak of two arms in turns."""
    blocks = 4 if context.quick else BLOCKS
    ratios = context.compare(of, to, *overrides, blocks=blocks, steps=STEPS).ratios
    return {
        "time": Measurement.of(ratios["seconds_per_token"], "x"),
        "peak": Measurement.of(ratios["live_peak_bytes"], "x"),
    }


def _tree(context: Context, arm: str, *overrides: str) -> Tree:
    """An arm's step taken apart, as plain data."""

    def dissected() -> Tree:
        gc.collect()
        trainer = build_trainer(context.recipe(arm, *overrides, seed=context.seeds[0]))
        tree = dissect_trainer(trainer, steps=2 if context.quick else 4)
        shares = {"products": tree.product_share(), "attention": tree.attention_share()}
        expected = trainer.workload.flops_per_token(trainer.model) * trainer.tokens / trainer.step
        coverage = {name: tree.coverage(name) for name in tree.phases} | {"step": tree.coverage()}
        return {"tree": tree.to_dict()["tree"], "shares": shares, "expected_flops": expected, "coverage": coverage,
                "overhead": tree.overhead}  # fmt: skip

    return context.keep(f"tree:{arm}:{overrides}", dissected)


def _phase(tree: Tree, name: str) -> Tree | None:
    return next((child for child in tree["tree"]["children"] if child["name"] == name), None)


def _memory(context: Context, arm: str, *overrides: str) -> dict[str, Any]:
    """An arm's memory by purpose, with the bytes of its frozen 4-bit weights and what they would take in bf16."""

    def measured() -> dict[str, Any]:
        gc.collect()
        trainer = build_trainer(context.recipe(arm, *overrides, seed=context.seeds[0]))
        report = memory_breakdown(trainer.train_step, trainer.model, trainer.optimizer, warmup=2)
        packed = [module for module in trainer.model.modules() if isinstance(module, Linear4Bit)]
        small, bf16 = sum(m.nbytes for m in packed), sum(2 * m.shape.numel() for m in packed)
        return {**report.to_dict(), "four_bit_bytes": small, "bf16_bytes": bf16}

    return context.keep(f"memory:{arm}:{overrides}", measured)


def _recompute(context: Context) -> dict[str, Measurement]:
    compared = _compare(context, "recompute", "none")
    plain, less = _memory(context, "none"), _memory(context, "recompute")
    activations = less["peak"]["activations"] / plain["peak"]["activations"]
    peaks = [{"name": name, **m["peak"]} for name, m in (("none", plain), ("recompute", less))]
    kinds = ("parameters", "gradients", "optimizer", "activations", "other")
    context.show(
        Figure(
            title="Live tensor bytes at the peak of a step",
            x="purpose",
            y="MiB",
            series=[
                Series(name=p["name"], x=list(kinds), y=[p[kind] / 2**20 for kind in kinds], kind="bars") for p in peaks
            ],
        )
    )
    return {
        "recompute_time": compared["time"],
        "recompute_peak": compared["peak"],
        "recompute_activations": Measurement(activations, unit="x"),
    }


def _attention(context: Context) -> dict[str, Measurement]:
    compared = _compare(context, "none", "eager", "data.sequence=1024", "train.batch=2")
    return {"attention_time": compared["time"], "attention_peak": compared["peak"]}


def _adapters(context: Context) -> dict[str, Measurement]:
    lora, four_bit = _compare(context, "lora", "none"), _compare(context, "qlora", "lora")
    plain, adapted, packed = (_memory(context, arm) for arm in ("none", "lora", "qlora"))
    return {
        "lora_time": lora["time"],
        "lora_peak": lora["peak"],
        "lora_optimizer": Measurement(adapted["before"]["optimizer"] / plain["before"]["optimizer"], unit="x"),
        "qlora_time": four_bit["time"],
        "qlora_weights": Measurement(packed["four_bit_bytes"] / packed["bf16_bytes"], unit="x"),
        "qlora_peak": four_bit["peak"],
    }


def _accumulation(context: Context) -> dict[str, Measurement]:
    shares, milliseconds = [], []
    groups = GROUPS[:: len(GROUPS) - 1] if context.quick else GROUPS
    for group in groups:
        phase = _phase(_tree(context, "none", *SHORT, f"train.batch={group}"), "optimizer")
        assert phase is not None
        shares.append(phase["share"])
        milliseconds.append(phase["milliseconds"])
    context.show(
        Figure(
            title="The optimizer's share of a step",
            x="micro-batches of 128 tokens per step",
            y="share of the step",
            series=[Series(name="measured", x=list(groups), y=shares)],
            log_x=True,
            log_y=True,
        )
    )
    per_token = milliseconds[-1] / groups[-1] / milliseconds[0]
    return {
        "accumulation": Measurement(per_token * groups[-1] / groups[0], unit="x"),
        "accumulation_share": Measurement(shares[-1] / shares[0], unit="x"),
        "optimizer_share_small_batch": Measurement(shares[0]),
    }


def _sharding(context: Context) -> dict[str, Measurement]:
    model = {"hidden": 256, "layers": 2 if context.quick else 4, "heads": 4, "vocab": 512, "context": 256}
    rounds = 4 if context.quick else 12
    found = context.keep("sharding", lambda: on_ranks(sharded_steps, 2, model, 1, 128, rounds)[0])
    whole, again = found["zero2"], found["zero3"]
    same = max(abs(a - b) for a, b in zip(whole["losses"], again["losses"], strict=True))
    return {
        "zero3_time": Measurement.of(paired_ratio(again["seconds"], whole["seconds"]), "x"),
        "zero3_parameters": Measurement(again["parameter_bytes"] / whole["parameter_bytes"], unit="x"),
        "zero3_loss_difference": Measurement(same),
    }


def _offload(context: Context) -> dict[str, Measurement]:
    compared = _compare(context, "disk", "none", *FEW)
    plain, slow = (_phase(_tree(context, arm, *FEW), "optimizer") for arm in ("none", "disk"))
    memory, without = (_memory(context, arm, *FEW) for arm in ("none", "disk"))
    assert plain is not None and slow is not None
    return {
        "offload_time": compared["time"],
        "offload_optimizer": Measurement(slow["milliseconds"] / plain["milliseconds"], unit="x"),
        "offload_bytes": Measurement(without["before"]["optimizer"] / memory["before"]["optimizer"], unit="x"),
    }


def _breakdown(context: Context) -> dict[str, Measurement]:
    trees = {arm: _tree(context, arm) for arm in ("none", "recompute", "eager")}
    phases = ("forward", "backward", "recompute", "gradients", "optimizer", "data", "other")
    context.show(
        Figure(
            title="Where the time of a step goes",
            x="phase",
            y="ms",
            series=[
                Series(
                    name=arm,
                    x=list(phases),
                    y=[(_phase(tree, name) or {"milliseconds": 0.0})["milliseconds"] for name in phases],
                    kind="bars",
                )
                for arm, tree in trees.items()
            ],
        )
    )
    eager, again = trees["eager"], trees["recompute"]
    counted = eager["tree"]["flops"]
    forward, recompute = _phase(again, "forward"), _phase(again, "recompute")
    blocks = next(child for child in (forward or {})["children"] if child["name"].startswith("blocks"))
    long = ("forward", "backward")
    return {
        "phases": Measurement(min(tree["coverage"]["step"] for tree in trees.values())),
        "operations": Measurement(min(tree["coverage"][name] for tree in trees.values() for name in long)),
        "flops": Measurement(abs(counted / eager["expected_flops"] - 1)),
        "recomputed_flops": Measurement((recompute or {"flops": 0.0})["flops"] / blocks["flops"], unit="x"),
        "elementwise_share": Measurement(1 - eager["shares"]["products"] - eager["shares"]["attention"]),
    }


def _widths(context: Context) -> dict[str, Measurement]:
    widths = (64, 512) if context.quick else (64, 128, 256, 512, 768)
    overrides = ("data.sequence=256",)
    shares = {
        width: _tree(context, "eager", f"model.hidden={width}", *overrides)["shares"]["products"] for width in widths
    }
    context.show(
        Figure(
            title="Matrix products' share of forward and backward",
            x="width of the model",
            y="share of time",
            series=[Series(name="eager attention", x=list(shares), y=list(shares.values()))],
            log_x=True,
            caption="What a toy width says of techniques that speed up matrix products is not what a large one says.",
        )
    )
    return {
        "products_wide": Measurement(shares[512]),
        "products_narrow": Measurement(shares[64]),
        "products_narrow_to_wide": Measurement(shares[64] / shares[512], unit="x"),
    }


def _operations(context: Context) -> dict[str, Measurement]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    seconds = 0.05 if context.quick else 0.3
    counts = (64, 512, 4096) if context.quick else (64, 128, 256, 512, 1024, 2048, 4096)

    def rates() -> dict[str, Any]:
        model = build_trainer(context.recipe("none")).model
        wide = {n: bench_products(products_of(model, n, backward=False), dtype, device, seconds) for n in counts}
        rows, width = (4096, 4096) if device == "cuda" else (512, 256)
        head = Product("head of 32000", rows, 32000, width)
        layers = bench_layers(2048, 512, 4, 64, 704, dtype, device, seconds)
        return {
            "products": {str(n): {r.name: r.rate for r in found} for n, found in wide.items()},
            "head": [r.rate for r in bench_products([head, misaligned(head)], dtype, device, 4 * seconds)],
            "layers": {r.name: [r.milliseconds, r.share] for r in layers},
            "collectives": [r.to_dict() for r in bench_collectives([2**12, 2**16, 2**20, 2**24], seconds=seconds)],
        }

    found = context.keep("operations", rates)
    products = found["products"]
    names = list(next(iter(products.values())))
    context.show(
        Figure(
            title="Matrix products of the model",
            x="tokens",
            y="GFLOP/s",
            series=[Series(name=n, x=list(counts), y=[products[str(c)][n] / 1e9 for c in counts]) for n in names],
            log_x=True,
        )
    )
    context.show(
        Figure(
            title="Bus bandwidth of collectives between two processes",
            x="bytes",
            y="GB/s",
            series=[
                Series(
                    name=name,
                    x=[c["sizes"]["bytes"] for c in found["collectives"] if c["name"] == name],
                    y=[c["rate"] / 1e9 for c in found["collectives"] if c["name"] == name],
                )
                for name in dict.fromkeys(c["name"] for c in found["collectives"])
            ],
            log_x=True,
            log_y=True,
        )
    )
    few, many = (median(products[str(c)].values()) for c in (counts[0], counts[-1]))
    layers = found["layers"]
    return {
        "products_few_tokens": Measurement(few / many, unit="x"),
        "misaligned": Measurement(found["head"][1] / found["head"][0], unit="x"),
        "fused_attention": Measurement(layers["attention"][0] / layers["attention, plain"][0], unit="x"),
    }


experiment = Experiment(
    name="dissecting-runtime",
    title="Dissecting the runtime",
    paper="Zhang et al., Dissecting the Runtime Performance of the Training, Fine-tuning, and Inference of Large "
    "Language Models, arXiv 2311.03687",
    claim="Recomputation, fused attention, LoRA, 4-bit weights, accumulation, sharding and offloading each move time "
    "and memory in known directions, and matrix products take most of a step.",
    recipe={
        "model": {"family": "llama", "hidden": 256, "layers": 4, "heads": 4, "vocab": 2048, "context": 1024},
        "data": {"source": "python-stdlib", "tokenizer": "byte", "sequence": 512},
        "train": {"steps": 10_000, "batch": 4, "precision": "fp32"},
        "schedule": {"name": "constant", "warmup": 0},
        "optimizer": {"lr": 3e-4},
        "eval": {"batches": 1},
    },
    arms=(
        Arm("none"),
        Arm("recompute", ("methods.recompute={}",), "blocks run again in backward"),
        Arm("eager", (f"{ARMS}EagerAttention={{}}",), "attention with its matrix of scores"),
        Arm("lora", (f"{ARMS}LoRA={{rank: 4}}",), "LoRA"),
        Arm("qlora", (f"{ARMS}LoRA={{rank: 4, four_bit: true}}",), "LoRA on 4-bit weights"),
        Arm("disk", (f"{ARMS}DiskStates={{}}",), "optimizer state on disk"),
    ),
    measure=measure,
    expectations=(
        Expectation(
            "recompute_time", "about 4/3 of forward and backward", between(1.15, 1.4), "step time, recompute / none"
        ),
        Expectation(
            "recompute_activations",
            "most of the activations' memory is freed",
            at_most(0.6),
            "activations at the peak, recompute / none",
            quick=at_most(0.8),
        ),
        Expectation(
            "attention_time",
            "FlashAttention is faster",
            at_most(0.8),
            "step time at 1024 tokens, fast attention / eager",
        ),
        Expectation(
            "attention_peak",
            "FlashAttention needs less memory",
            at_most(0.5),
            "live peak at 1024 tokens, fast attention / eager",
        ),
        Expectation(
            "lora_time",
            "LoRA is faster than full training",
            between(0.6, 0.8),
            "step time, LoRA / full",
            quick=at_most(0.95),
        ),
        Expectation(
            "lora_optimizer", "LoRA has almost no optimizer state", at_most(0.05), "optimizer bytes, LoRA / full"
        ),
        Expectation("qlora_time", "LoRA is about twice as fast as QLoRA", at_least(1.05), "step time, QLoRA / LoRA"),
        Expectation(
            "qlora_weights",
            "4-bit quantisation cuts memory most: about half of LoRA's in all",
            at_most(0.35),
            "bytes of frozen weights, NF4 / bf16",
        ),
        Expectation(
            "accumulation",
            "the optimizer's share vanishes with accumulation",
            between(0.7, 1.4),
            "the optimizer's time per step, 8 micro-batches / 1 (1 is: its time per token falls as 1/8)",
            quick=between(0.4, 2.5),
        ),
        Expectation(
            "accumulation_share",
            "the optimizer's share vanishes with accumulation",
            at_most(0.3),
            "the optimizer's share of a step, 8 micro-batches / 1",
            quick=at_most(0.6),
        ),
        Expectation(
            "zero3_time",
            "ZeRO-3 pays in all-gathers",
            at_least(1.0),
            "step time, ZeRO-3 / ZeRO-2, two ranks",
            quick=at_least(0.8),
        ),
        Expectation(
            "zero3_parameters",
            "ZeRO-3 saves more memory",
            at_most(0.6),
            "bytes of parameters after forward, ZeRO-3 / ZeRO-2",
        ),
        Expectation(
            "offload_time",
            "several times to an order of magnitude slower",
            at_least(2.0),
            "step time, optimizer state on disk / in memory",
            quick=at_least(1.2),
        ),
        Expectation(
            "offload_optimizer",
            "several times to an order of magnitude slower",
            at_least(3.0),
            "the optimizer's time, on disk / in memory",
        ),
        Expectation(
            "products_wide",
            "matrix products take more than 60 % of forward and backward",
            at_least(0.55),
            "share of matrix products at width 512",
        ),
        Expectation(
            "products_narrow_to_wide",
            "(7B and larger; not claimed of toy widths)",
            at_most(0.9),
            "share of matrix products, width 64 / width 512",
        ),
        Expectation(
            "elementwise_share",
            "element-wise operations take a share far above their FLOPs",
            at_least(0.1),
            "share of everything but matrix products at width 256",
        ),
        Expectation(
            "fused_attention", "FlashAttention is faster", at_most(0.8), "attention alone, fast / eager", only="full"
        ),
        Expectation("phases", "(instrument)", at_least(0.98), "share of a step that has a phase", quick=at_least(0.95)),
        Expectation(
            "operations",
            "(instrument)",
            at_least(0.9),
            "share of forward and backward that ran in operations, the rest being Python",
            quick=at_least(0.5),
        ),
        Expectation("flops", "(instrument)", at_most(0.01), "FLOPs of a step against the closed form, relative error"),
        Expectation(
            "recomputed_flops",
            "(instrument)",
            between(0.7, 1.0),
            "FLOPs attributed to recompute / those of the blocks' forward pass",
        ),
        Expectation(
            "misaligned",
            "sizes that are no multiple of the hardware's tile are slower",
            at_most(0.95),
            "rate of a product with N = 32001 / with 32000",
            only="cuda",
        ),
    ),
    minutes=8,
    quick=Quick(overrides=("model.layers=2", "train.batch=2"), minutes=3),
    notes="fp32 on a CPU instead of bf16 on 8 GPUs, a Llama of width 256 instead of 7B to 70B, LoRA of rank 4 (the "
    "same share of the width as 64 of 4096). A checkpoint leaves out the last product of each block, and the head is "
    "not run again, so recomputation costs less than 4/3. 4-bit weights are unpacked before each product: on a CPU "
    "they save memory and cost time. ZeRO-2 and ZeRO-3 are fully_shard without and with freeing after forward, two "
    "gloo processes on one machine. Offloading to host memory means nothing without a GPU; the state goes to a file "
    "that is forced to disk. Not measured yet: serving (the system's own server is a later part), more than two ranks, "
    "GPUs and their scaling, 1.3B and 7B shapes, quantised training.",
)
