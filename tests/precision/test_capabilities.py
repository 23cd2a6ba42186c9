"""What the machine says it can do, against doing it.

Needs: torch. Run: pytest tests/precision
"""

import sys

import torch

from headway.precision.blocks import BLOCK_FORMATS
from headway.precision.capabilities import _TRIALS, _whole_numbers, capabilities, torchao_version
from headway.precision.formats import FORMATS


def test_every_format_is_accounted_for():
    found = capabilities()
    assert set(found) == {*FORMATS, *BLOCK_FORMATS}
    for name, capability in found.items():
        assert capability.cast in ("native", "emulated")
        assert capability.native == (not capability.why), "what is emulated says why, what is native needs no excuse"
        assert capability.native == (capability.product != "emulated")
        assert capability.native <= (name in _TRIALS)
    assert found["e4m3"].cast == "native" and found["e2m1"].cast == "emulated"
    assert found["bf16"].product == "torch.matmul" and found["int4"].product == "emulated"


def test_the_trial_would_notice_a_wrong_product(monkeypatch):
    from headway.precision import capabilities as module

    left, right = _whole_numbers(torch.device("cpu"))
    exact = left.double() @ right.double()
    assert exact.abs().max() < 256 and len(exact.unique()) > 10
    assert torch.equal(exact.bfloat16().double(), exact)
    monkeypatch.setitem(_TRIALS, "int8", ("torch._int_mm", lambda a, b: (a @ b) + 1))
    assert module._product(FORMATS["int8"], torch.device("cpu")) == (
        "emulated",
        "torch._int_mm runs here, but its result is wrong",
    )


def test_torchao_is_asked_for_and_not_imported():
    assert torchao_version() is None or torchao_version()[0].isdigit()
    assert "torchao" not in sys.modules or torchao_version()


def test_formats_alone_need_no_torch():
    import subprocess

    code = "import sys, headway.precision.formats; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
