"""What memory is made of: parameters, gradients, optimizer, activations and the rest, before a step and at its peak."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from headway.core.meters import host_storages, live_bytes, process_peak_bytes, profiled, synchronize
from headway.plan.dissect.scopes import PHASE

_GRADIENT = "headway/gradient/"


@dataclass(frozen=True)
class Breakdown:
    """Bytes of live tensor storage by what they are for."""

    parameters: int
    """The model's parameters and buffers."""
    gradients: int
    optimizer: int
    """The optimizer's state, and its fp32 masters where it has them."""
    activations: int
    """Made by a forward pass, or by running one again, and alive: kept for backward, or a temporary of forward."""
    other: int
    """Everything else: the batch, data, gradients of activations and the temporaries of backward."""

    @property
    def total(self) -> int:
        """Their sum."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.other


@dataclass(frozen=True)
class MemoryReport:
    """A step's memory."""

    before: Breakdown
    peak: Breakdown
    peak_phase: str
    """Where the peak was reached: ``forward``, ``backward``, ``recompute`` or ``other``."""
    process_bytes: int
    """The process's largest resident set so far: code, allocator and all."""
    reserved_bytes: int | None
    """What the caching allocator of a GPU held at its peak; None on a CPU."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "before_bytes": self.before.total, "peak_bytes": self.peak.total}


@dataclass
class _Allocation:
    bytes: int
    phase: str | None
    """None: older than the step."""
    gradient: bool = False


def memory_breakdown(
    step_fn: Callable[[], Any], model: nn.Module, optimizer: Any = None, *, warmup: int = 1
) -> MemoryReport:
    """Run ``step_fn`` and tell what memory held before it and at its peak.

    The peak is that of ``core.meters.live_peak``: bytes of live tensor storage, the same every time.

    Args:
        step_fn: one training step; it is called ``warmup + 1`` times and each is a real one.
        warmup: steps before, so that the optimizer's state exists.
    """
    for _ in range(warmup):
        step_fn()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = live_bytes(device)
    owned = _owned(model, optimizer)
    live = {ptr: _Allocation(size, None) for kind in owned.values() for ptr, size in kind.items()}
    handles = [_watch(parameter, optimizer) for parameter in model.parameters() if parameter.requires_grad]
    with profiled(device, profile_memory=True) as profiler:
        try:
            step_fn()
            synchronize(device)
        finally:
            for handle in handles:
                handle.remove()
    after = _owned(model, optimizer)
    # The tree of events is the only place where allocations have an address.
    found = profiler.profiler.kineto_results.experimental_event_tree()  # type: ignore[union-attr]
    snapshots = _replay(sorted(_events(found, device), key=lambda event: event[0]), live, start)
    older = {kind: owned[kind].keys() for kind in owned}
    return MemoryReport(
        before=_sum(snapshots[0], older, owned["optimizer"].keys()),
        peak=_sum(snapshots[1], older, after["optimizer"].keys()),
        peak_phase={"marked": "other"}.get(snapshots[1].phase, snapshots[1].phase),
        process_bytes=process_peak_bytes(),
        reserved_bytes=torch.cuda.max_memory_reserved(device) if on_gpu else None,
    )


@dataclass
class _Snapshot:
    total: int
    live: dict[int, _Allocation]
    phase: str = "other"


def _replay(
    events: list[tuple[int, int, int, str]], live: dict[int, _Allocation], start: int
) -> tuple[_Snapshot, _Snapshot]:
    """What was alive at first, and at the peak."""
    new: set[int] = set()
    for _, pointer, size, phase in events:  # buffers that were kept for gradients since an earlier step
        if phase == _GRADIENT and pointer not in new:
            live.setdefault(pointer, _Allocation(size, None)).gradient = True
        elif phase != _GRADIENT and size > 0:
            new.add(pointer)
    first = _Snapshot(start, dict(live))
    peak, current = first, start
    for _, pointer, size, phase in events:
        if phase == _GRADIENT:
            if pointer in live:
                live[pointer].gradient = True
            continue
        current += size
        if size > 0:
            live[pointer] = _Allocation(size, phase)
        else:
            live.pop(pointer, None)
        if current > peak.total:
            peak = _Snapshot(current, dict(live), phase)
    return first, peak


def _sum(snapshot: _Snapshot, older: dict[str, Any], optimizer: Any) -> Breakdown:
    sums = dict.fromkeys(("parameters", "gradients", "optimizer", "activations"), 0)
    for pointer, one in snapshot.live.items():
        if one.phase is None and pointer in older["parameters"]:
            sums["parameters"] += one.bytes
        elif one.gradient or (one.phase is None and pointer in older["gradients"]):
            sums["gradients"] += one.bytes
        elif pointer in optimizer:
            sums["optimizer"] += one.bytes
        elif one.phase in ("forward", "recompute"):
            sums["activations"] += one.bytes
    return Breakdown(**sums, other=snapshot.total - sum(sums.values()))


def _owned(model: nn.Module, optimizer: Any) -> dict[str, dict[int, int]]:
    """Kind -> address -> bytes of the storages that are known to be parameters, gradients and optimizer state."""
    masters = list(_masters(optimizer).values())
    trained = [*model.parameters(), *masters]
    states = [t for part in _optimizers(optimizer) for state in part.state.values() for t in state.values()]
    kinds = {
        "parameters": [*model.parameters(), *model.buffers()],
        "gradients": [p.grad for p in trained if p.grad is not None],
        "optimizer": [*masters, *(t for t in states if isinstance(t, Tensor))],
    }
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found: dict[str, dict[int, int]] = {}
    for kind, tensors in kinds.items():
        storages = [t.untyped_storage() for t in tensors if t.device == device and t.layout is torch.strided]
        found[kind] = {s.data_ptr(): s.nbytes() for s in storages if s.nbytes() and s.data_ptr() not in host_storages}
    return found


def _masters(optimizer: Any) -> dict[Tensor, Tensor]:
    return getattr(optimizer, "masters", {})


def _optimizers(optimizer: Any) -> list[Any]:
    if isinstance(optimizer, list | tuple):
        return [part for one in optimizer for part in _optimizers(one)]
    return [optimizer] if hasattr(optimizer, "state") else []


def _watch(parameter: Tensor, optimizer: Any) -> Any:
    """Mark in the profile where the gradient of ``parameter`` lies, each time that backward has added to it."""
    gathered = getattr(optimizer, "gathered", None) or _masters(optimizer)
    master = gathered.get(parameter, parameter)

    def note(_: Tensor) -> None:
        for gradient in (parameter.grad, master.grad):
            if gradient is not None and gradient.layout is torch.strided:
                storage = gradient.untyped_storage()
                if storage.data_ptr() in host_storages:
                    continue
                with record_function(f"{_GRADIENT}{storage.data_ptr()}/{storage.nbytes()}"):
                    pass

    return parameter.register_post_accumulate_grad_hook(note)


def _events(nodes: list[Any], device: torch.device, phase: str = "other") -> Iterator[tuple[int, int, int, str]]:
    """(time, address, bytes allocated or minus those freed, phase); the mark of a gradient has a phase of its own."""
    for node in nodes:
        kind = node.tag.name
        if kind == "Allocation":
            fields = node.extra_fields
            if fields.device.type == device.type:
                yield node.start_time_ns, fields.ptr, fields.alloc_size, phase
            continue
        inside = phase
        if node.name.startswith(_GRADIENT):
            pointer, size = node.name.removeprefix(_GRADIENT).split("/")
            yield node.start_time_ns, int(pointer), int(size), _GRADIENT
        elif node.name.startswith("autograd::"):
            inside = "backward"
        elif node.name.startswith(PHASE):
            inside = "marked"  # data, clipping, the optimizer's step: no activations, even with gradients enabled
        elif kind == "TorchOp" and getattr(node.extra_fields, "sequence_number", -1) >= 0:
            if phase == "other":
                inside = "forward"
            elif phase == "backward" and node.extra_fields.scope.name == "FUNCTION":
                inside = "recompute"
        yield from _events(node.children, device, inside)
