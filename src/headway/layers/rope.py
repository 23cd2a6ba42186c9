"""Rotary position embedding: its frequencies, their scalings to longer contexts, its tables, the rotation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn")


def rope_frequencies(
    head_dim: int,
    theta: float,
    scaling: dict[str, Any] | None = None,
    context: int = 2048,
    *,
    length: int | None = None,
) -> tuple[Tensor, float]:
    """Angular frequencies of the pairs of a head, in radians per position.

    Args:
        head_dim: channels of a head, even.
        theta: base of the geometric progression of wavelengths.
        scaling: ``{"rope_type": "linear" | "dynamic" | "llama3" | "yarn", "factor": ..., ...}`` with the keys that
            transformers' configurations have (``type`` is read as ``rope_type``); ``None`` is unscaled.
        context: tokens the model is configured for (``max_position_embeddings``).
        length: tokens of the sequence at hand; ``dynamic`` alone depends on it, and only beyond ``context``.

    Returns:
        fp32 [head_dim/2], and the factor by which cosines and sines are multiplied (1.0 except for ``yarn``).

    Raises:
        ValueError: the kind of scaling is unknown or lacks a key.

    Source: Su et al. 2021 (RoFormer); Chen et al. 2023 (linear); bloc97 2023 (dynamic NTK); Peng et al. 2023 (YaRN,
    section 3); Llama 3.1 for ``llama3``.
    """
    scaling = scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in SCALINGS:
        raise ValueError(f"rope scaling {kind!r} is unknown; there are: {', '.join(SCALINGS)}")
    if kind != "default" and "factor" not in scaling:
        raise ValueError(f"rope scaling {kind!r} needs 'factor'")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    if kind == "dynamic":
        stretch = scaling["factor"] * max(length or context, context) / context - (scaling["factor"] - 1)
        theta = theta * stretch ** (head_dim / (head_dim - 2))
    inv_freq = 1.0 / (theta**exponents)  # [head_dim/2]
    if kind == "linear":
        return inv_freq / scaling["factor"], 1.0
    if kind == "llama3":
        return _llama3(inv_freq, scaling, context), 1.0
    if kind == "yarn":
        return _yarn(inv_freq, head_dim, theta, scaling, context)
    return inv_freq, 1.0


def _llama3(inv_freq: Tensor, scaling: dict[str, Any], context: int) -> Tensor:
    """Long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    original = scaling.get("original_max_position_embeddings") or context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = original * inv_freq / (2 * math.pi)  # rotations within the original context
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * inv_freq / scaling["factor"] + smooth * inv_freq


def _yarn(inv_freq: Tensor, head_dim: int, theta: float, scaling: dict[str, Any], context: int) -> tuple[Tensor, float]:
    """Interpolate by wavelength ("NTK by parts") and sharpen the attention by a constant factor."""
    original = scaling.get("original_max_position_embeddings") or context
    factor = scaling["factor"] or context / original

    def channel(rotations: float) -> float:
        """The channel pair that turns ``rotations`` times within the original context."""
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(scaling.get("beta_fast") or 32), channel(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    keep = 1 - ramp.clamp(0.0, 1.0)
    scaled = inv_freq / factor * (1 - keep) + inv_freq * keep

    def sharpen(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        one, all_dims = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention_factor = sharpen(factor, one) / sharpen(factor, all_dims) if one and all_dims else sharpen(factor)
    return scaled, float(attention_factor)


def rope_tables(
    inv_freq: Tensor, positions: Tensor, dtype: torch.dtype = torch.float32, attention_factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position and frequency.

    Args:
        inv_freq: fp32 [head_dim/2], from ``rope_frequencies``.
        positions: integer [T] or [B, T].
        dtype: of the tables; the angles are fp32 always.
        attention_factor: multiplies both tables.

    Returns:
        ``cos, sin``, each [T, head_dim/2] or [B, T, head_dim/2].
    """
    angles = positions.to(inv_freq.device)[..., None].float() * inv_freq.float()
    return (angles.cos() * attention_factor).to(dtype), (angles.sin() * attention_factor).to(dtype)


def apply_rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation as plain tensor arithmetic; see ``apply_rope``."""

    def rotate(x: Tensor) -> Tensor:
        c, s = (t[:, None] if t.dim() == 3 else t for t in (cos, sin))  # [B, 1, T, hd/2] or [T, hd/2]
        low, high = x.chunk(2, dim=-1)
        return torch.cat((low * c - high * s, high * c + low * s), dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the channel pairs ``(i, i + head_dim/2)`` of queries and keys by their position's angles.

    Args:
        q: [B, H, T, hd].
        k: [B, Hkv, T, hd].
        cos: [T, hd/2] or [B, T, hd/2].
        sin: as ``cos``.

    Returns:
        Rotated ``q`` and ``k``, in their dtypes. First derivatives only, and none of the tables.

    Source: Su et al. 2021, equation 34, with the halves layout of GPT-NeoX and of transformers' Llama.
    """
    rotated: tuple[Tensor, Tensor] = _Rotation.apply(q, k, cos, sin)
    return rotated


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the rotation back: nothing but the tables is saved."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotate(q, cos, sin), _rotate(k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad_q, cos, -sin), _rotate(grad_k, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x * [cos, cos] + swap(x) * [-sin, sin]``: two passes over whole heads and a copy with the halves swapped."""
    x = x.transpose(1, 2)  # [B, T, H, hd], the order in memory after a projection
    cos, sin = (torch.cat(pair, -1)[..., None, :].to(x.dtype) for pair in ((cos, cos), (-sin, sin)))
    swapped = x.roll(x.shape[-1] // 2, -1)
    return (x * cos).addcmul_(swapped, sin).transpose(1, 2)
