"""The n-gram model against a slow dictionary version, and compressors against what they are.

Needs nothing. Run: pytest tests/evals/test_baselines.py
"""

from __future__ import annotations

import math
import random
import time
import zlib
from collections import Counter

import numpy as np
import pytest

from headway.core.errors import DataError
from headway.evals.baselines import NGram, gzip_bits_per_byte, ngram_bits_per_byte, xz_bits_per_byte

WORDS = ["the ", "cat ", "sat ", "on ", "a ", "mat", ".\n", "dog ", "was ", "here", "ä"]
TRAIN = "".join(random.Random(0).choices(WORDS, k=4000)).encode()
TEXT = "".join(random.Random(1).choices(WORDS, k=300)).encode() + b"never seen \xff\x00"


class Slow:
    """Interpolated Kneser-Ney with modified discounts, straight from the definition, in dictionaries."""

    def __init__(self, train: bytes, order: int) -> None:
        padded = bytes(order - 1) + train
        occurrences = Counter(padded[i : i + order] for i in range(len(train)))
        self.counts = {order: dict(occurrences)}
        for k in range(order - 1, 0, -1):
            self.counts[k] = dict(Counter(gram[1:] for gram in self.counts[k + 1]))
        self.discount = {k: self._discounts(Counter(c.values())) for k, c in self.counts.items()}
        self.followers: dict[bytes, list[int]] = {}
        for k, table in self.counts.items():
            for gram, count in table.items():
                self.followers.setdefault(bytes([k]) + gram[:-1], []).append(count)

    @staticmethod
    def _discounts(n: Counter) -> list[float]:
        if not all(n[i] for i in (1, 2, 3, 4)):
            return [0, 0.5, 0.5, 0.5]
        y = n[1] / (n[1] + 2 * n[2])
        d = [i - (i + 1) * y * n[i + 1] / n[i] for i in (1, 2, 3)]
        return [0] + [min(max(x, 0.05), i - 0.05) for i, x in enumerate(d, 1)]

    def probability(self, gram: bytes) -> float:
        k = len(gram)
        if k == 0:
            return 1 / 256
        lower = self.probability(gram[1:]) if k > 1 else 1 / 256
        after = self.followers.get(bytes([k]) + gram[:-1])
        if not after:
            return lower
        d, count = self.discount[k], self.counts[k].get(gram, 0)
        taken = sum(d[min(c, 3)] for c in after)
        return (count - d[min(count, 3)]) / sum(after) + taken / sum(after) * lower


@pytest.mark.parametrize("order", [1, 2, 3, 5, 7])
def test_probabilities_are_those_of_the_definition(order: int) -> None:
    slow, padded = Slow(TRAIN, order), bytes(order - 1) + TEXT
    wanted = [slow.probability(padded[i : i + order]) for i in range(len(TEXT))]
    found = NGram(TRAIN, order).probabilities(TEXT)
    assert np.allclose(found, wanted, rtol=1e-9)
    assert ngram_bits_per_byte(TRAIN, TEXT, order) == pytest.approx(-np.mean(np.log2(wanted)))


@pytest.mark.parametrize("order", [1, 2, 5])
@pytest.mark.parametrize("train", [TRAIN, b"a", b"ab" * 50, bytes(range(256)) * 3, b"\x00\x00\x00\x01"])
def test_probabilities_sum_to_one(order: int, train: bytes) -> None:
    model = NGram(train, order)
    for context in (b"the ", b"cat", b"", b"\xff\xfe\xfd\xfc", b"\0\0\0\0", b"at. the", b"aba"):
        p = model.distribution(context)
        assert p.shape == (256,)
        assert (p > 0).all()
        assert math.isclose(p.sum(), 1.0, rel_tol=1e-12)


def test_a_text_is_predicted_from_the_bytes_before_it() -> None:
    model = NGram(TRAIN, 5)
    p = model.probabilities(TEXT)
    for i in (4, 50, 200, len(TEXT) - 1):
        assert p[i] == model.distribution(TEXT[i - 4 : i])[TEXT[i]]
    changed = model.probabilities(TEXT[:100] + b"?" + TEXT[101:])
    assert (changed[:100] == p[:100]).all(), "no look at what comes later"
    assert (changed[105:] == p[105:]).all()


def test_more_context_and_more_text_help() -> None:
    bits = [ngram_bits_per_byte(TRAIN, TEXT, order) for order in (1, 2, 3, 4)]
    assert bits == sorted(bits, reverse=True)
    assert ngram_bits_per_byte(TRAIN, TEXT) < ngram_bits_per_byte(TRAIN[:300], TEXT)
    entropy = ngram_bits_per_byte(bytes(range(256)) * 50, bytes(range(256)), 1)
    assert entropy == pytest.approx(8, abs=0.01)


def test_speed() -> None:
    """A megabyte in about a tenth of a second when this was written; 10 MB must take less than 20 s."""
    train = np.random.default_rng(0).choice(60, 1_000_000, p=np.arange(60, 0, -1) / 1830).astype(np.uint8).tobytes()
    begin = time.process_time()
    ngram_bits_per_byte(train, train[:100_000])
    assert time.process_time() - begin < 2


def test_gzip_is_gzip() -> None:
    plain = gzip_bits_per_byte(b"", TRAIN)
    assert plain == pytest.approx(8 * len(zlib.compress(TRAIN, 9)) / len(TRAIN), rel=0.01)
    assert gzip_bits_per_byte(TRAIN, TRAIN[-5000:]) < 0.2, "it has just read these very bytes"
    far = TRAIN[:5000] + random.Random(0).randbytes(40_000)
    assert gzip_bits_per_byte(far, TRAIN[:5000]) > gzip_bits_per_byte(b"", TRAIN[:5000]) * 0.9, "window of 32 KiB"


def test_xz_remembers_all_of_the_training_text() -> None:
    far = TRAIN[:5000] + random.Random(0).randbytes(40_000)
    assert xz_bits_per_byte(far, TRAIN[:5000]) < 0.2
    assert 1 < xz_bits_per_byte(b"", TRAIN) < 3


def test_empty_texts_and_bad_orders() -> None:
    for call in (gzip_bits_per_byte, xz_bits_per_byte, ngram_bits_per_byte):
        with pytest.raises(DataError, match="empty"):
            call(TRAIN, b"")
    with pytest.raises(DataError, match="empty"):
        NGram(b"")
    for order in (0, 8):
        with pytest.raises(ValueError, match="expected 1 to 7"):
            NGram(TRAIN, order)
