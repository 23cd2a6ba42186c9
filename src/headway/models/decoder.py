"""What all decoders of Headway's own are: an embedding, blocks one after the other, a norm, and a head.

A family says how tokens are embedded (``embed``) and what its blocks get beside the residual stream (``beside``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.layers.embedding import Embedding
from headway.layers.linear_cross_entropy import linear_cross_entropy
from headway.models.structure import Structure


class Decoder(nn.Module, ABC):
    """A causal language model; families set ``embedding``, ``blocks``, ``norm`` and ``head``, None where it is tied."""

    plain_head = True
    """The logits are ``hidden @ head_weight.T`` and nothing else."""
    embedding: Embedding
    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Linear | None

    def __init__(self) -> None:
        super().__init__()
        # Tensor parallelism has its own of these.
        self.head_loss: Callable[..., tuple[Tensor, Tensor]] = linear_cross_entropy
        self.head_logits: Callable[[Tensor, Tensor], Tensor] = F.linear

    @abstractmethod
    def embed(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: Any = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """What the first block gets, and what every block gets beside it: ``x = block(x, **shared)``."""

    @abstractmethod
    def beside(
        self,
        length: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: Any = None,
    ) -> dict[str, Any]:
        """What every block gets beside the residual stream of ``length`` new tokens."""

    def hidden(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """The residual stream after the final norm.

        Args:
            tokens: int64 [B, T].
            positions: integer [T] or [B, T]; by default they count on from the cache's length, or, where they are
                learned and there are segments, from each document's start.
            segments: integer [B, T], the document of each token, which sees no other. Not with a cache.
            cache: from ``new_cache``; it takes up the new tokens.

        Returns:
            [B, T, D].

        Raises:
            ModelError: the sequence is longer than the model has learned positions.
        """
        x, shared = self.embed(tokens, positions=positions, segments=segments, cache=cache)
        for block in self.blocks:
            x = block(x, **shared)
        return self.norm(x)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Logits [B, T, V]; arguments as for ``hidden``."""
        hidden = self.hidden(tokens, positions=positions, segments=segments, cache=cache)
        return self.head_logits(hidden, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """[V, D]: the embedding itself where the head is tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def structure(self) -> Structure:
        """The parts that methods work on."""
        return Structure(self.embedding, self.blocks, self.norm, self.head or self.embedding)
