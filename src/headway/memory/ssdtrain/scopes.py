"""Which module is running: a stack kept by module hooks, and the segments that a forward pass goes through."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from headway.memory.saved import Entry, in_backward

OUTSIDE = ""
"""Name of what runs outside of all modules, such as the loss, and in the root itself."""


@dataclass(eq=False)
class Segment:
    """A stretch of the forward pass in which one module is the innermost."""

    number: int
    module: str
    volume: int = 0
    """Bytes of the storages first saved here that could be offloaded."""
    seconds: float = 0.0
    entries: list[weakref.ref[Entry]] = field(default_factory=list)
    """What was offloaded here, in the order in which it was saved."""


@dataclass(eq=False)
class Pass:
    """One forward pass and the backward pass that goes with it: one micro-batch."""

    timed: bool = False
    """Its segments are timed."""
    segments: list[Segment] = field(default_factory=list)
    marks: list[Any] = field(default_factory=list)
    """The moment at which each segment began."""
    waited: list[float] = field(default_factory=list)
    """Seconds spent, up to that moment, on waiting for room in the store's queue."""
    backward: bool = False
    """The backward pass has begun."""
    away: list[Segment] | None = None
    """Segments with something offloaded, the last one first; made when the backward pass begins."""
    asked: int = 0
    """How many of them have been asked for."""
    asked_bytes: int = 0
    freed: list[int] = field(default_factory=list)
    """Bytes that the segments from each number on saved."""
    keep: set[int] = field(default_factory=set)
    """Stamps of storages that stay: parameters, buffers, inputs."""
    seen: set[int] = field(default_factory=set)
    """Stamps of storages whose bytes have been counted."""

    def end(self, mark: Any, waited: float) -> None:
        """Turn the marks into seconds."""
        marks, waits = [*self.marks, mark], [*self.waited, waited]
        for index, segment in enumerate(self.segments):
            segment.seconds = max(0.0, _between(marks[index], marks[index + 1]) - (waits[index + 1] - waits[index]))


class Scopes:
    """Hooks on every module of a model that follow which one runs.

    Args:
        model: its root counts as outside.
        on_enter: called with a module and its positional and keyword arguments when it begins.
        on_change: called whenever another module has become the innermost.
    """

    def __init__(
        self,
        model: nn.Module,
        on_enter: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None],
        on_change: Callable[[], None],
    ) -> None:
        self.active = False
        self.stack: list[str] = []
        self._on_enter, self._on_change = on_enter, on_change
        self._names = weakref.WeakKeyDictionary((module, name) for name, module in model.named_modules())
        self._removers = []
        for module in self._names:
            self._removers += [
                module.register_forward_pre_hook(self._enter, with_kwargs=True),
                module.register_forward_hook(self._leave, always_call=True),
            ]
        self.modules = len(self._names)

    def __deepcopy__(self, memo: Any) -> Scopes:
        return self  # a copy of the model is followed as the model is, while it is run under the same store

    @property
    def current(self) -> str:
        """The innermost module's name; `OUTSIDE` in none, or in the root."""
        return self.stack[-1] if self.stack else OUTSIDE

    def _ignored(self) -> bool:
        return not self.active or not torch.is_grad_enabled() or in_backward()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._ignored():
            return
        self._on_enter(module, args, kwargs)
        self.stack.append(self._names.get(module, OUTSIDE))
        self._on_change()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._ignored() or not self.stack:
            return
        self.stack.pop()
        self._on_change()

    def remove(self) -> None:
        """Take the hooks off."""
        for remover in self._removers:
            remover.remove()
        self._removers = []


def mark(device: torch.device) -> Any:
    """This moment, in the time of the device."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    """Seconds between two marks."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000
