"""`headway compare`, `reproduce`, `plan` and `profile`. Needs torch. Run: pytest tests/cli/test_experiments.py"""

import json
import re
from pathlib import Path

import pytest

from headway.cli.main import main

EXPERIMENT = """
from headway.experiments.base import Experiment, Expectation, Measurement, at_least

def experiment(bound):
    return Experiment(name="demo", title="A demonstration", paper="nobody, 2026", claim="three is large", minutes=0.1,
                      expectations=(Expectation("three", "3", at_least(bound)),),
                      measure=lambda context: {"three": Measurement(3.0)})

holds, fails = experiment(2), experiment(4)
"""


def answer(capsys, *arguments):
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_compare_prints_ratios(recipe, capsys):
    short = ["--blocks", 2, "--steps", 1]
    result = answer(capsys, "compare", recipe, "--with", "ema:decay=0.9", *short)
    assert result["differences"] and result["ratios"]["live_peak_bytes"]["value"] > 1
    assert main(["compare", str(recipe), "--set", "train.micro_batch=2", *map(str, short)]) == 0
    out = capsys.readouterr().out
    assert "train.micro_batch: None -> 2" in out.replace("null", "None") and "B / A" in out


def test_compare_refuses_arms_that_are_the_same(recipe, capsys):
    assert main(["compare", str(recipe)]) == 2
    assert "both arms have the same recipe" in capsys.readouterr().err
    assert main(["compare", str(recipe), "--with", "emma"]) == 2
    assert "Did you mean 'ema'?" in capsys.readouterr().err


def test_reproduce_exits_with_the_answer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("demo_experiments.py").write_text(EXPERIMENT)
    assert main(["reproduce", "demo_experiments:holds"]) == 0
    out, err = capsys.readouterr()
    assert "held" in out and "three" in out and "three is large" in err
    assert json.loads(Path("evidence/demo.json").read_text())["held"] is True
    assert main(["reproduce", "demo_experiments:fails", "--out", "other"]) == 1
    assert "did not hold" in capsys.readouterr().out
    assert main(["reproduce", "demo_experiments:holds", "demo_experiments:fails", "--out", "both", "--json"]) == 1
    assert [outcome["held"] for outcome in json.loads(capsys.readouterr().out)] == [True, False]


def test_reproduce_lists_the_experiments_and_refuses_unknown_ones(capsys):
    listed = answer(capsys, "reproduce")
    assert {"one-epoch", "dissecting-runtime"} <= {experiment["name"] for experiment in listed}
    assert main(["reproduce"]) == 0
    assert all(experiment["claim"][:30] in capsys.readouterr().out for experiment in listed[:1])
    assert main(["reproduce", "two-epochs"]) == 2
    assert "there is no experiment 'two-epochs'" in capsys.readouterr().err
    assert main(["reproduce", "one-epoch", "--all"]) == 2


def test_plan_spends_the_budget(recipe, capsys):
    plan = answer(capsys, "plan", recipe, "--flops", "1e10")
    assert plan["flops"] == pytest.approx(1e10, rel=0.05)
    assert plan["tokens"] == plan["steps"] * 4 * 32
    assert main(["plan", str(recipe), "--time", "1s", "--ratio", "5"]) == 0
    out = capsys.readouterr().out
    assert "headway train RECIPE model.hidden=" in out and "train.steps=" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs one budget"),
        (["--flops", "1e9", "--time", "1h"], "needs one budget"),
        (["--time", "soon"], "--time: got 'soon', expected a duration"),
        (["--flops", "many"], "--flops: got 'many', expected a number"),
        (["--flops", "1e9", "--ratio", "-1"], "ratio"),
    ],
)
def test_plan_tells_mistakes(arguments, message, recipe, capsys):
    assert main(["plan", str(recipe), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_profile_takes_a_step_apart(recipe, capsys):
    assert main(["train", str(recipe), "--run", "run"]) == 0
    capsys.readouterr()
    found = answer(capsys, "profile", recipe, "--run", "run", "--steps", 1)
    phases = [phase["name"] for phase in found["tree"]["children"]]
    assert {"forward", "backward", "optimizer"} <= set(phases)
    assert found["memory"]["peak_bytes"] > found["memory"]["before_bytes"] > 0
    assert json.loads(Path("run/profile.json").read_text()) == found
    failed = {"setting": "huge", "batch": 4, "status": "memory", "cause": "no room for it"}
    plain = {"setting": "none", "batch": 4, "status": "ok", "step_milliseconds": 7.25, "tokens_per_second": 512.0,
             "peak_memory_bytes": 2**20, "time_ratio": 1.0, "memory_ratio": 1.0}  # fmt: skip
    Path("run/profile.json").write_text(json.dumps({**found, "settings": [plain, failed]}))
    assert main(["report", "run"]) == 0
    page = Path("run/report.html").read_text()
    assert all(text in page for text in ("backward", "time ratio", "<td>7.2</td>", "memory: no room for it"))


def test_profile_by_setting(recipe, capsys):
    settings = ["--setting", "half:train.micro_batch=2", "--repeats", "1", "--drift", "0"]
    assert main(["profile", str(recipe), *settings, "--steps", "1"]) == 0
    out = capsys.readouterr().out
    assert "where the time goes" in out and "at the peak" in out
    lines = [re.split(r" {2,}", line.strip()) for line in out[out.index("time ratio") :].splitlines()[2:]]
    rows = {fields[0]: fields for fields in lines if len(fields) > 1}
    assert set(rows) == {"none", "half"}
    assert float(rows["none"][7]) == 1.0 and float(rows["half"][7]) < 1.0, "a smaller micro-batch takes less memory"
    assert main(["profile", str(recipe), "--setting", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err
