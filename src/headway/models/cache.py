"""The key/value cache of decoding: the state that our attention blocks carry from token to token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KVCache:
    """Keys and values of the tokens so far, in buffers allocated once.

    A block with a sliding window stores at most twice its window. Rows of a batch have the same length.

    Args:
        batch: sequences.
        length: tokens that the cache can hold.
        windows: per layer, the sliding window in tokens or ``None``.
        heads: key and value heads.
        head_dim: channels per head.
        dtype: of the buffers.
        device: of the buffers.
    """

    def __init__(
        self,
        batch: int,
        length: int,
        windows: Sequence[int | None],
        heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.capacity = length
        self._windows = tuple(windows)
        self._seen = [0] * len(self._windows)  # tokens appended, per layer
        self._kept = [0] * len(self._windows)  # tokens stored, per layer
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        for window in self._windows:
            # Twice the window: its last tokens are moved to the front once per window, and every read is one slice.
            slots = length if window is None else min(length, 2 * window)
            for buffers in (self._keys, self._values):
                buffers.append(torch.zeros(batch, heads, slots, head_dim, dtype=dtype, device=device))

    @property
    def length(self) -> int:
        """Tokens that all layers have seen."""
        return min(self._seen)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens to one layer.

        Args:
            layer: number of the block, from 0.
            k: [B, Hkv, T, hd].
            v: [B, Hkv, T, hd].

        Returns:
            Keys and values [B, Hkv, S, hd] that end with the new ones; S counts all tokens so far or, in a layer with a
            sliding window, at least those that the new tokens see.

        Raises:
            ValueError: the cache is full.
        """
        new = k.shape[2]
        if self._seen[layer] + new > self.capacity:
            raise ValueError(f"a cache of {self.capacity} tokens holds {self._seen[layer]}: {new} more do not fit")
        keys, values, kept = self._keys[layer], self._values[layer], self._kept[layer]
        slots = keys.shape[2]
        if kept + new > slots:
            past = min(kept, (self._windows[layer] or 1) - 1)  # what the first new token still sees
            if past + new > slots:  # a long prompt: it goes through whole, its end is stored
                k = torch.cat((keys[:, :, kept - past : kept], k.to(keys.dtype)), dim=2)
                v = torch.cat((values[:, :, kept - past : kept], v.to(values.dtype)), dim=2)
                keys.copy_(k[:, :, -slots:])
                values.copy_(v[:, :, -slots:])
                self._kept[layer], self._seen[layer] = slots, self._seen[layer] + new
                return k, v
            for buffer in (keys, values):
                buffer[:, :, :past] = buffer[:, :, kept - past : kept].clone()  # source and target may overlap
            kept = past
        keys[:, :, kept : kept + new] = k
        values[:, :, kept : kept + new] = v
        self._kept[layer], self._seen[layer] = kept + new, self._seen[layer] + new
        return keys[:, :, : kept + new], values[:, :, : kept + new]

    @property
    def state(self) -> dict[str, Tensor]:
        """The stored keys and values, by name: views [B, Hkv, S, hd] into the buffers."""
        views = {}
        for layer, kept in enumerate(self._kept):
            views[f"keys.{layer}"] = self._keys[layer][:, :, :kept]
            views[f"values.{layer}"] = self._values[layer][:, :, :kept]
        return views

    @property
    def nbytes(self) -> int:
        """Bytes allocated, whatever is stored."""
        return sum(buffer.nbytes for buffer in (*self._keys, *self._values))
