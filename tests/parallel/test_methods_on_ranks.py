"""Every method on every dimension that its card names: losses and gradients of one process, in fp64.

Needs gloo; `pytest tests/parallel/test_methods_on_ranks.py`.
"""

from typing import Any

import pytest

from headway.core import registry
from headway.core.recipe import Recipe
from headway.parallel.parity import parity
from tests.test_methods import recipe_with

DIMENSIONS: dict[str, dict[str, Any]] = {
    "replicate": {"replicate": 2},
    "shard": {"shard": 2},
    "sequence": {"sequence": 2},
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2},
    "experts": {"shard": 2, "experts": 2},
}
CARDS = {name: registry.find("methods", name, "methods").card for name in registry.names("methods")}
NAMED = [(name, dimension) for name, card in CARDS.items() for dimension in card.parallel]


def test_cards_name_dimensions_that_exist() -> None:
    assert {dimension for _, dimension in NAMED} <= set(DIMENSIONS)
    assert len(NAMED) >= 20


@pytest.mark.parametrize(("name", "dimension"), NAMED)
def test_a_method_does_on_ranks_what_it_does_in_one_process(name: str, dimension: str) -> None:
    train = {"precision": "fp64", "steps": 3}
    base = recipe_with(name, train=train)
    if dimension == "experts" and base.model.family != "moe":  # type: ignore[attr-defined]
        base = recipe_with(name, train=train, model={"family": "moe", "experts": 4, "expert_width": 32})
    laid_out = Recipe.load({**base.to_dict(), "parallel": DIMENSIONS[dimension]})
    found = parity(laid_out, 2)
    assert found.loss_difference < 1e-9 and found.gradient_difference < 1e-9, found
