"""A writer killed at any moment leaves a complete checkpoint, no older than the last save that was done.

Needs: torch, fork. Each scenario is one process that forks and kills; see killed_writer.py.
Run: pytest tests/resilience/test_kill.py
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def run(folder, scenario, mode):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.resilience.killed_writer", str(folder), scenario, mode],
        cwd=root, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mode", ["plain", "lazy"])
def test_killed_at_random_moments(tmp_path, mode):
    result = run(tmp_path / "c", "random", mode)
    assert result["kills"] >= 25 and result["in_the_middle"] >= 10, result


@pytest.mark.parametrize("mode", ["plain", "lazy"])
@pytest.mark.parametrize("scenario", ["new", "again"])
def test_killed_before_every_file_operation(tmp_path, scenario, mode):
    result = run(tmp_path / "c", scenario, mode)
    assert result["kills"] >= 15 and result["rests"] >= 10, result
