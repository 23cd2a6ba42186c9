"""Packed sequences without files, for tests."""

from __future__ import annotations

import numpy as np

from headway.data.cache import TokenCache
from headway.data.packing import TokenSet

EOS = 256


def token_set(texts: list[bytes], sequence: int, mask: bool = False) -> TokenSet:
    """Documents of byte tokens, packed without any files."""
    stream: list[int] = []
    starts = []
    for text in texts:
        starts.append(len(stream))
        stream += [EOS, *text]
    stream.append(EOS)
    sizes = np.array([len(t) for t in texts])
    return TokenSet(TokenCache(np.array(stream, np.uint16), np.array(starts), sizes, True, "f"), sequence, EOS, mask)


def documents(seed: int = 0, number: int = 30, longest: int = 40) -> list[bytes]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, rng.integers(1, longest)).astype(np.uint8).tobytes() for _ in range(number)]
