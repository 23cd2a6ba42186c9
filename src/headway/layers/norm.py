"""Root-mean-square normalisation with statistics in fp32 whatever the dtype of its input."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
        [..., D] in the dtype of ``x``; the statistics are fp32 (fp64 for fp64 input).

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
    """
    return rms_norm_reference(x, weight, eps)


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
