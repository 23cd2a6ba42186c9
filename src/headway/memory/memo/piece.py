"""What leaves the device, and what stands for it meanwhile."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headway.core.errors import HeadwayError
from headway.memory.store import Handle, TieredStore, version


class Piece:
    """Bytes that left the device: contiguous pieces of one storage, dropped when nobody needs them any more."""

    def __init__(self, store: TieredStore, parts: Sequence[Tensor], source: Tensor, label: str, verify: bool) -> None:
        self.store, self.label = store, label
        self.sums = [_checksum(part) for part in parts] if verify else None
        self.handles: list[Handle] = [store.put(part, label, source=source) for part in parts]

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(handle.nbytes for handle in self.handles)

    def prefetch(self) -> None:
        """Begin to bring it back."""
        for handle in self.handles:
            self.store.prefetch(handle)

    def fetch(self) -> list[Tensor]:
        """What left; it stays in its tier until the piece is forgotten.

        Raises:
            HeadwayError: it cannot be had, or came back as something else.
        """
        tensors = [self.store.get(handle) for handle in self.handles]
        for handle in self.handles:
            self.store.release(handle)
        if self.sums is not None and self.sums != [_checksum(tensor) for tensor in tensors]:
            raise HeadwayError(self.label, "came back from its tier with other bytes", hint="the copy was corrupted")
        return tensors

    def __del__(self) -> None:
        for handle in getattr(self, "handles", ()):
            self.store.drop(handle)


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).cpu().numpy().data)


class Kept:
    """A tensor that stays, with what is needed to notice a change in place (torch does not check under hooks)."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor, version(tensor)


@dataclass(frozen=True)
class View:
    """A saved tensor: a view of a storage that left."""

    storage: int
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]

    def of(self, whole: Tensor) -> Tensor:
        """The tensor, on ``whole``, the storage as uint8."""
        empty = torch.empty(0, dtype=self.dtype, device=whole.device)
        return empty.set_(whole.untyped_storage(), self.offset, self.size, self.stride)  # type: ignore[call-overload]


@dataclass
class Storage:
    """A storage that left, whole or up to a token."""

    piece: Piece
    bytes_per_token: int = 0
    """0: it left whole."""
    source: tuple[str, int] = ("", 0)
    """Where its rest comes from: the part, and the place among what it saves."""
    views: int = 0
    """Saved tensors that are views of it."""
