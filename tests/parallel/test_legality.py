"""Layouts that do not fit are refused in one sentence before any rank starts.

No process group, no model and no data is made here: that the refusals come without them is part of what is tested.

Needs gloo. Run: pytest tests/parallel/test_legality.py
"""

import re
import sys
from typing import Any

import pytest

from headway.cli.main import main
from headway.core.errors import RecipeError
from headway.parallel.legality import check_layout
from headway.parallel.mesh import Layout, settle
from tests.parallel.recipes import recipe

MOE = {"family": "moe", "experts": 8, "top_k": 2, "expert_width": 48}

BAD: dict[str, tuple[int, dict[str, Any], str]] = {
    # name: (ranks, recipe, what the message must say)
    "product too small": (4, {"parallel": {"shard": 2}}, "makes 2 ranks, and there are 4"),
    "product too large": (2, {"parallel": {"shard": 2, "tensor": 2}}, "makes 4 ranks, and there are 2"),
    "groups do not make up the ranks": (4, {"parallel": {"tensor": 3}}, r"groups of 3 ranks.*start 3 or 6 ranks"),
    "three dimensions": (12, {"parallel": {"tensor": 2, "pipeline": 4}}, r"groups of 8.*start 8 or 16"),
    "batch": (3, {"parallel": {"shard": 3}}, r"4 sequences cannot be shared among 3 .*take 3 or 6"),
    "batch and replicas": (4, {"parallel": {"replicate": 4}, "train": {"batch": 6}}, r"6 sequences.*4 ranks.*4 or 8"),
    "batch smaller than ranks": (8, {"parallel": {"shard": 8}}, r"4 sequences.*8 ranks.*take 8"),
    "micro-batch": (2, {"parallel": {"shard": 2}, "train": {"batch": 12, "micro_batch": 4}}, r"4 .*6 seq.*3 or 6"),
    "heads": (3, {"parallel": {"tensor": 3}}, r"of 3 does not divide the 4 heads.*1, 2 or 4"),
    "kv heads": (4, {"parallel": {"tensor": 4}, "model": {"heads": 12, "kv_heads": 6, "hidden": 48}}, " 6 key and"),
    "width of the feed-forward block": (2, {"parallel": {"tensor": 2}, "model": {"intermediate": 45}}, "45 channels"),
    "tokens among tensor ranks": (2, {"parallel": {"tensor": 2}, "data": {"sequence": 31}}, r"31 tokens.*: false"),
    "sequence length": (4, {"parallel": {"sequence": 4}, "data": {"sequence": 30}}, r"30 tokens.*28 or 32"),
    "zigzag": (2, {"parallel": {"sequence": {"degree": 2, "kind": "ring"}}, "data": {"sequence": 30}}, r"4 .*28 or 32"),
    "more ranks than heads": (8, {"parallel": {"sequence": 8}}, r"8 ranks exchange heads, and each has 4"),
    "heads already cut": (8, {"parallel": {"sequence": 4, "tensor": 2}}, r"4 ranks exchange heads, and each has 2"),
    "ring without usp": (2, {"parallel": {"sequence": {"degree": 2, "ring": 2}}}, "is for kind usp"),
    "usp without rings": (4, {"parallel": {"sequence": {"degree": 4, "kind": "usp"}}}, r"rings of 4 ranks.*2 or 4"),
    "usp with odd rings": (4, {"parallel": {"sequence": {"degree": 4, "kind": "usp", "ring": 3}}}, r"of 3 .*2 or 4"),
    "scan of softmax": (2, {"parallel": {"sequence": {"degree": 2, "kind": "all-scan"}}}, "softmax attention"),
    "more stages than blocks": (8, {"parallel": {"pipeline": 8}, "train": {"batch": 8, "micro_batch": 1}},
                                r"8 stages .*of 4 blocks.*a degree of 4"),
    "too many chunks": (2, {"parallel": {"pipeline": {"degree": 2, "chunks": 3, "schedule": "interleaved-1f1b"}},
                            "train": {"micro_batch": 1}}, r"6 stages \(2 ranks x 3\) of 4 blocks.*2 chunks"),
    "nothing to interleave": (2, {"parallel": {"pipeline": {"degree": 2, "schedule": "interleaved-1f1b"}},
                                  "train": {"micro_batch": 1}}, r"of 1 leaves.*2 or more"),
    "chunks of 1f1b": (2, {"parallel": {"pipeline": {"degree": 2, "chunks": 2}}, "train": {"micro_batch": 1}},
                       "one stage on each rank"),
    "zbv": (2, {"parallel": {"pipeline": {"degree": 2, "schedule": "zbv-zero-bubble"}}, "train": {"micro_batch": 1}},
            r"of 1 does not fit zbv.*take 2"),
    "one matrix in two stages of a rank": (
        4, {"parallel": {"pipeline": {"degree": 2, "chunks": 2, "schedule": "zbv-zero-bubble"}, "shard": 2},
            "train": {"batch": 8}}, r"model.tied.* 2 ranks cannot share.*false"),
    "chunks without a pipeline": (2, {"parallel": {"shard": 2, "pipeline": {"chunks": 2}}}, "its degree is 1"),
    "too few micro-batches": (4, {"parallel": {"pipeline": 4}, "train": {"micro_batch": 2}},
                              r"2 micro-batches .*4 sequences, fewer than the 4 stages.*take 1 or less"),
    "one micro-batch": (2, {"parallel": {"pipeline": 2}, "train": {"micro_batch": 4}}, r"take 2 or less"),
    "batch smaller than the pipeline": (4, {"parallel": {"pipeline": 4}, "train": {"batch": 2, "micro_batch": 1}},
                                        "train.batch of 4 or more"),
    "rounds of the interleaved schedule": (
        2, {"parallel": {"pipeline": {"degree": 2, "chunks": 2, "schedule": "interleaved-1f1b"}},
            "train": {"batch": 10, "micro_batch": 2}}, r"5 micro-batches.*equal rounds.*take 1 or 5"),
    "experts of a dense model": (2, {"parallel": {"experts": 2}}, "a llama model has none"),
    "budget": (2, {"memory": {"budget": "1GiB"}}, "plans for one process, and there are 2 ranks"),
    "plain checkpoints": (2, {"checkpoint": {"mode": "plain"}}, "take checkpoint.mode=lazy"),
    "automatic checkpoints": (2, {"checkpoint": {"every": "auto"}}, "give a number of steps"),
    "a method for one process": (2, {"methods": {"sam": {}}}, r"sam: is not made for parallel.shard.*one process"),
    "a method for some dimensions": (
        2, {"parallel": {"pipeline": 2}, "methods": {"token-accumulation": {"targets": 9}}},
        "it is for replicate, shard, sequence, tensor"),
}  # fmt: skip


def laid_out(ranks: int, changes: dict[str, Any]) -> Layout:
    chosen = recipe(**changes)
    layout = settle(chosen.parallel, ranks, chosen.train.batch)
    check_layout(chosen, layout)
    return layout


@pytest.mark.parametrize("name", BAD)
def test_a_bad_layout_is_refused_with_its_numbers(name: str) -> None:
    ranks, changes, said = BAD[name]
    with pytest.raises(RecipeError) as refused:
        laid_out(ranks, changes)
    message = str(refused.value)
    assert re.search(said, message, re.IGNORECASE), message
    assert re.match(r"(parallel|train|data|model|memory|checkpoint|methods)[\w.-]*: ", message), message
    assert "\n" not in message and len(message) < 300, message


def test_there_are_many_ways_to_be_wrong() -> None:
    assert len(BAD) >= 30


@pytest.mark.parametrize("options", ["tensor=0", "shard=0", "tensr=2", "tensor={degre: 2}", "pipeline.schedule=2f2b",
                                     "sequence.kind=circle"])  # fmt: skip
def test_misspelt_options_are_refused_by_the_recipe(options: str) -> None:
    with pytest.raises(RecipeError, match="parallel"):
        recipe().override(f"parallel.{options}")


def test_the_command_line_refuses_before_a_rank_starts(tmp_path: Any, capsys: Any, monkeypatch: Any) -> None:
    recipe(parallel={"tensor": 3}).save(tmp_path / "recipe.yaml")
    monkeypatch.setitem(sys.modules, "headway.parallel.launch", None)  # importing it would be an error
    assert main(["train", str(tmp_path / "recipe.yaml"), "--ranks", "3", "--run", str(tmp_path / "run")]) == 2


def test_a_divided_recipe_alone_names_the_ranks_that_it_needs(tmp_path: Any, capsys: Any) -> None:
    recipe(parallel={"tensor": 2, "shard": 2}).save(tmp_path / "recipe.yaml")
    assert main(["train", str(tmp_path / "recipe.yaml"), "--run", str(tmp_path / "run")]) == 2
    assert "--ranks 4" in capsys.readouterr().err


def test_what_nobody_asked_for_is_shared_as_the_batch_allows() -> None:
    assert laid_out(4, {}) == Layout(shard=4)
    assert laid_out(4, {"train": {"batch": 2}}) == Layout(shard=2, sequence=2)
    assert laid_out(4, {"parallel": {"tensor": 2}}) == Layout(shard=2, tensor=2)
    assert laid_out(4, {"parallel": {"replicate": 2}}) == Layout(replicate=2, shard=2)


def test_ranks_and_groups() -> None:
    layout = Layout(pipeline=2, shard=2, sequence=1, tensor=2)
    assert [layout.rank(**layout.coordinates(rank)) for rank in range(8)] == list(range(8))
    assert layout.groups("tensor") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.groups("shard") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert layout.groups("pipeline") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert layout.groups("shard", "tensor") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert str(layout) == "pipeline 2 x shard 2 x tensor 2"
