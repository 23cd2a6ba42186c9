"""An event-driven simulation of a pipeline: every rank runs its list of actions in order, and waits for messages.

The actions are those that the runtime runs (`parallel/pipeline/tables.py`); their times come from a cost model, or are
given. Nothing is assumed about the schedule: bubble, stash and idle time are what comes out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from headway.core.errors import HeadwayError
from headway.parallel.pipeline.tables import Action
from headway.parallel.pipeline.trace import Span

Task = Action
"""What a rank does: the runtime's own record."""


class Event(NamedTuple):
    """A task on a rank's own clock, or a message on its way; seconds."""

    rank: int
    task: Task
    start: float
    end: float


class Message(NamedTuple):
    """A boundary activation or its gradient between two ranks."""

    source: int
    target: int
    task: Task
    """What it is the result of."""
    link: str
    bytes: float
    start: float
    end: float


class Transfer(NamedTuple):
    """What it takes to send one boundary."""

    seconds: float = 0.0
    bytes: float = 0.0
    link: str = "free"


@dataclass
class Timeline:
    """What happened."""

    events: list[Event]
    messages: list[Message]
    ranks: int
    peak_stash: list[float] = field(default_factory=list)
    """By rank, the most that was kept from forward for backward passes, in the unit of ``kept``."""

    @property
    def seconds(self) -> float:
        """From the first task's start to the last one's end."""
        return max(event.end for event in self.events)

    def busy(self, rank: int) -> float:
        """Seconds that a rank computed."""
        return sum(event.end - event.start for event in self.events if event.rank == rank)

    @property
    def bubble(self) -> float:
        """Idle time as a share of the busiest rank's busy time: what `formulas.bubble` predicts."""
        busy = [0.0] * self.ranks
        for event in self.events:
            busy[event.rank] += event.end - event.start
        return self.seconds / max(busy) - 1

    def spans(self) -> list[Span]:
        """Tasks, and beside each sender's the messages that it sends, for `chrome_trace`."""
        tasks = [Span(event.rank, *event.task, event.start, event.end) for event in self.events]
        return tasks + [Span(m.source, "message", m.task.stage, m.task.micro, m.start, m.end)
                        for m in self.messages if m.end > m.start]  # fmt: skip

    def bytes_by_link(self) -> dict[str, float]:
        """Bytes sent over each kind of link."""
        total: dict[str, float] = {}
        for message in self.messages:
            total[message.link] = total.get(message.link, 0.0) + message.bytes
        return total


def simulate(
    orders: Sequence[Sequence[Task]],
    seconds: Callable[[Task], float],
    rank_of: Callable[[int], int],
    *,
    transfer: Callable[[int, int], Transfer] = lambda source, target: Transfer(),
    kept: Callable[[int], float] = lambda stage: 1.0,
    overlap: bool = True,
) -> Timeline:
    """Run every rank's tasks in their order, each as soon as what it needs has arrived.

    Args:
        orders: by rank.
        seconds: of a task.
        rank_of: the rank that has a stage.
        transfer: what a message between two ranks takes. A rank's messages leave one after the other.
        kept: what a stage keeps of a micro-batch between its passes; 1 counts micro-batches.
        overlap: a rank goes on while its message travels; otherwise it waits until it has been sent.

    Raises:
        HeadwayError: the ranks wait for one another for ever.
    """
    return _Run(orders, seconds, rank_of, transfer, kept, overlap).run()


class _Run:
    def __init__(self, orders, seconds, rank_of, transfer, kept, overlap) -> None:  # type: ignore[no-untyped-def]
        self.orders, self.seconds, self.rank_of = orders, seconds, rank_of
        self.transfer, self.kept, self.overlap = transfer, kept, overlap
        self.last = max(task.stage for order in orders for task in order)
        self.at = [0] * len(orders)
        self.free = [0.0] * len(orders)
        self.link_free = [0.0] * len(orders)
        self.arrived: dict[Task, float] = {}
        self.waiting: dict[Task, int] = {}
        self.timeline = Timeline([], [], len(orders))

    def run(self) -> Timeline:
        # Every link has one sender, so that times do not depend on which of the ready ranks goes first.
        ready = deque(range(len(self.orders)))
        while ready:
            rank = ready.popleft()
            while self.at[rank] < len(self.orders[rank]):
                task = self.orders[rank][self.at[rank]]
                missing = [need for need in self._needs(task) if need not in self.arrived]
                if missing:
                    self.waiting[missing[0]] = rank
                    break
                self.at[rank] += 1
                for result in self._do(rank, task):
                    if result in self.waiting:
                        ready.append(self.waiting.pop(result))
        self._check()
        self.timeline.peak_stash = [stash(order, self.kept) for order in self.orders]
        return self.timeline

    def _needs(self, task: Task) -> list[Task]:
        """What must have arrived; a message is known as the task of the stage that it is for."""
        if task.kind == "weight":
            return [Task("weight", task.stage, task.micro)]
        if task.kind == "forward":
            return [task] if task.stage else []
        needs = [Task("input", task.stage, -1 - task.micro)]  # its own forward pass
        return needs + ([Task("input", task.stage, task.micro)] if task.stage < self.last else [])

    def _do(self, rank: int, task: Task) -> list[Task]:
        start = max([self.free[rank], *(self.arrived[need] for need in self._needs(task))])
        end = start + self.seconds(task)
        self.timeline.events.append(Event(rank, task, start, end))
        self.free[rank] = end
        kind, stage, micro = task
        results: list[Task] = []
        if kind == "forward":
            results.append(Task("input", stage, -1 - micro))
            self.arrived[results[0]] = end
            if stage < self.last:
                results.append(Task("forward", stage + 1, micro))
        elif kind != "weight":
            results.append(Task("weight", stage, micro))
            self.arrived[results[0]] = end
            if stage:
                results.append(Task("input", stage - 1, micro))
        for result in results[1:]:
            self._send(rank, self.rank_of(result.stage), task, result, end)
        return results

    def _send(self, rank: int, target: int, task: Task, result: Task, ready: float) -> None:
        if target == rank:
            self.arrived[result] = ready
            return
        cost = self.transfer(rank, target)
        start = max(ready, self.link_free[rank])
        self.arrived[result] = self.link_free[rank] = start + cost.seconds
        if not self.overlap:
            self.free[rank] = start + cost.seconds
        self.timeline.messages.append(Message(rank, target, task, cost.link, cost.bytes, start, start + cost.seconds))

    def _check(self) -> None:
        stuck = [rank for rank, order in enumerate(self.orders) if self.at[rank] < len(order)]
        if stuck:
            kind, stage, micro = self.orders[stuck[0]][self.at[stuck[0]]]
            what = f"rank {stuck[0]} waits to run the {kind} pass of micro-batch {micro} in stage {stage}"
            raise HeadwayError("schedule", f"never ends: {what}, and {len(stuck)} of {len(self.orders)} ranks wait")


def stash(order: Sequence[Task], kept: Callable[[int], float] = lambda stage: 1.0) -> float:
    """The most that a rank keeps from forward for backward passes while it runs ``order``; see `simulate`."""
    held = most = 0.0
    for task in order:
        if task.kind == "forward":
            held += kept(task.stage)
            most = max(most, held)
        elif task.kind != "input":  # what it was kept for is done
            held -= kept(task.stage)
    return most
