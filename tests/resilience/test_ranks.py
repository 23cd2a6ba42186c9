"""Several processes save one checkpoint, or none; others, in other numbers and layouts, load it.

Needs: torch.distributed with gloo, fork; see ranked.py.
Run: pytest tests/resilience/test_ranks.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def run(folder, scenario):
    done = subprocess.run(
        [sys.executable, "-m", "tests.resilience.ranked", str(folder), scenario], cwd=Path(__file__).parents[2],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_two_processes_publish_together_or_not_at_all(tmp_path):
    files = run(tmp_path, "two")["files"]
    assert files == [".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "state.json"]


def test_four_processes_save_two_and_one_load(tmp_path):
    assert len(run(tmp_path, "four")["files"]) == 4
