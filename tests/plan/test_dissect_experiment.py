"""The experiment of the runtime study, on made-up measurements: every expectation is measured, and as the names say.

Needs torch, trains nothing: pytest tests/plan/test_dissect_experiment.py
"""

from types import SimpleNamespace

import pytest

from headway.core.recipe import Recipe
from headway.experiments.dissecting_runtime import experiment
from headway.experiments.evidence import Figure
from headway.experiments.statistics import Estimate
from headway.plan.dissect.techniques import recipe_rule

COMPARED = {
    ("recompute", "none"): (1.3, 0.5),
    ("none", "eager"): (0.6, 0.4),
    ("lora", "none"): (0.7, 0.7),
    ("qlora", "lora"): (1.5, 0.9),
    ("disk", "none"): (4.0, 0.8),
}


def phase(name, milliseconds, share, flops=0.0, children=()):
    return {"name": name, "milliseconds": milliseconds, "share": share, "flops": flops, "children": list(children)}


def tree(key):
    arm, group = key.split(":")[1], 8 if "train.batch=8" in key else 1
    children = [
        phase("forward", 10.0, 0.3, 100.0, [phase("blocks.*", 8.0, 0.2, 80.0)]),
        phase("backward", 20.0, 0.6, 200.0),
        phase("optimizer", 50.0 if arm == "disk" else 5.0, 0.4 if group == 1 else 0.08),
    ]
    if arm == "recompute":
        children.append(phase("recompute", 7.0, 0.1, 72.0))
    products = {64: 0.3, 512: 0.7}.get(next((w for w in (64, 512) if f"hidden={w}" in key), 0), 0.6)
    return {
        "tree": phase("step", 40.0, 1.0, 300.0, children),
        "shares": {"products": products, "attention": 0.1},
        "expected_flops": 300.0,
        "coverage": {"step": 0.99, "forward": 0.95, "backward": 0.96},
    }


def memory(key):
    arm = key.split(":")[1]
    kinds = {"parameters": 10, "gradients": 10, "activations": 50 if arm == "recompute" else 100, "other": 1}
    optimizer = {"lora": 1, "qlora": 1, "disk": 0}.get(arm, 40)
    held = {**kinds, "optimizer": optimizer}
    return {"before": held, "peak": held, "four_bit_bytes": 28, "bf16_bytes": 100}


class MadeUp:
    """A context in which nothing is run."""

    def __init__(self, quick):
        self.quick, self.seeds, self.figures, self.keys = quick, (0,), [], []

    def say(self, text):
        pass

    def show(self, figure):
        self.figures.append(figure)

    def compare(self, of, to, *overrides, **options):
        time, peak = (Estimate(value, value, value, 4) for value in COMPARED[of, to])
        return SimpleNamespace(ratios={"seconds_per_token": time, "live_peak_bytes": peak})

    def keep(self, key, compute):
        self.keys.append(key)
        kind = key.split(":")[0]
        if kind == "sharding":
            zero2 = {"seconds": [1.0, 1.0, 1.0], "parameter_bytes": 150, "losses": [2.0, 1.0]}
            return {"zero2": zero2, "zero3": {"seconds": [1.2, 1.3, 1.1], "parameter_bytes": 50, "losses": [2.0, 1.0]}}
        if kind == "operations":
            rates = {str(n): {"qkv": n * 1e9} for n in (64, 128, 256, 512, 1024, 2048, 4096)}
            collective = {"name": "all-reduce", "sizes": {"bytes": 1024}, "rate": 1e9}
            layers = {"attention": [1.0, 0.5], "attention, plain": [4.0, 0.1]}
            return {"products": rates, "head": [2.0, 1.8], "layers": layers, "collectives": [collective]}
        return {"tree": tree, "memory": memory}[kind](key)


@pytest.mark.parametrize("quick", [False, True])
def test_every_expectation_is_measured_and_figures_are_whole(quick):
    context = MadeUp(quick)
    found = experiment.measure(context)
    for expectation in experiment.expectations:
        assert expectation.judge(found[expectation.measure], quick), expectation.measure
    assert len(context.figures) == 6 and all(isinstance(figure, Figure) for figure in context.figures)
    assert len(set(context.keys)) >= 10
    assert found["recompute_activations"].value == 0.5
    assert found["lora_optimizer"].value == 1 / 40
    assert found["accumulation"].value == 1.0, "the same time per step however many micro-batches"
    assert found["accumulation_share"].value == pytest.approx(0.2)
    assert found["offload_optimizer"].value == 10.0 and found["offload_bytes"].value == 0.0
    assert found["recomputed_flops"].value == 0.9
    assert found["zero3_time"].value == pytest.approx(1.2)
    assert found["elementwise_share"].value == pytest.approx(0.3)


def test_the_arms_are_recipes_that_can_be_run():
    base = Recipe.load(dict(experiment.recipe))
    rule = recipe_rule(base, {arm.name: arm.overrides for arm in experiment.arms})
    assert all(rule((arm.name,)) is None for arm in experiment.arms)
