"""`headway methods`, `recipe`, `report` and `doctor`. Needs torch. Run: pytest tests/cli/test_catalogue.py"""

import json
from pathlib import Path

import pytest
import yaml

from headway.cli import doctor
from headway.cli.main import main
from headway.core import registry
from headway.core.recipe import Recipe


def answer(capsys, *arguments):
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_method_is_listed(capsys):
    cards = answer(capsys, "methods")
    assert [card["name"] for card in cards] == registry.names("methods")
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert all(card["name"] in out and card["buys"][:20] in out for card in cards)


@pytest.mark.parametrize("name", registry.names("methods"))
def test_one_card(name, capsys):
    card = answer(capsys, "methods", name)
    assert card["name"] == name and card["points"] and card["paper"]
    assert all(option["help"] for option in card["options"])
    assert main(["methods", name]) == 0
    out = capsys.readouterr().out
    assert card["title"] in out and all(option["name"] in out for option in card["options"])


@pytest.fixture
def evidence(tmp_path, monkeypatch) -> Path:
    """The file of an experiment named after a method, in the working folder's `evidence/`."""
    row = {"measure": "speed", "title": "Speed", "claimed": "2x", "measured": 1.9, "unit": "x",
           "expected": "at least 1.5", "bound": {"op": "at_least", "bound": [1.5]}, "held": True}  # fmt: skip
    outcome = {"name": "ema", "title": "T", "paper": "P", "claim": "C", "held": True, "quick": False, "rows": [row],
               "measurements": {}, "arms": {}, "recipe": {}, "seeds": [0], "minutes": 1, "date": "2026-01-01",
               "commit": None, "hardware": {"cpu": "a chip", "gpu": None}, "versions": {}}  # fmt: skip
    file = tmp_path / "evidence" / "ema.json"
    file.parent.mkdir()
    file.write_text(json.dumps(outcome))
    monkeypatch.chdir(tmp_path)
    return file


def test_a_card_shows_its_evidence(evidence, capsys):
    assert answer(capsys, "methods", "ema")["evidence"]["rows"][0]["measured"] == 1.9
    assert main(["methods", "ema"]) == 0
    out = capsys.readouterr().out
    assert "a chip" in out and "1.9 x" in out and "held" in out


def test_reports_on_runs_and_on_evidence(trained, evidence, tmp_path, capsys):
    assert main(["report", str(trained), str(trained), "--out", "both.html"]) == 0
    assert main(["report", str(evidence)]) == 0
    assert capsys.readouterr().out == "both.html\nreport.html\n"
    assert "<svg" in (tmp_path / "both.html").read_text() and "1.9" in (tmp_path / "report.html").read_text()


def test_an_unknown_method_gets_the_nearest(capsys):
    assert main(["methods", "emma"]) == 2
    assert "Did you mean 'ema'?" in capsys.readouterr().err


def test_check_prints_a_recipe_that_is_the_same(recipe, tmp_path, capsys):
    assert main(["recipe", "check", str(recipe), "methods.ema={decay: 0.9}", "train.batch=2"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(text)
    assert Recipe.load(tmp_path / "again.yaml") == Recipe.load(recipe, ["methods.ema={decay: 0.9}", "train.batch=2"])
    assert "wrap in this order: ema" in text
    checked = answer(capsys, "recipe", "check", recipe, "methods={sam: {}, ema: {}}")
    assert checked["recipe"]["train"]["batch"] == 4 and sorted(checked["order"]) == ["ema", "sam"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "train.stepz: is not an option here. Did you mean 'steps'?"),
        ("methods.emma={}", "methods.emma: there is no method 'emma'. Did you mean 'ema'?"),
        ("train.batch=0", "train.batch"),
        ("nonsense", "is not an override"),
    ],
)
def test_check_tells_what_is_wrong(override, message, recipe, capsys):
    assert main(["recipe", "check", str(recipe), override]) == 2
    out, err = capsys.readouterr()
    assert message in err and out == ""


def test_the_schema_describes_the_recipe(recipe, capsys):
    assert main(["recipe", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    keys = set(yaml.safe_load(recipe.read_text()))
    assert keys <= schema["properties"].keys()
    assert "base" in schema["properties"]


def test_doctor_measures_this_machine(tmp_path, capsys):
    facts = answer(capsys, "doctor", "--runs", tmp_path / "runs")
    assert set(facts["matmul_flops_per_second"]) == {"fp32", "bf16"}
    rates = [
        *facts["matmul_flops_per_second"].values(),
        facts["memory_bytes_per_second"],
        facts["disk_bytes_per_second"],
    ]
    assert all(rate > 1e6 for rate in rates)
    assert facts["extras"]["parquet"]["pyarrow"], "the tests have it"
    assert not (tmp_path / "runs").exists() and not list(tmp_path.iterdir()), "nothing is left behind"
    doctor.print_facts(facts)
    out = capsys.readouterr().out
    assert "matrix products, bf16" in out and "pip install 'headway[" in out
