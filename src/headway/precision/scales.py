"""One scale for each group of numbers: chosen from the group's largest magnitude, stored in a format of its own.

A number is worth ``decode(code) * scale`` (times the tensor's own scale where there are two levels).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from headway.core.errors import HeadwayError, nearest
from headway.precision.encode import encode
from headway.precision.formats import E4M3, Format
from headway.precision.tables import decode

Rule = Literal["none", "absmax", "floor", "ceil", "even", "rceil"]
Storage = Literal["fp32", "bf16", "e8m0", "e4m3"]
RULES = ("none", "absmax", "floor", "ceil", "even", "rceil")
STORAGES = ("fp32", "bf16", "e8m0", "e4m3")
NonFinite = Literal["raise", "propagate"]

_TINY = 2.0**-126  # no scale is subnormal in fp32, or a GPU that flushes them would divide by zero; E8M0 may be 2^-127


@dataclass(frozen=True)
class Scale:
    """How a scale comes from ``amax``, the largest magnitude of its group, and ``max`` and ``emax``, the format's.

    rule:
        ``none``: no scale; ``absmax``: ``amax / max``, so that nothing is clipped and no code is idle. Powers of two:
        ``floor``: ``2^(floor(log2 amax) - emax)``, the MX rule, which clips the top of some groups;
        ``ceil``: ``2^(ceil(log2 amax) - emax)``; ``even``: as ``floor``, after rounding ``amax`` to the element's
        mantissa; ``rceil``: the least power of two that clips nothing.
    storage: ``fp32``, ``bf16``, ``e8m0`` (powers of two only), ``e4m3``.
    tensor: a scale of the whole tensor on top, ``amax of all / (max * max of the storage)`` in fp32, as NVFP4 has.

    A group of zeros has scale 1. Source: OCP MX 1.0, section 6.3 (``floor``).
    """

    rule: Rule = "absmax"
    storage: Storage = "fp32"
    tensor: bool = False

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise HeadwayError("scale", "has no such rule", got=self.rule, hint=nearest(str(self.rule), RULES))
        if self.storage not in STORAGES:
            raise HeadwayError(
                "scale", "cannot be stored so", got=self.storage, hint=nearest(str(self.storage), STORAGES)
            )
        if self.storage == "e8m0" and self.rule == "absmax":
            raise HeadwayError("scale", "in e8m0 must be a power of two", expected="floor, ceil, even or rceil")
        if self.tensor and self.storage != "e4m3":
            raise HeadwayError("scale", "of the tensor belongs to scales stored as e4m3", got=self.storage)


class Scales(NamedTuple):
    """What is kept and what it is worth."""

    stored: Tensor  # fp32, bf16, or uint8 codes of E8M0 or E4M3
    tensor: Tensor | None  # fp32 [] : the second level
    values: Tensor  # fp32, both levels together


def group_maxima(view: Tensor, dims: tuple[int, ...]) -> Tensor:
    """``max |x|`` over ``dims``, which stay with size 1; 0 for empty groups; NaN if one is in it. In fp32, or fp64."""
    wide = torch.promote_types(view.dtype, torch.float32)
    if view.numel() == 0:
        shape = [1 if axis in dims else size for axis, size in enumerate(view.shape)]
        return view.new_zeros(shape, dtype=wide)
    if not dims:  # each number is a group; to torch, no dimension means all of them
        return view.abs().to(wide)
    return torch.linalg.vector_norm(view, math.inf, dims, keepdim=True).to(wide)


def choose_scales(amax: Tensor, format: Format, scale: Scale, nonfinite: NonFinite = "raise") -> Scales:
    """Scales for groups whose largest magnitudes are ``amax`` (fp32 or fp64, any shape).

    Raises:
        HeadwayError: an ``amax`` is not finite, or so large that its scale is not; with ``propagate`` that scale is
            NaN, and so are all numbers of its group (as OCP MX 1.0, section 5.3.1, has it for E8M0).
    """
    limit = torch.finfo(torch.float32).max * min(format.max, 1.0)
    bad = ~(amax <= limit) if amax.dtype == torch.float64 else ~torch.isfinite(amax)
    if nonfinite not in ("raise", "propagate"):
        raise HeadwayError("nonfinite", got=nonfinite, expected="raise or propagate")
    if nonfinite == "raise" and bool(bad.any()):
        raise HeadwayError(
            f"scales for {format}",
            f"are not finite in {int(bad.sum())} of {bad.numel()} groups",
            hint="the tensor holds NaN, infinity or numbers beyond fp32; nonfinite: propagate makes those groups NaN",
        )
    amax = amax.masked_fill(bad, 1.0)
    zero = amax == 0
    if scale.rule == "absmax":
        chosen = _absmax(amax, zero, bad, format, scale)
    else:
        chosen = _power(amax, zero, bad, format, scale)
    return chosen


def stored_values(stored: Tensor, tensor: Tensor | None, storage: Storage) -> Tensor:
    """What stored scales are worth, in fp32."""
    if storage == "e8m0":
        values = torch.where(stored == 255, math.nan, _two_to(stored.to(torch.int64) - 127))
    elif storage == "e4m3":
        values = decode(stored, E4M3)
    else:
        values = stored.float()
    return values if tensor is None else values * tensor


def _absmax(amax: Tensor, zero: Tensor, bad: Tensor, format: Format, scale: Scale) -> Scales:
    tensor = None
    values = (amax / format.max).to(torch.float32)
    if scale.tensor:
        top = amax.masked_fill(bad, 0.0).amax() if amax.numel() else amax.new_zeros(())
        tensor = torch.where(top == 0, 1.0, top / (format.max * E4M3.max)).float().clamp_(min=_TINY)
        values = values / tensor
    values = values.masked_fill_(zero, 1.0)
    stored: Tensor
    if scale.storage == "e4m3":  # the least scale is E4M3's least number: zero would lose its group
        stored = encode(values.clamp_(min=E4M3.smallest), E4M3).masked_fill_(bad, 0x7F)
    else:
        dtype = torch.bfloat16 if scale.storage == "bf16" else torch.float32
        stored = values.clamp_(min=_TINY).to(dtype).masked_fill_(bad, math.nan)
    return Scales(stored, tensor, stored_values(stored, tensor, scale.storage))


def _power(amax: Tensor, zero: Tensor, bad: Tensor, format: Format, scale: Scale) -> Scales:
    mantissa, exponent = torch.frexp(amax)  # amax = mantissa 2^exponent, 1/2 <= mantissa < 1
    exponent = exponent.to(torch.int64)
    if scale.rule == "floor":
        exponent -= 1 + format.exponent_of_max
    elif scale.rule == "ceil":
        exponent -= (mantissa == 0.5).to(torch.int64) + format.exponent_of_max
    elif scale.rule == "even":
        if format.significant_bits is None:
            raise HeadwayError(
                f"format {format}", "has no mantissa to round the scale to", expected="floor, ceil or rceil"
            )
        bits = format.significant_bits + 1
        carry = (mantissa * 2.0**bits + 0.5).floor() >= 2.0**bits
        exponent += carry.to(torch.int64) - 1 - format.exponent_of_max
    else:
        top, top_exponent = math.frexp(format.max)
        exponent += (mantissa > top).to(torch.int64) - top_exponent
    exponent.masked_fill_(zero, 0)
    if scale.storage == "e8m0":
        stored = (exponent.clamp_(-127, 127) + 127).to(torch.uint8).masked_fill_(bad, 255)
    elif scale.storage == "e4m3":
        stored = encode(_two_to(exponent.clamp_(-9, 8)), E4M3).masked_fill_(bad, 0x7F)
    else:
        dtype = torch.bfloat16 if scale.storage == "bf16" else torch.float32
        stored = _two_to(exponent.clamp_(-126, 127)).to(dtype).masked_fill_(bad, math.nan)
    return Scales(stored, None, stored_values(stored, None, scale.storage))


def _two_to(exponent: Tensor) -> Tensor:
    """``2.0 ** exponent`` in fp32 from int64, put together from its bits: exp2 may be off by one."""
    return ((exponent + 1023) << 52).view(torch.float64).to(torch.float32)
