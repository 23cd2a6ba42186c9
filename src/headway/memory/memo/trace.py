"""The allocations of one training step: what is allocated when, for how long, and in which block's pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from headway.core.meters import profiled, synchronize
from headway.memory.saved import in_backward

_MARK = "headway/scope/"


@dataclass(frozen=True)
class Allocation:
    """One allocation of a step."""

    id: int
    size: int
    """Bytes."""
    start: int
    """Number of the event, among all of the step, that allocated it."""
    end: int
    """Number of the event that freed it; beyond the last event if the step did not."""
    scope: str = ""
    """In which stretch of the step it was allocated (``forward 3``, ``backward 3``, in the second micro-batch
    ``forward 3, 2``); empty outside of all blocks."""


def record_trace(
    step: Callable[[], Any], blocks: Sequence[nn.Module] = (), device: torch.device | str = "cpu"
) -> list[Allocation]:
    """Run ``step`` and note every allocation on ``device`` that it makes.

    Args:
        step: a training step, run once; run it before, so that gradients and optimizer states exist.
        blocks: whose forward and backward passes are told apart.
        device: of which allocator.

    Raises:
        RuntimeError: another profiler is running.
    """
    device = torch.device(device)
    if torch.autograd._profiler_enabled():
        raise RuntimeError("another profiler is running")
    handles = [handle for index, block in enumerate(blocks) for handle in _watch(block, index)]
    with profiled(device, profile_memory=True) as profiler:
        try:
            step()
            synchronize(device)
        finally:
            for handle in handles:
                handle.remove()
    # The tree of events is the only place where allocations have an address.
    tree = profiler.profiler.kineto_results.experimental_event_tree()  # type: ignore[union-attr]
    return from_events(sorted(_events(tree, device.type), key=lambda event: event[0]))


def from_events(events: Sequence[tuple[int, int, int, str]]) -> list[Allocation]:
    """Allocations from events in the order of time.

    Args:
        events: (time, address, bytes allocated or minus those freed, mark); a mark ``+name`` begins a scope and
            ``-name`` ends it, with neither address nor bytes. What is freed without having been allocated is older
            than the step, and does not count.
    """
    found: list[Allocation] = []
    live: dict[int, tuple[int, int, str]] = {}  # address -> bytes, event, scope
    visits: Counter[str] = Counter()
    inside, scope, number = "", "", 0
    for _, address, size, mark in events:
        if mark:
            name = mark[1:]
            if mark[0] == "+":
                visits[name] += 1
                inside, scope = name, name if visits[name] == 1 else f"{name}, {visits[name]}"
            elif name == inside:
                inside = scope = ""
            continue
        number += 1
        if size > 0:
            live[address] = (size, number, scope)
        elif address in live:
            bytes_, start, where = live.pop(address)
            found.append(Allocation(len(found), bytes_, start, number, where))
    for bytes_, start, where in live.values():
        found.append(Allocation(len(found), bytes_, start, number + 1, where))
    return sorted(found, key=lambda one: one.start)


def _watch(block: nn.Module, index: int) -> Iterator[Any]:
    """Mark in the profile where the passes of a block begin and end."""

    def begins(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if in_backward() or not torch.is_grad_enabled():
            return  # recomputation belongs to the backward pass that it serves
        inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
        if inputs:
            inputs[0].register_hook(lambda _: _note(f"-backward {index}"))
        _note(f"+forward {index}")

    def ends(_: nn.Module, args: Any, output: Any) -> None:
        if in_backward() or not torch.is_grad_enabled():
            return
        _note(f"-forward {index}")
        first = output[0] if isinstance(output, tuple) else output
        first.register_hook(lambda _: _note(f"+backward {index}"))

    yield block.register_forward_pre_hook(begins, with_kwargs=True)
    yield block.register_forward_hook(ends)


def _note(mark: str) -> None:
    with record_function(_MARK + mark):
        pass


def _events(nodes: Sequence[Any], kind: str) -> Iterator[tuple[int, int, int, str]]:
    for node in nodes:
        if node.tag.name == "Allocation":
            fields = node.extra_fields
            if fields.device.type == kind and fields.alloc_size:
                yield node.start_time_ns, fields.ptr, fields.alloc_size, ""
            continue
        if node.name.startswith(_MARK):
            yield node.start_time_ns, 0, 0, node.name.removeprefix(_MARK)
        yield from _events(node.children, kind)
