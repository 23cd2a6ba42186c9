"""The events of a profile as plain records, nested by time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

_BACKWARD_FUNCTION = 1  # torch's RecordScope::BACKWARD_FUNCTION
_INTERNAL = ("[memory]", "profiler::")


@dataclass
class Event:
    """What is used of one profiled event."""

    name: str
    start: float
    """Microseconds."""
    end: float
    thread: int = 1
    sequence: int = -1
    """Autograd's sequence number; -1 where gradients are off."""
    forward_thread: int = 0
    """Of a backward node, the thread that ran its forward operation; 0 elsewhere."""
    backward: bool = False
    """An autograd node at work."""
    annotation: bool = False
    """A scope that Python code opened."""
    shapes: tuple[Any, ...] = ()
    device: float = 0.0
    """Microseconds of the kernels that this event itself started."""
    children: list[Event] = field(default_factory=list)

    @property
    def duration(self) -> float:
        """Microseconds."""
        return self.end - self.start

    @property
    def device_total(self) -> float:
        """Microseconds of the kernels that were started inside this event."""
        return sum(event.device for event in walk([self]))


def read_events(profile: Any) -> list[Event]:
    """The host's events of a finished ``torch.profiler.profile``, with the time of the kernels they started.

    The raw events are read: ``profile.events()`` needs a second for what a small model does in a few steps.
    """
    raw = profile.profiler.kineto_results.events()
    kernels: dict[int, float] = {}
    for e in raw:
        if e.device_type().name != "CPU" and e.linked_correlation_id() > 0:
            origin = e.linked_correlation_id()
            kernels[origin] = kernels.get(origin, 0.0) + e.duration_ns() / 1e3
    first = min((e.start_ns() for e in raw), default=0)
    found = []
    for e in raw:
        name = e.name()
        if e.device_type().name != "CPU" or e.linked_correlation_id() > 0 or name.startswith(_INTERNAL):
            continue
        if e.start_thread_id() != e.end_thread_id():
            continue  # begins on one thread and ends on another: it takes no thread's time
        found.append(
            Event(
                name=name,
                start=(e.start_ns() - first) / 1e3,
                end=(e.end_ns() - first) / 1e3,
                thread=e.start_thread_id(),
                sequence=e.sequence_nr(),
                forward_thread=e.fwd_thread_id(),
                backward=e.scope() == _BACKWARD_FUNCTION,
                annotation=e.is_user_annotation(),
                shapes=tuple(e.shapes()),
                device=kernels.get(e.correlation_id(), 0.0),
            )
        )
    return found


def nest(events: Iterable[Event]) -> dict[int, list[Event]]:
    """Thread -> its outermost events in order of time, each with the events inside it as ``children``."""
    threads: dict[int, list[Event]] = {}
    stacks: dict[int, list[Event]] = {}
    for event in sorted(events, key=lambda e: (e.start, -e.end)):
        event.children = []
        stack = stacks.setdefault(event.thread, [])
        while stack and event.end > stack[-1].end:
            stack.pop()
        (stack[-1].children if stack else threads.setdefault(event.thread, [])).append(event)
        stack.append(event)
    return threads


def walk(events: Iterable[Event]) -> Iterator[Event]:
    """The events and everything inside them, in order of time."""
    pending = list(events)[::-1]
    while pending:
        event = pending.pop()
        yield event
        pending += reversed(event.children)
