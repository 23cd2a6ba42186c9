"""Gated linear attention, top to bottom: a recurrent language model that trains in matrix products.

Pre-norm blocks (RMSNorm) whose mixer keeps a state of one matrix per head; every channel of it decays at a rate that
the token sets, through a matrix of low rank. The output is normalised per head and gated. SwiGLU, a tied or separate
head. Some blocks may have Llama's softmax attention instead (a hybrid model). There is no short convolution.

Shapes: B batch, T new tokens, D hidden, H heads, dk channels of queries and keys per head, dv of values.

Source: Yang et al., Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv 2312.06635,
section 4.4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.layers.embedding import Embedding
from headway.layers.linear_attention import linear_attention
from headway.layers.norm import RMSNorm
from headway.layers.swiglu import swiglu
from headway.models.config import GLAConfig
from headway.models.decoder import Decoder
from headway.models.llama import Attention, FeedForward, Rope
from headway.models.recurrent_cache import RecurrentCache

__all__ = ["GLA", "Block", "GatedLinearAttention"]


class GLA(Decoder):
    """A causal language model with gated linear attention; ``build_model`` gives it its weights."""

    residual_projections = ("mixer.out.weight", "mlp.down.weight")
    """Endings of the parameters that write into the residual stream; their initial values shrink with depth."""

    def __init__(self, config: GLAConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab, self.context = config.vocabulary, config.context
        self.embedding = Embedding(self.vocab, config.hidden)
        self.rope = Rope(config.softmax()) if config.softmax_layers else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.hidden, self.vocab, bias=False)

    def embed(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: RecurrentCache | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """What the first block gets, and what every block gets beside it: ``x = block(x, **shared)``.

        Positions matter to blocks with softmax attention alone; a state knows the order by itself.
        """
        if cache is not None and segments is not None:
            raise ValueError("segments and a cache exclude each other: a cache holds one document per row")
        x = F.dropout(self.embedding(tokens), self.config.dropout, self.training)  # [B, T, D]
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
        cache: RecurrentCache | None = None,
    ) -> dict[str, Any]:
        """What every block gets beside the residual stream of ``length`` new tokens."""
        rope = None
        if self.rope is not None:
            start = 0 if cache is None else cache.length
            if positions is None:
                positions = torch.arange(start, start + length, device=device)  # [T]
            rope = self.rope(positions, start + length, dtype)
        return {"rope": rope, "segments": segments, "cache": cache}

    def flops_per_token(self, sequence: int) -> float:
        """Floating-point operations of a forward and backward pass per token, in sequences of ``sequence`` tokens.

        Six per weight of a matrix product; ``12 dk dv`` per head for writing to its state and reading from it, which is
        the recurrence's count and less than what chunks do; ``12 H hd`` per key for softmax attention.
        """
        config = self.config
        weights = sum(p.numel() for p in self.blocks.parameters() if p.ndim == 2) + self.head_weight.numel()
        linear, softmax = config.layers - len(config.softmax_layers), len(config.softmax_layers)
        states = linear * config.key_width * config.value_width / config.heads
        return 6.0 * weights + 12.0 * (states + softmax * config.hidden * sequence)

    def new_cache(self, batch: int, length: int, dtype: torch.dtype | None = None) -> RecurrentCache:
        """An empty cache for ``batch`` sequences of up to ``length`` tokens; keys and values of softmax attention are
        by default in the dtype of the weights, states in fp32 or better."""
        return RecurrentCache(self.config, batch, length, dtype or self.embedding.weight.dtype, self.embedding.weight)


class Block(nn.Module):
    """A mixer and a feed-forward, each on a normalised copy and added back."""

    def __init__(self, config: GLAConfig, layer: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        softmax = layer in config.softmax_layers
        self.mixer_norm = RMSNorm(config.hidden, config.norm_eps)
        self.mixer = Attention(config.softmax(), layer) if softmax else GatedLinearAttention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden, config.norm_eps)
        self.mlp = FeedForward(config)  # type: ignore[arg-type]  # it asks for two widths alone

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        segments: Tensor | None = None,
        cache: RecurrentCache | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        y = self.mixer(self.mixer_norm(x), rope, segments, cache)
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.mlp(self.mlp_norm(x))
        return x + F.dropout(y, self.dropout, self.training)


class GatedLinearAttention(nn.Module):
    """``out(norm(attend(q, k, v, decays)) * silu(gate(x)))``."""

    def __init__(self, config: GLAConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.chunk = layer, config.chunk
        self.temperature = config.gate_temperature
        self.key_dim, self.value_dim = config.key_width // config.heads, config.value_width // config.heads
        self.q = nn.Linear(config.hidden, config.key_width, bias=False)
        self.k = nn.Linear(config.hidden, config.key_width, bias=False)
        self.v = nn.Linear(config.hidden, config.value_width, bias=False)
        self.decay: nn.Sequential | None = None
        self.decay_dim = self.key_dim if config.decay == "channel" else 1  # decays per head
        if config.decay != "none":
            self.decay = nn.Sequential(
                nn.Linear(config.hidden, config.gate_rank, bias=False),
                nn.Linear(config.gate_rank, config.heads * self.decay_dim),
            )
        self.gate = nn.Linear(config.hidden, config.value_width, bias=False)
        self.norm = RMSNorm(self.value_dim, config.norm_eps)
        self.out = nn.Linear(config.value_width, config.hidden, bias=False)
        self.attend: Callable[..., tuple[Tensor, Tensor]] = (
            linear_attention  # ranks that share sequences have their own
        )

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        segments: Tensor | None = None,
        cache: RecurrentCache | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]; rotary positions are for softmax attention."""
        B, T, _ = x.shape
        q, k = (part(x).view(B, T, -1, self.key_dim).transpose(1, 2) for part in (self.q, self.k))
        v = self.v(x).view(B, T, -1, self.value_dim).transpose(1, 2)
        state = None if cache is None else cache.state_of(self.layer)
        y, state = self.attend(
            q * self.key_dim**-0.5, k, v, self.log_decay(x), segments=segments, state=state, chunk=self.chunk
        )  # [B, H, T, dv], [B, H, dk, dv]
        if cache is not None:
            cache.keep(self.layer, state, T)
        y = self.norm(y.transpose(1, 2)).flatten(2)  # [B, T, H dv]
        return self.out(swiglu(self.gate(x), y))

    def log_decay(self, x: Tensor) -> Tensor | None:
        """Logarithms of the decays [B, H, T, dk or 1], at most 0, in fp32 or better: of bf16's eight bits none would
        be left for what a thousand tokens add up to."""
        if self.decay is None:
            return None
        gates: Tensor = self.decay(x)
        gates = gates.to(torch.promote_types(x.dtype, torch.float32))
        logs = F.logsigmoid(gates) / self.temperature
        return logs.view(*x.shape[:2], -1, self.decay_dim).transpose(1, 2)
