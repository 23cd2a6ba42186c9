"""Cutting a state into pieces that are copied to host memory one by one, and seeing whether they changed meanwhile.

A piece is a box of a tensor, small enough for the ring. Its bytes must be those of the moment of the save. Two signs
of a change are looked at: the tensor's version counter, which in-place operations raise, and a sample of its values,
since fused optimizers do not raise it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headway.core.errors import CheckpointError
from headway.core.meters import host_storages
from headway.memory.store import version
from headway.resilience.ring import Ring

ALIGNMENT = 64
SAMPLES = 64
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Source:
    """A tensor of the state, under all the keys that mean the very same memory."""

    keys: list[str]
    tensor: Tensor
    """The process's own part of it."""
    shape: tuple[int, ...]
    """Of the whole."""
    offsets: tuple[int, ...]
    """Of this part in the whole."""
    version: int = 0

    @property
    def changed(self) -> bool:
        """Whether an in-place operation has been seen since the save."""
        return version(self.tensor) != self.version


@dataclass
class Piece:
    """A box of a source and, once it has been copied, where."""

    source: Source
    offsets: tuple[int, ...]
    """Of the box in the process's part."""
    sizes: tuple[int, ...]
    box: Tensor
    nbytes: int
    at: int = 0
    """Offset in the batch."""
    sample: Tensor | None = None
    """Some of its values at the time of the save, as integers."""

    @property
    def names(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Key and offsets in the whole tensor, for every key."""
        for key in self.source.keys:
            yield key, tuple(a + b for a, b in zip(self.source.offsets, self.offsets, strict=True))


@dataclass
class Batch:
    """Pieces that are copied and written as one job."""

    pieces: list[Piece] = field(default_factory=list)
    nbytes: int = 0
    memory: Any = None
    """Host memory of its own, uint8 [bytes]; None: it takes a span of the ring."""
    start: int = 0
    """Offset in that memory."""
    ring: Ring | None = None
    """To give the span back to."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Of all the tensors."""

    def add(self, piece: Piece) -> None:
        """Lay ``piece`` behind the others."""
        piece.at = self.nbytes
        self.nbytes += -(-max(piece.nbytes, 1) // ALIGNMENT) * ALIGNMENT
        self.pieces.append(piece)

    def copy_in(self, check: bool = True) -> None:
        """Copy every piece into ``memory``, and see whether it is still what was saved.

        Raises:
            ChangedError: it is not.
        """
        copies = [_host(self.memory, self.start + piece.at, piece) for piece in self.pieces]
        for piece, copy in zip(self.pieces, copies, strict=True):
            copy.copy_(piece.box, non_blocking=True)
        for device in {piece.box.device for piece in self.pieces if piece.box.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        for piece, copy in zip(self.pieces, copies, strict=True) if check else ():
            same = piece.sample is None or torch.equal(_sample(copy), piece.sample.cpu())
            if piece.source.changed or not same:
                raise ChangedError(piece.source.keys[0])

    def views(self) -> Iterator[tuple[Piece, Tensor]]:
        """Each piece with its copy, in a storage of its own: ``torch.save`` writes whole storages."""
        base, raw = self.memory.data_ptr(), memoryview(self.memory.numpy())
        for piece in self.pieces:
            at = self.start + piece.at
            if not piece.nbytes:
                yield piece, torch.empty(piece.sizes, dtype=piece.source.tensor.dtype)
                continue
            host_storages.add(base + at)  # it is host memory to the meters, too
            flat = torch.frombuffer(raw[at : at + piece.nbytes], dtype=torch.uint8)
            view = flat.view(piece.source.tensor.dtype).view(piece.sizes)
            del flat
            try:
                yield piece, view
            finally:
                del view
                if at:
                    host_storages.discard(base + at)


class ChangedError(CheckpointError):
    """A tensor was changed before it had been copied."""

    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(key, "was changed in place before it had been copied",
                         hint="call the checkpointer's fence() before changing what was saved")  # fmt: skip


def sources(tensors: dict[str, Tensor], mine: set[str] | None = None) -> list[Source]:
    """What this process has to save; the same memory only once.

    Args:
        tensors: by key. Of a DTensor, the process's part is saved, by one of the processes that hold it.
        mine: keys of plain tensors to save; None: all.

    Raises:
        CheckpointError: a DTensor of partial sums.
    """
    found: dict[Any, Source] = {}
    for key, tensor in tensors.items():
        part, offsets = tensor, (0,) * tensor.dim()
        if type(tensor) is not Tensor:
            local = _local(key, tensor)
            if local is None:
                continue
            part, offsets = local
        elif mine is not None and key not in mine:
            continue
        where = (part.device, part.data_ptr(), part.dtype, part.shape, part.stride(), tuple(tensor.shape), offsets)
        identity = where if part.numel() else key
        if identity in found:
            found[identity].keys.append(key)
        else:
            found[identity] = Source([key], part, tuple(tensor.shape), offsets, version(part))
    return list(found.values())


def _local(key: str, tensor: Any) -> tuple[Tensor, tuple[int, ...]] | None:
    """This process's part of a DTensor and its offsets; None where another process saves it."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    where = tensor.device_mesh.get_coordinate()
    if any(placement.is_partial() for placement in tensor.placements):
        raise CheckpointError(key, "is a DTensor of partial sums", hint="redistribute it before saving")
    if where is None or any(p.is_replicate() and at for p, at in zip(tensor.placements, where, strict=True)):
        return None
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local().detach(), tuple(offsets)


def cut(source: Source, limit: int) -> Iterator[Piece]:
    """``source`` in boxes of at most ``limit`` bytes (or one element), each a run of its rows."""
    tensor = source.tensor
    for offsets, sizes in boxes(tuple(tensor.shape), tensor.element_size(), limit):
        box = tensor
        for dim, (start, length) in enumerate(zip(offsets, sizes, strict=True)):
            if length != tensor.shape[dim]:
                box = box.narrow(dim, start, length)
        yield Piece(source, offsets, sizes, box, math.prod(sizes) * tensor.element_size())


def boxes(shape: tuple[int, ...], itemsize: int, limit: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and sizes of boxes of at most ``limit`` bytes that tile ``shape``, in the order of memory."""
    if math.prod(shape) * itemsize <= max(limit, itemsize):
        yield (0,) * len(shape), shape
        return
    rows = [math.prod(shape[dim + 1 :]) * itemsize for dim in range(len(shape))]  # bytes of one index of each dimension
    split = next((dim for dim, nbytes in enumerate(rows) if nbytes <= limit), len(shape) - 1)
    step = max(1, limit // rows[split])
    for outer in itertools.product(*(range(n) for n in shape[:split])):
        for start in range(0, shape[split], step):
            rest = shape[split + 1 :]
            length = min(step, shape[split] - start)
            yield (*outer, start, *(0 for _ in rest)), (*(1 for _ in outer), length, *rest)


def mark(piece: Piece) -> None:
    """Remember a sample of the piece's values, where its dtype allows."""
    if piece.nbytes and piece.box.element_size() in _INTEGERS:
        piece.sample = _sample(piece.box)


def _sample(box: Tensor) -> Tensor:
    return box.view(_INTEGERS[box.element_size()]).take(_positions(box.numel(), box.device))


@functools.lru_cache(maxsize=1024)
def _positions(numel: int, device: torch.device) -> Tensor:
    return torch.linspace(0, numel - 1, min(numel, SAMPLES), dtype=torch.float64).long().to(device)


def _host(memory: Tensor, at: int, piece: Piece) -> Tensor:
    return memory[at : at + piece.nbytes].view(piece.source.tensor.dtype).view(piece.sizes)
