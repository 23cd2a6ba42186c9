"""GPT-2, top to bottom: pre-norm blocks (LayerNorm), learned positions, GELU in its tanh form, biases everywhere.

Shapes: B batch, T new tokens, S keys, D hidden, H heads, hd head width, F intermediate, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.core.errors import ModelError
from headway.layers.attention import attention
from headway.layers.embedding import Embedding
from headway.models.cache import KVCache
from headway.models.config import GPT2Config
from headway.models.decoder import Decoder

__all__ = ["GPT2", "Attention", "Block", "FeedForward"]


class GPT2(Decoder):
    """A causal language model of the GPT-2 family; ``build_model`` gives it its weights."""

    residual_projections = ("attention.out.weight", "mlp.down.weight")
    """Endings of the parameters that write into the residual stream; their initial values shrink with depth."""
    tensor_plan: ClassVar[dict[str, str]] = {
        "embedding": "vocabulary",
        "positions": "positions",
        "blocks.*.attention_norm": "enter",
        "blocks.*.attention.q": "heads",
        "blocks.*.attention.k": "heads",
        "blocks.*.attention.v": "heads",
        "blocks.*.attention.out": "row",
        "blocks.*.mlp_norm": "enter",
        "blocks.*.mlp.up": "column",
        "blocks.*.mlp.down": "row",
        "norm": "leave",
        "head": "vocabulary",
    }
    """How tensor parallelism divides the modules; ``headway.parallel.tensor.plan`` says what the words mean."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.vocab, self.context = config.vocabulary, config.context
        self.embedding = Embedding(self.vocab, config.hidden)
        self.positions = Embedding(config.context, config.hidden)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.LayerNorm(config.hidden, config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.hidden, self.vocab, bias=False)
        # Tensor parallelism has its own of these, and this rank's share of the heads.
        self.drop: Callable[[Tensor, float, bool], Tensor] = F.dropout
        self.cached_heads = config.heads

    def embed(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """What the first block gets, and what every block gets beside it: ``x = block(x, **shared)``."""
        if cache is not None and segments is not None:
            raise ValueError("segments and a cache exclude each other: a cache holds one document per row")
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if positions is None:
            if segments is not None:
                positions = positions_in_documents(segments)  # [B, T]
            else:
                positions = torch.arange(start, end, device=tokens.device)  # [T]
        # A sequence within the context needs no look at the positions, which would wait for the device.
        if end > self.context and (longest := int(positions.max()) + 1) > self.context:
            raise ModelError(
                "model.context",
                f"{longest} tokens do not fit the {self.context} learned positions",
                hint="shorten the sequence, or train a model with a longer context",
            )
        x = self.embedding(tokens) + self.positions(positions)  # [B, T, D]
        shared = self.beside(tokens.shape[1], x.device, x.dtype, segments=segments, cache=cache)
        return self.drop(x, self.config.dropout, self.training), shared

    def beside(
        self,
        length: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> dict[str, Any]:
        """What every block gets beside the residual stream; positions are in the stream already."""
        return {"segments": segments, "cache": cache}

    def flops_per_token(self, sequence: int) -> float:
        """Floating-point operations of a forward and backward pass per token, in sequences of ``sequence`` tokens.

        Six per weight of a matrix product, and ``12 D`` per key for attention. The causal half that a kernel may skip
        counts, as is customary (PaLM, appendix B).
        """
        weights = sum(p.numel() for p in self.blocks.parameters() if p.ndim == 2) + self.head_weight.numel()
        return 6.0 * weights + 12.0 * self.config.layers * self.config.hidden * sequence

    def new_cache(self, batch: int, length: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for ``batch`` sequences of up to ``length`` tokens; by default in the dtype of the weights."""
        config, weight = self.config, self.embedding.weight
        windows = [None] * config.layers
        return KVCache(
            batch, length, windows, self.cached_heads, config.head_width, dtype or weight.dtype, weight.device
        )


class Block(nn.Module):
    """Attention and feed-forward, each on a normalised copy and added back."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = nn.LayerNorm(config.hidden, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = nn.LayerNorm(config.hidden, config.norm_eps)
        self.mlp = FeedForward(config)
        self.drop: Callable[[Tensor, float, bool], Tensor] = F.dropout  # tensor parallelism has its own

    def forward(self, x: Tensor, segments: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        y = self.attention(self.attention_norm(x), segments, cache)
        x = x + self.drop(y, self.dropout, self.training)
        y = self.mlp(self.mlp_norm(x))
        return x + self.drop(y, self.dropout, self.training)


class Attention(nn.Module):
    """Causal multi-head attention."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.head_dim = layer, config.heads, config.head_width
        self.q, self.k, self.v = (nn.Linear(config.hidden, config.hidden) for _ in range(3))
        self.out = nn.Linear(config.hidden, config.hidden)
        self.attend: Callable[..., Tensor] = attention  # sequence parallelism puts its own here

    def forward(self, x: Tensor, segments: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        B, T, _ = x.shape
        # The number of heads is what the products give: under tensor parallelism, this rank's share.
        q, k, v = (part(x).view(B, T, -1, self.head_dim).transpose(1, 2) for part in (self.q, self.k, self.v))
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # [B, H, S, hd]
        y = self.attend(q, k, v, segments=segments, offset=k.shape[2] - T)  # [B, H, T, hd]
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    """``down(gelu(up(x)))`` with the tanh approximation that GPT-2 was trained with."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden, config.intermediate_width)
        self.down = nn.Linear(config.intermediate_width, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))


def positions_in_documents(segments: Tensor) -> Tensor:
    """Position of each token within its document, from 0.

    Args:
        segments: integer [B, T]; a new document starts where the number changes.

    Returns:
        int64 [B, T].
    """
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    new = torch.ones_like(segments, dtype=torch.bool)
    new[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - torch.where(new, index, 0).cummax(dim=1).values
