"""What a model with linear attention carries from token to token: a state per block, or keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from headway.models.cache import KVCache
from headway.models.config import GLAConfig


class RecurrentCache:
    """States of linear attention, of one size whatever the length, and the key/value cache of the other blocks.

    Args:
        config: of the model.
        batch: sequences.
        length: tokens that the cache can hold: those blocks with softmax attention need room for.
        dtype: of keys and values; states are fp32 (fp64 for fp64).
        like: a tensor on the device of the cache.
    """

    def __init__(self, config: GLAConfig, batch: int, length: int, dtype: torch.dtype, like: Tensor) -> None:
        softmax = config.softmax_layers
        self.capacity = length
        self._index = {layer: index for index, layer in enumerate(softmax)}  # block -> place in the key/value cache
        heads = config.kv_heads or config.heads
        self._kv = KVCache(batch, length, [None] * len(softmax), heads, config.head_width, dtype, like.device)
        shape = (batch, config.heads, config.key_width // config.heads, config.value_width // config.heads)
        wide = torch.promote_types(dtype, torch.float32)
        linear = [layer for layer in range(config.layers) if layer not in self._index]
        self._states = {layer: torch.zeros(shape, dtype=wide, device=like.device) for layer in linear}
        self._seen = dict.fromkeys(linear, 0)

    @property
    def length(self) -> int:
        """Tokens that all layers have seen."""
        seen = list(self._seen.values())
        return min([*seen, self._kv.length] if self._index else seen)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values to a block with softmax attention; see ``KVCache.append``."""
        return self._kv.append(self._index[layer], k, v)

    def state_of(self, layer: int) -> Tensor:
        """[B, H, dk, dv], the state of a block with linear attention."""
        return self._states[layer]

    def keep(self, layer: int, state: Tensor, tokens: int) -> None:
        """Take the state after ``tokens`` more."""
        self._states[layer] = state
        self._seen[layer] += tokens

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors by name."""
        views = {f"states.{layer}": state for layer, state in self._states.items()}
        names = {f"{kind}.{index}": f"{kind}.{layer}" for layer, index in self._index.items()
                 for kind in ("keys", "values")}  # fmt: skip
        return views | {names[name]: view for name, view in self._kv.state.items()}

    @property
    def nbytes(self) -> int:
        """Bytes allocated, whatever is stored."""
        return self._kv.nbytes + sum(state.nbytes for state in self._states.values())
