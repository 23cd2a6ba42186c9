"""The Llama family, top to bottom: Llama, Mistral, Qwen2 and Qwen3 are settings of it.

Pre-norm blocks (RMSNorm), rotary positions with their scalings, grouped-query attention with optional QK norm, biases
and sliding window, SwiGLU, a tied or separate head. Every projection is a matrix of its own, so that each can be cut
by heads or channels for tensor parallelism as it is.

Shapes: B batch, T new tokens, S keys, D hidden, H heads, Hkv key and value heads, hd head width, F intermediate,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.layers.attention import attention
from headway.layers.embedding import Embedding
from headway.layers.norm import RMSNorm
from headway.layers.rope import apply_rope, rope_frequencies, rope_tables
from headway.layers.swiglu import swiglu
from headway.models.cache import KVCache
from headway.models.config import LlamaConfig
from headway.models.decoder import Decoder

__all__ = ["Attention", "Block", "FeedForward", "Llama"]


class Llama(Decoder):
    """A causal language model of the Llama family; ``build_model`` gives it its weights."""

    residual_projections: tuple[str, ...] = ("attention.out.weight", "mlp.down.weight")
    """Endings of the parameters that write into the residual stream; their initial values shrink with depth."""
    tensor_plan: ClassVar[dict[str, str]] = {
        "embedding": "vocabulary",
        "blocks.*.attention_norm": "enter",
        "blocks.*.attention.q": "heads",
        "blocks.*.attention.k": "kv_heads",
        "blocks.*.attention.v": "kv_heads",
        "blocks.*.attention.q_norm": "inside",
        "blocks.*.attention.k_norm": "inside",
        "blocks.*.attention.out": "row",
        "blocks.*.mlp_norm": "enter",
        "blocks.*.mlp.gate": "column",
        "blocks.*.mlp.up": "column",
        "blocks.*.mlp.down": "row",
        "norm": "leave",
        "head": "vocabulary",
    }
    """How tensor parallelism divides the modules; ``headway.parallel.tensor.plan`` says what the words mean."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab, self.context = config.vocabulary, config.context
        self.embedding = Embedding(self.vocab, config.hidden)
        self.rope = Rope(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.hidden, self.vocab, bias=False)
        # Tensor parallelism has its own of these, and this rank's share of the key and value heads.
        self.drop: Callable[[Tensor, float, bool], Tensor] = F.dropout
        self.cached_heads = config.kv_head_count

    def embed(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """What the first block gets, and what every block gets beside it: ``x = block(x, **shared)``.

        Positions are relative, so that packed documents need no restart of theirs.
        """
        if cache is not None and segments is not None:
            raise ValueError("segments and a cache exclude each other: a cache holds one document per row")
        x = self.drop(self.embedding(tokens), self.config.dropout, self.training)  # [B, T, D]
        given: dict[str, Any] = {"positions": positions, "segments": segments, "cache": cache}
        return x, self.beside(tokens.shape[1], x.device, x.dtype, **given)

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
        """What every block gets beside the residual stream of ``length`` new tokens."""
        start = 0 if cache is None else cache.length
        end = start + length
        if positions is None:
            positions = torch.arange(start, end, device=device)  # [T]
        elif self.rope.dynamic:
            end = int(positions.max()) + 1
        return {"rope": self.rope(positions, end, dtype), "segments": segments, "cache": cache}

    def flops_per_token(self, sequence: int) -> float:
        """Floating-point operations of a forward and backward pass per token, in sequences of ``sequence`` tokens.

        Six per weight of a matrix product, and ``12 H hd`` per key for attention. The causal half that a kernel may
        skip counts, as is customary (PaLM, appendix B); keys outside a sliding window do not.
        """
        config = self.config
        weights = sum(p.numel() for p in self.blocks.parameters() if p.ndim == 2) + self.head_weight.numel()
        keys = sum(min(sequence, config.window_of(layer) or sequence) for layer in range(config.layers))
        return 6.0 * weights + 12.0 * config.heads * config.head_width * keys

    def new_cache(self, batch: int, length: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for ``batch`` sequences of up to ``length`` tokens; by default in the dtype of the weights."""
        config, weight = self.config, self.embedding.weight
        windows = [config.window_of(layer) for layer in range(config.layers)]
        return KVCache(
            batch, length, windows, self.cached_heads, config.head_width, dtype or weight.dtype, weight.device
        )


class Block(nn.Module):
    """Attention and feed-forward, each on a normalised copy and added back."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = RMSNorm(config.hidden, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden, config.norm_eps)
        self.mlp = FeedForward(config)
        self.drop: Callable[[Tensor, float, bool], Tensor] = F.dropout  # tensor parallelism has its own

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        segments: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        y = self.attention(self.attention_norm(x), rope, segments, cache)
        x = x + self.drop(y, self.dropout, self.training)
        y = self.mlp(self.mlp_norm(x))
        return x + self.drop(y, self.dropout, self.training)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.window = layer, config.window_of(layer)
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_head_count, config.head_width
        self.q = nn.Linear(config.hidden, self.heads * self.head_dim, bias=config.qkv_bias)
        self.k = nn.Linear(config.hidden, self.kv_heads * self.head_dim, bias=config.qkv_bias)
        self.v = nn.Linear(config.hidden, self.kv_heads * self.head_dim, bias=config.qkv_bias)
        self.out = nn.Linear(self.heads * self.head_dim, config.hidden, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.attend: Callable[..., Tensor] = attention  # sequence parallelism puts its own here

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        segments: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        B, T, _ = x.shape
        # The number of heads is what the products give: under tensor parallelism, this rank's share.
        q, k, v = (part(x).view(B, T, -1, self.head_dim).transpose(1, 2) for part in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, k, *rope)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # [B, Hkv, S, hd]
        y = self.attend(q, k, v, segments=segments, window=self.window, offset=k.shape[2] - T)  # [B, H, T, hd]
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden, config.intermediate_width, bias=False)
        self.up = nn.Linear(config.hidden, config.intermediate_width, bias=False)
        self.down = nn.Linear(config.intermediate_width, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.down(swiglu(self.gate(x), self.up(x)))


class Rope:
    """The rotary tables of one model.

    No module and no buffer: ``model.to(torch.bfloat16)`` would round the frequencies, and far positions with them.
    """

    def __init__(self, config: LlamaConfig) -> None:
        self.config = config
        self.dynamic = (config.rope_scaling or {}).get("rope_type") == "dynamic"
        with torch.device("cpu"):  # also while the model itself is made on the meta device
            self.frequencies, self.attention_factor = self._frequencies(None)
        self._on_device: dict[torch.device, Tensor] = {}

    def __call__(self, positions: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [.., T, hd/2] of ``positions``; ``length`` is the sequence's, for ``dynamic`` scaling."""
        if self.dynamic and length > self.config.context:
            frequencies = self._frequencies(length)[0].to(positions.device)
        else:
            frequencies = self._on_device.get(positions.device, self.frequencies)
            if frequencies.device != positions.device:
                frequencies = self._on_device[positions.device] = frequencies.to(positions.device)
        return rope_tables(frequencies, positions, dtype, self.attention_factor)

    def _frequencies(self, length: int | None) -> tuple[Tensor, float]:
        config = self.config
        return rope_frequencies(
            config.head_width, config.rope_theta, config.rope_scaling, config.context, length=length
        )
