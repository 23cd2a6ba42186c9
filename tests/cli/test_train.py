"""`headway train` from start to resume, and stopped by signals. Needs torch. Run: pytest tests/cli/test_train.py"""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headway.cli.main import main


def losses(run: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in records if "loss" in r]


def start(*arguments: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "headway.cli.main", "train", *map(str, arguments)], text=True, **options
    )


def test_it_trains_into_the_next_free_directory(recipe, capsys):
    assert main(["train", str(recipe)]) == 0
    assert main(["train", str(recipe), "train.steps=2"]) == 0
    assert Path("runs/tiny-1/summary.json").is_file() and "<svg" in Path("runs/tiny-1/report.html").read_text()
    assert json.loads(Path("runs/tiny-2/summary.json").read_text())["steps"] == 2
    out, err = capsys.readouterr()
    assert "runs/tiny-1" in out and "validation bits per byte" in out
    assert "step      2  loss" in err, "progress is for people, so it is on standard error"
    assert "tokens/s" in err and "bits per byte" in err


def test_json_is_the_only_thing_on_standard_output(recipe, capsys):
    assert main(["train", str(recipe), "methods.ema={}", "--run", "here", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["run"] == "here"
    assert result["steps"] == 6 and result["bits_per_byte"] > 0
    assert result["methods"]["ema"] and "method ema:" in err
    assert {k: v for k, v in result.items() if k != "run"} == json.loads(Path("here/summary.json").read_text())


def test_the_same_directory_goes_on_and_a_finished_run_stays(recipe, capsys):
    steady = ["schedule={name: constant, warmup: 0}", "--run", "a"]
    assert main(["train", str(recipe), "train.steps=4", *steady]) == 0
    assert main(["train", str(recipe), "train.steps=6", *steady]) == 0
    assert "going on after step 4" in capsys.readouterr().err
    assert main(["train", str(recipe), *steady[:1], "--run", "b"]) == 0
    assert losses(Path("a")) == losses(Path("b")), "stopped and resumed is the same run"


def test_another_recipe_is_refused_and_nothing_is_lost(recipe, capsys):
    assert main(["train", str(recipe), "--run", "a"]) == 0
    before = losses(Path("a"))
    assert main(["train", str(recipe), "optimizer.lr=0.5", "--run", "a"]) == 2
    assert "optimizer.lr" in capsys.readouterr().err
    assert losses(Path("a")) == before
    assert main(["train", str(recipe), "optimizer.lr=0.5", "--run", "a", "--fresh"]) == 2
    assert "--yes" in capsys.readouterr().err
    assert losses(Path("a")) == before
    assert main(["train", str(recipe), "optimizer.lr=0.5", "--run", "a", "--fresh", "--yes"]) == 0
    assert losses(Path("a")) != before


def test_mistakes_leave_no_directory_behind(recipe, capsys):
    for wrong in ("train.stepz=3", "data.path=nowhere", "methods.emma={}"):
        assert main(["train", str(recipe), wrong, "--run", "a"]) == 2
        assert not Path("a").exists() or not any(Path("a").iterdir())
    assert "Traceback" not in capsys.readouterr().err


def test_baselines_and_a_sample(recipe, capsys):
    assert main(["train", str(recipe), "--run", "a", "--baselines", "--sample", "the run", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert 0 < result["baselines"]["5-gram"] < result["baselines"]["gzip"] < 8
    assert result["sample"].startswith("the run") and len(result["sample"]) > len("the run")
    assert main(["train", str(recipe), "--run", "a", "--baselines", "--sample", "the run"]) == 0
    out = capsys.readouterr().out
    assert "gzip" in out and "5-gram" in out and "\nthe run" in out


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on(signum, recipe, capsys):
    steady = ["schedule={name: constant, warmup: 0}", "--run", "a"]
    process = start(recipe, "train.steps=1000000", *steady, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    for line in process.stderr:
        if line.startswith("step"):
            break
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert "headway train a/recipe.yaml --run a" in err and "Traceback" not in err and out == ""
    done = json.loads(next(Path("a/checkpoints").glob("*/manifest.json")).read_text())["step"]
    assert done >= 2
    assert main(["train", str(recipe), f"train.steps={done + 2}", *steady]) == 0
    assert f"going on after step {done}" in capsys.readouterr().err


def test_on_a_terminal_there_is_a_bar(recipe):
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = start(recipe, "train.steps=40", "--run", "a", stdout=subprocess.DEVNULL, stderr=theirs, env=environment)
    os.close(theirs)
    shown, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        shown += chunk
    os.close(ours)
    assert process.wait(timeout=60) == 0
    text = shown.decode(errors="replace")
    assert "━" in text and "100%" in text and "tokens/s" in text and "eval loss" in text


SMALL = ["data.sequence=128", "train.steps=3", "train.batch=2", "schedule.warmup=0", "eval=null"]


def shipped(name: str) -> str:
    return str(Path(__file__).resolve().parents[2] / "recipes" / f"{name}.yaml")


@pytest.mark.parametrize("name", ["quickstart", "gpt2-bytes", "methods", "gla", "moe"])
def test_the_shipped_recipes_train(name, recipe):
    data = ["data.source=text", "data.path=text", "data.validation_fraction=0.2", "data.vocab=300"]
    model = ["model.layers=1", "model.hidden=32", "model.heads=2"]
    assert main(["train", shipped(name), *SMALL, *data, *model, "train.time=null", "--run", "run"]) == 0


def test_the_shipped_recipe_for_fine_tuning_trains(recipe, trained):
    assert main(["export", str(trained), "--to", "hf", "model"]) == 0
    overrides = [*SMALL, "model.path=model", "data.tokenizer=model", "data.path=text"]
    assert main(["train", shipped("finetune"), *overrides, "--run", "tuned"]) == 0


def test_every_shipped_recipe_is_tried_here():
    tried = {"quickstart", "gpt2-bytes", "methods", "finetune", "gla", "moe"}
    assert {path.stem for path in Path(shipped("x")).parent.glob("*.yaml")} == tried
