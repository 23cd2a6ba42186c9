"""Forks writers that save checkpoints and are killed, checks after each what the folder holds, prints one JSON line.

A process of its own, so that torch is imported once and forked from a single thread. Arguments: a folder, a scenario,
how to save: plain or lazy.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from headway.core.fallback import FallbackLog, use_log
from headway.resilience import pipeline
from headway.resilience.checkpoint import PlainCheckpointer
from headway.resilience.lazy import LazyCheckpointer
from tests.resilience.states import same

LAZY = sys.argv[3:] == ["lazy"]


def state_of(step):
    generator = torch.Generator().manual_seed(step)
    size = 50_000 if LAZY else 50  # in several pieces, through the ring
    return {
        "w": torch.randn(size, generator=generator),
        "m": [torch.randn(3, generator=generator).half()],
        "step": step,
    }


def checkpointer(folder, keep=2):
    if LAZY:
        pipeline.TINY_STATE, pipeline.CHUNK = 0, 64 << 10
        return LazyCheckpointer(LazyCheckpointer.Options(keep=keep, host_cache=128 << 10), folder)
    return PlainCheckpointer(PlainCheckpointer.Options(keep=keep), folder)


def spawn(work):
    """Run ``work(report)`` in a child; ``report(number)`` reaches the parent even if the child is killed then."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            work(lambda number: os.write(writing, b"%d\n" % number))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    return child, os.fdopen(reading)


def reported(pipe):
    with pipe:
        return max((int(line) for line in pipe if line.endswith("\n")), default=-1)


def check(folder, saved, allowed):
    """What is there loads, is bit-exact, is no older than the last save that was done, and the next start tidies up."""
    before = {path.name for path in folder.iterdir()} if folder.exists() else set()
    log = FallbackLog()
    use_log(log)
    state = checkpointer(folder).load()
    assert not log.entries, f"a kill looks like damage: {log.entries}"
    step = -1 if state is None else state["step"]
    assert state is None or same(state, state_of(step)), f"step {step} was not loaded as it was saved"
    assert saved <= step and step in allowed, f"step {saved} was saved and step {step} was loaded"
    after = {path.name for path in folder.iterdir()} if folder.exists() else set()
    assert not any(name.startswith(".") for name in after), f"rests stay: {sorted(after)}"
    return bool({name for name in before if name.startswith(".")}), step


def random_moments(folder, least=25, seconds=60):
    """A writer that saves one step after another is killed at random moments; the next one goes on from there."""
    rng = random.Random(0)
    kills, in_the_middle, step, end = 0, 0, -1, time.monotonic() + seconds
    while (kills < least or in_the_middle < 10 or step < 10) and time.monotonic() < end:

        def work(report, start=step):
            saver = checkpointer(folder)
            report(start)
            for number in range(start + 1, start + 1000):
                saver.save(number, state_of(number))
                saver.fence()
                if not LAZY or number % 3 == 0:  # a lazy one counts once it was waited for
                    saver.wait()
                    report(number)

        child, pipe = spawn(work)
        pipe.readline()  # it is under way, however slow the machine is now
        time.sleep(rng.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        saved = max(step, reported(pipe))
        hit, step = check(folder, saved, range(step, saved + (6 if LAZY else 2)))
        kills, in_the_middle = kills + 1, in_the_middle + hit
    return {"kills": kills, "in_the_middle": in_the_middle, "steps": step}


def every_operation(folder, again=False):
    """A writer kills itself just before its first, second, third ... file operation, until it gets through unharmed.

    With ``again`` it saves the step which is there already; otherwise a new one, which also removes an old one.
    """
    kills, rests = 0, 0
    events = {
        "open",
        "os.mkdir",
        "os.rename",
        "os.remove",
        "os.rmdir",
        "shutil.rmtree",
        "os.scandir",
        "os.listdir",
        "fcntl.flock",
    }
    while True:
        for path in folder.glob("*") if folder.exists() else ():
            raise AssertionError(f"{path} should be gone")
        for number in (1, 2):
            saver = checkpointer(folder)
            saver.save(number, state_of(number))
            saver.close()

        def work(report, last=kills):
            saver = checkpointer(folder)
            count = 0

            def watch(event, arguments):
                nonlocal count
                touches = any(
                    os.fspath(folder) in os.fsdecode(a) for a in arguments if isinstance(a, str | bytes | Path)
                )
                if event in events and (touches or event == "fcntl.flock"):
                    if count == last:
                        os.kill(os.getpid(), signal.SIGKILL)
                    count += 1

            sys.addaudithook(watch)
            saver.save(2 if again else 3, state_of(2 if again else 3))
            saver.wait()
            report(3)

        child, pipe = spawn(work)
        os.waitpid(child, 0)
        done = reported(pipe) == 3
        hit, _ = check(folder, 3 if done and not again else 2, {2} if again else {2, 3})
        rests += hit
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        if done:
            return {"kills": kills, "rests": rests}
        kills += 1


def again(folder):
    return every_operation(folder, again=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory() as scratch
    ):  # the first save of a process imports a lot: once, not in every child
        first = checkpointer(Path(scratch))
        first.save(0, state_of(0))
        first.close()  # its threads too: a process is forked from one thread
    print(
        json.dumps({"random": random_moments, "new": every_operation, "again": again}[sys.argv[2]](Path(sys.argv[1])))
    )
