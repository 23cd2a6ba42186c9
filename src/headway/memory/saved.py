"""Tensors that autograd saves, known by their storage: stored once, brought back as the views they were.

Python wraps the same memory in ever new tensor objects and allocators use addresses again, so neither ``id()`` nor
``data_ptr()`` tells whether a tensor was seen before. A stamp on the storage object does: it lives exactly as long as
the memory. Whole storages are stored, and each saved tensor is a view of one: the three parts of a fused projection, or
a tensor and its transpose, leave once.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from headway.memory.store import Handle, TieredStore, version

_stamps = itertools.count(1)


def stamp(tensor: Tensor) -> int:
    """A number that stands for the tensor's storage: the same for all its views, never used for another."""
    storage: Any = tensor.untyped_storage()
    number = getattr(storage, "headway_stamp", None)
    if number is None:
        number = storage.headway_stamp = next(_stamps)
    return number


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is nothing but a strided view of memory: no subclass, no pending conjugation."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


class Counter:
    """A tensor's version counter, without its memory.

    Equal stamps and equal versions do not make equal bytes: torch itself, in its recurrent cells, changes a storage in
    place through one view and saves another, each with a counter of its own.
    """

    __slots__ = ("_carrier",)

    def __init__(self, tensor: Tensor) -> None:
        self._carrier = tensor.detach()
        self._carrier.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)  # keeps the counter alone

    def counts(self, tensor: Tensor) -> bool:
        """Whether this is the counter of ``tensor``."""
        if tensor.is_inference() or self._carrier.is_inference():
            return False
        before = tensor._version
        with torch.autograd._unsafe_preserve_version_counter(self._carrier):
            torch.autograd.graph.increment_version(self._carrier)
            return tensor._version != before


class Entry:
    """One storage in the store, as one counter saw it; dropped there when nothing refers to the entry any more."""

    __slots__ = ("__weakref__", "counter", "handle", "store", "version")

    def __init__(self, store: TieredStore, handle: Handle, tensor: Tensor) -> None:
        self.store, self.handle = store, handle
        self.counter, self.version = Counter(tensor), version(tensor)

    def __del__(self) -> None:
        self.store.drop(self.handle)


class Saved:
    """A view of a stored storage: what autograd keeps in place of the tensor."""

    __slots__ = ("dtype", "entry", "offset", "size", "stride")

    def __init__(self, entry: Entry, tensor: Tensor) -> None:
        self.entry, self.dtype = entry, tensor.dtype
        self.offset, self.size, self.stride = tensor.storage_offset(), tensor.size(), tensor.stride()

    def restore(self) -> Tensor:
        """The tensor, with its strides; all views of one entry share their memory.

        Raises:
            HeadwayError: see `TieredStore.get`.
        """
        whole = self.entry.store.get(self.entry.handle)  # uint8 [bytes of the storage]
        view = torch.empty(0, dtype=self.dtype, device=whole.device)
        return view.set_(whole.untyped_storage(), self.offset, self.size, self.stride)


class SavedTensors:
    """Puts storages into a store, each once for as long as one of its views is needed.

    Args:
        store: where to.
    """

    def __init__(self, store: TieredStore) -> None:
        self.store = store
        self._entries: dict[int, list[weakref.ref[Entry]]] = {}  # by stamp

    def find(self, tensor: Tensor) -> Saved | None:
        """The tensor as a view of what is stored already; None when its storage is not, or was changed since."""
        number = version(tensor)
        for ref in list(self._entries.get(stamp(tensor), ())):
            entry = ref()
            if entry is not None and entry.version == number:
                with self.store.lock:  # a lane's thread may be comparing versions
                    same = entry.counter.counts(tensor)
                if same:
                    return Saved(entry, tensor)
        return None

    def save(self, tensor: Tensor, label: str = "") -> Saved:
        """Put the tensor's storage into the store; `find` first."""
        storage = tensor.untyped_storage()
        whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)  # type: ignore[call-overload]
        entry = Entry(self.store, self.store.put(whole, label, source=tensor), tensor)
        number, entries = stamp(tensor), self._entries

        def gone(ref: weakref.ref[Entry]) -> None:
            left = [other for other in entries.pop(number, ()) if other is not ref]
            if left:
                entries[number] = left

        entries[number] = [*entries.get(number, ()), weakref.ref(entry, gone)]
        return Saved(entry, tensor)


def in_backward() -> bool:
    """Whether this thread is inside a backward pass, recomputation included."""
    return torch._C._current_graph_task_id() != -1
