"""How many floating-point operations and bytes an operation of given shapes takes, counted on one untimed step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import _maybe_get_opdef  # the only way to what is behind a custom operator
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

Key = tuple[str, tuple[tuple[int, ...], ...]]

aten = torch.ops.aten


def _flash_forward(q: Any, k: Any, v: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _flash_backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


# torch has formulas for the attention kernels of GPUs, not for that of CPUs.
_FORMULAS: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _flash_forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward,
}


@dataclass
class Cost:
    """What the calls of one operation with the same shapes take together."""

    calls: int = 0
    flops: dict[str, float] = field(default_factory=dict)
    """By data type of the inputs."""
    bytes: float = 0.0

    def add(self, flops: float, dtype: str, moved: float) -> None:
        """One more call."""
        self.calls += 1
        self.bytes += moved
        if flops:
            self.flops[dtype] = self.flops.get(dtype, 0.0) + flops


class Costs:
    """Costs of one step by operation and shapes."""

    def __init__(self) -> None:
        self._exact: dict[Key, Cost] = {}
        self._by_name: dict[str, Cost] = {}
        self.opened: set[str] = set()
        """Operators written in Python, whose inside was counted instead of them."""

    def add(self, key: Key, flops: float, dtype: str, moved: float) -> None:
        """Note a call."""
        self._exact.setdefault(key, Cost()).add(flops, dtype, moved)
        self._by_name.setdefault(key[0], Cost()).add(flops, dtype, moved)

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def of_call(self, name: str, shapes: Iterable[Iterable[int]]) -> tuple[dict[str, float], float]:
        """FLOPs by data type and bytes of one call, averaged over the calls of the same shapes.

        Where the shapes are not found (a profile has none of lists of tensors), over those of the same operation.
        """
        cost = self.cost(name, shapes)
        if cost is None:
            return {}, 0.0
        return {dtype: value / cost.calls for dtype, value in cost.flops.items()}, cost.bytes / cost.calls

    def cost(self, name: str, shapes: Iterable[Iterable[int]]) -> Cost | None:
        """What was noted of the calls with these shapes."""
        key = _shapes(shapes)
        while key and (name, key) not in self._exact:
            key = key[:-1]  # compiled code gives an operation its output as a last argument
        return self._exact.get((name, key)) or self._by_name.get(name)

    @property
    def flops(self) -> dict[str, float]:
        """FLOPs of the whole step, by data type."""
        total: dict[str, float] = {}
        for cost in self._exact.values():
            for dtype, value in cost.flops.items():
                total[dtype] = total.get(dtype, 0.0) + value
        return total


def count(step: Callable[[], Any]) -> Costs:
    """Run ``step`` once and count what its operations take.

    A product of ``[M, K]`` and ``[K, N]`` is ``2 M N K``. Attention counts all its scores, the causal half that a
    kernel may skip too, and the scores that a fused backward computes again.
    """
    costs = Costs()
    # Compiled code runs as it was written meanwhile: compiled under a counter, it would stay uncompiled for good.
    as_written = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with as_written, _Counter(costs):
        step()
    return costs


class _Counter(TorchDispatchMode):
    def __init__(self, costs: Costs) -> None:
        super().__init__()
        self.costs = costs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (inside := _python_of(func, args)) is not None:
            self.costs.opened.add(func._schema.name)
            with torch.no_grad(), self:
                return inside(*args, **kwargs)
        packet = getattr(func, "_overloadpacket", func)
        if packet not in flop_registry and isinstance(func, OpOverload):
            with self:  # operations made of others; autograd takes them apart, but it does not run inside of operators
                if (parts := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return parts
        out = func(*args, **kwargs)
        schema = getattr(func, "_schema", None)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        formula = _FORMULAS.get(packet) or flop_registry.get(packet)
        flops = float(formula(*args, **kwargs, out_val=out)) if formula else 0.0
        dtype = str(inputs[0].dtype).removeprefix("torch.") if inputs else ""
        name = schema.name if schema is not None else str(packet)
        direct = [tuple(t.shape) if isinstance(t, Tensor) else () for t in (*args, *kwargs.values())]
        mutable = schema is not None and schema.is_mutable
        self.costs.add((name, _shapes(direct)), flops, dtype, _moved(inputs, outputs, mutable))
        return out


def _python_of(func: Any, args: Any) -> Callable[..., Any] | None:
    """What a ``torch.library.custom_op`` runs for these arguments; None for any other operation.

    Operators with a formula of their own (``register_flop_formula``) stay closed.
    """
    if not isinstance(func, OpOverload) or func.namespace == "aten" or func._overloadpacket in flop_registry:
        return None
    definition = _maybe_get_opdef(func)
    if definition is None:
        return None
    device = next((t.device.type for t in tree_leaves(args) if isinstance(t, Tensor)), None)
    return definition._backend_fns.get(device) or definition._backend_fns.get(None)


def _moved(inputs: list[Tensor], outputs: list[Tensor], mutable: bool) -> float:
    """Bytes read and written; none where the outputs are views of the inputs."""
    read = {_storage(t) for t in inputs}
    fresh = [t for t in outputs if _storage(t) not in read]
    if not fresh and not mutable:
        return 0.0
    written = fresh if fresh else [t for t in outputs if _storage(t) in read] or inputs[:1]
    return float(sum(_size(t) for t in inputs) + sum(_size(t) for t in written))


def _size(t: Tensor) -> int:
    """Bytes of memory behind a tensor; a broadcast dimension has none."""
    numel = 1
    for size, stride in zip(t.shape, t.stride() if t.layout is torch.strided else t.shape):
        numel *= size if stride != 0 else 1
    return numel * t.element_size()


def _storage(t: Tensor) -> int:
    try:
        return t.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return id(t)


def _shapes(shapes: Iterable[Iterable[Any]]) -> tuple[tuple[int, ...], ...]:
    """The shapes of direct tensor arguments; scalars and lists, which a profile does not tell apart, left out."""
    found = (tuple(shape) for shape in shapes)
    return tuple(shape for shape in found if shape and all(isinstance(size, int) for size in shape))
