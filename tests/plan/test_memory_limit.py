"""A run that dies for lack of memory finishes with a budget, unattended, with the peak that was predicted.

Needs: Linux (a limit on the address space). Run: pytest tests/plan/test_memory_limit.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from headway.core.run import Run

LIMITED = Path(__file__).with_name("limited.py")
MIB = 2**20


def start(recipe: dict, folder: Path, name: str) -> subprocess.CompletedProcess:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, str(LIMITED), str(path), str(folder / name), str(540 * MIB)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=600)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS is kept by Linux alone")
def test_a_run_that_dies_finishes_with_a_budget(tiny, tmp_path):
    recipe = tiny(
        model={"hidden": 64, "layers": 8, "heads": 2, "context": 1024},
        data={"sequence": 1024},
        train={"steps": 2, "batch": 16},
        eval={"batches": 1},
    )
    died = start(recipe, tmp_path, "plain")
    assert died.returncode != 0
    assert "does not fit in memory" in died.stderr and "memory.budget=SIZE" in died.stderr
    lived = start({**recipe, "memory": {"budget": 180 * MIB, "disk": "/dev/shm"}}, tmp_path, "planned")
    assert lived.returncode == 0, lived.stderr
    summary = Run(tmp_path / "planned").summary
    assert summary["steps"] == 2
    assert summary["peak_memory_bytes"] == pytest.approx(summary["memory"]["predicted_bytes"], rel=0.1)
