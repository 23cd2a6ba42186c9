"""The registry-wide suite: every method, with no list of exceptions.

Needs nothing. Run: pytest tests/test_methods.py
"""

from __future__ import annotations

import copy
import itertools
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from headway.core import registry
from headway.core.build import build_trainer
from headway.core.errors import MethodError, RecipeError
from headway.core.method import POINTS, Card, Method, resolve
from headway.core.recipe import Recipe
from tests.conftest import tiny_recipe

METHODS = registry.names("methods")
DOCS = Path(__file__).parents[1] / "docs" / "methods"

# What a method needs in order to have something to act on; where nothing is said, its defaults do on the tiny recipe.
SETTINGS: dict[str, dict[str, Any]] = {
    "deep-optimizer-states": {"options": {"stride": 2, "subgroup": 4096}},
    "length-warmup": {"options": {"first": 8, "steps": 10}},
    "token-accumulation": {"options": {"targets": 200}},
    "one-epoch": {"model": {"dropout": 0.1}},
    "ssdtrain": {"options": {"min_bytes": 1}},
    "memo": {"options": {"alpha": 0.5}, "model": {"layers": 4}},
    "fuyou": {"train": {"clip": None}},
    "global-lbl": {"model": {"family": "moe", "experts": 4, "expert_width": 32}},
    "skip-pipeline": {"options": {"stages": 3, "path_length": 2}, "model": {"layers": 4}},
}
# A recipe in which the method has nothing to act on; it must be refused, or stop for having changed nothing.
NOTHING: dict[str, dict[str, Any]] = {
    "global-lbl": {},  # a model without experts
    "length-warmup": {"options": {"first": 32}},
    "memo": {"model": {"layers": 2}},  # the last two are never swapped
    "skip-pipeline": {"options": {"stages": 2, "path_length": 2, "swap": "none"}},  # all stages in order
}


def recipe_with(*names: str, **sections: Any) -> Recipe:
    """The tiny recipe with these methods on."""
    methods = {}
    for name in names:
        settings = dict(SETTINGS.get(name, {}))
        methods[name] = settings.pop("options", {})
        for key, value in settings.items():
            sections[key] = {**value, **sections.get(key, {})}
    return Recipe.load(tiny_recipe(methods=methods, **sections))


def losses(recipe: Recipe, steps: int = 20) -> list[float]:
    """The losses of the first steps."""
    trainer = build_trainer(recipe)
    return [trainer.train_step()["loss"] for _ in range(steps)]


@pytest.mark.parametrize("name", METHODS)
def test_card_is_complete(name: str) -> None:
    cls = registry.find("methods", name, "methods")
    assert issubclass(cls, Method)
    card = cls.card
    assert isinstance(card, Card)
    assert card.name == name
    for text in (card.title, card.paper, card.summary, card.buys, card.costs):
        assert len(text) >= 10, text
    assert card.exact != bool(card.approximates), "what is approximate says what it approximates"
    assert cls.points(), "wraps nothing"
    assert set(cls.points()) <= set(POINTS)
    for other in (*card.before, *card.after, *card.needs, *card.refuses):
        assert other in METHODS, f"{name} speaks of {other}, which does not exist"
    for sentence in (*card.needs.values(), *card.refuses.values()):
        assert len(sentence.split()) >= 4, "a reason is a sentence"
    for key, info in cls.Options.model_fields.items():
        assert info.description, f"option {key} has no help text"


@pytest.mark.parametrize("name", METHODS)
def test_on_reports_changes_and_off_leaves_no_trace(name: str) -> None:
    plain = recipe_with(name).override(f"methods.{name}=null")
    assert name not in plain.methods
    before = losses(plain, 3)
    trainer = build_trainer(recipe_with(name))
    trainer.train_step()
    assert trainer.changes[name]
    del trainer
    assert losses(plain, 3) == before, "a run without the method is not bit-identical after one with it"


@pytest.mark.parametrize("name", [n for n in METHODS if registry.find("methods", n, "methods").card.exact])
def test_exact_is_exact(name: str) -> None:
    plain = losses(recipe_with(name).override(f"methods.{name}=null"))
    assert losses(recipe_with(name)) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_nothing_to_change_is_an_error(name: str) -> None:
    if name in NOTHING:
        settings = dict(NOTHING[name])
        options = settings.pop("options", {})
        with pytest.raises(MethodError, match=f"methods.{name}"):
            build_trainer(Recipe.load(tiny_recipe(methods={name: options}, **settings)))
        return
    # A method whose every point hands back what it was given must be stopped, whatever it is.
    cls = registry.find("methods", name, "methods")
    idle = type("Idle", (cls,), {point: lambda self, part: part for point in cls.points()})
    globals()["Idle"] = idle
    recipe = recipe_with(name)
    recipe = recipe.model_copy(update={"methods": {f"{__name__}:Idle": recipe.methods[name]}})
    with pytest.raises(MethodError, match="changed nothing"):
        build_trainer(recipe)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_resume_equals_undisturbed(name: str, precision: str) -> None:
    recipe = recipe_with(name, train={"precision": precision, "micro_batch": 2})
    undisturbed = build_trainer(recipe)
    expected = [undisturbed.train_step()["loss"] for _ in range(8)]
    first = build_trainer(recipe)
    got = [first.train_step()["loss"] for _ in range(4)]
    state = pickle.loads(pickle.dumps(first.state_dict()))
    second = build_trainer(recipe)
    torch.manual_seed(999)
    second.load_state_dict(state)
    got += [second.train_step()["loss"] for _ in range(4)]
    assert got == expected
    assert second.evaluate() == undisturbed.evaluate()


@pytest.mark.parametrize("pair", list(itertools.combinations(METHODS, 2)), ids="+".join)
def test_every_pair_trains_or_is_refused(pair: tuple[str, str]) -> None:
    try:
        trainer = build_trainer(recipe_with(*pair))
    except MethodError as error:
        assert any(name in str(error) for name in pair)
        assert len(str(error).split()) >= 6, "a refusal is a sentence"
        return
    for _ in range(20):
        assert trainer.train_step()["loss"] < 10
    assert set(trainer.changes) == set(pair)


def test_order_in_the_recipe_does_not_matter() -> None:
    names: list[str] = []  # as many as go together
    for name in METHODS:
        refuses = registry.find("methods", name, "methods").card.refuses
        if not any(n in refuses or name in registry.find("methods", n, "methods").card.refuses for n in names):
            names.append(name)
    assert len(names) >= 5
    orders = [[m.card.name for m in resolve(recipe_with(*order))] for order in (names, names[::-1])]
    assert orders[0] == orders[1]
    assert losses(recipe_with("ema", "length-warmup", "token-accumulation"), 4) == losses(
        recipe_with("token-accumulation", "length-warmup", "ema"), 4
    )


@pytest.mark.parametrize("name", METHODS)
def test_options_copy_pickle_and_refuse_unknown_names(name: str) -> None:
    options = recipe_with(name).methods[name]
    assert copy.deepcopy(options) == options
    assert pickle.loads(pickle.dumps(options)) == options
    with pytest.raises(RecipeError, match=rf"methods\.{name}\.nonsense"):
        Recipe.load(tiny_recipe(methods={name: {"nonsense": 1}}))


@pytest.mark.parametrize("name", [*METHODS, "datastates"])  # the default checkpointer has a page as methods have
def test_documentation_page_and_its_snippets(name: str) -> None:
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    for heading in ("What it does", "When", "Switch", "Own loop", "Options", "Costs", "Measured", "Reference"):
        assert re.search(rf"^##? .*{heading}", page, re.M | re.I), f"no section {heading!r}"
    switches = re.findall(r"```yaml\n(.*?)```", page, re.S)
    assert switches, "no recipe on the page"
    import yaml

    for text in switches:
        switch = yaml.safe_load(text)
        if "methods" in switch:
            Recipe.load(tiny_recipe(methods=switch["methods"]))
    snippets = re.findall(r"```python\n(.*?)```", page, re.S)
    assert snippets, "no plain function on the page"
    script = "\n".join(snippets) + (
        "\nimport sys\nassert 'headway.core.trainer' not in sys.modules, 'the plain function imports the trainer'\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
