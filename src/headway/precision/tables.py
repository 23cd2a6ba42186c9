"""Code tables as tensors: from codes to numbers, and the bounds that lead from numbers to codes of a `TableFormat`."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from headway.precision.formats import FloatFormat, Format, TableFormat

_NATIVE = {
    (4, 3, 7, "fn"): "float8_e4m3fn",
    (5, 2, 15, "ieee"): "float8_e5m2",
    (4, 3, 8, "fnuz"): "float8_e4m3fnuz",
    (5, 2, 16, "fnuz"): "float8_e5m2fnuz",
}


def torch_dtype(format: Format) -> torch.dtype | None:
    """The dtype of torch whose bytes are exactly this format's codes, if this torch has one of 8 bits."""
    if not isinstance(format, FloatFormat):
        return None
    name = _NATIVE.get((format.exponent, format.mantissa, format.bias, format.specials))
    return getattr(torch, name, None) if name else None


@lru_cache(maxsize=256)
def numbers(format: Format, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`Format.codes` in ``dtype`` on ``device``; kept, so treat it as constant."""
    return format.codes().to(device=device, dtype=dtype)


def fits_fp32(format: Format) -> bool:
    """Whether every number, and the step between neighbours at both ends, is a normal number of fp32."""
    if isinstance(format, FloatFormat):
        return format.emin - format.mantissa >= -126 and format.exponent_of_max <= 126
    values = [abs(value) for value in format.numbers if value and math.isfinite(value)]
    return min(values) >= 2.0**-126 and max(values) < 2.0**127


def decode(codes: Tensor, format: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers of ``codes`` (uint8, or int16 bit patterns above 8 bits), same shape, in fp32 or fp64."""
    native = torch_dtype(format)
    if native is not None:
        return codes.view(native).to(dtype)
    index = codes.to(torch.int32)
    if format.bits > 8:
        index &= 0xFFFF
    table = numbers(format, dtype, codes.device)
    return table.index_select(0, index.reshape(-1)).view(codes.shape)


class Ladder(NamedTuple):
    """The finite numbers of a table in rising order."""

    values: Tensor  # fp64 [n]
    codes: Tensor  # int32 [n]
    bounds: Tensor  # [n - 1]: `x >= bounds[i]` means: nearer to values[i + 1] than to values[i], or a tie that goes up
    nan_code: int | None


@lru_cache(maxsize=64)
def ladder(format: TableFormat, dtype: torch.dtype, device: torch.device) -> Ladder:
    """Where to cut the real line for rounding to the nearest, exactly, with comparisons in ``dtype``.

    The middle of two neighbours need not be a number of ``dtype``; the smallest number of ``dtype`` on the upper side
    is then an equivalent bound. A number written twice keeps its lowest code.
    """
    first: dict[float, int] = {}
    for code, value in enumerate(format.numbers):
        if not math.isnan(value):
            first.setdefault(value + 0.0, code)  # -0.0 + 0.0 is 0.0: one zero
    rising = sorted(first)
    values = torch.tensor(rising, dtype=torch.float64)
    middle = values[:-1] / 2 + values[1:] / 2
    down = torch.arange(len(middle)) % 2 == 0  # the lower neighbour has even rank: the tie itself goes down
    bounds = middle.to(dtype)
    after = torch.nextafter(bounds, torch.full_like(bounds, math.inf))
    short = torch.where(down, bounds.double() <= middle, bounds.double() < middle)
    bounds = torch.where(short, after, bounds)
    codes = torch.tensor([first[value] for value in rising], dtype=torch.int32)
    nan_code = next((code for code, value in enumerate(format.numbers) if math.isnan(value)), None)
    return Ladder(values.to(device), codes.to(device), bounds.to(device), nan_code)
