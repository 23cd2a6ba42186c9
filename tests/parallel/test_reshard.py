"""A checkpoint that one layout wrote is resumed in any other, losses equal.

Needs gloo. Run: pytest tests/parallel/test_reshard.py
"""

import shutil
from pathlib import Path
from typing import Any

import pytest

from headway.core.run import Run
from headway.core.train import train
from headway.parallel.local import run_ranks
from tests.parallel.recipes import recipe
from tests.parallel.test_engine import LAYOUTS

LAYOUTS = {"one rank": (1, {}), **LAYOUTS}
CHAIN = ["one rank", "shard x tensor", "pipeline", "replicate x shard", "pipeline x tensor", "interleaved x replicate",
         "tensor, whole tokens", "pipeline, there and back", "shard", "one rank"]  # fmt: skip
"""Each layout resumes what the one before it has saved."""
STEPS = 3


def steps(count: int, **changes: Any) -> Any:
    return recipe(
        train={"steps": count},
        schedule={"name": "constant", "warmup": 0},
        checkpoint={"every": STEPS, "keep": 2},
        log={"every": 1},
        methods={"ema": {"decay": 0.5}},
        **changes,
    )


def run_as(layout: str, count: int, run: Path) -> None:
    ranks, parallel = LAYOUTS[layout]

    def work(rank: int) -> None:
        train(steps(count, parallel=parallel), run=run)

    run_ranks(ranks, work)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One process, all steps."""
    run = tmp_path_factory.mktemp("whole") / "run"
    run_as("one rank", STEPS * len(CHAIN), run)
    return Run(run)


@pytest.mark.slow
def test_every_layout_goes_on_where_another_has_stopped(undisturbed: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number, layout in enumerate(CHAIN, start=1):
        run_as(layout, STEPS * number, run)
        for record, expected in zip(Run(run).metrics(), undisturbed.metrics(), strict=False):
            assert record["step"] == expected["step"]
            assert record["loss"] == pytest.approx(expected["loss"], rel=1e-9), (layout, record["step"])
            assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-8), (layout, record["step"])
            assert record["tokens"] == expected["tokens"]
    assert len(Run(run).metrics()) == len(undisturbed.metrics()) == STEPS * len(CHAIN)
    assert Run(run).summary["eval_loss"] == pytest.approx(undisturbed.summary["eval_loss"], rel=1e-9), "of the averages"


def test_a_checkpoint_of_half_precision_keeps_its_masters(tmp_path: Path) -> None:
    """bf16: masters are in the optimizer without shards, and are FSDP2's own weights with them."""

    def train_as(layout: str, run: Path, count: int) -> None:
        ranks, parallel = LAYOUTS[layout]
        changed = steps(count, parallel=parallel).override("train.precision=bf16")
        run_ranks(ranks, lambda rank: train(changed, run=run) and None)

    first = tmp_path / "first"
    train_as("one rank", first, STEPS)
    shutil.copytree(first, tmp_path / "other")
    train_as("one rank", first, 2 * STEPS)
    for layout in ("shard", "tensor", "pipeline"):
        other = tmp_path / layout
        shutil.copytree(tmp_path / "other", other)
        train_as(layout, other, 2 * STEPS)
        for record, expected in zip(Run(other).metrics(), Run(first).metrics(), strict=True):
            assert record["loss"] == pytest.approx(expected["loss"], rel=3e-3), (layout, record["step"])
