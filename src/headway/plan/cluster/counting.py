"""Counts what a rank would send and keep, by running its part of a model on tensors without contents."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

_SENT = {
    "all_reduce": 2.0, "allreduce_": 2.0, "all_gather_into_tensor": 1.0, "_allgather_base_": 1.0,
    "allgather_": 1.0, "reduce_scatter_tensor": 1.0, "_reduce_scatter_base_": 1.0, "reduce_scatter_": 1.0,
    "all_to_all_single": 1.0, "alltoall_base_": 1.0, "alltoall_": 1.0, "send": 1.0,
}  # fmt: skip
"""Collective -> how many times (k - 1)/k of the whole tensor a rank of a ring sends."""
_GATHERS = ("all_gather_into_tensor",)
"""Those whose argument is a part of the whole."""
_OF_SEQUENCES = ("all_to_all_single", "alltoall_base_", "alltoall_", "send")
"""What only attention to shared sequences uses here."""


@dataclass
class Sent:
    """What a rank sends to one of its groups."""

    messages: int = 0
    """Collective operations."""
    bytes: float = 0.0


@dataclass
class CountCollectives(TorchDispatchMode):
    """While it is on, adds up every collective operation by dimension, and lets no tensor's contents be asked for."""

    groups: dict[str, tuple[str, int]]
    """Name of a process group -> its dimension and its size."""
    sent: dict[tuple[str, bool], Sent] = field(default_factory=dict)
    """By dimension, and by whether something was summed."""

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0  # a check of contents, such as that token numbers are in range: here there are none
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name not in _SENT:
            return
        dimension, ranks = self.groups[next(filter(None, map(_group_name, args)))]
        if ranks == 1:
            return
        tensors = [t for arg in args[:2] for t in _tensors(arg)]
        # Of input and output one is a part of the other: the larger is the whole.
        whole = max(t.numel() * t.element_size() for t in tensors) * (ranks if name in _GATHERS else 1)
        share = 1.0 if name == "send" else _SENT[name] * (ranks - 1) / ranks
        dimension = "sequence" if name in _OF_SEQUENCES else dimension
        total = self.sent.setdefault((dimension, "reduce" in name), Sent())
        total.messages += 1
        total.bytes += share * whole


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for inner in value for t in _tensors(inner)] if isinstance(value, list | tuple) else []


def _group_name(value: Any) -> str | None:
    if isinstance(value, str):
        return None if value in ("sum", "avg", "max", "min") else value
    if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):  # type: ignore[attr-defined]
        return str(torch.distributed.ProcessGroup.unbox(value).group_name)
    return None


class CountKept:
    """Bytes that autograd keeps between forward and backward pass, weights left out; a context around the former."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.bytes = 0
        self._known: set[int] = set()
        self._alive: list[Any] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._handles = [module.register_forward_pre_hook(self._pass_over) for module in modules]

    def __enter__(self) -> CountKept:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        for handle in self._handles:
            handle.remove()
        self._alive.clear()

    def _pass_over(self, module: nn.Module, _: Any) -> None:
        """Just before a module runs, its weights are whole: FSDP2 has gathered them."""
        for parameter in module.parameters(recurse=False):
            storage = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).untyped_storage()
            self._known.add(storage._cdata)
            self._alive.append(storage)

    def _pack(self, tensor: Tensor) -> Tensor:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._alive.append(storage)  # a freed one's address could come again
            self.bytes += storage.nbytes()
        return tensor
