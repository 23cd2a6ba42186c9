"""Methods: order, conflicts, needs, changes; and one written outside the package.

Needs nothing. Run: pytest tests/core/test_method.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from headway.core.build import build_trainer
from headway.core.errors import MethodError
from headway.core.method import Card, Method, check_changes, resolve, wrap
from headway.core.recipe import Recipe

OUTSIDE = '''
import torch
from headway import Card, Method, Options


class NoiseOptions(Options):
    """Options of `gradient-noise`."""

    scale: float = 0.01
    """Standard deviation of the noise."""


class GradientNoise(Method):
    """Adds Gaussian noise to the gradients."""

    card = Card(
        name="gradient-noise",
        title="Gradient noise",
        paper="Neelakantan et al. 2015, arXiv 1511.06807",
        summary="Adds Gaussian noise to every gradient.",
        exact=False,
        approximates="the gradient, with noise of a given deviation",
        buys="escape from poor starts in deep networks",
        costs="a pass over the gradients",
    )
    Options = NoiseOptions

    def optimizer(self, optimizer):
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.changed("gradients made noisy", len(self.params))
        return optimizer

    def gradients(self, gradients):
        def noisy():
            for p in self.params:
                p.grad.add_(torch.randn_like(p.grad), alpha=self.options.scale)
            return gradients()
        return noisy
'''


def card(name: str, **facts: Any) -> Card:
    return Card(name, "a title", "a paper", "a summary", True, "", "something", "something", **facts)


def make(name: str, **facts: Any) -> type[Method]:
    def model(self: Method, model: Any) -> Any:
        self.changed("model wrapped")
        return [*model, name] if isinstance(model, list) else model

    return type(name.upper(), (Method,), {"card": card(name, **facts), "model": model})


def install(monkeypatch: pytest.MonkeyPatch, *classes: type[Method]) -> None:
    from headway.core import registry

    table = {}
    for cls in classes:
        monkeypatch.setitem(globals(), cls.__name__, cls)
        table[cls.card.name] = f"{__name__}:{cls.__name__}"
    monkeypatch.setitem(registry.TABLE, "methods", table)


def order(tiny: Any, *names: str) -> list[str]:
    methods = resolve(Recipe.load(tiny(methods={n: {} for n in names})))
    return wrap(methods, "model", [])


def test_cards_order_methods_whatever_the_recipe_says(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    install(monkeypatch, make("a", after=("c",)), make("b", before=("c",)), make("c"), make("d"))
    assert order(tiny, "a", "b", "c", "d") == order(tiny, "d", "c", "b", "a") == ["b", "d", "c", "a"]
    assert order(tiny, "a", "d") == ["a", "d"], "constraints on absent methods do not bind"


def test_conflicts_needs_and_cycles_are_sentences(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    install(
        monkeypatch,
        make("a", refuses={"b": "both own the loss of a step"}),
        make("b"),
        make("c", needs={"d": "it reads what that writes"}),
        make("d"),
        make("e", before=("f",)),
        make("f", before=("e",)),
    )
    for names, fragment in [
        (("a", "b"), "methods.a: cannot be combined with b: both own the loss"),
        (("c",), "methods.c: needs d: it reads"),
        (("e", "f"), "no possible order"),
    ]:
        with pytest.raises(MethodError, match=fragment):
            order(tiny, *names)


def test_a_method_that_changes_nothing_or_returns_nothing_is_stopped(
    monkeypatch: pytest.MonkeyPatch, tiny: Any
) -> None:
    idle = type("IDLE", (Method,), {"card": card("idle")})
    silent = type("SILENT", (Method,), {"card": card("silent"), "model": lambda self, model: None})
    zero = type("ZERO", (Method,), {"card": card("zero"), "model": lambda self, m: self.changed("blocks", 0) or m})
    install(monkeypatch, idle, silent, zero)
    for name, fragment in [
        ("idle", "changed nothing"),
        ("zero", "changed nothing"),
        ("silent", "returned nothing at the point 'model'"),
    ]:
        with pytest.raises(MethodError, match=fragment):
            build_trainer(Recipe.load(tiny(methods={name: {}})))


def test_changes_are_sentences(tiny: Any) -> None:
    trainer = build_trainer(Recipe.load(tiny(methods={"ema": {}})))
    assert trainer.changes == check_changes(trainer.methods)
    assert trainer.changes["ema"][0].startswith("weights averaged (")


def test_a_method_from_outside_plugs_in_by_path(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len([line for line in OUTSIDE.strip().splitlines() if line]) < 40
    (tmp_path / "noisy_method.py").write_text(OUTSIDE)
    monkeypatch.chdir(tmp_path)
    name = "noisy_method:GradientNoise"
    trainer = build_trainer(Recipe.load(tiny(methods={name: {"scale": 0.1}})))
    torch.manual_seed(0)
    plain = build_trainer(Recipe.load(tiny()))
    assert trainer.train_step()["grad_norm"] > plain.train_step()["grad_norm"]
    assert list(trainer.changes) == ["gradient-noise"]


def test_a_method_from_outside_plugs_in_by_entry_point(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headway.core import registry

    (tmp_path / "noisy_package.py").write_text(OUTSIDE)
    facts = tmp_path / "noisy_package-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: noisy-package\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[headway.methods]\ngradient-noise = noisy_package:GradientNoise\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._installed.cache_clear()
    try:
        assert "gradient-noise" in registry.names("methods")
        trainer = build_trainer(Recipe.load(tiny(methods={"gradient-noise": {}})))
        trainer.train_step()
        assert trainer.changes["gradient-noise"]
    finally:
        registry._installed.cache_clear()
