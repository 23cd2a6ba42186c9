"""Tensors in few bits: `quantize`, its result, and `fake_quantize` for training through it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from headway.core.errors import HeadwayError
from headway.precision.blocks import BlockFormat, format_named
from headway.precision.encode import Overflow, check_dtype, encode
from headway.precision.formats import FixedFormat, Format
from headway.precision.granularity import Granularity
from headway.precision.packing import pack, unpack
from headway.precision.rounding import Rounding
from headway.precision.scales import NonFinite, Rule, Scale, Scales, choose_scales, group_maxima, stored_values
from headway.precision.tables import decode


@dataclass(frozen=True)
class Quantized:
    """A tensor as codes and scales.

    codes: uint8 (int16 bit patterns above 8 bits), the shape of the tensor; two to a byte along the last dimension for
        4 bits, four for 2 bits.
    scales: one for each group, without the axes inside groups: fp32, bf16, or uint8 codes of E8M0 or E4M3; None without
        scales. [] for one scale of the tensor.
    tensor_scale: fp32 [] on top of them (NVFP4), else None.
    """

    codes: Tensor
    scales: Tensor | None
    tensor_scale: Tensor | None
    format: Format
    granularity: Granularity
    scale: Scale
    shape: tuple[int, ...]
    dtype: torch.dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The numbers again, in ``dtype`` or that of the original: ``decode(code) * scale``.

        The product is taken in fp32 (fp64 for fp64) and rounded to ``dtype`` at the end.
        """
        dtype = dtype or self.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        numbers = decode(self.unpacked(), self.format, wide)
        if self.scales is None:
            return numbers.to(dtype)
        view, dims = self.granularity.split(numbers)
        view = view * _with_axes(self.scale_values().to(wide), dims)
        return self.granularity.join(view, self.shape).to(dtype)

    def unpacked(self) -> Tensor:
        """One code for each number, in the shape of the tensor."""
        return unpack(self.codes, self.format.bits, self.shape)

    def scale_values(self) -> Tensor:
        """What the scales are worth: fp32, both levels together; 1 without scales."""
        if self.scales is None:
            return torch.ones((), device=self.codes.device)
        return stored_values(self.scales, self.tensor_scale, self.scale.storage)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales, self.tensor_scale) if t is not None)

    def to(self, device: torch.device | str) -> Quantized:
        """The same on ``device``."""
        scales = None if self.scales is None else self.scales.to(device)
        tensor = None if self.tensor_scale is None else self.tensor_scale.to(device)
        return replace(self, codes=self.codes.to(device), scales=scales, tensor_scale=tensor)


def quantize(
    x: Tensor,
    format: str | Format | BlockFormat,
    granularity: Granularity | None = None,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
    *,
    scale: Scale | Tensor | Rule | None = None,
    overflow: Overflow = "saturate",
    nonfinite: NonFinite = "raise",
) -> Quantized:
    """Write ``x`` down in ``format``.

    Args:
        x: fp64, fp32, bf16 or fp16, any shape and strides. Scaling is done in fp32 (fp64 for fp64): one division, and
            one rounding to the format.
        format: an element format, a block format (MX, NVFP4), or the name of one.
        granularity: who shares a scale; default the whole tensor, or the blocks of a block format along the last
            dimension.
        rounding, generator, overflow: see `encode`. ``overflow`` matters where scales do not follow the data (none,
            given, ``floor``).
        scale: how scales are chosen, as a `Scale` or the name of its rule; or scales given as fp32 numbers, one for
            each group. Default: that of the block format, ``none`` for formats with fraction bits of their own, else
            ``absmax``.
        nonfinite: whether a group that holds NaN or infinity is an error (one look at the scales, which waits for a
            GPU) or becomes NaN as a whole. Without scales there are no groups: NaN and infinity are encoded, see
            `encode`.

    Raises:
        HeadwayError: unknown names, groups that do not divide the shape, numbers that are not finite.
    """
    check_dtype(x)
    element, granularity, rule = _settle(x, format, granularity, scale)
    if isinstance(rule, Scale) and rule.rule == "none":
        codes = encode(x, element, rounding, overflow, generator)
        return Quantized(pack(codes, element.bits), None, None, element, granularity, rule, tuple(x.shape), x.dtype)
    view, dims = granularity.split(x.detach())
    wide = torch.promote_types(view.dtype, torch.float32)
    if isinstance(rule, Tensor):
        scales, rule = _given(rule, view, dims), Scale("absmax")
        bad = None
    else:
        scales = choose_scales(group_maxima(view, dims), element, rule, nonfinite)
        bad = torch.isnan(scales.values) if nonfinite == "propagate" else None
    scaled = view.to(wide) / scales.values
    if bad is not None:
        scaled = scaled.masked_fill_(bad, 0.0)
    known = not isinstance(scale, Tensor)
    codes = granularity.join(encode(scaled, element, rounding, overflow, generator, finite=known), tuple(x.shape))
    return Quantized(
        pack(codes, element.bits), _without_axes(scales.stored, dims), scales.tensor,
        element, granularity, rule, tuple(x.shape), x.dtype,
    )  # fmt: skip


def fake_quantize(
    x: Tensor,
    format: str | Format | BlockFormat,
    granularity: Granularity | None = None,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
    *,
    scale: Any = None,
    overflow: Overflow = "saturate",
    nonfinite: NonFinite = "raise",
    gradient: Literal["straight", "clipped"] = "straight",
) -> Tensor:
    """``quantize`` and ``dequantize`` in the dtype of ``x``, for training: its gradient is that of the identity.

    ``gradient``: ``straight`` lets everything through; ``clipped`` stops it where ``x`` is beyond what the format can
    reach with its scale, where moving ``x`` a little changes nothing.

    Source: Bengio et al. 2013, section 2.3 (straight-through estimator).
    """
    if gradient not in ("straight", "clipped"):
        raise HeadwayError("gradient", got=gradient, expected="straight or clipped")
    settings = {"scale": scale, "overflow": overflow, "nonfinite": nonfinite}
    return _Straight.apply(x, gradient, (format, granularity, rounding, generator), settings)


class _Straight(torch.autograd.Function):
    """Saves nothing for a straight gradient, and a mask for a clipped one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: str, how: tuple[Any, ...], settings: dict[str, Any]) -> Tensor:
        quantized = quantize(x, *how, **settings)
        if gradient == "clipped":
            view, dims = quantized.granularity.split(x)
            values = quantized.scale_values()
            values = values if quantized.scales is None else _with_axes(values, dims)
            reached = (view >= values * quantized.format.min) & (view <= values * quantized.format.max)
            ctx.save_for_backward(quantized.granularity.join(reached, tuple(x.shape)))
        return quantized.dequantize()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return (grad * ctx.saved_tensors[0] if ctx.saved_tensors else grad), None, None, None


def _settle(
    x: Tensor, format: str | Format | BlockFormat, granularity: Granularity | None, scale: Any
) -> tuple[Format, Granularity, Scale | Tensor]:
    found = format_named(format)
    if isinstance(scale, str):
        scale = Scale(scale)  # type: ignore[arg-type]
    if isinstance(found, BlockFormat):
        granularity = granularity or found.granularity()
        if granularity.kind != "group" or granularity.size != (found.size,):
            raise HeadwayError(
                f"format {found}", f"has groups of {found.size}, along any dimension", got=granularity,
                hint=f"Granularity.group({found.size}, dim)",
            )  # fmt: skip
        if scale is not None and scale != found.scale:
            raise HeadwayError(f"format {found}", "chooses its scales itself", hint="with_rule gives it another rule")
        return found.element, granularity, found.scale
    if scale is None:
        scale = Scale("none" if isinstance(found, FixedFormat) and found.fraction else "absmax")
    return found, granularity or Granularity.tensor(), scale


def _given(scale: Tensor, view: Tensor, dims: tuple[int, ...]) -> Scales:
    """Scales from the caller, one for each group, checked."""
    groups = [size for axis, size in enumerate(view.shape) if axis not in dims]
    if list(scale.shape) != groups:
        raise HeadwayError("scale", "has the wrong shape", got=tuple(scale.shape), expected=f"{tuple(groups)}")
    values = scale.detach().float()
    if not bool(((values > 0) & torch.isfinite(values)).all()):
        raise HeadwayError("scale", "must be finite and above zero")
    values = _with_axes(values, dims)
    return Scales(values, None, values)


def _with_axes(scales: Tensor, dims: tuple[int, ...]) -> Tensor:
    for dim in sorted(dims):
        scales = scales.unsqueeze(dim)
    return scales


def _without_axes(scales: Tensor, dims: tuple[int, ...]) -> Tensor:
    return scales.squeeze(dims)
