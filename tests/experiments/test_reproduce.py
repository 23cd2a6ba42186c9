"""Experiments: run, judged, written down; resumed after an interruption; honest about what was not measured.

Needs nothing. Run: pytest tests/experiments/test_reproduce.py
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import headway.core.train
from headway.core import registry
from headway.core.errors import HeadwayError, RecipeError
from headway.experiments.base import (
    Arm,
    Expectation,
    Experiment,
    Measurement,
    Quick,
    at_least,
    at_most,
    between,
)
from headway.experiments.context import Context
from headway.experiments.evidence import Figure, Series, load_evidence
from headway.experiments.measures import Difference, Final, Interleaved, Ratio
from headway.experiments.reproduce import find_experiment, outcome_table, reproduce
from tests.conftest import tiny_recipe


def toy(**changes) -> Experiment:
    """Ten times the steps lower the loss: true, in one arm per seed and length."""
    facts = {
        "name": "toy",
        "title": "Training longer",
        "paper": "Nobody, On Nothing, arXiv 0000.00000",
        "claim": "Longer is better.",
        "recipe": {**tiny_recipe(train={"steps": 3}), "schedule": {"name": "constant"}},
        "arms": (Arm("short"), Arm("long", ("train.steps=12",), title="four times as long")),
        "seeds": (0, 1),
        "measurements": (
            Ratio("ratio", "eval_loss", of="long", to="short"),
            Difference("difference", "eval_loss", of="long", to="short"),
            Final("steps", "long", "steps"),
            Final("first-loss", "long", lambda run: run.metrics()[0]["loss"], unit="nats"),
        ),
        "expectations": (
            Expectation("ratio", "lower", at_most(1.0), title="loss, long / short", whole_interval=True),
            Expectation("steps", "12", between(12, 12), quick=between(4, 4)),
        ),
        "minutes": 1,
        "quick": Quick(("train.steps=4",)),
    }
    return Experiment(**{**facts, **changes})


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """The names of the runs that are really trained."""
    names: list[str] = []
    original = headway.core.train.train

    def train(recipe, **options):
        names.append(options["run"].name)
        return original(recipe, **options)

    monkeypatch.setattr(headway.core.train, "train", train)
    return names


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_held_claim_and_its_evidence(here, trained):
    outcome = reproduce(toy())
    assert outcome.held
    assert outcome.exit_status == 0
    assert len(trained) == 4  # two arms, two seeds; four measurements share them
    assert load_evidence(here / "evidence/toy.json") == outcome
    assert [row.held for row in outcome.rows] == [True, True]
    assert outcome.rows[0].title == "loss, long / short"
    assert outcome.rows[0].interval[1] < 1
    assert outcome.measurements["difference"].value < 0
    assert outcome.measurements["steps"].value == 12
    assert outcome.measurements["first-loss"].unit == "nats"
    assert outcome.arms == {"short": [], "long": ["train.steps=12"]}
    assert outcome.minutes > 0


def test_a_claim_that_does_not_hold_is_an_outcome(here):
    wrong = Expectation("steps", "thousands", at_least(1000))
    outcome = reproduce(toy(seeds=(0,), expectations=(*toy().expectations, wrong)))
    assert not outcome.held
    assert outcome.exit_status == 1
    assert [row.held for row in outcome.rows] == [True, True, False]
    assert not load_evidence(here / "evidence/toy.json").held


def test_quick_run_stays_out_of_the_evidence(here, trained):
    quick = reproduce(toy(), quick=True)
    assert quick.quick
    assert quick.rows[1].held, "a quick run has expectations of its own"
    assert {name.split("-")[2] for name in trained} == {"0"}, "a quick run takes one seed"
    assert not (here / "evidence").exists()
    full = reproduce(toy())
    with pytest.raises(HeadwayError, match="full run"):
        reproduce(toy(), quick=True, out="evidence")
    assert load_evidence(here / "evidence/toy.json") == full


class Interruption(Exception):
    pass


def test_interrupted_experiment_goes_on_with_what_is_finished(here, trained):
    computed = []

    def measure(context):
        context.train("short")
        value = context.keep("slow", lambda: computed.append(1) or [1.5, {"a": 2}])
        if not interrupted:
            interrupted.append(True)
            raise Interruption
        return {"kept": Measurement(value[0]), "seeds": Measurement(len(context.runs("long")))}

    interrupted: list[bool] = []
    experiment = toy(measure=measure, measurements=(), expectations=(Expectation("kept", "", at_least(1)),))
    with pytest.raises(Interruption):
        reproduce(experiment)
    assert not (here / "evidence").exists()
    outcome = reproduce(experiment)
    assert outcome.measurements["kept"].value == 1.5
    assert len(computed) == 1
    assert len(trained) == len(set(trained)) == 3
    reproduce(experiment)  # a finished one is measured anew
    assert len(computed) == 2
    assert len(trained) == 6
    reproduce(experiment, reuse=True)
    assert len(trained) == 6


def test_other_code_measures_anew(here, trained, monkeypatch):
    def measure(context):
        context.train("short")
        raise Interruption

    experiment = toy(measure=measure, measurements=())
    for fingerprint in ("one", "one", "two"):
        monkeypatch.setattr("headway.experiments.context.code_fingerprint", lambda f=fingerprint: f)
        with pytest.raises(Interruption):
            reproduce(experiment)
    assert len(trained) == 2


def test_interleaved_measures_share_a_comparison(here, monkeypatch):
    import headway.experiments.compare as compare_module

    calls = []
    original = compare_module.compare_recipes
    monkeypatch.setattr(
        compare_module, "compare_recipes", lambda *a, **k: calls.append(k["names"]) or original(*a, **k)
    )
    small = {"blocks": 2, "steps": 1}
    experiment = toy(
        arms=(Arm("plain"), Arm("halves", ("train.micro_batch=2",))),
        measurements=(
            Interleaved("memory", "live_peak_bytes", of="halves", to="plain", **small),
            Interleaved("time", "seconds_per_token", of="halves", to="plain", **small),
        ),
        expectations=(Expectation("memory", "less", at_most(1.0)),),
    )
    outcome = reproduce(experiment)
    assert calls == [("plain", "halves")]
    assert outcome.held
    assert outcome.measurements["time"].interval is not None
    wrong = replace(experiment, measurements=(Interleaved("m", "live_peak", of="halves", to="plain", **small),))
    with pytest.raises(HeadwayError, match="live_peak_bytes"):
        reproduce(wrong)


def test_what_is_not_measured_here_is_not_judged(here):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU, so that the row is judged")
    gpu = Expectation("speed", "3x", at_least(2), only="cuda")
    outcome = reproduce(toy(seeds=(0,), expectations=(*toy().expectations, gpu)))
    row = outcome.rows[-1]
    assert (row.held, row.measured, row.note) == (None, None, "needs a GPU")
    assert outcome.held
    only_gpu = reproduce(toy(measurements=(), expectations=(gpu,)))
    assert not only_gpu.held, "what was judged nowhere has not been shown"


def test_figures_infinity_and_table(here):
    def measure(context):
        context.show(Figure(title="F", x="x", y="y", series=[Series(name="s", x=["a"], y=[1.0], kind="bars")]))
        return {"speedup": Measurement(math.inf, note="never reached"), "n": Measurement(2.0, (1.5, 2.5), "x")}

    outcome = reproduce(
        toy(
            measure=measure,
            measurements=(),
            expectations=(Expectation("speedup", "2x", at_least(2)), Expectation("n", "2x", at_least(1))),
        )
    )
    assert outcome.held
    kept = json.loads((here / "evidence/toy.json").read_text())
    assert kept["figures"][0]["series"][0]["x"] == ["a"]
    console = Console(width=120)
    with console.capture() as captured:
        console.print(outcome_table(outcome))
    for part in ("held here", "at least 2", "1.5 to 2.5", "2 x"):
        assert part in captured.get()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expectations": (Expectation("ratios", "", at_most(1)),)}, "Did you mean 'ratio'"),
        ({"measurements": (Final("m", "lon", "steps"),)}, "Did you mean 'long'"),
        ({"measurements": (Final("m", "short", "eval_los"),)}, "Did you mean 'eval_loss'"),
        ({"measure": lambda context: {"ratio": Measurement(1.0)}}, "twice"),
    ],
)
def test_mistakes_in_an_experiment(here, changes, message):
    with pytest.raises(HeadwayError, match=message):
        reproduce(toy(seeds=(0,), **changes))
    assert not (here / "evidence").exists()


def test_find_experiment(monkeypatch):
    with pytest.raises(RecipeError, match="there is no experiment"):
        find_experiment("one-epok")
    with pytest.raises(HeadwayError, match="is no headway"):
        find_experiment("json:loads")


@pytest.mark.parametrize("name", registry.names("experiments"))
def test_every_registered_experiment_is_complete(name):
    experiment = find_experiment(name)
    assert experiment.name == name
    assert experiment.minutes <= 20
    assert experiment.quick.minutes <= 4
    assert experiment.paper
    assert experiment.claim.endswith(".")
    for arm in experiment.arms:
        assert all("=" in override for override in arm.overrides)


def test_the_documented_experiment_is_one(here):
    page = Path(__file__).parents[2] / "docs/evidence.md"
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec(next(snippet for snippet in snippets if "experiment = Experiment(" in snippet), names)
    context = Context(names["experiment"], quick=True, folder=here / "work")
    recipes = {arm.name: context.recipe(arm) for arm in context.arms}
    assert recipes["plain"].train.steps == 60
    assert list(recipes["ema"].methods) == ["ema"]
    exec(next(snippet for snippet in snippets if "def measure(context)" in snippet), names)
    assert callable(names["measure"])


def test_two_processes_do_not_share_a_working_folder(here):
    from headway.core.run import locked

    with locked(here / "work"), pytest.raises(HeadwayError, match="another process"):
        reproduce(toy(), work=here / "work")
