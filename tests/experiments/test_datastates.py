"""The parts of the datastates experiment: the savers it compares, its watch, its rows; runs that are killed.

Needs: torch, fork. Run: pytest tests/experiments/test_datastates.py
"""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp

from headway.experiments.datastates import Setting, _small_ring, _throttled, _torn
from headway.experiments.savers import AsyncSave, Watched
from headway.memory.lanes import Lanes
from headway.resilience.lazy import LazyCheckpointer


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_async_save_writes_a_copy_at_the_given_rate(tmp_path):
    saver = AsyncSave(tmp_path / "a", rate=4 << 20)
    weights = torch.randn(1 << 18)
    expected = weights.clone()
    start = time.perf_counter()
    path = saver.save(1, {"model": {"w": weights}})
    weights.zero_()
    saver.wait()
    assert time.perf_counter() - start > 0.2
    loaded = {"model.w": torch.zeros(1 << 18)}
    dcp.load(loaded, checkpoint_id=path, no_dist=True)
    assert torch.equal(loaded["model.w"], expected)
    saver.close()
    assert not path.exists()


def test_the_watch_counts_what_stops_training(tmp_path):
    lanes = Lanes(rates={"device_to_host": 20 << 20})
    saver = Watched(LazyCheckpointer(LazyCheckpointer.Options(), tmp_path, lanes))
    saver.save(1, {"w": torch.randn(1 << 20)})
    saver.fence()
    assert saver.stalled > 0.15 and saver.fences[0][1] > 0.15
    saver.close()


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Setting(True, tmp_path_factory.mktemp("setting"), batch=1)
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_on_a_slow_disk(setting):
    setting.different = 0
    cycles = _throttled(setting, setting.bytes / 0.25, 1)
    assert setting.different == 0
    # Only what must hold on a busy machine: blocking waits for the disk, lazy waits for less.
    for every in (5, 2):
        assert cycles[f"blocking {every} stall"][0] > 1.2 * cycles[f"lazy {every} stall"][0]
    assert len(_small_ring(setting, setting.bytes / 0.5, 1)) == 1
    setting.trainer.optimizer.param_groups[0]["lr"] = 1.0
    setting.trainer.train_step()
    setting.verify()
    assert setting.different == 1, "a state that differs is not noticed"


def test_torn_saves_are_found(setting):
    assert _torn(setting, 5) == 0


def test_torn_saves_would_be_seen(setting, monkeypatch):
    """Without the checks the experiment's row says so."""
    from headway.resilience import staging

    monkeypatch.setattr(staging.Source, "changed", property(lambda self: False))
    monkeypatch.setattr(staging, "mark", lambda piece: None)
    monkeypatch.setattr("headway.resilience.pipeline.mark", lambda piece: None)
    assert _torn(setting, 8) > 0


def test_killed_runs_go_on_exactly(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "headway.experiments.killed_runs", str(tmp_path / "k"), "8", "40"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills"] == 8 and counts["broken"] == 0 and counts["runs"] >= 1 and counts["resumed"] >= 2, counts
