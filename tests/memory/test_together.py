"""The memory methods with one another and with bf16, accumulation, torch.compile and lazy checkpoints.

Each combination trains with the plain run's losses or is refused with a sentence. Needs: nothing.
Run: pytest tests/memory/test_together.py
"""

import itertools
from typing import Any

import pytest

from headway.core.build import build_trainer
from headway.core.errors import MethodError
from headway.core.recipe import Recipe
from headway.core.train import train

OPTIONS: dict[str, dict[str, Any]] = {
    "recompute": {},
    "streambp": {"chunk": 8},
    "ssdtrain": {"min_bytes": 1},
    "memo": {"alpha": 0.5},
    "deep-optimizer-states": {"stride": 2, "subgroup": 4096},
    "fuyou": {},
}
PAIRS = list(itertools.combinations(OPTIONS, 2))
SETTINGS: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16"},
    "accumulation": {"micro_batch": 2},
    "bf16 and accumulation": {"precision": "bf16", "micro_batch": 1},
    "compile": {"compile": True},
}
ACTIVATIONS = {"recompute", "streambp", "ssdtrain", "memo"}
REFUSED_PAIRS = {
    *((a, b) for a, b in itertools.combinations(OPTIONS, 2) if {a, b} <= ACTIVATIONS and "ssdtrain" not in (a, b)),
    ("ssdtrain", "memo"),
    ("deep-optimizer-states", "fuyou"),
}


def clip(names: tuple[str, ...]) -> dict[str, Any]:
    """Fuyou updates under the backward pass only without exact clipping."""
    return {"clip": None} if "fuyou" in names else {}


def recipe(tiny: Any, *names: str, **train: Any) -> Recipe:
    return Recipe.load(
        tiny(
            model={"layers": 4},
            train={"steps": 4, **clip(names), **train},
            methods={name: OPTIONS[name] for name in names},
            checkpoint={"mode": "lazy", "every": 1, "host_cache": "64KiB"},
            log={"every": 1, "tensorboard": False},
        )
    )


@pytest.fixture(scope="module")
def plain() -> Any:
    """The losses of the plain run with these settings, made once."""
    known: dict[str, list[float]] = {}

    def losses(made: Recipe) -> list[float]:
        key = str(made.train)
        if key not in known:
            trainer = build_trainer(made)
            known[key] = [trainer.train_step()["loss"] for _ in range(4)]
        return known[key]

    return losses


ALONE = [(name,) for name in OPTIONS]
# A pair compiles as each of it alone: what is refused is refused by one card.
CASES = [(names, s) for names in [*ALONE, *PAIRS] for s in SETTINGS if s != "compile" or names in ALONE]


@pytest.mark.parametrize(
    ("names", "setting"), CASES, ids=lambda part: "+".join(part) if part in ALONE + PAIRS else part
)
def test_with_the_losses_of_the_plain_run_or_refused(names, setting, tiny, plain):
    try:
        trainer = build_trainer(recipe(tiny, *names, **SETTINGS[setting]))
    except MethodError as error:
        assert len(str(error).split()) >= 6, "a reason is a sentence"
        assert names in REFUSED_PAIRS or setting == "compile", error
        return
    assert names not in REFUSED_PAIRS
    tolerance = 1e-2 if "bf16" in setting else 1e-5
    expected = plain(recipe(tiny, **clip(names), **SETTINGS[setting]))
    assert [trainer.train_step()["loss"] for _ in range(4)] == pytest.approx(expected, rel=tolerance)
    for method in trainer.methods:
        if method.card.name == "fuyou":
            assert method.report()["updates_during_backward"] > 0


@pytest.mark.parametrize("names", [pair for pair in PAIRS if pair not in REFUSED_PAIRS], ids="+".join)
def test_a_pair_goes_on_from_a_lazy_checkpoint_as_if_nothing_had_happened(names, tiny, tmp_path):
    whole = train(recipe(tiny, *names, precision="bf16", micro_batch=2), run=tmp_path / "whole")

    class Stop(Exception):
        pass

    class Stopper:
        def on_step(self, trainer, record):
            if record["step"] == 3:
                raise Stop

        def __getattr__(self, name):
            return lambda *_: None

    with pytest.raises(Stop):
        train(recipe(tiny, *names, precision="bf16", micro_batch=2), run=tmp_path / "cut", observers=[Stopper()])
    resumed = train(recipe(tiny, *names, precision="bf16", micro_batch=2), run=tmp_path / "cut")
    assert [r["loss"] for r in resumed.metrics()] == [r["loss"] for r in whole.metrics()]
    assert resumed.summary["eval_loss"] == whole.summary["eval_loss"]
