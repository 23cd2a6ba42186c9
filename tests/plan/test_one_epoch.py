"""The one-epoch library as a stranger's loop uses it: without torch and without the trainer.

Needs: nothing. Run: pytest tests/plan/test_one_epoch.py
"""

import subprocess
import sys

import headway.plan.one_epoch as one_epoch


def test_the_plain_functions_need_neither_torch_nor_the_trainer():
    heavy = ("torch", "headway.core.trainer")
    script = f"import sys, headway.plan.one_epoch; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.strip() == "[]"


def test_every_public_name_exists_and_is_described():
    assert one_epoch.__all__ == sorted(one_epoch.__all__)
    for name in one_epoch.__all__:
        assert getattr(one_epoch, name).__doc__, name
