"""How a block falls apart into what needs the whole sequence (keys and values) and what does not (all the rest).

Position t of a causal block depends on x[t] and on the keys and values of positions up to t. So the block's output
over a chunk of positions needs the chunk's own inputs and a prefix of the keys and values, nothing else.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.core.errors import MethodError
from headway.layers.attention import attention
from headway.layers.rope import apply_rope
from headway.models import gpt2, llama

Shared = dict[str, Any]
"""What every block gets beside its input: rotary tables, document ids, masks."""


class Parts(Protocol):
    """One block, in two halves."""

    def keys_values(self, x: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, T, hd] of the whole sequence, from the block's input [B, T, D]."""

    def rest(self, x: Tensor, k: Tensor, v: Tensor, start: int, shared: Shared) -> Tensor:
        """The block's output [B, C, D] at positions ``start`` to ``start + C``.

        Args:
            x: the block's input at these positions, [B, C, D].
            k: keys of positions 0 to ``start + C``.
            v: values of positions 0 to ``start + C``.
        """


class LlamaParts:
    """A block of `headway.models.llama`."""

    def __init__(self, block: llama.Block) -> None:
        self.block = block

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, heads hd] -> [B, heads, T, hd]."""
        return x.unflatten(-1, (-1, self.block.attention.head_dim)).transpose(1, 2)

    def keys_values(self, x: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        """See `Parts`."""
        x = self.block.attention_norm(x)
        k, v = self._heads(self.block.attention.k(x)), self._heads(self.block.attention.v(x))
        if self.block.attention.k_norm is not None:
            k = self.block.attention.k_norm(k)
        return apply_rope(k[:, :0], k, *shared["rope"])[1], v

    def rest(self, x: Tensor, k: Tensor, v: Tensor, start: int, shared: Shared) -> Tensor:
        """See `Parts`."""
        block, end = self.block, start + x.shape[1]
        q = self._heads(block.attention.q(block.attention_norm(x)))
        if block.attention.q_norm is not None:
            q = block.attention.q_norm(q)
        cos, sin = (table[..., start:end, :] for table in shared["rope"])
        q = apply_rope(q, q[:, :0], cos, sin)[0]
        y = attention(q, k, v, segments=_prefix(shared, end), window=block.attention.window, offset=start)
        y = block.attention.out(y.transpose(1, 2).flatten(2))
        x = x + F.dropout(y, block.dropout, block.training)
        return x + F.dropout(block.mlp(block.mlp_norm(x)), block.dropout, block.training)


class GPT2Parts:
    """A block of `headway.models.gpt2`."""

    def __init__(self, block: gpt2.Block) -> None:
        self.block = block

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, heads hd] -> [B, heads, T, hd]."""
        return x.unflatten(-1, (-1, self.block.attention.head_dim)).transpose(1, 2)

    def keys_values(self, x: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        """See `Parts`."""
        x = self.block.attention_norm(x)
        return self._heads(self.block.attention.k(x)), self._heads(self.block.attention.v(x))

    def rest(self, x: Tensor, k: Tensor, v: Tensor, start: int, shared: Shared) -> Tensor:
        """See `Parts`."""
        block, end = self.block, start + x.shape[1]
        q = self._heads(block.attention.q(block.attention_norm(x)))
        y = attention(q, k, v, segments=_prefix(shared, end), offset=start)
        y = block.attention.out(y.transpose(1, 2).flatten(2))
        x = x + F.dropout(y, block.dropout, block.training)
        return x + F.dropout(block.mlp(block.mlp_norm(x)), block.dropout, block.training)


class TransformersParts:
    """A decoder layer of transformers that is wired as Llama's: pre-norm, separate projections, rotary positions.

    A family may differ in what its attributes do not tell (a cap on the scores, a scaled residual), so the first
    call of a `StreamedBlock` compares with the layer itself.
    """

    needed = (
        "input_layernorm", "post_attention_layernorm", "mlp", "self_attn.q_proj", "self_attn.k_proj",
        "self_attn.v_proj", "self_attn.o_proj", "self_attn.head_dim",
    )  # fmt: skip
    foreign = ("pre_feedforward_layernorm", "post_feedforward_layernorm", "mlp.gate", "mlp.experts")

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Whether the layer has Llama's parts and no others that compute."""
        return all(_has(layer, name) for name in cls.needed) and not any(_has(layer, name) for name in cls.foreign)

    def _heads(self, x: Tensor, name: str) -> Tensor:
        attention_ = self.layer.self_attn
        y = getattr(attention_, f"{name}_proj")(self.layer.input_layernorm(x))
        y = y.unflatten(-1, (-1, attention_.head_dim))  # [B, T, heads, hd]
        norm = getattr(attention_, f"{name}_norm", None)
        return (y if norm is None else norm(y)).transpose(1, 2)

    def keys_values(self, x: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        """See `Parts`."""
        return _rotate(self._heads(x, "k"), shared, 0, x.shape[1]), self._heads(x, "v")

    def rest(self, x: Tensor, k: Tensor, v: Tensor, start: int, shared: Shared) -> Tensor:
        """See `Parts`."""
        attention_, end = self.layer.self_attn, start + x.shape[1]
        q = _rotate(self._heads(x, "q"), shared, start, end)
        mask = shared.get("attention_mask")
        if mask is None:
            window = getattr(attention_, "sliding_window", None)
            y = attention(q, k, v, window=window, scale=getattr(attention_, "scaling", None), offset=start)
        else:
            rows = mask[..., start:end, :end]  # [B, 1, C, S]: boolean, or added to the scores
            scale = getattr(attention_, "scaling", None)
            grouped = q.shape[1] != k.shape[1]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=rows, scale=scale, enable_gqa=grouped)
        x = x + attention_.o_proj(y.transpose(1, 2).flatten(2))
        return x + self.layer.mlp(self.layer.post_attention_layernorm(x))


def parts_of(block: nn.Module) -> Parts:
    """The two halves of a block.

    Raises:
        MethodError: it is wired in a way that nobody has taken apart here; names its class and what is known.
    """
    if isinstance(block, llama.Block):
        return LlamaParts(block)
    if isinstance(block, gpt2.Block):
        return GPT2Parts(block)
    if TransformersParts.fits(block):
        return TransformersParts(block)
    raise MethodError(
        "methods.streambp",
        f"cannot take a {type(block).__module__}.{type(block).__name__} apart",
        expected="blocks of Headway's Llama or GPT-2, or decoder layers of transformers wired as Llama's",
    )


def _prefix(shared: Shared, end: int) -> Tensor | None:
    segments = shared.get("segments")
    return None if segments is None else segments[:, :end]


def _rotate(x: Tensor, shared: Shared, start: int, end: int) -> Tensor:
    """transformers' rotary embedding, whose tables [B, T, hd] repeat each angle in both halves."""
    cos, sin = (table[:, None, start:end].to(x.dtype) for table in shared["position_embeddings"])
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def _has(module: Any, path: str) -> bool:
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return False
    return True
