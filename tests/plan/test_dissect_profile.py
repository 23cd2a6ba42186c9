"""Profiles of recipes: the trainer's points are the phases, settings stand side by side, a report can be made of them.

Needs torch; trains tiny models: pytest tests/plan/test_dissect_profile.py
"""

import io
import json

import pytest
from rich.console import Console

from headway.core.build import build_trainer
from headway.core.errors import HeadwayError
from headway.core.recipe import Recipe
from headway.experiments.profile_report import profile_view
from headway.plan.dissect.measure import measure_recipe
from headway.plan.dissect.profile import profile_recipe, vary, with_settings
from headway.plan.dissect.training import dissect_trainer, phases_of


def text_of(tables):
    console = Console(width=240, file=io.StringIO())
    for table in tables:
        console.print(table)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def report():
    from tests.conftest import tiny_recipe

    return profile_recipe(tiny_recipe(train={"batch": 4, "micro_batch": 2, "precision": "bf16"}), steps=2)


def test_the_trainers_points_are_the_phases(tiny):
    trainer = build_trainer(Recipe.load(tiny()))
    parts = trainer.stream, trainer.gradients, trainer.update
    tree = dissect_trainer(trainer, steps=2, warmup=1, plain=1, peaks={})
    assert {"data", "forward", "backward", "gradients", "optimizer"} <= tree.phases.keys()
    assert "recompute" not in tree.phases
    assert any(leaf.kind == "op" for leaf in tree.phases["optimizer"].leaves())
    assert (trainer.stream, trainer.gradients, trainer.update) == parts
    assert trainer.step == 7, "every step was a real one"


def test_dissecting_does_not_change_the_training(tiny):
    plain, watched = (build_trainer(Recipe.load(tiny())) for _ in range(2))
    losses = [plain.train_step()["loss"] for _ in range(3)]
    with phases_of(watched):
        assert [watched.train_step()["loss"] for _ in range(3)] == losses
        assert watched.stream.state_dict() == plain.stream.state_dict()


def test_flops_agree_with_the_models_own_count(tiny):
    trainer = build_trainer(Recipe.load(tiny()))
    tree = dissect_trainer(trainer, steps=1, warmup=1, plain=1, peaks={})
    tokens = trainer.tokens / trainer.step
    # A fused backward computes the attention scores once more, and weights' gradients of the embedding are no product.
    expected = trainer.workload.flops_per_token(trainer.model) * tokens
    assert tree.root.total_flops == pytest.approx(expected, rel=0.1)
    assert tree.root.flops == tree.counted_flops


def test_a_report_of_one_setting(report, tmp_path):
    text = text_of(report.tables())
    for word in ("forward", "backward", "optimizer", "blocks.*", "aten::mm", "activations", "unwatched"):
        assert word in text
    assert "settings" not in text
    report.save(tmp_path / "profile.json")
    view = profile_view(tmp_path / "profile.json")
    assert {"forward", "backward"} <= {phase["name"] for phase in view["phases"]}
    data = json.loads((tmp_path / "profile.json").read_text())
    assert data["tree"]["children"] and data["memory"]["peak_bytes"] > 0 and data["tokens_per_second"] > 0
    assert "settings" not in data
    keys = {"name", "milliseconds", "share", "calls", "flops_rate", "children"}
    assert keys <= data["tree"]["children"][0].keys()


def test_accumulation_calls_the_model_twice(report):
    phases = report.base.value["tree"]["tree"]["children"]
    forward = next(child for child in phases if child["name"] == "forward")
    blocks = next(child for child in forward["children"] if child["name"] == "blocks.*")
    assert blocks["calls"] == 2 * 2, "two blocks, two micro-batches"


def test_measuring_keeps_raw_times_and_names_the_precision(tiny):
    value = measure_recipe({"recipe": tiny(train={"steps": None, "tokens": 10}), "warmup": 2, "measure": 3})
    assert len(value["step_seconds"]) == 3 and len(value["losses"]) == 5
    assert value["tokens_per_step"] == 4 * 32
    assert value["precision"] == {"float32": 1.0}
    assert value["peak_memory_bytes"] > 0 and value["process_peak_bytes"] > value["peak_memory_bytes"]
    assert value["parameters"] == value["trained"]


def test_running_out_of_data_is_told(tiny):
    recipe = tiny(data={"on_exhausted": "stop", "max_passes": 1, "documents": ["some text"] * 9})
    with pytest.raises(HeadwayError, match="data"):
        measure_recipe({"recipe": recipe, "warmup": 2, "measure": 500})


@pytest.mark.parametrize(
    "texts,settings",
    [
        (["train.precision=fp32,bf16"], [("train.precision=fp32",), ("train.precision=bf16",)]),
        (["a.b=1,2", "c=true"], [("a.b=1", "c=true"), ("a.b=2", "c=true")]),
        (["methods.ema={decay: 0.5},null"], [("methods.ema={decay: 0.5}",), ("methods.ema=null",)]),
        ([], [()]),
    ],
)
def test_varying(texts, settings):
    assert vary(texts) == settings


@pytest.mark.parametrize("text", ["train.precision", "=1,2", "x=", "x=[1"])
def test_nothing_to_vary(text):
    with pytest.raises(HeadwayError):
        vary([text])


def test_settings_by_name_and_their_combinations(tiny):
    recipe = Recipe.load(tiny())
    found = with_settings(recipe, {"bf16": None, "half": "train.micro_batch=2"}, combine=2)
    assert list(found) == ["none", "bf16", "half", "bf16+half"]
    assert found["bf16+half"] == ("train.precision=bf16", "train.micro_batch=2")
    with pytest.raises(HeadwayError, match=r"bad: cannot be set: train\.batch"):
        with_settings(recipe, {"bad": "train.batch=0"})
    with pytest.raises(HeadwayError, match="nonsense"):
        with_settings(recipe, {"nonsense": None})


@pytest.mark.slow
def test_settings_side_by_side_one_of_which_fails(tiny, tmp_path):
    settings = {"plain": (), "broken": ["optimizer.lr=1e30", "train.clip=null"]}
    said = []
    options = {"steps": 1, "measure": 3, "repeats": 1, "log": tmp_path / "log.jsonl", "say": said.append}
    report = profile_recipe(tiny(), settings=settings, batches=[4, 8], **options)
    found = [(s.name, s.batch, s.cell.status) for s in report.settings]
    assert found == [("plain", 4, "ok"), ("broken", 4, "nan"), ("plain", 8, "ok")]
    plain, broken = report.settings[:2]
    assert plain.time_ratio == 1.0 and broken.time_ratio is None
    assert plain.phases.keys() >= {"forward", "backward", "optimizer"}
    text = text_of(report.tables())
    assert "broken" in text and "nan" in text and "time ratio" in text
    report.save(tmp_path / "profile.json")
    assert [row["name"] for row in profile_view(tmp_path / "profile.json")["settings"]] == [f[0] for f in found]
    count = len(said)
    profile_recipe(tiny(), settings=settings, batches=[4, 8], **options)
    assert len(said) == count, "what the log has is not measured again"
