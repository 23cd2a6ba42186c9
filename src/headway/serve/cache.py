"""What a decoder carries from token to token: the protocol, and the key/value cache that our own families use.

The cache of a family lives with the family (``headway.models.cache``), because the family alone knows its shape; any
other state (fast weights, a recurrent state, a cache predicted by another model) is served if it offers ``Cache``.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from headway.models.cache import KVCache

__all__ = ["Cache", "KVCache"]


@runtime_checkable
class Cache(Protocol):
    """The state of one decoding; made by ``model.new_cache``, filled by ``model(tokens, cache=cache)``."""

    @property
    def length(self) -> int:
        """Tokens that it has taken up: the position of the next one."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take up new keys and values [B, Hkv, T, hd] of a layer; gives those that the new tokens may look at."""

    @property
    def state(self) -> dict[str, Tensor]:
        """Its tensors by name: to count, copy or move them."""
