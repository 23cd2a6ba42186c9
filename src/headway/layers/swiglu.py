"""The gated activation of Llama's feed-forward block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` in fp32 or better, rounded once."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    g = gate.to(wide)
    return (g * torch.sigmoid(g) * up.to(wide)).to(gate.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``.

    Args:
        gate: [..., F].
        up: [..., F], same dtype.

    Returns:
        [..., F].

    Source: Shazeer 2020, "GLU Variants Improve Transformer", equation 6.
    """
    return F.silu(gate) * up
