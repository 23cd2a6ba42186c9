"""Probes in processes of their own: nothing stays behind in the run's, and what runs out of memory may be killed.

    python -m headway.plan.memory.worker

imports everything once and then forks for each recipe that comes in on standard input, a JSON document a line; the
answer goes to standard output.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headway.core.errors import HeadwayError
from headway.core.recipe import Recipe
from headway.memory.backends import offload_folder, remove_leftovers
from headway.plan.memory.probe import Footprint, measure

PRELOADED = ("torch._dynamo", "torch.profiler", "torch.utils.checkpoint", "headway.workloads.language",
             "headway.optim.adamw", "headway.optim.schedules", "headway.memory.store")  # fmt: skip
"""What most steps import, torch itself among it: a second that no child has to spend again."""


class Prober:
    """Measures recipes, each in a process that ends with it; a context manager."""

    def __enter__(self) -> Prober:
        command = [sys.executable, "-m", "headway.plan.memory.worker"]
        quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ}  # the profiler warns of memory older than itself
        self._worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, env=quiet
        )
        self._folders: set[Path] = set()
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._worker.pid, signal.SIGKILL)  # a probe that runs still, too
        self._worker.communicate()  # until none of them lives
        for folder in self._folders:
            remove_leftovers(folder)  # probes end without cleaning up

    def measure(self, recipe: Recipe) -> Footprint:
        """As `probe.measure`.

        Raises:
            MemoryError: it ran out of memory, or was killed.
            HeadwayError: as raised in the process, or the process cannot go on.
        """
        assert self._worker.stdin is not None and self._worker.stdout is not None
        self._folders.add(offload_folder(recipe.memory.disk))
        try:
            self._worker.stdin.write(json.dumps(recipe.to_dict()) + "\n")
            self._worker.stdin.flush()
            answer: dict[str, Any] = json.loads(self._worker.stdout.readline())
        except (OSError, ValueError) as error:
            raise HeadwayError("memory.budget", f"the process that tries switches out has died ({error})",
                               hint="choose the methods by hand: `headway methods`") from error  # fmt: skip
        if "footprint" in answer:
            return Footprint(**answer["footprint"])
        if "memory" in answer:
            raise MemoryError(answer["memory"])
        raise HeadwayError(answer["where"], answer["error"])


def serve() -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    for module in PRELOADED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # children neither walk nor copy what is there by now
    for line in sys.stdin:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            with os.fdopen(write, "w") as pipe:
                json.dump(_answer(line), pipe)
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            answer = pipe.read()
        _, status = os.waitpid(child, 0)
        if status or not answer:
            how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"
            answer = json.dumps({"memory": f"the process was ended by {how}"})
        answers.write(answer + "\n")
        answers.flush()


def _answer(line: str) -> dict[str, Any]:
    try:
        return {"footprint": asdict(measure(Recipe.load(json.loads(line))))}
    except MemoryError as error:
        return {"memory": str(error)}
    except HeadwayError as error:
        return {"where": error.where, "error": str(error).removeprefix(f"{error.where}: ")}
    except Exception as error:
        return {"where": "memory.budget", "error": f"a trial failed: {type(error).__name__}: {error}"}


if __name__ == "__main__":
    serve()
