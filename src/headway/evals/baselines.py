"""What a text costs without a neural network: compressors and a byte n-gram model, in bits per byte."""

from __future__ import annotations

import lzma
import zlib
from typing import Any

import numpy as np

from headway.core.errors import DataError


def gzip_bits_per_byte(train_text: bytes, text: bytes) -> float:
    """Bits per byte of ``text`` under gzip's method (DEFLATE, level 9) after it has read ``train_text``.

    DEFLATE looks back 32 KiB, so only the end of ``train_text`` matters.

    Raises:
        DataError: ``text`` is empty.
    """
    _need(text)
    window = train_text[-(1 << 15) :]
    options: dict[str, Any] = {"zdict": window} if window else {}
    compressor = zlib.compressobj(9, zlib.DEFLATED, wbits=-15, memLevel=9, **options)
    return 8 * len(compressor.compress(text) + compressor.flush()) / len(text)


def xz_bits_per_byte(train_text: bytes, text: bytes) -> float:
    """Bits per byte that ``text`` adds to ``train_text`` under xz (LZMA2, 64 MiB dictionary); about a second per MB.

    Raises:
        DataError: ``text`` is empty.
    """
    _need(text)
    options = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 26}]

    def size(data: bytes) -> int:
        return len(lzma.compress(data, lzma.FORMAT_RAW, filters=options))

    return 8 * (size(train_text + text) - size(train_text)) / len(text)


def ngram_bits_per_byte(train: bytes, text: bytes, order: int = 5) -> float:
    """Bits per byte of ``text`` under an `NGram` of ``order`` bytes counted on ``train``.

    Raises:
        DataError: one of them is empty.
    """
    _need(text)
    return float(-np.log2(NGram(train, order).probabilities(text)).mean())


def _need(text: bytes) -> None:
    if not text:
        raise DataError("text", "is empty, so it has no bits per byte")


class NGram:
    """Interpolated Kneser-Ney model of bytes.

    With c_k the counts of k-grams (occurrences for k = ``order``, distinct preceding bytes below it), D_k the discount
    and N1+(h .) the number of different bytes after h: P_k(w | h) = max(c_k(hw) - D_k, 0) / c_k(h .) + D_k N1+(h .) /
    c_k(h .) P_{k-1}(w | h'), where h' is h without its first byte and P_0 = 1/256. A context never seen leaves
    everything to the shorter one.

    Source: Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1999), equations
    15-17 and modified discounts of their section 4.

    Raises:
        DataError: ``train`` is empty.
    """

    def __init__(self, train: bytes, order: int = 5) -> None:
        if not 1 <= order <= 7:
            raise ValueError(f"order is {order}, expected 1 to 7")
        _need(train)
        self.order = order
        grams, counts = np.unique(_grams(train, order), return_counts=True)
        tables = [_Table(grams, counts)]
        for length in range(order - 1, 0, -1):
            suffix = grams & np.uint64((1 << 8 * length) - 1)
            grams, counts = np.unique(suffix, return_counts=True)
            tables.append(_Table(grams, counts))
        self._tables = tables[::-1]  # by length: 1, 2, ... order

    def probabilities(self, text: bytes) -> np.ndarray:
        """P(byte | the order - 1 bytes before it), float64 ``[len(text)]``; zeros stand before the text."""
        return self._of(_grams(text, self.order))

    def distribution(self, context: bytes) -> np.ndarray:
        """P(byte | context) for all 256 bytes, float64 ``[256]``."""
        context = context[len(context) - self.order + 1 :] if self.order > 1 else b""
        start = np.uint64(int.from_bytes(context, "big") << 8)
        return self._of(start + np.arange(256, dtype=np.uint64))

    def _of(self, grams: np.ndarray) -> np.ndarray:
        p = np.full(len(grams), 1 / 256)
        for length, table in enumerate(self._tables, 1):
            p = table.interpolate(grams & np.uint64((1 << 8 * length) - 1), p)
        return p


def _grams(text: bytes, order: int) -> np.ndarray:
    """The ``order`` bytes that end at each byte, big-endian in uint64; zeros stand before the text."""
    data = np.frombuffer(text, dtype=np.uint8)
    grams = np.zeros(len(data), dtype=np.uint64)
    for back in range(order):
        grams[back:] |= data[: len(data) - back].astype(np.uint64) << np.uint64(8 * back)
    return grams


class _Table:
    """Counts of the n-grams of one length, sorted, with the sums over each context."""

    def __init__(self, grams: np.ndarray, counts: np.ndarray) -> None:
        self.grams, self.counts = grams, counts
        contexts = grams >> np.uint64(8)
        first = np.flatnonzero(np.concatenate([[True], contexts[1:] != contexts[:-1]]))
        self.contexts = contexts[first]
        self.totals = np.add.reduceat(counts, first)
        self.discounts = _discounts(counts)
        self.taken = np.add.reduceat(self.discounts[np.minimum(counts, 3)], first)

    def interpolate(self, grams: np.ndarray, lower: np.ndarray) -> np.ndarray:
        at, seen = _find(self.contexts, grams >> np.uint64(8))
        total = np.where(seen, self.totals[at], 1)
        weight = np.where(seen, self.taken[at] / total, 1.0)
        place, there = _find(self.grams, grams)
        count = np.where(there, self.counts[place], 0)
        return (count - self.discounts[np.minimum(count, 3)]) / total + weight * lower


def _find(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return place, keys[place] == wanted


def _discounts(counts: np.ndarray) -> np.ndarray:
    """What is taken from counts of 0, 1, 2 and 3 or more; 0.5 where there are too few small counts to estimate it."""
    n1, n2, n3, n4 = (int((counts == c).sum()) for c in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = n1 / (n1 + 2 * n2)
    estimates = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    return np.array([0.0, *np.clip(estimates, 0.05, [0.95, 1.95, 2.95])])
