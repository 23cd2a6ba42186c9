"""`headway parity`: layouts beside one process, and its exit status. Needs gloo; `pytest tests/cli/test_parity.py`."""

import json

import pytest

from headway.cli.main import main
from headway.core.recipe import Recipe
from headway.parallel import parity as harness
from headway.parallel.layouts import every_layout

EXACT = ["train.precision=fp64", "train.micro_batch=2"]


def test_an_exact_layout_agrees_and_says_what_it_did(recipe, capsys):
    command = ["parity", str(recipe), *EXACT, "parallel.tensor=2", "--ranks", "2", "--steps", "2"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "tensor 2: loss" in out and "evaluation" in out and "embedding.weight" in out
    assert "2 ranks and one process agree" in out and "\n- " in out
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["agrees"] and found["layout"] == "tensor 2" and len(found["losses"]) == 3
    assert 0 < found["gradient_difference"] < found["tolerance"] == 1e-9


def test_a_difference_above_the_tolerance_is_the_exit_status(recipe, capsys):
    assert main(["parity", str(recipe), "train.precision=bf16", "--steps", "1", "--tolerance", "1e-12"]) == 1
    assert "DO NOT AGREE" in capsys.readouterr().out
    assert main(["parity", str(recipe), "train.precision=bf16", "--steps", "1"]) == 0
    assert "tolerance 0.02" in capsys.readouterr().out


def test_a_layout_that_does_not_fit_is_one_sentence(recipe, capsys):
    assert main(["parity", str(recipe), "parallel.tensor=3", "--ranks", "4"]) == 2
    said = capsys.readouterr().err
    assert "do not make up 4" in said and "Traceback" not in said


def test_every_layout_is_tried_or_refused_with_its_reason(recipe, capsys, monkeypatch):
    command = ["parity", str(recipe), *EXACT, "--ranks", "2", "--steps", "1", "--layouts"]
    assert main(command) == 0
    out = capsys.readouterr().out
    for name in ("tensor 2", "sequence 2", "shard 2", "replicate 2", "pipeline 2"):
        assert f"{name} " in out
    assert "5 of 5 layouts agree" in out
    # Three ranks divide neither heads nor batch, and a pipeline of three has more stages than there are blocks.
    assert main([*command, "--ranks", "3"]) == 1
    out = capsys.readouterr().out
    assert "pipeline 3 is refused: parallel.pipeline: makes 3 stages" in out
    assert "shard 3 is refused: train.batch: of 4" in out

    train = harness._train

    def breaks(rank, *arguments):
        if rank == 1:
            raise ValueError("broken on purpose")
        return train(rank, *arguments)

    monkeypatch.setattr(harness, "_train", breaks)
    assert main(command) == 1
    out = capsys.readouterr().out
    assert out.count("FAILED: ValueError: broken on purpose") == 5 and "0 of 5 layouts agree" in out


def test_layouts_are_all_products_and_experts_get_all_their_grids():
    plain = Recipe.load({"model": {"hidden": 32, "layers": 4, "heads": 4}, "train": {"steps": 1, "batch": 8},
                         "data": {"source": "python-stdlib", "tokenizer": "byte", "sequence": 32}})  # fmt: skip
    names = [str(candidate.layout) for candidate in every_layout(plain, 4)]
    assert len(names) == len(set(names)) == 15
    assert all(candidate.layout.world == 4 and not candidate.refused for candidate in every_layout(plain, 4))
    model = {"family": "moe", "hidden": 32, "layers": 4, "heads": 4, "experts": 4, "top_k": 2}
    experts = Recipe.load({"model": model, "train": {"steps": 1, "batch": 8},
                           "data": {"source": "python-stdlib", "tokenizer": "byte", "sequence": 32}})  # fmt: skip
    grids = {(c.layout.expert, c.layout.expert_tensor) for c in every_layout(experts, 4) if c.layout.pipeline == 1}
    assert grids == {(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)}
    assert {(c.layout.expert, c.layout.expert_tensor) for c in every_layout(experts, 4) if c.layout.pipeline == 4} == {
        (1, 1)
    }


@pytest.mark.parametrize("word", ["one process", "Exit status 0"])
def test_help_says_what_is_compared(word, capsys):
    assert main(["parity", "--help"]) == 0
    assert word in " ".join(capsys.readouterr().out.split())


def test_a_pipeline_is_drawn(recipe, tmp_path, capsys):
    command = ["parity", str(recipe), *EXACT, "--ranks", "2", "--steps", "2", "--trace", str(tmp_path / "trace.json")]
    assert main([*command, "parallel.pipeline=2"]) == 0
    rows = [row for row in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if row["ph"] == "X"]
    assert {row["tid"] for row in rows} == {0, 1} and len(rows) % 4 == 0, "forward and backward on both ranks"
    capsys.readouterr()
    assert main([*command, "parallel.shard=2"]) == 2
    assert "shard 2 has none" in capsys.readouterr().err
