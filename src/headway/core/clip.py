"""Clipping by the norm of the whole gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that is on this rank; a plain tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def clip_(params: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scale all gradients in place so that their joint 2-norm is at most ``max_norm``.

    Args:
        params: tensors with ``.grad``; those without one are passed over.
        max_norm: ``None`` or infinity measures only.

    Returns:
        The norm before clipping, a scalar on the parameters' device. Where it is not finite the gradients stay as
        they are on a CPU and become NaN elsewhere; the caller has to look at it.

    Source: Pascanu et al. 2013, algorithm 1.
    """
    params = [p for p in params if p.grad is not None]
    grads = [p.grad for p in params if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads, foreach=True)
    if hasattr(norm, "full_tensor"):  # of sharded gradients
        norm = norm.full_tensor()
    if max_norm is None or math.isinf(max_norm) or not grads:
        return norm
    if norm.device.type == "cpu":
        # reading the number costs nothing here, and most steps then save a pass over the gradients
        value = norm.item()
        if math.isfinite(value) and value > max_norm:
            torch._foreach_mul_(grads, max_norm / (value + 1e-6))
        return norm
    torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm, foreach=True)
    return norm
