"""Exit statuses and messages of the command line. Needs nothing. Run: pytest tests/cli/test_main.py"""

import signal

import pytest

from headway.cli import methods as methods_command
from headway.cli.main import main
from headway.core.errors import HeadwayError, Interrupted


def raising(error):
    def fail(*arguments, **options):
        raise error

    return fail


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "0.1.0\n"


@pytest.mark.parametrize(
    "arguments", [["trian"], ["train"], ["train", "x.yaml", "--no-such-option"], ["generate", "run"]]
)
def test_a_wrong_call_is_told_and_exits_with_2(arguments, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Usage" in err
    assert "Traceback" not in err


def test_a_mistake_is_one_message(monkeypatch, capsys):
    monkeypatch.setattr(
        methods_command, "describe", raising(HeadwayError("methods.ema", "is odd", hint="leave it out"))
    )
    assert main(["methods", "ema"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "headway: methods.ema: is odd. Leave it out\n")


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_has_its_exit_status(signum, status, monkeypatch, capsys):
    monkeypatch.setattr(methods_command, "describe", raising(Interrupted(signum)))
    assert main(["methods", "ema"]) == status
    assert "stopped by SIG" in capsys.readouterr().err


def test_ctrl_c_outside_training_exits_with_130(monkeypatch):
    monkeypatch.setattr(methods_command, "describe", raising(KeyboardInterrupt()))
    assert main(["methods", "ema"]) == 130


def test_our_own_faults_are_not_hidden(monkeypatch):
    monkeypatch.setattr(methods_command, "describe", raising(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError, match="ours"):
        main(["methods", "ema"])


def test_no_command_shows_the_help(capsys):
    assert main([]) in (0, 2)
    assert "train" in "".join(capsys.readouterr())
