"""The norm of a gradient whose parts are on many ranks, each part counted once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from headway.core.clip import local


def shards(tensor: Tensor) -> int:
    """Into how many different parts it is divided."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes: Any = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if not placement.is_replicate())


@torch.no_grad()
def clip_divided_(
    params: Iterable[Tensor], max_norm: float | None, holders: int, skip: set[Tensor], group: Any = None
) -> Tensor:
    """Scale all gradients in place so that their joint 2-norm is at most ``max_norm``; all ranks call it.

    Args:
        params: this rank's parameters, plain or DTensors, with ``.grad``.
        max_norm: ``None`` or infinity measures only.
        holders: ranks that hold each parameter, whole or a part of it.
        skip: parameters that other ranks hold and count too, though they are not among the holders.
        group: all ranks, to carry one number on the CPU; default: the process group.

    Returns:
        The norm before clipping, the same on every rank; not finite if any part is.
    """
    params = [p for p in params if p.grad is not None]
    grads = [local(p.grad) for p in params if p.grad is not None]
    counted = [(p, g) for p, g in zip(params, grads, strict=True) if p not in skip and g.numel()]
    square = torch.zeros((), dtype=torch.float64)
    if counted:
        # Every part is counted by all who hold the same one.
        weights = torch.tensor([shards(p) / holders for p, _ in counted], dtype=torch.float64)
        norms = torch.stack(torch._foreach_norm([g for _, g in counted], 2, dtype=torch.float64)).cpu()
        square = (norms.square() * weights).sum()
    dist.all_reduce(square, group=group)
    norm = square.sqrt()
    if max_norm is not None and math.isfinite(value := float(norm)) and value > max_norm and grads:
        torch._foreach_mul_(grads, max_norm / (value + 1e-6))
    return norm
