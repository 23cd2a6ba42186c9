"""What this machine does in a format itself, and what is emulated: found out by trying it once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from headway.precision.blocks import BLOCK_FORMATS, BlockFormat
from headway.precision.encode import encode
from headway.precision.formats import E2M1, E4M3, E5M2, FORMATS, FloatFormat, Format
from headway.precision.packing import pack
from headway.precision.tables import torch_dtype


@dataclass(frozen=True)
class Capability:
    """How one format runs on one device.

    cast: ``native`` (torch has a cast that gives the same numbers) or ``emulated`` (tensor arithmetic).
    product: the call of torch that multiplies matrices in this format and gave the right answer here, or ``emulated``
        (dequantise, then multiply in fp32 or bf16).
    why: what the native product said when it was tried, where it is emulated.
    """

    cast: str
    product: str
    why: str = ""

    @property
    def native(self) -> bool:
        """Whether matrix products run in this format itself."""
        return self.product != "emulated"


def capabilities(device: str | torch.device = "cpu") -> dict[str, Capability]:
    """Every format of `FORMATS` and `BLOCK_FORMATS` -> how it runs on ``device``; tried once for each device.

    A product counts as native only if its result on small whole numbers, which every format holds exactly, is right.
    """
    return dict(_capabilities(torch.device(device)))


def torchao_version() -> str | None:
    """The version of torchao, which brings optimizers and training in some of these formats, or None without it."""
    try:
        return version("torchao")
    except PackageNotFoundError:
        return None


@lru_cache(maxsize=16)
def _capabilities(device: torch.device) -> dict[str, Capability]:
    found = {}
    formats: dict[str, Format | BlockFormat] = {**FORMATS, **BLOCK_FORMATS}
    for name, format in formats.items():
        element = format.element if isinstance(format, BlockFormat) else format
        cast = "native" if torch_dtype(element) is not None or name in ("fp16", "bf16") else "emulated"
        product, why = _product(format, device)
        found[name] = Capability(cast, product, why)
    return found


def _product(format: Format | BlockFormat, device: torch.device) -> tuple[str, str]:
    trial = _TRIALS.get(format.name)
    if trial is None:
        return "emulated", "torch has no matrix product in this format"
    name, call = trial
    left, right = _whole_numbers(device)
    try:
        got = call(left, right).double()
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, AssertionError) as error:
        return (
            "emulated",
            f"{name}: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}",
        )
    if not torch.equal(got, left.double() @ right.double()):
        return "emulated", f"{name} runs here, but its result is wrong"
    return name, ""


def _whole_numbers(device: torch.device) -> tuple[Tensor, Tensor]:
    """Two [128, 128] matrices of -1, 0, 1 and 2: exact in every format, and so is their product in bf16."""
    place = torch.arange(128 * 128, device=device).reshape(128, 128)
    left = (place * 7919 // 13 % 4 - 1).float()
    right = (place * 6007 // 11 % 4 - 1).float()
    left[:, 64:] = 0  # sums stay below 2^8, where bf16 still holds every whole number
    return left, right


def _plain(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda left, right: left.to(dtype) @ right.to(dtype)


def _int_mm(left: Tensor, right: Tensor) -> Tensor:
    return torch._int_mm(left.to(torch.int8), right.to(torch.int8))


def _scaled_mm(left_format: FloatFormat, right_format: FloatFormat) -> Callable[[Tensor, Tensor], Tensor]:
    def call(left: Tensor, right: Tensor) -> Tensor:
        a, b = _codes(left, left_format), _codes(right.t(), right_format)
        one = torch.ones((), device=left.device)
        return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    return call


def _block_scaled_mm(element: FloatFormat, size: int, scale: str) -> Callable[[Tensor, Tensor], Tensor]:
    def call(left: Tensor, right: Tensor) -> Tensor:
        a, b = _codes(left, element), _codes(right.t(), element)
        # One for every block, so the order that the hardware wants its scales in does not matter here.
        ones = torch.ones(128 * 128 // size, device=left.device).to(getattr(torch, scale))
        return torch._scaled_mm(a, b.t(), scale_a=ones, scale_b=ones, out_dtype=torch.bfloat16)

    return call


def _codes(x: Tensor, format: FloatFormat) -> Tensor:
    codes = encode(x.contiguous(), format)
    dtype = torch_dtype(format)
    if dtype is not None:
        return codes.view(dtype)
    return pack(codes, format.bits).view(torch.float4_e2m1fn_x2)


_TRIALS: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "fp16": ("torch.matmul", _plain(torch.float16)),
    "bf16": ("torch.matmul", _plain(torch.bfloat16)),
    "int8": ("torch._int_mm", _int_mm),
    "e4m3": ("torch._scaled_mm", _scaled_mm(E4M3, E4M3)),
    "e5m2": ("torch._scaled_mm", _scaled_mm(E5M2, E4M3)),  # no hardware multiplies E5M2 by E5M2
    "mxfp8_e4m3": ("torch._scaled_mm", _block_scaled_mm(E4M3, 32, "float8_e8m0fnu")),
    "mxfp4": ("torch._scaled_mm", _block_scaled_mm(E2M1, 32, "float8_e8m0fnu")),
    "nvfp4": ("torch._scaled_mm", _block_scaled_mm(E2M1, 16, "float8_e4m3fn")),
}
