"""Run one measurement in a process of its own: whatever it does, the caller goes on and knows what happened.

As a program (``python -m headway.plan.dissect.isolate FILE``) it is that process.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from headway.core.errors import DivergedError, HeadwayError

Status = Literal["ok", "oom", "nan", "refused", "crash", "timeout"]


@dataclass(frozen=True)
class Outcome:
    """What came of one measurement."""

    status: Status
    cause: str = ""
    """Why it is not ``ok``, in a sentence."""
    value: dict[str, Any] = field(default_factory=dict)
    """What the runner returned."""
    wall_seconds: float = 0.0
    """From the start of the process to its end."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def run_isolated(runner: str, work: dict[str, Any], *, timeout: float = 600.0, memory: int | None = None) -> Outcome:
    """``runner(work)`` in a new process.

    Args:
        runner: ``module:function``; takes and returns plain JSON-able data.
        timeout: seconds after which the process and its children are killed.
        memory: bytes that it may allocate, to try out a smaller machine; by default as many as there are.
    """
    with tempfile.TemporaryDirectory(prefix="headway-cell-") as folder:
        path = Path(folder) / "work.json"
        path.write_text(json.dumps({"runner": runner, "work": work, "memory": memory, "path": sys.path}))
        start = time.monotonic()
        with (Path(folder) / "stderr").open("w+b") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "headway.plan.dissect.isolate", str(path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _kill(process)
            elapsed = time.monotonic() - start
            if code is None:
                return Outcome("timeout", f"took longer than {timeout:g} s", wall_seconds=elapsed)
            result = path.with_suffix(".result")
            if code == 0 and result.is_file():
                return Outcome(**json.loads(result.read_text()), wall_seconds=elapsed)
            stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - 4000))
            return _died(code, stderr.read().decode(errors="replace"), elapsed)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and those it started; they share a session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _died(code: int, stderr: str, elapsed: float) -> Outcome:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    last = f": {lines[-1]}" if lines else ""
    if code == -signal.SIGKILL:
        return Outcome("oom", "was killed, most likely by the kernel for want of memory", wall_seconds=elapsed)
    if code < 0:
        return Outcome("crash", f"died of {signal.Signals(-code).name}{last}", wall_seconds=elapsed)
    return Outcome("crash", f"ended with status {code}{last}", wall_seconds=elapsed)


def _attempt(runner: str, work: dict[str, Any]) -> dict[str, Any]:
    """What ``runner`` returns or raises, as the fields of an outcome."""
    try:
        module, _, function = runner.partition(":")
        return {"status": "ok", "value": getattr(importlib.import_module(module), function)(work)}
    except DivergedError as error:
        return {"status": "nan", "cause": str(error)}
    except HeadwayError as error:
        return {"status": "refused", "cause": str(error)}
    except Exception as error:  # any failure is this cell's result
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        return {"status": "oom" if _out_of_memory(error) else "crash", "cause": cause}


def _out_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        text = str(error).lower()
        names = ("MemoryError", "OutOfMemoryError")
        if type(error).__name__ in names or "out of memory" in text or "can't allocate memory" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


def _main(path: Path) -> None:
    job = json.loads(path.read_text())
    sys.path[:] = job["path"]
    if job["memory"]:
        resource.setrlimit(resource.RLIMIT_DATA, (job["memory"], job["memory"]))
    outcome = _attempt(job["runner"], job["work"])
    path.with_suffix(".result").write_text(json.dumps(outcome))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
