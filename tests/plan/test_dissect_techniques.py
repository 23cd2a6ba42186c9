"""Which techniques may be combined: the 40 published sets, letter by letter, and rules over recipes.

Needs nothing but Headway: pytest tests/plan/test_dissect_techniques.py
"""

import pytest

from headway.core.errors import HeadwayError
from headway.core.recipe import Recipe
from headway.plan.dissect.techniques import (
    PUBLISHED,
    combinations,
    headway_techniques,
    published,
    published_rule,
    recipe_rule,
    technique,
)

# As the authors' script lists them.
PUBLISHED_SETS = [
    "-",
    "F",
    "R",
    "L",
    "QL",
    "Z2",
    "Z2O",
    "Z3",
    "Z3O",
    "F+R",
    "F+L",
    "F+QL",
    "F+Z2",
    "F+Z2O",
    "F+Z3",
    "F+Z3O",
    "R+L",
    "R+QL",
    "R+Z2",
    "R+Z2O",
    "R+Z3",
    "R+Z3O",
    "L+Z2",
    "L+Z2O",
    "L+Z3",
    "L+Z3O",
    "F+R+L",
    "F+R+QL",
    "F+R+Z2",
    "F+R+Z2O",
    "F+R+Z3",
    "F+R+Z3O",
    "R+L+Z2",
    "R+L+Z2O",
    "R+L+Z3",
    "R+L+Z3O",
    "F+R+L+Z2",
    "F+R+L+Z2O",
    "F+R+L+Z3",
    "F+R+L+Z3O",
]


def test_the_published_letters_give_the_published_sets_in_their_order():
    assert len(PUBLISHED_SETS) == 40
    assert ["+".join(chosen) or "-" for chosen in published()] == PUBLISHED_SETS


@pytest.mark.parametrize("chosen", ["Z2+Z3", "L+QL", "QL+Z3", "F+L+Z2", "F+R+QL+Z2"])
def test_other_sets_have_a_reason(chosen):
    assert published_rule(tuple(chosen.split("+")))


def test_sizes_are_limited_and_the_empty_set_comes_first():
    assert combinations("abc", lambda _: None, 1) == [(), ("a",), ("b",), ("c",)]
    assert len(combinations("abcd", lambda _: None)) == 16
    assert len(combinations(PUBLISHED, lambda _: None, 8)) == 2**8


@pytest.fixture
def recipe(tiny):
    return Recipe.load(tiny(train={"batch": 4}))


def test_techniques_that_set_one_key_differently_exclude_each_other(recipe):
    techniques = {"bf16": ["train.precision=bf16"], "fp32": ["train.precision=fp32"], "compile": ["train.compile=true"]}
    rule = recipe_rule(recipe, techniques)
    assert rule(("bf16", "fp32")) == "bf16 and fp32 both set train.precision"
    sets = combinations(list(techniques), rule)
    assert sets == [(), ("bf16",), ("fp32",), ("compile",), ("bf16", "compile"), ("fp32", "compile")]


def test_the_recipe_and_the_cards_decide(recipe):
    rule = recipe_rule(recipe, {"bad": ["train.batch=0"], "ema": ["methods.ema={}"], "odd": ["methods.nothing={}"]})
    assert rule(("ema",)) is None
    assert "train.batch" in rule(("bad",))
    assert "nothing" in rule(("odd",))


def test_every_method_of_the_registry_is_a_technique(recipe):
    techniques = headway_techniques()
    assert {"bf16", "compile", "ema", "sam"} <= techniques.keys()
    assert recipe_rule(recipe, techniques)(("bf16", "ema")) is None


def test_technique_by_name_or_by_override():
    assert technique(None, "bf16") == ("train.precision=bf16",)
    assert technique("train.micro_batch=2", "accumulate") == ("train.micro_batch=2",)
    assert technique(["a=1", "b=2"], "x") == ("a=1", "b=2")
    with pytest.raises(HeadwayError, match="Did you mean 'compile'"):
        technique(None, "compil")
    with pytest.raises(HeadwayError, match="override"):
        technique("train.micro_batch", "accumulate")
