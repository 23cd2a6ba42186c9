"""Comparisons: arms undisturbed by each other, known ratios found, senseless ones refused.

Needs nothing. Run: pytest tests/experiments/test_compare.py
"""

from __future__ import annotations

import json
import math

import pytest
import torch

from headway.core.build import build_trainer
from headway.core.errors import DivergedError, HeadwayError, MethodError, RecipeError
from headway.core.method import Card, Method
from headway.core.recipe import Recipe, parse_override
from headway.core.state import rng_state
from headway.experiments.compare import Comparison, compare, parse_switch
from headway.experiments.comparison import window_mean
from tests.conftest import generated_text, tiny_recipe

HERE = "tests.experiments.test_compare"
FACTS = {"title": "", "paper": "", "summary": "", "exact": True, "approximates": "", "buys": "", "costs": ""}


class Nothing(Method):
    """A switch that does nothing."""

    card = Card(name="nothing", **FACTS)


class Noise(Method):
    """Draws from every generator in each step, as dropout or a data augmentation would."""

    card = Card(name="noise", **FACTS)

    def update(self, update):
        self.changed("weights moved")

        def noisy():
            import random

            import numpy as np

            update()
            for group in self.trained.param_groups:
                for parameter in group["params"]:
                    parameter.data.add_(torch.randn_like(parameter), alpha=1e-3 * random.random() * np.random.rand())

        return noisy

    def optimizer(self, optimizer):
        self.trained = optimizer
        return optimizer


class Explosion(Method):
    """Diverges in the fourth step."""

    card = Card(name="explosion", **FACTS)

    def loss(self, loss):
        self.changed("loss")
        self.calls = 0

        def exploding(model, batch):
            self.calls += 1
            total, count = loss(model, batch)
            return total * (math.nan if self.calls == 4 else 1), count

        return exploding


@pytest.fixture(scope="module")
def accumulated() -> Comparison:
    """Double accumulation at equal batch."""
    short = {"documents": generated_text(documents=300, words=20)}
    recipe = tiny_recipe(train={"batch": 8, "steps": 50}, data=short)
    return compare(recipe, set_=["train.micro_batch=4"], blocks=3, steps=2)


@pytest.mark.parametrize("switch", [f"{HERE}:Noise", "model.dropout=0.1", "sam"])
def test_losses_are_bit_for_bit_those_of_a_run_on_its_own(tiny, switch):
    recipe = Recipe.load(tiny(train={"steps": 40}))
    outside = rng_state()
    comparison = compare(recipe, with_=[switch], blocks=2, steps=2)
    assert torch.equal(outside["torch"], rng_state()["torch"]), "a comparison left its mark on the caller's generator"
    for arm, alone in ((comparison.a, recipe), (comparison.b, recipe.override(parse_switch(switch)))):
        trainer = build_trainer(alone)
        expected = [(r["tokens"], r["loss"]) for r in (trainer.train_step() for _ in arm.losses[0])]
        assert arm.losses[0] == expected
        assert arm.tokens == expected[-1][0]
        assert trainer.evaluate()["eval_loss"] == arm.metrics["eval_loss"]


def test_double_accumulation_has_equal_losses_and_about_half_the_activations(accumulated, tiny):
    ratios = accumulated.ratios
    assert ratios["train_loss"].value == pytest.approx(1, abs=1e-5)
    # On the same sequences, although `eval.batches` counts batches of the micro-batch's size.
    assert ratios["eval_loss"].value == pytest.approx(1, abs=1e-5)
    saved = [_saved_bytes(tiny(train={"batch": 8, "micro_batch": m, "steps": 1})) for m in (8, 4)]
    assert saved[1] == pytest.approx(saved[0] / 2, rel=0.05)  # some of it, as the rotary tables, has no batch
    less = accumulated.a.metrics["live_peak_bytes"] - accumulated.b.metrics["live_peak_bytes"]
    # Besides what autograd saved, the micro-batch's temporaries at the peak shrink with it.
    assert 1 <= less / (saved[0] - saved[1]) <= 1.6


def _saved_bytes(raw) -> int:
    """What autograd keeps of one micro-batch's forward pass: the reference for the activations in the live peak."""
    trainer = build_trainer(Recipe.load(raw))
    weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        micro = next(trainer.stream).micro[0]
        loss, _ = trainer.loss(trainer.model, micro)
    given = {tensor.untyped_storage().data_ptr() for tensor in micro.values()}
    del loss
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in given)


def test_live_peak_is_that_of_a_plain_run_and_the_same_every_time(accumulated, tiny):
    recipe = tiny(train={"batch": 8, "steps": 50}, data={"documents": generated_text(documents=300, words=20)})
    again = compare(recipe, set_=["train.micro_batch=4"], blocks=1, steps=1)
    for arm in ("a", "b"):
        first, second = (getattr(c, arm).metrics["live_peak_bytes"] for c in (accumulated, again))
        assert first == pytest.approx(second, rel=1e-3)


def test_blocks_have_equal_tokens_where_steps_have_not(tiny):
    comparison = compare(tiny(train={"steps": 200}), set_=["train.batch=8"], blocks=2, steps=2)
    assert comparison.a.tokens == comparison.b.tokens
    # B: two steps to know its memory, then a block that warms up and two that count, of two steps each.
    assert [len(arm.losses[0]) for arm in (comparison.a, comparison.b)] == [16, 8]
    assert any("tokens a step" in note for note in comparison.notes)
    assert comparison.ratios["live_peak_bytes"].value > 1.3


def test_other_tokenizer_is_compared_per_byte(tiny):
    comparison = compare(tiny(), set_=["data.tokenizer=bpe", "data.vocab=300"], blocks=1, steps=1)
    assert {"seconds_per_byte", "bits_per_byte"} <= comparison.ratios.keys()
    assert not {"seconds_per_token", "train_loss", "eval_loss"} & comparison.ratios.keys()


def test_other_sequences_are_evaluated_on_the_same_text(tiny):
    short = {"documents": generated_text(documents=300, words=20)}
    comparison = compare(tiny(data=short), set_=["data.sequence=16", "optimizer.lr=0.0101"], blocks=1, steps=1)
    assert any("whole validation split" in note for note in comparison.notes)
    loss, bits = (comparison.a.metrics[key] / comparison.b.metrics[key] for key in ("eval_loss", "bits_per_byte"))
    assert loss == pytest.approx(bits, rel=1e-6), "the same targets over the same bytes"


def test_repeats_give_losses_a_spread(tiny):
    comparison = compare(tiny(), with_=["ema:decay=0.5"], blocks=2, steps=1, repeats=2)
    assert comparison.ratios["eval_loss"].count == 2
    assert comparison.ratios["seconds_per_token"].count == 4
    assert comparison.a.losses[0] != comparison.a.losses[1]
    assert comparison.b.methods["ema"]


def test_plain_data_and_back(accumulated):
    data = json.loads(json.dumps(accumulated.to_dict()))
    again = Comparison.from_dict(data)
    assert again.ratios == accumulated.ratios
    assert again.a.metrics == accumulated.a.metrics


def test_table_shows_ratios_differences_and_notes(accumulated):
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as captured:
        console.print(accumulated.table())
    shown = captured.get()
    for part in ("B: train.micro_batch=4", "time per token", "live peak", "eval loss", "B / A", "None -> 4"):
        assert part in shown


def test_longer_than_the_recipe_is_said(tiny):
    comparison = compare(tiny(train={"steps": 3}), set_=["optimizer.lr=0.02"], blocks=1, steps=1)
    assert any("longer than the recipe" in note for note in comparison.notes)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, HeadwayError, "same recipe"),
        ({"with_": ["ema"], "against": ["ema"]}, HeadwayError, "same recipe"),
        ({"set_": ["train.batch=4"]}, HeadwayError, "same recipe"),
        ({"with_": [f"{HERE}:Nothing"]}, MethodError, "changed nothing"),
        ({"with_": [f"{HERE}:Explosion"]}, DivergedError, "arm B"),
        ({"with_": ["emma"]}, RecipeError, "Did you mean 'ema'"),
        ({"with_": ["ema:decay"]}, RecipeError, "option without a value"),
        ({"with_": ["=1"]}, RecipeError, "neither a method nor a setting"),
        ({"with_": ["ema:decay=2"]}, RecipeError, "methods.ema.decay"),
        ({"set_": ["train.bach=2"]}, RecipeError, "train.bach"),
        ({"set_": ["data.on_exhausted=stop"]}, HeadwayError, "ran out of data"),
        ({"with_": ["ema"], "blocks": 0}, HeadwayError, "blocks"),
    ],
)
def test_refused(tiny, options, error, message):
    recipe = tiny(train={"batch": 4, "micro_batch": 4}, data={"documents": generated_text(documents=4)})
    with pytest.raises(error, match=message):
        compare(recipe, **{"blocks": 30, "steps": 1, **options})


@pytest.mark.parametrize(
    ("switch", "override"),
    [
        ("ema", {"methods": {"ema": {}}}),
        ("ema:decay=0.9", {"methods": {"ema": {"decay": 0.9}}}),
        ("m:a=[1,2],b=x,c=null", {"methods": {"m": {"a": [1, 2], "b": "x", "c": None}}}),
        ("pack.mod:Class", {"methods": {"pack.mod:Class": {}}}),
        ("pack.mod:Class:k=1", {"methods": {"pack.mod:Class": {"k": 1}}}),
        ("train.batch=4", {"train": {"batch": 4}}),
    ],
)
def test_switches(switch, override):
    assert parse_override(parse_switch(switch)) == override


def test_window_mean_weighs_steps_by_the_tokens_inside():
    losses = [(10, 4.0), (20, 2.0), (40, 1.0)]
    assert window_mean(losses, 0, 40) == pytest.approx((10 * 4 + 10 * 2 + 20 * 1) / 40)
    assert window_mean(losses, 20, 40) == 1.0
    assert window_mean(losses, 15, 25) == pytest.approx((5 * 2 + 5 * 1) / 10)
    assert math.isnan(window_mean(losses, 40, 50))
