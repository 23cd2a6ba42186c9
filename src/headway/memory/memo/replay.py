"""Running a part of a block again as it ran in the forward pass, and noting what autograd saves there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from headway.core.errors import HeadwayError
from headway.memory.saved import is_plain


class Enough(Exception):
    """The rest of a part need not run: nothing more is saved that is needed."""


@contextmanager
def recording(
    tape: dict[int, Tensor], name: str, wanted: set[tuple[str, int]] | None, last: int = -1
) -> Iterator[Callable[[Tensor], None]]:
    """Note the tensors that autograd saves inside, by place; the graph itself keeps nothing."""
    count = 0

    def note(tensor: Tensor) -> None:
        nonlocal count
        if wanted is None or (name, count) in wanted:
            tape[count] = tensor.detach()
        count += 1
        if count - 1 == last:
            raise Enough

    def gone(_: Any) -> Tensor:
        raise HeadwayError("memo", "has no backward pass through a recomputation")

    with torch.autograd.graph.saved_tensors_hooks(note, gone):
        yield note


@contextmanager
def as_in_forward(device: torch.device, rng: Any, autocast: Any) -> Iterator[None]:
    """Gradients on, the generators and autocast as they were in the forward pass."""
    enabled, dtype, cached = autocast
    devices = [device] if device.type == "cuda" and rng is not None else []
    with (
        torch.random.fork_rng(devices, enabled=rng is not None),
        torch.enable_grad(),
        torch.autocast(device.type, dtype, enabled, cache_enabled=cached),
    ):
        if rng is not None:
            torch.set_rng_state(rng[0])
            if rng[1] is not None:
                torch.cuda.set_rng_state(rng[1], device)
        yield


def rng_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Of the generators of host and device."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def autocast_state(device: torch.device) -> tuple[bool, torch.dtype, bool]:
    """Whether autocast is on, to which dtype, and whether it caches."""
    kind = device.type
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()


def tensors_in(tree: Any) -> list[Tensor]:
    """The plain tensors among its leaves."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and is_plain(leaf)]


def close(a: Tensor, b: Tensor) -> bool:
    """Whether the same operators gave the same on another number of tokens; true of what is not finite."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = 1e-4 if a.dtype in (torch.float32, torch.float64) else 5e-2
    scale = float(a.abs().max())
    return not scale < float("inf") or torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale)
