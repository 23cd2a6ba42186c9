"""The events of a profile as plain records, nested by time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

_BACKWARD_FUNCTION = 1  # torch's RecordScope::BACKWARD_FUNCTION


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
    """The events of a finished ``torch.profiler.profile``, those on the host with the time of the kernels they started."""
    return [
        Event(
            name=e.name,
            start=e.time_range.start,
            end=e.time_range.end,
            thread=e.thread,
            sequence=e.sequence_nr,
            forward_thread=e.fwd_thread or 0,
            backward=e.scope == _BACKWARD_FUNCTION,
            annotation=bool(e.is_user_annotation),
            shapes=tuple(e.input_shapes or ()),
            device=sum(kernel.duration for kernel in e.kernels),
        )
        for e in profile.events()
        if e.device_type.name == "CPU" and not e.is_async
    ]


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
