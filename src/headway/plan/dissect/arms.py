"""The study's techniques as methods, plain and small: what its experiment compares, before each has a room of its own.

A recipe names them ``headway.plan.dissect.arms:LoRA``.
"""

from __future__ import annotations

import math
import os
import tempfile
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from headway.core.method import Card, Method, Update
from headway.core.options import Options
from headway.layers.attention import attention_reference
from headway.layers.rope import apply_rope
from headway.models.structure import structure

_PAPER = "Zhang et al., arXiv 2311.03687"

NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip
"""Quantiles of a normal distribution: Dettmers et al., QLoRA, arXiv 2305.14314, appendix E."""
_GROUP = 64


class EagerAttention(Method):
    """Attention with its whole matrix of scores, operation by operation: the study's baseline."""

    card = Card(
        name="arm-eager-attention",
        title="Attention without a fused kernel",
        paper=_PAPER,
        summary="Computes scores, mask, softmax and values one after the other, each kept for backward.",
        exact=True,
        approximates="",
        buys="nothing; what FlashAttention is measured against",
        costs="time and memory that grow with the square of the sequence",
        status="trial",
    )

    def model(self, model: nn.Module) -> nn.Module:
        """Give every Llama block the slow attention."""
        layers: list[Any] = [block.attention for block in structure(model).blocks]
        for layer in layers:
            layer.forward = partial(_eager, layer)
        self.changed("attention layers made eager", len(layers))
        return model


def _eager(layer: Any, x: Tensor, rope: tuple[Tensor, Tensor], segments: Any = None, cache: Any = None) -> Tensor:
    B, T, _ = x.shape
    q, k, v = (part(x).view(B, T, -1, layer.head_dim).transpose(1, 2) for part in (layer.q, layer.k, layer.v))
    q, k = apply_rope(q, k, *rope)
    y = attention_reference(q, k, v, segments=segments, window=layer.window)
    return layer.out(y.transpose(1, 2).reshape(B, T, -1))


class LoRAOptions(Options):
    """Options of the LoRA arm."""

    rank: int = Field(4, ge=1)
    """Rank of each update; 4 at a width of 256 is 64 at one of 4096."""
    four_bit: bool = False
    """Keep the frozen weights in 4 bits (NF4), as QLoRA does."""


class LoRA(Method):
    """Freeze the model and train a low-rank update of each linear layer of its blocks."""

    card = Card(
        name="arm-lora",
        title="LoRA, with four_bit QLoRA",
        paper=f"Hu et al., arXiv 2106.09685; Dettmers et al., arXiv 2305.14314; measured by {_PAPER}",
        summary="Trains low-rank updates of frozen linear layers.",
        exact=False,
        approximates="updates are of low rank; with four_bit the frozen weights are rounded to 16 values",
        buys="gradients and optimizer state of the updates alone; 4-bit weights",
        costs="quality where low rank does not suffice; unpacking 4-bit weights at each use",
        status="trial",
    )
    Options = LoRAOptions

    def model(self, model: nn.Module) -> nn.Module:
        """Replace the linear layers of the blocks."""
        model.requires_grad_(False)
        count = 0
        for block in structure(model).blocks:
            for name, layer in list(block.named_modules()):
                if isinstance(layer, nn.Linear):
                    parent = block.get_submodule(name.rpartition(".")[0])
                    setattr(
                        parent, name.rpartition(".")[2], LoRALinear(layer, self.options.rank, self.options.four_bit)
                    )
                    count += 1
        self.changed("linear layers with a low-rank update", count)
        return model


class LoRALinear(nn.Module):
    """``base(x) + x A B``, the base frozen; B starts at zero."""

    def __init__(self, base: nn.Linear, rank: int, four_bit: bool) -> None:
        super().__init__()
        self.base: nn.Module = Linear4Bit(base) if four_bit else base
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


class Linear4Bit(nn.Module):
    """A frozen linear layer in NF4: two weights a byte and a scale for each 64 of them; unpacked at each use."""

    packed: Tensor
    scale: Tensor

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.shape = base.weight.shape
        packed, scale = quantize_nf4(base.weight.detach())
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return _Frozen4Bit.apply(x, self.packed, self.scale, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of weights and scales."""
        return self.packed.nbytes + self.scale.nbytes


class _Frozen4Bit(torch.autograd.Function):
    """The weight is unpacked in both passes and never kept: autograd would hold it until backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scale: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(packed, scale)
        ctx.shape = shape
        return F.linear(x, dequantize_nf4(packed, scale, shape, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        packed, scale = ctx.saved_tensors
        return grad @ dequantize_nf4(packed, scale, ctx.shape, grad.dtype), None, None, None


def quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of 16 levels times the largest magnitude of each 64 weights.

    Args:
        weight: a multiple of 64 values.

    Returns:
        Two levels a byte, uint8 [n / 2], and the magnitudes in bf16 [n / 64].
    """
    groups = weight.float().reshape(-1, _GROUP)
    scale = groups.abs().amax(1).clamp_min(1e-12).to(torch.bfloat16)  # [n / 64]
    levels = torch.tensor(NF4)
    codes = ((groups / scale.float()[:, None])[..., None] - levels).abs().argmin(-1).to(torch.uint8).flatten()
    return codes[0::2] << 4 | codes[1::2], scale


def dequantize_nf4(packed: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The inverse of ``quantize_nf4``, up to the rounding."""
    codes = torch.stack((packed >> 4, packed & 15), dim=1).flatten().int()
    values = torch.tensor(NF4, dtype=dtype)[codes].view(-1, _GROUP) * scale.to(dtype)[:, None]
    return values.view(shape)


class DiskStates(Method):
    """Keep the optimizer's state in a file between steps: read, update, write, forced to the disk."""

    card = Card(
        name="arm-disk-states",
        title="Optimizer state offloaded to disk",
        paper=f"Rajbhandari et al., ZeRO-Infinity, arXiv 2104.07857; measured by {_PAPER} with host memory",
        summary="Reads the optimizer's state before each update and writes it back after.",
        exact=True,
        approximates="",
        buys="the memory of the optimizer's state between steps",
        costs="reading and writing all of it in each step",
        status="trial",
    )

    def optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Remember whose state it is."""
        self._optimizer = optimizer
        return optimizer

    def update(self, update: Update) -> Update:
        """Fetch the state before the update and put it away after."""
        file: Any = tempfile.TemporaryFile(prefix="headway-states-")  # noqa: SIM115 - it lives as long as the training
        shapes: dict[tuple[Tensor, str], torch.Size] = {}
        self.changed("optimizer's state kept in a file")

        def offloaded() -> None:
            file.seek(0)
            for key, shape in shapes.items():
                state = torch.empty(shape)
                file.readinto(state.view(-1).numpy())
                self._put(key, state)
            update()
            file.seek(0)
            for key, state in self._states():
                shapes[key] = state.shape
                file.write(state.view(-1).numpy())
                self._put(key, torch.empty(0))
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # the next read comes from the disk

        return offloaded

    def _states(self) -> list[tuple[tuple[Tensor, str], Tensor]]:
        """(parameter, name) and tensor; counters of steps stay where they are."""
        every = ((p, name, t) for p, state in self._optimizer.state.items() for name, t in state.items())
        return [((p, name), t) for p, name, t in every if isinstance(t, Tensor) and t.ndim]

    def _put(self, key: tuple[Tensor, str], state: Tensor) -> None:
        parameter, name = key
        self._optimizer.state[parameter][name] = state
