"""Help comes at once: no torch is imported before a command runs. Needs nothing. Run: pytest tests/cli/test_start.py"""

import os
import subprocess
import sys

import pytest

from headway.cli.main import app

COMMANDS = [info.name or info.callback.__name__ for info in app.registered_commands] + ["recipe", "recipe check"]
HEAVY = ("torch", "numpy", "transformers", "matplotlib", "scipy")


def heavy_modules(code: str) -> str:
    script = f"{code}\nimport sys\nprint('loaded:', [m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_loads_nothing_heavy(command):
    call = f"from headway.cli.main import main\nassert main({[*command.split(), '--help']!r}) == 0"
    assert heavy_modules(call) == "loaded: []"


def test_the_package_and_what_needs_no_torch_load_none():
    names = "headway.__version__, headway.Recipe, headway.HeadwayError, headway.Method, headway.Run"
    assert heavy_modules(f"import headway\ndir(headway)\n{names}") == "loaded: []"


def test_every_public_name_is_there():
    import headway

    for name in headway.__all__:
        assert getattr(headway, name) is not None
        assert name in dir(headway)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = headway.trian


def test_help_takes_less_than_0_4_seconds():
    """Processor time of the fastest of five, since other work on the machine is not ours to count."""
    times = []
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-m", "headway.cli.main", "--help"], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        times.append(usage.ru_utime + usage.ru_stime)
    assert min(times) < 0.4
