"""Several codes in a byte, for formats of one, two or four bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def codes_in_a_byte(bits: int) -> int:
    """How many codes of ``bits`` share a byte: 8, 4 or 2 for 1, 2 or 4 bits, else 1."""
    return 8 // bits if bits in (1, 2, 4) else 1


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., D] with one code each -> uint8 [..., ceil(D bits / 8)]; the first code is in the lowest bits.

    The order is that of torch's ``float4_e2m1fn_x2`` and of torchao. A last byte that is not full ends in zeros; a
    tensor without dimensions becomes [1].
    """
    each = codes_in_a_byte(bits)
    if each == 1:
        return codes
    codes = codes.reshape(1) if codes.dim() == 0 else codes
    codes = F.pad(codes, (0, -codes.shape[-1] % each))
    packed = codes[..., 0::each].clone()
    for place in range(1, each):
        packed |= codes[..., place::each] << (place * bits)
    return packed


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The way back from `pack`, for codes of ``shape``."""
    each = codes_in_a_byte(bits)
    if each == 1:
        return packed.reshape(shape)
    size = shape[-1] if shape else 1
    codes = torch.stack([(packed >> (place * bits)) & (2**bits - 1) for place in range(each)], dim=-1)
    return codes.flatten(-2)[..., :size].reshape(shape)
