"""What one block saved in one forward pass: swapped up to a token, and made again from there on.

Autograd saves views of storages. A storage that holds its numbers token by token, ``[B, T, bytes]``, is cut at a token:
its first part leaves, the rest is dropped and comes from running the block's token-wise parts again on the rest of the
tokens. Which storages are so is not guessed from names. The parts are run once on a few tokens; what is saved at the
same place there has the same shape but for the number of tokens, and the same values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headway.core.errors import HeadwayError
from headway.memory.memo.parts import Parts, Span
from headway.memory.memo.piece import Kept, Piece, Storage, View
from headway.memory.memo.replay import Enough, as_in_forward, autocast_state, close, recording, rng_state, tensors_in
from headway.memory.saved import is_plain, stamp
from headway.memory.store import Handle, TieredStore, version
from headway.memory.streambp.parts import Shared

PROBE = 2
"""Tokens on which it is found out how a block saves."""


@dataclass(frozen=True)
class Layout:
    """How the storages behind a block's saved tensors depend on the number of tokens."""

    project: tuple[int | None, ...]
    """For each tensor that the first part saves, then for its three results: bytes per token of its storage; 0 where it
    does not depend on the tokens; None where it does, but does not lie token by token."""
    finish: tuple[int | None, ...]
    """The same for the last part."""


class Packed:
    """What autograd keeps in place of a saved tensor."""

    __slots__ = ("index", "record")

    def __init__(self, record: Record, index: int) -> None:
        self.record, self.index = record, index


class Record:
    """The saved tensors of one block in one forward pass.

    Args:
        parts: the block's.
        shared: what it got beside its input.
        store: where things go.
        label: names the block in errors.
        verify: keep checksums.
    """

    def __init__(
        self,
        parts: Parts,
        shared: Shared,
        store: TieredStore,
        label: str,
        verify: bool = False,
    ) -> None:
        self.parts, self.shared, self.store, self.label, self.verify = parts, shared, store, label, verify
        self.sizes = (0, 0, 0)
        """Bytes of the input, of what attention made, and of all the rest."""
        self._saved: list[Tensor] = []
        self._versions: list[int] = []
        self._entries: list[Kept | View] | None = None
        self._marks: list[int] = []
        self._storages: list[Storage] = []
        self._live: dict[int, tuple[Tensor, int]] | None = None  # what is back, and the views yet to be asked for
        self.length = self.split = 0
        self.autocast: Any = None

    # The forward pass.

    def run(self, x: Tensor) -> Tensor:
        """The block's output, with what it saves put aside here; `settle` follows."""
        self.batch, self.length = x.shape[:2]
        whole = Span(0, self.length, self.length)
        self._device, self._grads = x.device, (x.requires_grad, False)
        self.autocast = autocast_state(x.device)
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            q, k, v = self.parts.project(x, whole, self.shared)
            self._marks.append(len(self._saved))
            y = self.parts.attend(q, k, v, self.shared)
            self._marks.append(len(self._saved))
            self._rng = rng_state(x.device) if self.parts.draws() else None
            out = self.parts.finish(x, y, whole, self.shared)
        self._grads = (x.requires_grad, y.requires_grad)
        self._x, self._qkv, self._y = x.detach(), tuple(t.detach() for t in (q, k, v)), y.detach()
        return out

    def _pack(self, tensor: Tensor) -> Packed:
        # A saved result must not hold the graph that holds it.
        self._saved.append(tensor if tensor.is_leaf or not is_plain(tensor) else tensor.detach())
        self._versions.append(version(tensor))
        return Packed(self, len(self._saved) - 1)

    def layout(self) -> Layout:
        """How this block saves, found out on the last few tokens.

        Raises:
            HeadwayError: what the parts compute there is not what they computed on the whole sequence.
        """
        few = max(1, min(PROBE, self.length - 1))
        start = self.length - few
        tapes = self._again(start, None)
        first, second = self._marks[0], self._marks[1]
        full = {"project": [*self._saved[:first], *self._qkv], "finish": self._saved[second:]}
        found: dict[str, list[int | None]] = {"project": [], "finish": []}
        for name, tensors in full.items():
            if len(tapes[name]) != len(tensors):
                raise self._differs()
            for index, tensor in enumerate(tensors):
                found[name].append(self._bytes_per_token(tensor, tapes[name][index], few))
        return Layout(tuple(found["project"]), tuple(found["finish"]))

    def _bytes_per_token(self, full: Tensor, small: Tensor, few: int) -> int | None:
        if not is_plain(full) or full.shape == small.shape:
            return 0
        changed = [d for d, (a, b) in enumerate(zip(full.shape, small.shape)) if a != b]
        tokens = (self.batch * self.length, self.batch * few)
        if full.dim() != small.dim() or len(changed) != 1:
            raise self._differs()
        (d,) = changed
        counts = (full.shape[d], small.shape[d])
        if counts not in ((self.length, few), tokens):
            raise self._differs()
        per_token = [t.stride(d) * t.element_size() for t in (full, small)]
        lies = all(t.untyped_storage().nbytes() == n * c for t, n, c in zip((full, small), tokens, per_token))
        if not lies or per_token[0] != per_token[1]:
            return None
        if counts == tokens:  # the batch and the tokens are one dimension
            full, small = full.unflatten(d, (self.batch, self.length)), small.unflatten(d, (self.batch, few))
            d += 1
        if not close(full.narrow(d, self.length - few, few), small):
            raise self._differs()
        return per_token[0]

    def _differs(self) -> HeadwayError:
        return HeadwayError(
            self.label, "does not compute token by token outside of attention: on a part of the sequence it is another",
            hint="switch memo off for this model",
        )  # fmt: skip

    def _changed(self) -> HeadwayError:
        return HeadwayError(self.label, "needs a tensor that was changed in place since",
                            hint="do not modify tensors that the backward pass needs")  # fmt: skip

    def settle(self, layout: Layout, split: int) -> None:
        """Send away what is to leave, and let go of the rest.

        Args:
            split: tokens of each sequence whose saved tensors leave; those of the others are made again.

        Raises:
            HeadwayError: the block has changed in place what it had saved, or saves otherwise than ``layout`` says.
        """
        self.split = split
        if [version(t) for t in self._saved] != self._versions:
            raise self._changed()
        block = self.parts.module
        self._weights = [version(p) for p in block.parameters()]
        own = (t for t in (*block.parameters(), *block.buffers()) if is_plain(t))
        stays = {stamp(t) for t in (*tensors_in(self.shared), *own)}
        first, second = self._marks
        places: dict[int, tuple[str, int, int | None]] = {}  # stamp -> where a storage is made
        for name, tensors, sizes in (
            ("project", [*self._saved[:first], *self._qkv], layout.project),
            ("finish", self._saved[second:], layout.finish),
        ):
            if len(tensors) != len(sizes):
                raise self._differs()
            for index, (tensor, size) in enumerate(zip(tensors, sizes, strict=True)):
                if is_plain(tensor):
                    places.setdefault(stamp(tensor), (name, index, size))
        self._known: dict[int, int] = {}
        amounts = [0, 0, 0]
        # What every recomputation starts from leaves in any case.
        self._x_view = self._leave(self._x, "input", amounts, 0)
        self._y_view = self._leave(self._y, "attention", amounts, 1)
        entries: list[Kept | View] = []
        for position, tensor in enumerate(self._saved):
            if not is_plain(tensor) or tensor.device != self._device or stamp(tensor) in stays:
                entries.append(Kept(tensor))
                continue
            name, index, size = places.get(stamp(tensor), ("", 0, None))
            if size == 0 and stamp(tensor) not in self._known:
                entries.append(Kept(tensor))
            elif stamp(tensor) in self._known or size is None:
                kind = 1 if first <= position < second else 2  # else it cannot be cut, so it leaves whole
                entries.append(self._leave(tensor, name or "attention", amounts, kind))
            else:
                entries.append(self._cut(tensor, (name, index), size, amounts))
        for entry in entries:
            if isinstance(entry, View):
                self._storages[entry.storage].views += 1
        self.sizes = (amounts[0], amounts[1], amounts[2])
        self._entries = entries
        self._saved, self._qkv, self._known = [], (), {}
        del self._x, self._y

    def _leave(self, tensor: Tensor, label: str, amounts: list[int], kind: int) -> View:
        """The whole storage of ``tensor`` leaves, unless it has."""
        number = stamp(tensor)
        if number not in self._known:
            storage = tensor.untyped_storage()
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)  # type: ignore[call-overload]
            self._known[number] = len(self._storages)
            self._storages.append(Storage(self._piece([whole], tensor, label)))
            amounts[kind] += whole.numel()
        return self._view(tensor)

    def _cut(self, tensor: Tensor, source: tuple[str, int], size: int, amounts: list[int]) -> View:
        """The storage of ``tensor`` leaves up to the split."""
        storage = tensor.untyped_storage()
        whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)  # type: ignore[call-overload]
        part = whole.view(self.batch, self.length, size)[:, : self.split]
        pieces = [part] if part.is_contiguous() else list(part)
        self._known[stamp(tensor)] = len(self._storages)
        kept = self._piece(pieces if self.split else [], tensor, source[0])
        self._storages.append(Storage(kept, size, source))
        amounts[2] += whole.numel()
        return self._view(tensor)

    def _piece(self, parts: Sequence[Tensor], tensor: Tensor, label: str) -> Piece:
        return Piece(self.store, parts, tensor, f"{self.label}, {label}", self.verify)

    def _view(self, tensor: Tensor) -> View:
        number = self._known[stamp(tensor)]
        return View(number, tensor.dtype, int(tensor.storage_offset()), tensor.size(), tensor.stride())

    @property
    def handles(self) -> list[Handle]:
        """Of all that left."""
        return [handle for storage in self._storages for handle in storage.piece.handles]

    @property
    def swapped(self) -> int:
        """Bytes that left."""
        return sum(storage.piece.nbytes for storage in self._storages)

    # The backward pass.

    def prefetch(self) -> None:
        """Begin to bring back what left."""
        for storage in self._storages:
            storage.piece.prefetch()

    def tensor(self, index: int) -> Tensor:
        """The saved tensor of that place.

        Raises:
            HeadwayError: it cannot be had back, or what stayed was changed in place.
        """
        if self._entries is None:
            return self._saved[index]
        entry = self._entries[index]
        if isinstance(entry, Kept):
            if version(entry.tensor) != entry.version:
                raise self._changed()
            return entry.tensor
        if self._live is None or entry.storage not in self._live:
            self._live = self._bring_back()
        whole, views = self._live[entry.storage]
        if views == 1:
            del self._live[entry.storage]  # as autograd lets go of it, so do we
        else:
            self._live[entry.storage] = (whole, views - 1)
        return entry.of(whole)

    def _bring_back(self) -> dict[int, tuple[Tensor, int]]:
        """All storages of the block: what left, and behind it what is made again."""
        live: dict[int, tuple[Tensor, int]] = {}
        tails: dict[tuple[str, int], Tensor] = {}
        wholes: dict[int, Tensor] = {}
        if self.split < self.length:
            if [version(p) for p in self.parts.module.parameters()] != self._weights:
                raise self._changed()  # autograd saves no biases, and yet they are used again here
            for view in (self._x_view, self._y_view):
                wholes[view.storage] = self._storages[view.storage].piece.fetch()[0]
            self._x, self._y = (view.of(wholes[view.storage]) for view in (self._x_view, self._y_view))
            wanted = {storage.source for storage in self._storages if storage.bytes_per_token}
            tapes = self._again(self.split, wanted)
            del self._x, self._y
            tails = {(name, index): tensor for name, tape in tapes.items() for index, tensor in tape.items()}
            del tapes
        for number, storage in enumerate(self._storages):
            tail = tails.pop(storage.source, None)
            if not storage.views:
                continue
            size = storage.bytes_per_token
            if not size:
                whole = wholes[number] if number in wholes else storage.piece.fetch()[0]
            elif tail is None:
                (whole,) = storage.piece.fetch()
            else:
                whole = self._join(storage.piece.fetch(), tail, size)
            live[number] = (whole, storage.views)
            del tail
        return live

    def _join(self, heads: list[Tensor], tail: Tensor, size: int) -> Tensor:
        rest = self.length - self.split
        made = torch.empty(0, dtype=torch.uint8, device=tail.device).set_(tail.untyped_storage())  # type: ignore[call-overload]
        if made.numel() != self.batch * rest * size:
            raise self._differs()
        if not heads:
            return made
        whole = torch.empty(self.batch, self.length, size, dtype=torch.uint8, device=tail.device)
        if len(heads) == self.batch:
            for row, head in zip(whole, heads, strict=True):
                row[: self.split] = head.view(self.split, size)
        else:
            whole[:, : self.split] = heads[0].view(self.batch, self.split, size)
        whole[:, self.split :] = made.view(self.batch, rest, size)
        return whole.view(-1)

    def _again(self, start: int, wanted: set[tuple[str, int]] | None) -> dict[str, dict[int, Tensor]]:
        """Run both token-wise parts on the tokens from ``start`` on; what they save, by place.

        Args:
            wanted: what is needed; the last part ends with the last of it. None: everything.
        """
        span = Span(start, self.length, self.length)
        tapes: dict[str, dict[int, Tensor]] = {"project": {}, "finish": {}}
        last = max((index for name, index in wanted or () if name == "finish"), default=-1)
        with as_in_forward(self._device, self._rng, self.autocast):
            x, y = (t[:, start:].detach().contiguous() for t in (self._x, self._y))
            x.requires_grad_(self._grads[0])
            y.requires_grad_(self._grads[1])
            with recording(tapes["project"], "project", wanted) as tape:
                results = self.parts.project(x, span, self.shared)
            for result in results:
                tape(result)
            if wanted is not None and last < 0:
                return tapes
            try:
                with recording(tapes["finish"], "finish", wanted, last):
                    self.parts.finish(x, y, span, self.shared)
            except Enough:
                pass
        if wanted is not None and any(index not in tapes[name] for name, index in wanted):
            raise self._differs()
        return tapes


def _unpack(packed: Packed) -> Tensor:
    return packed.record.tensor(packed.index)
