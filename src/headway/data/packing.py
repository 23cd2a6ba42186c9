"""Packing: a stream of documents cut into sequences of equal length, none of its tokens lost."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from headway.data.cache import TokenCache
from headway.data.order import mix

IGNORE = -100
"""The target that counts in no loss."""


class TokenSet:
    """Sequences of ``sequence`` tokens from a stream ``eos d0 eos d1 ... eos``.

    Sequence i holds the inputs ``stream[i*T : (i+1)*T]`` and, one further, their targets, so every token after the
    first is a target exactly once, across the cuts too; the last sequence is filled up with ignored targets. An
    end-of-text token is the target after a document's last token and the input before the next one's first. With
    ``mask_documents`` attention stays within ``segments``, which begin at these tokens: then the target across a
    boundary depends on nothing before it, and none has to be dropped.

    Args:
        cache: the tokens; anything with its fields.
        sequence: tokens per sequence, T.
        eos: the end-of-text token.
        mask_documents: give ``segments``.
    """

    def __init__(self, cache: TokenCache, sequence: int, eos: int, mask_documents: bool = False) -> None:
        self.cache, self.sequence, self.eos, self.mask_documents = cache, sequence, eos, mask_documents
        self.targets = len(cache.stream) - 1
        """Targets in one pass: all tokens of all documents, and an end of text for each."""
        self.text_bytes = int(cache.bytes.sum())
        """UTF-8 bytes of the documents' text."""
        self._full = self.targets // sequence
        step = cache.stream.strides[0]
        self._windows = np.lib.stride_tricks.as_strided(
            np.asarray(cache.stream), (self._full, sequence + 1), (sequence * step, step), writeable=False
        )
        rest = np.asarray(cache.stream[self._full * sequence :]).astype(np.int64)
        self._rest_targets = len(rest) - 1
        self._rest = np.full(sequence + 1, eos, dtype=np.int64)
        self._rest[: len(rest)] = rest

    @property
    def fingerprint(self) -> str:
        """The same fingerprint, the same sequences."""
        text = f"{self.cache.fingerprint}/{self.sequence}/{self.mask_documents}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return -(-self.targets // self.sequence)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        return {key: value[0] for key, value in self.batch([index % len(self)]).items()}

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
        """``tokens`` and ``targets``, int64 ``[B, T]``, and with ``mask_documents`` also ``segments``, int64 ``[B,
        T]``.

        Targets that do not count are -100. Segments number the documents within each sequence from 0; filling is a
        segment of its own. An index of -1 gives a row of filling only, which keeps batches of one shape.
        """
        index = np.asarray(indices, dtype=np.int64)
        whole = index.min() >= 0 and index.max() < self._full
        rows = np.empty((len(index), self.sequence + 1), dtype=np.int64)  # [B, T+1]
        if whole:
            rows[:] = self._windows[index]
        else:
            inside = (index >= 0) & (index < self._full)
            rows[inside] = self._windows[index[inside]]
            rows[index == self._full] = self._rest
            rows[index < 0] = self.eos
        joint = torch.from_numpy(rows)
        # Copies: the two halves of a single row are contiguous already, and would share what is masked below.
        batch = {
            "tokens": joint[:, :-1].contiguous(),
            "targets": joint[:, 1:].clone(memory_format=torch.contiguous_format),
        }
        if not whole:
            filled = np.where(index < 0, 0, np.where(index == self._full, self._rest_targets, self.sequence))
            filling = torch.arange(self.sequence)[None, :] >= torch.from_numpy(filled)[:, None]  # [B, T]
            batch["targets"][filling] = IGNORE
        if self.mask_documents:
            batch["segments"] = torch.from_numpy(self._segments(index))
        return batch

    def _segments(self, index: np.ndarray) -> np.ndarray:
        """Document numbers counted from each row's first one; past the end of the stream, one more."""
        first = np.maximum(index, 0) * self.sequence
        position = first[:, None] + np.arange(self.sequence)  # [B, T]
        document = np.searchsorted(self.cache.starts, position, side="right")
        document += position >= self.targets  # filling, and nothing else, lies there
        return document - document[:, :1]

    def counts(self, indices: Sequence[int] | np.ndarray) -> tuple[int, int]:
        """Input tokens and targets that count in these sequences, found without reading them."""
        index = np.asarray(indices, dtype=np.int64)
        real = index[index >= 0]
        missing = int((real == self._full).sum()) * (self.sequence - self._rest_targets)
        number = len(real) * self.sequence - missing
        return number, number

    def sample(self, sequences: int) -> TokenSet:
        """A fixed subset of whole documents that fills at most ``sequences`` sequences, for evaluations that must be
        short.

        Documents are taken in an order that depends on their numbers alone, leaving out those too long to fit by
        themselves, up to the first that does not fit; at least one is taken. `text_bytes` is exact for the subset.
        """
        budget = sequences * self.sequence
        starts, size = self.cache.starts, len(self.cache.starts)
        if self.targets <= budget:
            return self
        lengths = np.diff(np.append(starts, self.targets))  # with one end of text each
        order = np.argsort(mix(np.arange(1, size + 1, dtype=np.uint64)), kind="stable")
        order = order[lengths[order] <= budget]
        chosen = order[np.cumsum(lengths[order]) <= budget] if len(order) else np.array([int(lengths.argmin())])
        parts = [self.cache.stream[starts[d] : starts[d] + lengths[d]] for d in chosen]
        stream = np.concatenate([*parts, self.cache.stream[-1:]])
        begin = np.concatenate([[0], np.cumsum(lengths[chosen])[:-1]]).astype(np.int64)
        fingerprint = f"{self.cache.fingerprint}/sample-{sequences}-{self.sequence}"
        cache = TokenCache(stream, begin, self.cache.bytes[chosen], self.cache.lossless, fingerprint)
        return TokenSet(cache, self.sequence, self.eos, self.mask_documents)
