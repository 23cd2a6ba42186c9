"""docs/parallel.md and the torchtitan page: snippets run, messages and the table of families are what the code says.

Needs gloo; `pytest tests/parallel/test_parallel_docs.py`. The table of methods is made by docs/reference.py, which
tests/test_docs.py holds to.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from headway.core.errors import RecipeError
from headway.parallel.legality import check_layout
from headway.parallel.mesh import settle
from tests.parallel.recipes import recipe

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "parallel.md").read_text(encoding="utf-8")
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"family": "gpt2", "hidden": 32, "layers": 4, "heads": 4, "context": 64},
    "moe": {"family": "moe", "hidden": 32, "layers": 4, "heads": 4, "context": 64, "experts": 4, "top_k": 2},
    "gla": {"family": "gla", "hidden": 32, "layers": 4, "heads": 4, "context": 64},
    "transformers": {"family": "transformers", "path": "nowhere"},
}


@pytest.mark.parametrize("page", ["parallel.md", "methods/torchtitan.md"])
def test_snippets_run(page: str) -> None:
    snippets = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    assert snippets
    for text in snippets:
        exec(compile(text, page, "exec"), {"__name__": page})


def fits(family: str, **parallel: Any) -> bool:
    ranks = 2
    wanted = recipe(model=MODELS[family], parallel=parallel)
    try:
        check_layout(wanted, settle(wanted.parallel, ranks, 4))
    except RecipeError:
        return False
    return True


def rows() -> list[tuple[str, list[str]]]:
    table = PAGE.split("Models of Headway's own:")[1].split("Not on many ranks")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.strip().splitlines()[2:]]
    return [(family, row[1:]) for row in cells for family in re.findall(r"`(\S+?)`", row[0])]


@pytest.mark.parametrize(("family", "row"), rows(), ids=[family for family, _ in rows()])
def test_the_table_of_families_is_what_legality_says(family: str, row: list[str]) -> None:
    samples, tensor, sequence, pipeline, experts = row
    assert fits(family, shard=2) == fits(family, replicate=2) == (samples == "yes")
    assert fits(family, tensor=2) == (tensor == "yes")
    assert fits(family, pipeline=2) == (pipeline == "yes")
    assert fits(family, shard=2, experts=2) == (experts == "yes")
    for kind in ("ulysses", "ring", "usp", "all-scan", "lasp1", "lasp2"):
        ring = {"ring": 2} if kind == "usp" else {}
        assert fits(family, sequence={"degree": 2, "kind": kind, **ring}) == (f"`{kind}`" in sequence), kind


def test_quoted_refusals_are_the_ones_given() -> None:
    for ranks, parallel in ((3, {"tensor": 3}), (3, {"shard": 3})):
        wanted = recipe(parallel=parallel)
        with pytest.raises(RecipeError) as refused:
            check_layout(wanted, settle(wanted.parallel, ranks, 4))
        assert f"headway: {refused.value}\n" in PAGE
