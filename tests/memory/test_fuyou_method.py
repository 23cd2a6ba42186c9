"""Fuyou in a recipe: clipping honestly, refusals, forecasts, checkpoints that others can read.

Needs nothing. Run: pytest tests/memory/test_fuyou_method.py
"""

from __future__ import annotations

import copy
import errno
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from headway.core.build import build_trainer
from headway.core.errors import DivergedError, HeadwayError, MethodError
from headway.core.recipe import Recipe
from headway.core.trainer import Trainer
from tests.conftest import tiny_recipe


def trainer_of(options: dict[str, Any] | None, methods: dict[str, Any] | None = None, **sections: Any) -> Trainer:
    """Fuyou with these options; None: without it."""
    chosen = {**({} if options is None else {"fuyou": options}), **(methods or {})}
    return build_trainer(Recipe.load(tiny_recipe(methods=chosen, **sections)))


def run(trainer: Trainer, steps: int = 6) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in (trainer.train_step() for _ in range(steps))]


def fuyou(trainer: Trainer) -> Any:
    return next(method for method in trainer.methods if method.card.name == "fuyou")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("options", [
    {},
    {"params": "memory", "writeback_delay": 0, "buffers": 1},
    {"overlap": False, "writeback_delay": 2},
    {"blocks": 1, "activations": "swap"},
    {"activations": "recompute"},
    {"activations": "auto", "rate": "50MB"},
], ids=str)  # fmt: skip
def test_losses_and_norms_are_bit_for_bit_those_of_the_plain_run(options: dict[str, Any], precision: str) -> None:
    train = {"clip": None, "precision": precision, "micro_batch": 2}
    expected = trainer_of(None, train=train)
    plain = run(expected)
    trainer = trainer_of(options, train=train)
    assert run(trainer) == plain
    report = fuyou(trainer).report()
    groups = report["groups"]
    assert report["updates_during_backward"] == (0 if options.get("overlap") is False else 6 * groups)
    assert report["written_per_step"] == report["state_bytes"]
    assert trainer.evaluate() == expected.evaluate()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_clipping_is_exact_unless_asked_otherwise(precision: str) -> None:
    train = {"clip": 0.05, "precision": precision}  # every step is clipped
    plain = run(trainer_of(None, train=train))
    assert plain[-1][1] > 0.05
    trainer = trainer_of({}, train=train)
    assert any("since train.clip needs the whole gradient's norm" in change for change in trainer.changes["fuyou"])
    assert run(trainer) == plain
    assert fuyou(trainer).report()["updates_during_backward"] == 0


def test_clipping_by_group_keeps_the_whole_within_the_bound() -> None:
    trainer = trainer_of({"clip": "group"}, train={"clip": 0.05})
    optimizer = fuyou(trainer).tiered
    norms: list[float] = []
    arm = optimizer.arm

    def noting(scale: Any) -> None:
        def scaled(norm: torch.Tensor) -> float | None:
            factor = scale(norm)
            norms.append(float(norm) * (1.0 if factor is None else factor))
            return factor

        arm(scaled)

    optimizer.arm = noting
    records = run(trainer, 1)
    assert len(norms) == len(optimizer.groups)
    assert records[0][1] > 0.05 >= math.sqrt(sum(norm**2 for norm in norms))
    assert fuyou(trainer).report()["updates_during_backward"] > 0
    assert run(trainer, 5)[-1][0] < records[0][0]


def test_clipping_by_the_step_before_begins_exactly_and_survives_a_restart() -> None:
    train = {"clip": 0.05}
    recipe = {"clip": "previous"}
    trainer = trainer_of(recipe, train=train)
    assert run(trainer, 1) == run(trainer_of(None, train=train), 1)
    assert fuyou(trainer).report()["updates_during_backward"] == 0
    run(trainer, 2)
    assert fuyou(trainer).report()["updates_during_backward"] > 0
    state = copy.deepcopy(trainer.state_dict())
    expected = run(trainer, 3)
    again = trainer_of(recipe, train=train)
    again.load_state_dict(state)
    assert run(again, 3) == expected


@pytest.mark.parametrize(("options", "sections", "words"), [
    ({"overlap": True}, {}, "overlap: cannot be met with exact clipping"),
    ({"clip": "group"}, {"train": {"clip": None}}, "clip: is of no use: train.clip is null"),
    ({"clip": "group", "overlap": False}, {}, "clip: is of no use: without overlap clipping is exact"),
    ({"buffers": 2, "writeback_delay": 2}, {}, "buffers: got 2, expected at least 3"),
    ({"host": "100kB"}, {}, r"host: is 97.7KiB, expected at least \d+.*: 2 buffers"),
    ({}, {"train": {"compile": True}}, "cannot follow train.compile"),
    ({}, {"methods": {"ema": {}}}, "ema: its average"),
    ({}, {"methods": {"sam": {}}}, "sam: it moves"),
    ({"activations": "swap"}, {"methods": {"recompute": {}}}, "activations: cannot be combined with recompute"),
    ({"activations": "auto"}, {"methods": {"ssdtrain": {}}}, "activations: cannot be combined with ssdtrain"),
    ({"activations": "recompute"}, {"methods": {"streambp": {}}}, "activations: cannot be combined with streambp"),
    ({}, {"methods": {"deep-optimizer-states": {}}}, "cannot be combined with fuyou: both decide"),
])  # fmt: skip
def test_refusals_are_sentences_with_a_remedy(options: dict[str, Any], sections: dict[str, Any], words: str) -> None:
    sections = dict(sections)
    with pytest.raises(MethodError, match=words):
        trainer_of(options, sections.pop("methods", None), **sections)


def test_host_memory_limits_the_buffers() -> None:
    size = fuyou(trainer_of({})).tiered.buffer_bytes
    trainer = trainer_of({"host": 3 * size + 100, "buffers": 20}, train={"clip": None})
    optimizer = fuyou(trainer).tiered
    run(trainer, 2)
    assert optimizer.max_buffers == 3
    assert optimizer.host_bytes <= 3 * size


@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_a_loss_that_is_not_finite_leaves_the_weights_untouched(what: str) -> None:
    trainer = trainer_of({}, train={"clip": None, "precision": "bf16"})
    run(trainer, 2)
    before = {name: value.clone() for name, value in trainer.state_dict()["model"].items()}
    forward_backward = trainer.forward_backward
    tiered = fuyou(trainer)

    def poisoned(micro: Any, targets: int) -> torch.Tensor:
        if what == "loss":  # such as that of a target whose logit is -inf, with finite gradients
            return tiered.forward_backward(lambda *given: plain(*given) + math.inf)(micro, targets)
        hook = trainer.model.embedding.weight.register_hook(lambda grad: grad * math.nan)  # type: ignore[operator,union-attr]
        try:
            return forward_backward(micro, targets)
        finally:
            hook.remove()

    def plain(micro: Any, targets: int) -> torch.Tensor:
        loss = trainer.loss(trainer.model, micro)[0]
        (loss / targets).backward()
        return loss.detach()

    trainer.forward_backward = poisoned
    with pytest.raises(DivergedError):
        trainer.train_step()
    after = trainer.state_dict()["model"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    trainer.forward_backward = forward_backward
    run(trainer, 1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_goes_on_without_the_method_and_the_other_way_round(precision: str) -> None:
    """The weights and states of core/state.py; the list of methods is the trainer's own and must be told."""
    train = {"clip": None, "precision": precision}
    plain, tiered = trainer_of(None, train=train), trainer_of({}, train=train)
    run(plain, 3)
    run(tiered, 3)
    states = [copy.deepcopy(trainer.state_dict()) for trainer in (plain, tiered)]
    expected = run(plain, 3)
    for options, state in ((None, states[1]), ({}, states[0])):
        trainer = trainer_of(options, train=train)
        state = {
            **state,
            "changes": trainer.changes,
            "methods": {m.card.name: {"previous": None} for m in trainer.methods},
        }
        trainer.load_state_dict(state)
        assert run(trainer, 3) == expected


def test_what_the_drive_allows_is_said_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = trainer_of({"rate": "2MB"}, train={"clip": None})
    said = capsys.readouterr().err
    assert "would keep up with the computation" in said
    assert "bound by disk" in said
    assert "FLOP/s" in said
    assert fuyou(trainer).report()["forecast"] in said


def test_a_disk_that_fills_up_stops_the_run_before_the_next_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of({}, train={"clip": None})
    run(trainer, 2)
    trainer.optimizer.named_masters()  # type: ignore[operator]

    def full(descriptor: int, data: memoryview) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("headway.memory.fuyou.files.write_all", full)
    step = trainer.step
    with pytest.raises(HeadwayError, match="No space left"):
        run(trainer, 2)
    assert trainer.step <= step + 1
    calls = []
    trainer.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(HeadwayError, match="No space left"):
        trainer.train_step()
    assert not calls


def test_a_path_is_used_and_left_empty(tmp_path: Path) -> None:
    trainer = trainer_of({"path": str(tmp_path), "activations": "swap"}, train={"clip": None})
    run(trainer, 2)
    assert len(list(tmp_path.glob("headway-store-*"))) == 2  # states, activations
    optimizer = fuyou(trainer).tiered
    optimizer.close()
    fuyou(trainer).activations.close()
    assert not list(tmp_path.iterdir())
