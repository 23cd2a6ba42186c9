"""The experiment on balancing over the global batch: its texts, its micro-batches, its ratios, and a few steps of it.

Needs the standard library's sources and torch's headers. Run: pytest tests/experiments/test_global_lbl.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from headway.experiments import global_lbl
from headway.experiments.context import Context
from headway.experiments.global_lbl import ARMS, BYTES, LENGTH, STEP, domains, experiment, step_batch, train_arm


def test_four_domains_of_one_size_and_of_different_bytes() -> None:
    texts = domains()
    assert [len(text) for text in texts.values()] == [BYTES] * 4
    shares = [torch.bincount(text.long(), minlength=256).double() / BYTES for text in texts.values()]
    for i, a in enumerate(shares):
        for b in shares[:i]:
            assert (a - b).abs().sum() / 2 > 0.1


def test_english_is_there_without_any_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEADWAY_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    text = global_lbl._english()
    assert len(text) == BYTES
    assert text.count(b" the ") > 1000


def test_arms_divide_the_same_sequences_differently() -> None:
    batches = {arm: step_batch(0, 3, size, mixed) for arm, (size, mixed, _) in ARMS.items()}
    counts = {"micro": 16, "buffer": 16, "shuffle": 16, "global": 1, "micro, mixed": 8, "buffer, mixed": 8}
    assert {arm: len(batch) for arm, batch in batches.items()} == counts
    whole = torch.cat(batches["global"]).tolist()
    assert len(whole) == STEP
    assert len(whole[0]) == LENGTH + 1
    for batch in batches.values():
        assert sorted(torch.cat(batch).tolist()) == sorted(whole)
    texts = [bytes(text[: len(text) * 9 // 10].tolist()) for text in domains().values()]

    def of(rows: torch.Tensor) -> list[int]:
        return [next(d for d, text in enumerate(texts) if bytes(row) in text) for row in rows.tolist()]

    assert [of(rows) for rows in batches["micro"]] == [[d, d] for d in range(4)] * 4
    assert [of(rows) for rows in batches["micro, mixed"]] == [[0, 1, 2, 3]] * 8
    assert step_batch(0, 4, 2, False)[0].tolist() != step_batch(0, 3, 2, False)[0].tolist()
    assert step_batch(1, 3, 2, False)[0].tolist() != step_batch(0, 3, 2, False)[0].tolist()


@pytest.mark.parametrize("arm", ["micro", "shuffle", "global"])
def test_an_arm_trains_and_is_looked_at(arm: str) -> None:
    found = train_arm(arm, 0, 6)
    assert found["train"][-1] < found["train"][0]
    assert 0 <= found["mutual_information"] < 1.4
    assert 1 <= found["load"] <= 8
    assert set(found["frequencies"]) == set(domains())


def made_up(information: dict[str, float], loss: float = 2.5) -> dict[str, Any]:
    one = {"max_frequency": 0.1, "score": 0.2, "load": 1.5, "held_out_load": 1.5, "micro_load": 3.0}
    frequencies = {domain: [1 / 16] * 16 for domain in domains()}
    return {
        arm: {**one, "mutual_information": information.get(arm, 0.1), "frequencies": frequencies,
              "loss": loss if arm == "buffer" else 2.5}
        for arm in ARMS
    }  # fmt: skip


def measured(arms: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    monkeypatch.setattr(global_lbl, "_train_arms", lambda names, seed, steps: arms)
    context = Context(experiment, quick=False, folder=folder)
    results = global_lbl.measure(context)
    assert len(context.figures) == 3
    return {e.measure: e.judge(results[e.measure]) for e in experiment.expectations}


def test_what_the_paper_says_holds_and_what_it_does_not_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    good = {"buffer": 0.3, "global": 0.32, "shuffle": 0.28}
    assert all(measured(made_up(good), tmp_path / "good", monkeypatch).values())
    alike = measured(made_up({}), tmp_path / "alike", monkeypatch)
    assert not alike["information_buffer"]
    assert not alike["information_global"]
    assert alike["loss"]
    assert not measured(made_up(good, loss=2.52), tmp_path / "worse", monkeypatch)["loss"]
    mixed = measured(made_up({**good, "buffer, mixed": 0.3}), tmp_path / "mixed", monkeypatch)
    assert not mixed["information_mixed"]
