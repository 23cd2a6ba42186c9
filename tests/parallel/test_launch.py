"""`headway train --ranks`: real processes through torch's elastic launcher; kills, signals, resuming on other ranks.

Needs gloo; about a minute; `pytest tests/parallel/test_launch.py`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from headway.core.run import Run
from tests.parallel.recipes import recipe

COMMAND = [sys.executable, "-m", "headway.cli.main"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def train(path: Path, run: Path, *more: str, ranks: int | None = None) -> subprocess.Popen[str]:
    arguments = ["train", str(path), "--run", str(run), *(["--ranks", str(ranks)] if ranks else []), *more]
    return subprocess.Popen(
        COMMAND + arguments, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in Run(run).metrics()}


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{path} does not appear"
        time.sleep(0.05)


def process_of_rank(rank: int, run: Path) -> int:
    """The process id of a rank of this run."""
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            variables = (entry / "environ").read_bytes().decode().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if str(run) in words and f"RANK={rank}" in variables and "LOCAL_WORLD_SIZE=4" in variables:
            return int(entry.name)
    raise AssertionError(f"rank {rank} is not there")


@pytest.fixture
def long(tmp_path: Path) -> Path:
    """A recipe of 60 steps that saves every tenth; its steps are slow enough to be hit."""
    path = tmp_path / "long.yaml"
    recipe(train={"steps": 60, "precision": "fp32"}, checkpoint={"every": 10}, log={"every": 1}).save(path)
    return path


@pytest.mark.slow
def test_a_killed_rank_is_named_and_the_run_goes_on_with_other_ranks(long: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    four = train(long, run, ranks=4)
    wait_for(run / "checkpoints" / "step-00000010", four)
    os.kill(process_of_rank(2, run), signal.SIGKILL)
    start = time.monotonic()
    _, said = four.communicate(timeout=60)
    assert time.monotonic() - start < 60
    assert four.returncode == 2 and "rank 2 of 4: was ended by SIGKILL" in said, said
    assert "Traceback" not in said, said
    assert not (run / "summary.json").exists()

    reached = max(losses(run))
    assert 10 <= reached < 60
    two, one = train(long, run, ranks=2), train(long, whole)
    _, said = two.communicate(timeout=120)
    assert two.returncode == 0 and "going on after step" in said, said
    assert one.wait(120) == 0
    resumed, undisturbed = losses(run), losses(whole)
    assert resumed.keys() == undisturbed.keys() == set(range(1, 61))
    for step, loss in undisturbed.items():
        assert resumed[step] == pytest.approx(loss, rel=1e-4), step
    summary = Run(run).summary
    assert summary["parallel"]["ranks"] == 2 and summary["parallel"]["layout"] == "shard 2"
    assert summary["eval_loss"] == pytest.approx(Run(whole).summary["eval_loss"], rel=1e-4)


@pytest.mark.slow
def test_an_interrupted_run_is_saved_by_all_ranks(long: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    four = train(long, run, ranks=4)
    wait_for(run / "checkpoints" / "step-00000010", four)
    four.send_signal(signal.SIGINT)
    _, said = four.communicate(timeout=60)
    assert four.returncode == 130 and "saved; to go on" in said and "Traceback" not in said, said
    newest = max((run / "checkpoints").iterdir()).name
    assert newest > "step-00000010" and int(newest[-8:]) == max(losses(run))


def test_an_error_of_all_ranks_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    recipe(data={"source": "text", "path": str(tmp_path / "nowhere.txt")}).save(path)
    two = train(path, tmp_path / "run", ranks=2)
    _, said = two.communicate(timeout=60)
    assert two.returncode == 2 and said.count("nowhere.txt") == 1 and "Traceback" not in said, said


def test_torchrun_starts_it_as_well(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    recipe().save(path)
    # (torchrun takes `--run` for an abbreviation of an option of its own.)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "headway.cli.main"]
    done = subprocess.run(
        [sys.executable, *launcher, "train", str(path), "--json"],
        env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["parallel"]["ranks"] == 2 and result["steps"] == 3


@pytest.mark.slow
def test_the_quickstart_learns_the_same_on_one_two_and_four_ranks(tmp_path: Path) -> None:
    """Four ranks share its batch of two: two of them each sequence. In fp32, to compare more than bf16's digits."""
    path = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
    changes = ["train.time=", "train.steps=3", "train.precision=fp32", "log.every=1", "eval.batches=2",
               "data.tokenizer=byte"]  # fmt: skip
    runs = {ranks: train(path, tmp_path / str(ranks), *changes, ranks=ranks) for ranks in (1, 2, 4)}
    for process in runs.values():
        _, said = process.communicate(timeout=150)
        assert process.returncode == 0, said
    alone = losses(tmp_path / "1")
    assert len(alone) == 3
    for ranks, layout in ((2, "shard 2"), (4, "shard 2 x sequence 2")):
        run = Run(tmp_path / str(ranks))
        assert run.summary["parallel"]["layout"] == layout
        assert losses(run.path) == pytest.approx(alone, rel=1e-5)
        assert run.summary["eval_loss"] == pytest.approx(Run(tmp_path / "1").summary["eval_loss"], rel=1e-5)
