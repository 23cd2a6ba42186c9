"""How long an iteration takes on given paths: nodes with one task at a time, limited memory and uneven links.

The rules are those behind the published times: a node runs what has arrived first, and time is worked through in
buckets of a second, within which nodes take turns. A forward pass waits while the node's memory is full; memory comes
back with the backward pass; a data node sends a slot's next micro-batch when the last one is back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from headway.parallel.skippipe.cluster import Cluster, Path, ScheduleError

RETRY = 0.1
"""Seconds after which a node looks again whether its memory is free."""
LIMIT = 100_000
"""Buckets after which a schedule counts as stuck."""


@dataclass(frozen=True)
class Job:
    """One micro-batch to send."""

    path: Path
    release: float
    """Seconds from the start of the iteration."""
    slot: int
    """Jobs of one slot go one after the other."""


@dataclass(frozen=True)
class Span:
    """A task as it ran."""

    node: int
    job: int
    kind: Literal["forward", "loss", "backward"]
    start: float
    end: float


@dataclass
class Result:
    """An iteration as simulated."""

    seconds: float = 0.0
    """When the last micro-batch's backward pass is done."""
    spans: list[Span] = field(default_factory=list)


@dataclass(eq=False)
class _Task:
    time: float
    arrival: float
    job: int
    kind: Literal["forward", "loss", "backward"]
    position: int
    sent_here: bool = False


class _State:
    def __init__(self, cluster: Cluster, jobs: Sequence[Job], gap: float, local_gap: float) -> None:
        self.cluster, self.jobs, self.gap, self.local_gap = cluster, jobs, gap, local_gap
        self.costs, self.compute = cluster.costs.tolist(), cluster.compute.tolist()
        n = len(self.compute)
        self.free, self.memory = [0.0] * n, [cluster.memory] * n
        self.queues: list[list[_Task]] = [[] for _ in range(n)]
        self.out: set[int] = set()
        self.left, self.result = len(jobs), Result()
        for index, job in enumerate(jobs):
            self.queues[job.path[0]].append(_Task(job.release, math.inf, index, "forward", 0, True))

    def ready(self, node: int, task: _Task) -> bool:
        """Whether a task can start now; else its time is moved to when it may."""
        if task.time < self.free[node]:
            task.time = self.free[node]
        elif (task.kind == "forward" and self.memory[node] <= 0) or (
            task.sent_here and self.jobs[task.job].slot in self.out
        ):
            task.time += RETRY
        else:
            return True
        return False

    def run(self, node: int, bucket: int) -> bool:
        """Run what can run on a node in this bucket; whether anything moved."""
        queue, moved, done = self.queues[node], False, set()
        queue.sort(key=lambda t: (t.time, t.arrival))
        for task in queue:
            if int(task.time) != bucket:
                continue
            moved = True
            if not self.ready(node, task):
                continue
            start = task.time
            end = self.process(node, task)
            self.free[node] = end + (self.local_gap if task.sent_here else self.gap)
            done.add(id(task))
            for other in queue:
                if start <= other.time < self.free[node] and id(other) not in done:
                    other.time = self.free[node]
        if done:
            self.queues[node] = [task for task in queue if id(task) not in done]
        return moved

    def process(self, node: int, task: _Task) -> float:
        """Run a task, send what it makes, and give the time at which it is done."""
        job, w = self.jobs[task.job], self.compute[node]
        path, position = job.path, task.position
        seconds = {"forward": w, "loss": w / 4, "backward": 1.5 * w}[task.kind]
        end = task.time + seconds
        self.result.spans.append(Span(node, task.job, task.kind, task.time, end))
        if task.kind == "forward":
            self.memory[node] -= 1
            if position == 0:
                self.out.add(job.slot)
            if position + 1 < len(path):
                self.send(node, path[position + 1], end, _Task(0, 0, task.job, "forward", position + 1))
            else:
                self.send(node, path[0], end, _Task(0, 0, task.job, "loss", position))
        elif task.kind == "loss":
            self.send(node, path[position], end, _Task(0, 0, task.job, "backward", position))
        else:
            self.memory[node] += 1
            if position:
                self.send(node, path[position - 1], end, _Task(0, 0, task.job, "backward", position - 1))
            else:
                self.result.seconds = max(self.result.seconds, end)
                self.left -= 1
                self.out.discard(job.slot)
        return end

    def send(self, node: int, to: int, at: float, task: _Task) -> None:
        """Let a task arrive over the link."""
        task.time = task.arrival = at + self.costs[node][to]
        self.queues[to].append(task)


def simulate(cluster: Cluster, jobs: Sequence[Job], gap: float = 0.13, local_gap: float = 0.09) -> Result:
    """Run ``jobs`` to the end of their backward passes.

    Args:
        gap: seconds between two tasks of a node; ``local_gap`` after one that the node itself issued.

    Raises:
        ScheduleError: they never end: a path's micro-batches hold the memory that each other needs.
    """
    state = _State(cluster, jobs, gap, local_gap)
    bucket = 0
    while state.left:
        while True:  # a list, not a generator: every node takes its turn
            if not any([state.run(node, bucket) for node in range(len(state.queues))]):
                break
        times = [task.time for queue in state.queues for task in queue]
        if bucket >= LIMIT or (state.left and not times):
            raise ScheduleError("simulation", f"is stuck with {state.left} of {len(jobs)} micro-batches on their way")
        bucket = max(bucket + 1, int(min(times))) if times else bucket
    return state.result


def rounds(paths: Sequence[Path], cluster: Cluster, micro_batches: int) -> list[Job]:
    """``micro_batches`` sent along ``paths`` in turn; the paths of a data node start one after the other."""
    started: dict[int, int] = {}
    offsets = []
    for path in paths:
        turn = started[path[0]] = started.get(path[0], -1) + 1
        offsets.append(turn * float(cluster.compute[path[0]]))
    return [Job(paths[i % len(paths)], offsets[i % len(paths)], i % len(paths)) for i in range(micro_batches)]
