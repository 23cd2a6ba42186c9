"""A block in three parts: what goes token by token before attention, attention, and what does so after it.

The first and the last can be run again on any stretch of the sequence, with the same operators as in the forward pass;
attention, whose cost grows with the square of the sequence, never is.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from headway.core.errors import MethodError
from headway.layers.attention import attention
from headway.layers.blocked_attention import blocked_attention_backward, blocked_attention_forward, can_block
from headway.layers.rope import apply_rope
from headway.memory.streambp.parts import Shared, TransformersParts
from headway.models import gpt2, llama

QKV = tuple[Tensor, Tensor, Tensor]


class Span:
    """A stretch of the sequence, ``start`` to ``end`` of ``length`` positions."""

    def __init__(self, start: int, end: int, length: int) -> None:
        self.start, self.end, self.length = start, end, length

    def tables(self, shared: Shared, name: str) -> Any:
        """The stretch of both rotary tables [.., T, c]."""
        return tuple(table[..., self.start : self.end, :] for table in shared[name])


class Parts(Protocol):
    """One block, in three parts."""

    @property
    def module(self) -> nn.Module:
        """The block."""

    def project(self, x: Tensor, span: Span, shared: Shared) -> QKV:
        """Queries [B, H, t, hd], keys and values [B, Hkv, t, hd] of the stretch, from the block's input [B, t, D]."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, shared: Shared) -> Tensor:
        """Attention over the whole sequence: [B, T, H hd]."""

    def finish(self, x: Tensor, y: Tensor, span: Span, shared: Shared) -> Tensor:
        """The block's output [B, t, D], from its input and attention's output at the stretch."""

    def draws(self) -> bool:
        """Whether ``finish`` draws random numbers."""


class LlamaParts:
    """A block of `headway.models.llama`."""

    def __init__(self, block: llama.Block) -> None:
        self.module = self.block = block

    def project(self, x: Tensor, span: Span, shared: Shared) -> QKV:
        """See `Parts`."""
        own = self.block.attention
        x = self.block.attention_norm(x)
        q, k, v = (part(x).unflatten(-1, (-1, own.head_dim)).transpose(1, 2) for part in (own.q, own.k, own.v))
        if own.q_norm is not None and own.k_norm is not None:
            q, k = own.q_norm(q), own.k_norm(k)
        q, k = apply_rope(q, k, *span.tables(shared, "rope"))
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, shared: Shared) -> Tensor:
        """See `Parts`."""
        y = attention_without_copies(q, k, v, shared.get("segments"), self.block.attention.window)
        return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)

    def finish(self, x: Tensor, y: Tensor, span: Span, shared: Shared) -> Tensor:
        """See `Parts`."""
        return _finish(self.block, x, y, span)

    def draws(self) -> bool:
        """See `Parts`."""
        return self.block.training and self.block.dropout > 0


class GPT2Parts:
    """A block of `headway.models.gpt2`."""

    def __init__(self, block: gpt2.Block) -> None:
        self.module = self.block = block

    def project(self, x: Tensor, span: Span, shared: Shared) -> QKV:
        """See `Parts`."""
        own, x = self.block.attention, self.block.attention_norm(x)
        q, k, v = (part(x).unflatten(-1, (-1, own.head_dim)).transpose(1, 2) for part in (own.q, own.k, own.v))
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, shared: Shared) -> Tensor:
        """See `Parts`."""
        y = attention_without_copies(q, k, v, shared.get("segments"), None)
        return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)

    def finish(self, x: Tensor, y: Tensor, span: Span, shared: Shared) -> Tensor:
        """See `Parts`."""
        return _finish(self.block, x, y, span)

    def draws(self) -> bool:
        """See `Parts`."""
        return self.block.training and self.block.dropout > 0


class DecoderLayerParts(TransformersParts):
    """A decoder layer of transformers that is wired as Llama's; see `streambp.parts.TransformersParts`."""

    @property
    def module(self) -> nn.Module:
        """See `Parts`."""
        layer: nn.Module = self.layer
        return layer

    def _normed(self, y: Tensor, name: str) -> Tensor:
        norm = getattr(self.layer.self_attn, f"{name}_norm", None)
        y = y.unflatten(-1, (-1, self.layer.self_attn.head_dim))  # [B, t, heads, hd]
        return (y if norm is None else norm(y)).transpose(1, 2)

    def project(self, x: Tensor, span: Span, shared: Shared) -> QKV:
        """See `Parts`."""
        own, x = self.layer.self_attn, self.layer.input_layernorm(x)
        q, k = (self._normed(getattr(own, f"{name}_proj")(x), name) for name in "qk")
        cos, sin = (table[:, None].to(x.dtype) for table in span.tables(shared, "position_embeddings"))
        q, k = (t * cos + _turned(t) * sin for t in (q, k))  # the tables repeat each angle in both halves
        return q, k, self._normed(own.v_proj(x), "v")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, shared: Shared) -> Tensor:
        """See `Parts`."""
        own, mask = self.layer.self_attn, shared.get("attention_mask")
        scale = getattr(own, "scaling", None)
        if mask is None:
            y = attention_without_copies(q, k, v, None, getattr(own, "sliding_window", None), scale)
        else:
            grouped = q.shape[1] != k.shape[1]
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
        return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)

    def finish(self, x: Tensor, y: Tensor, span: Span, shared: Shared) -> Tensor:
        """See `Parts`."""
        x = x + self.layer.self_attn.o_proj(y)
        return x + self.layer.mlp(self.layer.post_attention_layernorm(x))

    def draws(self) -> bool:
        """See `Parts`."""
        return False


def parts_of(block: nn.Module) -> Parts:
    """The three parts of a block.

    Raises:
        MethodError: it is wired in a way that nobody has taken apart here, or draws random numbers inside attention.
    """
    if isinstance(block, llama.Block):
        return LlamaParts(block)
    if isinstance(block, gpt2.Block):
        return GPT2Parts(block)
    if not DecoderLayerParts.fits(block):
        raise MethodError(
            "methods.memo",
            f"cannot take a {type(block).__module__}.{type(block).__name__} apart",
            expected="blocks of Headway's Llama or GPT-2, or decoder layers of transformers wired as Llama's",
        )
    if getattr(block, "gradient_checkpointing", False):
        raise MethodError(
            "methods.memo",
            f"finds a {type(block).__name__} that recomputes itself already",
            hint="switch the checkpointing of the model off",
        )
    attention_: Any = block.self_attn
    drops = [module for module in block.modules() if isinstance(module, nn.Dropout) and module.p > 0]
    inside: Any = getattr(attention_, "attention_dropout", 0.0)
    if drops or inside:
        raise MethodError(
            "methods.memo",
            f"cannot draw the dropout of a {type(block).__name__} a second time for some of its tokens",
            hint="set its dropout to 0",
        )
    return DecoderLayerParts(block)


def _finish(block: Any, x: Tensor, y: Tensor, span: Span) -> Tensor:
    """What Llama's and GPT-2's blocks do after attention."""
    p = block.dropout if block.training else 0.0
    x = x + dropout(block.attention.out(y), p, span)
    return x + dropout(block.mlp(block.mlp_norm(x)), p, span)


def _turned(x: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)


def dropout(x: Tensor, p: float, span: Span) -> Tensor:
    """``F.dropout`` on a stretch [B, t, D] of a sequence: what it gives there when it is called on the whole.

    It draws for the whole sequence, so that the generator ends where it would, too.
    """
    if p == 0.0:
        return x
    dropped: Tensor = _Dropout.apply(x, p, span)
    return dropped


class _Dropout(torch.autograd.Function):
    """Saves the stretch's mask alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, span: Span) -> Tensor:
        shape = (x.shape[0], span.length, x.shape[2])
        mine = slice(span.start, span.end)
        ctx.scale = 1 / (1 - p)
        if x.is_cuda:  # torch's kernel draws, masks and scales at once
            whole = x
            if x.shape[1] != span.length:
                whole = x.new_zeros(shape)
                whole[:, mine] = x
            out, mask = torch.native_dropout(whole, p, True)
            ctx.save_for_backward(mask[:, mine].contiguous())
            return out[:, mine].contiguous()
        noise = x.new_empty(shape).bernoulli_(1 - p).div_(1 - p)[:, mine].contiguous()
        ctx.save_for_backward(noise)
        return x * noise

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (saved,) = ctx.saved_tensors
        if saved.dtype == torch.bool:
            return torch.ops.aten.native_dropout_backward(grad, saved, ctx.scale), None, None
        return grad * saved, None, None


def attention_without_copies(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, window: int | None, scale: float | None = None
) -> Tensor:
    """``layers.attention.attention`` over a whole sequence, which saves nothing but ``q``, ``k`` and ``v`` on a CPU.

    Elsewhere torch's kernels save their output and the logarithms of the sums of exponentials beside these.
    """
    if not can_block(q, k, v):
        return attention(q, k, v, segments=segments, window=window, scale=scale)
    if window is not None and window >= k.shape[2]:
        window = None
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    y: Tensor = _Attention.apply(q, k, v, {"segments": segments, "window": window, "scale": scale})
    return y


class _Attention(torch.autograd.Function):
    """Attention on a CPU. It makes its folded copies again in the backward pass, and the probabilities, as ever."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.options = options
        return blocked_attention_forward(q, k, v, **options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *blocked_attention_backward(grad, *ctx.saved_tensors, **ctx.options), None
