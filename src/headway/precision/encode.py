"""From numbers to codes, bit for bit as the formats define it, with nothing but vectorised tensor arithmetic.

torch's own casts are used where they say the same: rounding to nearest of fp32, bf16 and fp16 to the float8 dtypes,
after clamping. Unclamped they do not: on a CPU, torch 2.13 turns anything above 448, infinity included, into 448 for
E4M3, and into infinity above 61440 for E5M2; and from fp64 they round twice.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from headway.core.errors import HeadwayError
from headway.precision.formats import FixedFormat, FloatFormat, Format, TableFormat
from headway.precision.rounding import Rounding, check_rounding, draws, round_
from headway.precision.tables import fits_fp32, ladder, torch_dtype

Overflow = Literal["saturate", "special"]

_SHORT = (torch.float32, torch.bfloat16, torch.float16)


def encode(
    x: Tensor,
    format: Format,
    rounding: Rounding = "nearest",
    overflow: Overflow = "saturate",
    generator: torch.Generator | None = None,
    *,
    fast: bool = True,
    finite: bool = False,
) -> Tensor:
    """The codes of ``x`` without any scale.

    Args:
        x: any shape; fp64, fp32, bf16 or fp16. Never rounded but once.
        rounding: ``nearest`` (ties to the even code), ``stochastic`` (to the two neighbours, mean ``x``) or ``zero``.
        overflow: of what would round beyond the largest number, infinity included. ``saturate``: the largest number
            of that sign; ``special``: infinity if the format has one, else NaN (OFP8's two modes). With ``zero``, only
            infinity itself overflows.
        generator: the source of stochastic rounding.
        fast: use torch's own cast or a table of all bf16 numbers where these say the same; off, to compare them.
        finite: the caller knows that no NaN is in ``x``.

    Zeros keep their sign where the format has two, as do negative numbers that round to zero. NaN becomes the format's
    NaN, of the same sign where there are two.

    Returns:
        uint8, or int16 bit patterns for formats of more than 8 bits; same shape as ``x``.

    Raises:
        HeadwayError: NaN and a format without; ``special`` and a format with neither; not a floating-point tensor.

    Source: IEEE 754-2019, sections 4.3 and 7.4; OCP OFP8 1.0, section 5 (conversions).
    """
    check_rounding(rounding)
    check_overflow(format, overflow)
    check_dtype(x)
    if not finite and not format.has_nan and bool(torch.isnan(x).any()):
        raise HeadwayError(f"format {format}", "has no NaN, and the tensor holds one")
    x = x.detach()
    dtype = torch_dtype(format)
    if fast and rounding == "nearest" and x.dtype in _SHORT:
        if dtype is not None and overflow == "saturate":
            return x.float().clamp(format.min, format.max).to(dtype).view(torch.uint8)
        if isinstance(format, FloatFormat) and format.bits <= 8 and format.mantissa <= 5 and fits_fp32(format):
            return _looked_up(x, format, overflow)
    x = x.to(torch.float32 if x.dtype in _SHORT and fits_fp32(format) else torch.float64)
    if isinstance(format, FloatFormat):
        wide = _float_codes(x, format, rounding, overflow, generator)
    elif isinstance(format, FixedFormat):
        scaled = x * 2.0**format.fraction
        whole = round_(scaled, rounding, generator).clamp_(format.low, format.high)
        wide = whole.to(torch.int32).bitwise_and_(2**format.bits - 1)
    elif isinstance(format, TableFormat):
        wide = _table_codes(x, format, rounding, generator)
    else:
        raise HeadwayError(f"format {format}", "has no encoder", got=type(format).__name__)
    return wide.to(torch.uint8 if format.bits <= 8 else torch.int16)


def check_dtype(x: Tensor) -> None:
    """One sentence for a tensor that is not of real numbers, or is in few bits already."""
    if x.dtype not in (*_SHORT, torch.float64):
        raise HeadwayError("x", "cannot be quantised", got=x.dtype, expected="fp64, fp32, bf16 or fp16")


def check_overflow(format: Format, overflow: str) -> None:
    """One sentence for a way to overflow that does not exist, or not for ``format``."""
    if overflow not in ("saturate", "special"):
        raise HeadwayError("overflow", got=overflow, expected="saturate or special")
    if overflow == "special" and not (isinstance(format, FloatFormat) and (format.has_inf or format.has_nan)):
        raise HeadwayError(f"format {format}", "has neither infinity nor NaN to overflow to", hint="overflow: saturate")


def _looked_up(x: Tensor, f: FloatFormat, overflow: Overflow) -> Tensor:
    """Codes from a table of all 65536 bf16 numbers, exact for fp32 too.

    fp32 is first cut to its upper 16 bits, and the lowest of these set if anything was cut off ("rounding to odd").
    That moves no number across or onto a middle of two neighbours, whose significant bits, at most ``mantissa + 2``,
    leave the last of bf16's eight zero. Source: Boldo and Melquiond 2008 (rounding to odd, then to nearest).
    """
    if x.dtype == torch.bfloat16:
        index = x.view(torch.int16).to(torch.int32)
    else:
        bits = x.float().view(torch.int32)
        index = (bits >> 16).bitwise_or_((bits & 0xFFFF).ne_(0))
    table = _all_bf16(f, overflow, x.device)
    return table.index_select(0, index.bitwise_and_(0xFFFF).reshape(-1)).view(x.shape)


@lru_cache(maxsize=64)
def _all_bf16(f: FloatFormat, overflow: Overflow, device: torch.device) -> Tensor:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    return _float_codes(every, f, "nearest", overflow, None).to(device=device, dtype=torch.uint8)


def _float_codes(
    x: Tensor, f: FloatFormat, rounding: Rounding, overflow: Overflow, generator: torch.Generator | None
) -> Tensor:
    """Codes as int32 or int64.

    With ``E = clamp(floor(log2 |x|), emin, emax)`` neighbours are ``2^(E - mantissa)`` apart, so ``n``, the rounded
    ``|x| 2^(mantissa - E)``, counts steps, and ``n + ((E - emin) << mantissa)`` is the code: below ``2^mantissa`` steps
    it is subnormal, and a carry to ``2^(mantissa + 1)`` steps lands on the next exponent by itself.
    """
    integer, width, bias = (torch.int32, 23, 127) if x.dtype == torch.float32 else (torch.int64, 52, 1023)
    magnitude = x.abs()
    exponent = (magnitude.view(integer) >> width).sub_(bias).clamp_(f.emin, f.exponent_of_max)
    steps = magnitude.mul_(((bias + f.mantissa) - exponent).bitwise_left_shift_(width).view(x.dtype))
    if f.mantissa == 0 and rounding == "nearest":  # 1 and 2 steps are neighbouring codes, and which is even alternates
        steps.masked_fill_((steps == 1.5) & ((exponent - f.emin) % 2 == 1), 1.0)
    steps = round_(steps, rounding, generator).clamp_(max=2.0 ** (f.mantissa + 2))
    if f.has_nan:
        nan = torch.isnan(steps)
        steps.masked_fill_(nan, 0.0)
    code = exponent.sub_(f.emin).bitwise_left_shift_(f.mantissa).add_(steps.to(integer))
    if overflow == "saturate":
        code.clamp_(max=f.max_code)
    else:
        over = code > f.max_code
        if rounding == "zero":
            over &= torch.isinf(x)
        special = f.inf_code if f.has_inf else (f.nan_code & (f.sign_code - 1))
        code.clamp_(max=f.max_code).masked_fill_(over, special)
        if f.specials == "fnuz":
            nan |= over
    if f.has_nan:
        code.masked_fill_(nan, f.nan_code & (f.sign_code - 1))
    sign = (x.view(integer) >> (31 if integer == torch.int32 else 63)).bitwise_and_(f.sign_code)
    if f.specials == "fnuz":  # one zero, and the code of the other is NaN
        return code.bitwise_or_(sign.masked_fill_(code == 0, 0)).masked_fill_(nan, f.nan_code)
    return code.bitwise_or_(sign)


def _table_codes(x: Tensor, f: TableFormat, rounding: Rounding, generator: torch.Generator | None) -> Tensor:
    steps = ladder(f, x.dtype, x.device)
    nan = torch.isnan(x) if f.has_nan else None
    if rounding == "nearest":
        place = torch.bucketize(x, steps.bounds, right=True, out_int32=True)
    else:
        x = x.double()
        floor = torch.bucketize(x, steps.values, right=True).sub_(1).clamp_(0, len(steps.values) - 2)
        low, high = steps.values[floor], steps.values[floor + 1]
        if rounding == "stochastic":
            up = draws(x, generator) < (x - low) / (high - low)
        else:
            up = (x >= high) | ((x < 0) & (x > low))
        place = floor + up
    codes = steps.codes.index_select(0, place.reshape(-1)).view(x.shape)
    if nan is not None and steps.nan_code is not None:
        codes = codes.masked_fill_(nan, steps.nan_code)
    return codes
