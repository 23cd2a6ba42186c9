"""Start the ranks of a training on this machine, through torch's elastic launcher, and say which one failed."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headway.core.errors import HeadwayError

STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit statuses of ranks that were asked to stop and have saved."""

TO_SAVE = 300
"""Seconds that ranks which are asked to stop have for the step that they are at and for saving."""


def launch(command: Sequence[str], ranks: int) -> int:
    """Run ``headway COMMAND`` as ``ranks`` processes; rank 0 has this terminal, the others are silent.

    When one dies, the others are stopped at once. Nothing is started again by itself: the same command goes on where
    the run's newest checkpoint is.

    Returns:
        The exit status: 0, or what the ranks ended with after they were asked to stop, or after an error that rank 0
        has told itself.

    Raises:
        HeadwayError: another rank failed or was killed, with its number and what it said last.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("agent.server.api", "multiprocessing.api"):  # they print long accounts of a failure; ours is below
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(TO_SAVE))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    with tempfile.TemporaryDirectory(prefix="headway-ranks-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id="headway",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=dict.fromkeys(range(1, ranks), Std.ALL)),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "headway.cli.main", *command)
        except ChildFailedError as error:
            return _status_of(error.failures, ranks)
        except SignalException as stop:
            return 128 + int(stop.sigval)
    return 0


def _status_of(failures: dict[int, Any], ranks: int) -> int:
    """What to say of ranks that failed: the one that a signal ended, else the first to end, has the cause."""
    killed = [
        rank for rank, failure in failures.items() if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM
    ]
    told = [0] if 0 in failures and failures[0].exitcode > 0 else []  # by rank 0, where the user reads it
    rank = min(killed or told or failures, key=lambda r: (failures[r].timestamp, r))
    code = failures[rank].exitcode
    if code in STOPPED:
        return int(code)
    if code < 0:
        name = signal.Signals(-code).name
        why = "; the system does that when memory runs out" if -code == signal.SIGKILL else ""
        raise HeadwayError(f"rank {rank} of {ranks}", f"was ended by {name}{why}, and the others were stopped",
                           hint="the same command goes on from the newest checkpoint, with as many ranks or other "
                           "ones")  # fmt: skip
    if rank == 0:
        return int(code)
    said = _last_words(failures[rank].error_file)
    raise HeadwayError(f"rank {rank} of {ranks}", f"failed{': ' + said if said else ''}, and the others were stopped")


def _last_words(error_file: str | None) -> str:
    log = Path(error_file).parent / "stderr.log" if error_file else None
    if log is None or not log.is_file():
        return ""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("headway: ") if lines else ""
