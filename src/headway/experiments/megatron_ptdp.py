"""PTD-P: tensor, pipeline and data parallelism in one, and the formulas that choose among them."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
import torch

from headway.core.meters import synchronize
from headway.core.recipe import Recipe
from headway.experiments.base import Expectation, Experiment, Measurement, at_least, at_most, between
from headway.experiments.context import Context
from headway.experiments.evidence import Figure, Series
from headway.experiments.padded_pipeline import step_seconds
from headway.experiments.ptdp_tables import (
    TABLE_1,
    WITHIN_A_NODE,
    constant_misses,
    fit_model,
    fit_width,
    fitted_reach,
    gathering,
    interleaving,
    left_out,
    scaling,
)
from headway.layers.linear_cross_entropy import linear_cross_entropy
from headway.memory.recompute import RecomputedBlock
from headway.models.build import build_model
from headway.models.config import GPT2Config
from headway.parallel.parity import parity
from headway.parallel.pipeline.micro_batch import choose_micro_batch
from headway.parallel.pipeline.tables import schedule_table
from headway.plan.cluster.formulas import gpt_parameters
from headway.plan.cluster.hardware import Reach
from headway.plan.cluster.simulator import Task, simulate

BATCHES = (12, 24, 36, 48, 60)
COUNTS = (2, 4, 8, 16)
SCHEDULES = (("1f1b", 1), ("interleaved-1f1b", 2))

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor 2 x pipeline 2": {"tensor": 2, "pipeline": 2},
    "tensor 2 x data 2": {"tensor": 2, "shard": 2},
    "pipeline 2 (2 chunks) x data 2": {
        "pipeline": {"degree": 2, "schedule": "interleaved-1f1b", "chunks": 2},
        "shard": 2,
    },
}
PARITY_RECIPE: dict[str, Any] = {
    "model": {"family": "gpt2", "hidden": 32, "layers": 4, "heads": 4, "context": 32},
    "data": {"source": "python-stdlib", "tokenizer": "byte", "sequence": 32, "validation_fraction": 0.01},
    "train": {"steps": 3, "batch": 8, "micro_batch": 2, "precision": "fp64"},
    "eval": {"batches": 2},
}


def _tables(context: Context) -> dict[str, Measurement]:
    width, model = (left_out(fit, WITHIN_A_NODE) for fit in (fit_width, fit_model))
    everything = left_out(fit_model, TABLE_1)
    reach = fitted_reach(WITHIN_A_NODE)
    predicted = [row.predict(reach).hardware_rate / 1e12 for row in TABLE_1]
    # 512 x 64 passes and more make no other sum: the rows with up to eight stages are simulated by their tables too.
    drift = [row.predict(reach, simulate=True).seconds / row.predict(reach).seconds - 1 for row in TABLE_1[3:7]]
    context.say(f"products reach {reach.most:.3f} of the peak; rows left out are missed by "
                + ", ".join(f"{100 * error:+.1f} %" for error in everything.values()))  # fmt: skip
    context.show(
        Figure(
            title="Table 1: reported, and predicted with one fitted number",
            x="model, billions of parameters",
            y="TFLOP/s per A100",
            series=[
                Series(name="reported", x=[row.billions for row in TABLE_1], y=[row.rate for row in TABLE_1]),
                Series(name="predicted", x=[row.billions for row in TABLE_1], y=predicted),
            ],
        )
    )
    sizes = [gpt_parameters(row.layers, row.hidden, 51_200, 2048) / 1e9 - row.billions for row in TABLE_1]
    found = {
        "parameters_off": max(map(abs, sizes)),
        "width_fit_error": max(map(abs, width.values())),
        "model_fit_error": max(map(abs, model.values())),
        "model_fit_error_all": max(map(abs, everything.values())),
        "constant_miss": constant_misses(),
        "formula_drift": max(map(abs, drift)),
    }
    return {name: Measurement(value) for name, value in found.items()} | _scaling(reach) | _interleaving(context, reach)


def _scaling(reach: Reach) -> dict[str, Measurement]:
    ptdp, zero = scaling(reach)
    rates = [", ".join(f"{rate:.0f}" for rate in way.predicted) for way in (ptdp, zero)]
    return {"ptdp_fall": Measurement(ptdp.fall(ptdp.predicted), note=f"{rates[0]} TFLOP/s"),
            "zero_fall": Measurement(zero.fall(zero.predicted), note=f"{rates[1]} TFLOP/s")}  # fmt: skip


def _interleaving(context: Context, reach: Reach) -> dict[str, Measurement]:
    gains = {gather: [interleaving(batch, gather, reach) for batch in BATCHES] for gather in (True, False)}
    context.show(
        Figure(
            title="Figure 12's setting, simulated: what interleaving gains",
            x="sequences in a step",
            y="times as fast, less one",
            series=[
                Series(name="scatter/gather" if gather else "whole boundaries", x=list(BATCHES), y=gains[gather])
                for gather in (True, False)
            ],
        )
    )
    return {
        "interleaving_12": Measurement(gains[True][0]),
        "interleaving_60": Measurement(gains[True][-1], note="the bubbles alone make 0.131"),
        "interleaving_60_whole": Measurement(gains[False][-1]),
        "gathering_60": Measurement(gathering(60, reach)),
    }


def _padded(context: Context) -> dict[str, Measurement]:
    sleep = 0.01 if context.quick else 0.03
    counts = COUNTS[::2] if context.quick else COUNTS

    def measured() -> dict[str, float]:
        times = step_seconds(SCHEDULES, counts, sleep, 2 * sleep, 1 if context.quick else 3)
        # The fastest repeat: what a busy machine adds is never negative.
        return {f"{v} {m}": min(taken) for (v, m), taken in times.items()}

    found = context.keep(f"padded {context.quick}", measured)
    each = 2 * 3 * sleep  # a rank has two blocks
    errors = [found[f"{v} {m}"] / ((m + 1 / v) * each) - 1 for _, v in SCHEDULES for m in counts]
    context.say("sleeping stages: " + ", ".join(f"{1e3 * t:.0f} ms" for t in found.values()))
    results = {"padded_error": Measurement(max(map(abs, errors)))}
    few, many = counts[0], counts[-1]
    for name, m in (("padded_ratio_few", few), ("padded_ratio_many", many)):
        results[name] = Measurement(found[f"2 {m}"] / found[f"1 {m}"], note=f"{m} micro-batches")
    for v in (1, 2):
        slope, intercept = np.polyfit(counts, [found[f"{v} {m}"] for m in counts], 1)
        results[f"padded_bubble_{v}"] = Measurement(float(intercept / slope))
    return results


def _micro_batch(context: Context) -> dict[str, Measurement]:
    """The chooser against every micro-batch tried: by the real schedule's table with measured times, and for real."""
    share, sizes = 16, (1, 2, 4, 8, 16)
    passes = context.keep("passes", lambda: [_passes(b) for b in sizes])
    seconds = {b: forward + backward for b, (forward, backward) in zip(sizes, passes)}
    agreed = []
    for p in (1, 2, 4, 8):
        chosen, _ = choose_micro_batch(seconds, share, 1, p)
        tried = {}
        for b, (forward, backward) in zip(sizes, passes):
            by_kind = {"forward": forward, "backward": backward}

            def taken(task: Task, by_kind: dict[str, float] = by_kind) -> float:
                return by_kind[task.kind]

            tried[b] = simulate(schedule_table("1f1b", p, 1, share // b), taken, lambda stage: stage).seconds
        agreed.append(tried[chosen] <= min(tried.values()) * (1 + 1e-9))
    return {"micro_batch_agrees": Measurement(sum(agreed) / len(agreed))}


def _passes(size: int, repeats: int = 7) -> tuple[float, float]:
    """Median seconds of forward and backward pass of ``size`` sequences in a small GPT."""
    model = build_model(GPT2Config(hidden=128, layers=2, heads=4, vocab=512, context=64), seed=0)
    return _timed(model, torch.zeros(size, 64, dtype=torch.long), repeats)


def _timed(model: Any, tokens: torch.Tensor, repeats: int) -> tuple[float, float]:
    forward, backward = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        hidden = model.hidden(tokens).flatten(0, 1)
        synchronize(tokens.device)
        middle = time.perf_counter()
        hidden.sum().backward()
        synchronize(tokens.device)
        forward.append(middle - start)
        backward.append(time.perf_counter() - middle)
    return sorted(forward)[repeats // 2], sorted(backward)[repeats // 2]


def _parity(context: Context) -> dict[str, Measurement]:
    """Losses and gradients of three layouts of four ranks against one process, fp64, with the tied matrix."""
    worst = {"parity_loss": 0.0, "parity_gradient": 0.0}
    for title, section in LAYOUTS.items():
        recipe = Recipe.load({**PARITY_RECIPE, "parallel": section})
        found = context.keep(f"parity {title}", partial(_differences, recipe))
        context.say(f"{title}: losses within {found['loss_difference']:.1e}, gradients within "
                    f"{found['gradient_difference']:.1e}")  # fmt: skip
        worst["parity_loss"] = max(worst["parity_loss"], found["loss_difference"])
        worst["parity_gradient"] = max(worst["parity_gradient"], found["gradient_difference"])
    return {name: Measurement(value) for name, value in worst.items()}


def _differences(recipe: Recipe) -> dict[str, Any]:
    return parity(recipe, 4).to_dict()


def gpu_ratios(device: torch.device, width: int = 2048, tokens: int = 2048) -> dict[str, float]:
    """On one GPU: a step's time with recomputed blocks over without, and without over with compiled blocks."""
    batch = torch.zeros(4, tokens, dtype=torch.long, device=device)
    taken = {}
    for kind in ("plain", "recompute", "compile"):
        config = GPT2Config(hidden=width, layers=4, heads=max(1, width // 128), vocab=51_200, context=tokens)
        model = build_model(config, seed=0).to(device, torch.bfloat16)
        for index, block in enumerate(list(model.blocks)):
            if kind == "recompute":
                model.blocks[index] = RecomputedBlock(block)
            elif kind == "compile":
                block.compile()

        def step(model: Any = model) -> None:
            hidden = model.hidden(batch).flatten(0, 1)
            linear_cross_entropy(hidden, model.head_weight, batch.flatten())[0].backward()

        times = []
        for _ in range(10):
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            times.append(time.perf_counter() - start)
        taken[kind] = sorted(times[3:])[3]
    return {"gpu_recompute": taken["recompute"] / taken["plain"], "gpu_compile": taken["plain"] / taken["compile"]}


def measure(context: Context) -> dict[str, Measurement]:
    """The paper's tables by the model; schedules, micro-batches and exactness on ranks of this machine."""
    results = _tables(context) | _padded(context) | _micro_batch(context) | _parity(context)
    if torch.cuda.is_available():
        ratios = context.keep("gpu", partial(gpu_ratios, torch.device("cuda")))
        results |= {name: Measurement(value) for name, value in ratios.items()}
    return results


experiment = Experiment(
    name="megatron-ptdp",
    title="Tensor, pipeline and data parallelism",
    paper="Narayanan et al., Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM, "
    "arXiv 2104.04473",
    claim="Closed formulas choose how a model is divided; interleaving stages shrinks the pipeline's bubble.",
    measure=measure,
    expectations=(
        Expectation("parameters_off", "Table 1", at_most(0.1), title="parameters of the ten models, billions off"),
        Expectation("width_fit_error", "Table 1, t = 8", at_most(0.065),
                    title="a x / (x + k): largest error of a row's rate, predicted from the others"),
        Expectation("model_fit_error", "Table 1, t = 8", at_most(0.065),
                    title="cost model with one fitted number: likewise"),
        Expectation("model_fit_error_all", "Table 1, all rows", at_most(0.08), title="likewise, over all ten rows"),
        Expectation("constant_miss", "163 TFLOP/s for 1008B", between(-0.28, -0.22),
                    title="negative control: one rate for all, error at 1008B"),
        Expectation("formula_drift", "the same sum", at_most(0.02),
                    title="step time by formulas against the simulated tables, largest difference"),
        Expectation("ptdp_fall", "153 to 141 TFLOP/s (Table 2): 0.08", at_most(0.10),
                    title="rate lost from 384 to 1536 GPUs, 174.6B, PTD-P"),
        Expectation("zero_fall", "144 to 44 TFLOP/s (Table 2): 0.69", at_least(0.60),
                    title="likewise, ZeRO-3 without model parallelism"),
        Expectation("interleaving_12", "more than 10 % at small batches (section 5.3)", at_least(0.08),
                    title="interleaving's gain, 175B on 96 GPUs, 12 sequences, simulated"),
        Expectation("interleaving_60", "the gap closes (figure 12)", at_most(0.14), title="likewise, 60 sequences"),
        Expectation("interleaving_60_whole", "none or less (section 5.3)", at_most(0.06),
                    title="likewise, without scatter/gather"),
        Expectation("gathering_60", "up to 11 % (section 5.7)", between(0.03, 0.12),
                    title="scatter/gather's gain with interleaving, 60 sequences, simulated"),
        Expectation("padded_error", "T(b), equation 1", at_most(0.15), quick=at_most(0.3),
                    title="two ranks with sleeping blocks: largest error of a step's time"),
        Expectation("padded_ratio_few", "(1 + 1/4) / (1 + 1/2) = 0.83", between(0.78, 0.9), quick=between(0.7, 1.0),
                    title="interleaved / 1F1B, 2 micro-batches"),
        Expectation("padded_ratio_many", "0.97", between(0.93, 1.06), quick=between(0.8, 1.2),
                    title="interleaved / 1F1B, most micro-batches"),
        Expectation("padded_bubble_1", "p - 1 = 1", between(0.85, 1.15), only="full",
                    title="1F1B's bubble, in micro-batches"),
        Expectation("padded_bubble_2", "(p - 1) / v = 0.5", between(0.425, 0.575), only="full",
                    title="interleaved 1F1B's bubble, in micro-batches"),
        Expectation("micro_batch_agrees", "takeaway 3", at_least(1.0),
                    title="chosen micro-batch is the best of all tried, share of pipelines"),
        Expectation("parity_loss", "strict optimizer semantics", at_most(1e-9),
                    title="losses of three layouts of four ranks against one process, fp64"),
        Expectation("parity_gradient", "strict optimizer semantics", at_most(1e-9), title="gradients, likewise"),
        Expectation("gpu_recompute", "4/3 of the operations", between(1.15, 1.4), only="cuda",
                    title="step time, recomputed blocks / kept"),
        Expectation("gpu_compile", "1.11 to 1.19 by fusion (section 5.8)", at_least(1.0), only="cuda",
                    title="step time, eager / compiled"),
    ),
    minutes=4,
    notes=(
        "The paper's clusters are simulated: A100 with NVLink inside a node and 18.6 GB/s per GPU between nodes, the "
        "paper's own 892 GB/s over the 48 links of a cut. The 1008B row has one chunk in the authors' script and so a "
        "bubble of 12 %. Two ranks on two shared cores compute no faster than one process, so that the schedules are "
        "timed with blocks that sleep."
    ),
)  # fmt: skip
