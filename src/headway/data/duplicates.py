"""How much of a text is near-duplicates, by MinHash: repeated text counts as more passes over less data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headway.data.order import mix, sample_index

_EMPTY = np.uint32(0xFFFFFFFF)


def near_duplicate_rate(
    documents: Sequence[str], *, threshold: float = 0.8, shingle: int = 24, sample: int = 2000, seed: int = 0
) -> float:
    """Share of the text (UTF-8 bytes) in documents that resemble an earlier one: what dropping those would save.

    Two documents resemble each other if the estimated Jaccard similarity of their sets of ``shingle``-byte strings is
    at least ``threshold``. More than ``sample`` documents are sampled; duplicates of documents outside the sample are
    then not seen, and the rate is a lower bound. Work and memory grow with the square of the sample.

    Source: Broder, "On the resemblance and containment of documents" (1997); one permutation hashing as in Li, Owen
    and Zhang (NeurIPS 2012), section 2.
    """
    if len(documents) > sample:
        chosen = np.sort(sample_index(seed, np.arange(sample), len(documents)))
        documents = [documents[int(i)] for i in chosen]
    raw = [text.encode("utf-8", "replace") for text in documents]
    total = sum(map(len, raw))
    if not total:
        return 0.0
    sketches = np.stack([sketch(text, shingle) for text in raw])  # [documents, bins]
    repeated = 0
    for i in range(1, len(raw)):
        if len(raw[i]) and (resemblance(sketches[:i], sketches[i]) >= threshold).any():
            repeated += len(raw[i])
    return repeated / total


def sketch(text: bytes, shingle: int = 24, bins: int = 256) -> np.ndarray:
    """The least hash of the text's shingles in each of ``bins`` equal parts of the hash range, uint32 ``[bins]``.

    A text shorter than a shingle is one shingle. A bin without hashes holds 2^32 - 1.
    """
    data = np.frombuffer(text, dtype=np.uint8).astype(np.uint64)
    width = min(shingle, len(data))
    hashes = np.zeros(max(len(data) - width + 1, 0) if width else 0, dtype=np.uint64)
    for offset in range(width):
        hashes = hashes * np.uint64(0x100000001B3) + data[offset : offset + len(hashes)] + np.uint64(1)
    hashes = mix(hashes)
    low = np.minimum((hashes & np.uint64(0xFFFFFFFF)).astype(np.uint32), _EMPTY - np.uint32(1))
    result = np.full(bins, _EMPTY, dtype=np.uint32)
    np.minimum.at(result, ((hashes >> np.uint64(32)) % np.uint64(bins)).astype(np.int64), low)
    return result


def resemblance(sketches: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarity of each of ``sketches`` ``[N, bins]`` with ``other`` ``[bins]``, float ``[N]``."""
    empty = (sketches == _EMPTY) & (other == _EMPTY)
    same = (sketches == other) & ~empty
    return same.sum(1) / np.maximum((~empty).sum(1), 1)
