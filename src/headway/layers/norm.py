"""Root-mean-square normalisation with statistics in fp32 whatever the dtype of its input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The equation as it is written: ``weight * x / sqrt(mean(x^2) + eps)``, in fp32 or better."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.to(wide.dtype)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide each vector by its root mean square and scale it.

    Args:
        x: [..., D], any floating dtype.
        weight: [D].
        eps: added to the mean square.

    Returns:
        [..., D] in the dtype of ``x``; the statistics are fp32 (fp64 for fp64 input). First derivatives only.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
    """
    if x.device.type == "cuda":  # where torch has a fused kernel
        return F.rms_norm(x, (x.shape[-1],), weight, eps).to(x.dtype)
    normed: Tensor = _RMSNorm.apply(x, weight, eps)
    return normed


class _RMSNorm(torch.autograd.Function):
    """One wide copy of the input, worked on in place; saved are the input and one number per vector."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        normed = x.to(wide, copy=True)
        # 1 / rms, [..., 1]
        scale = torch.linalg.vector_norm(normed, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return normed.mul_(scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normed = x.to(scale.dtype, copy=True).mul_(scale)
        grad = grad.to(scale.dtype, copy=True)
        product = grad * normed
        weight_wide = weight.to(scale.dtype)
        grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        # with g = weight * grad and n = x * scale: (g - n * mean(g n)) * scale
        mean = (product @ weight_wide).div_(x.shape[-1]).unsqueeze(-1)
        return grad.mul_(weight_wide).addcmul_(normed, mean, value=-1).mul_(scale).to(x.dtype), grad_weight, None


class RMSNorm(nn.Module):
    """``rms_norm`` with its own weight [D], which starts at one."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., D] -> the same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        """Width and epsilon, for ``print(model)``."""
        return f"{self.weight.shape[0]}, eps={self.eps}"
