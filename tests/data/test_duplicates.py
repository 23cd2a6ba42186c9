"""Near-duplicates: planted ones are found, the estimate agrees with the true Jaccard similarity.

Needs nothing. Run: pytest tests/data/test_duplicates.py
"""

from __future__ import annotations

import random

import numpy as np
import pytest

from headway.data.duplicates import near_duplicate_rate, resemblance, sketch


def text(seed: int, length: int = 3000) -> str:
    return "".join(random.Random(seed).choices("abcdefghij \n", k=length))


def edited(original: str, places: int, seed: int) -> str:
    rng, letters = random.Random(seed), list(original)
    for _ in range(places):
        letters[rng.randrange(len(letters))] = "#"
    return "".join(letters)


def jaccard(a: bytes, b: bytes, width: int) -> float:
    one, other = ({t[i : i + width] for i in range(len(t) - width + 1)} for t in (a, b))
    return len(one & other) / len(one | other)


def test_planted_duplicates_are_found_and_no_others() -> None:
    originals = [text(i) for i in range(60)]
    copies = [originals[i] for i in range(10)] + [edited(originals[i], 8, i) for i in range(10, 20)]
    documents = originals + copies
    random.Random(0).shuffle(documents)
    assert near_duplicate_rate(originals) == 0.0
    assert near_duplicate_rate(documents) == pytest.approx(20 / 80, abs=1e-3)


def test_heavily_edited_texts_are_not_duplicates() -> None:
    originals = [text(i) for i in range(20)]
    assert near_duplicate_rate(originals + [edited(t, 200, i) for i, t in enumerate(originals)]) == 0.0
    assert near_duplicate_rate(originals + [edited(t, 40, i) for i, t in enumerate(originals)], threshold=0.4) > 0.4


def test_the_rate_is_of_bytes() -> None:
    assert near_duplicate_rate([text(0, 9000), text(1, 1000), text(1, 1000)]) == pytest.approx(1 / 11, abs=1e-3)


@pytest.mark.parametrize("places", [0, 5, 20, 60, 150])
@pytest.mark.parametrize("width", [8, 24])
def test_the_estimate_is_the_jaccard_similarity(places: int, width: int) -> None:
    pairs = [(text(s).encode(), edited(text(s), places, s).encode()) for s in range(10)]
    estimates = [float(resemblance(sketch(a, width)[None], sketch(b, width))[0]) for a, b in pairs]
    true = np.mean([jaccard(a, b, width) for a, b in pairs])
    # the mean of ten estimates from 256 bins: standard error below 0.01
    assert abs(np.mean(estimates) - true) < 0.03


def test_short_and_empty_texts() -> None:
    assert near_duplicate_rate([]) == 0.0
    assert near_duplicate_rate(["", ""]) == 0.0
    assert near_duplicate_rate(["ab", "ab", "", "cd"]) == pytest.approx(1 / 3)
    assert near_duplicate_rate(["ab", "abc"]) == 0.0


def test_large_sets_are_sampled_and_the_rate_is_then_a_lower_bound() -> None:
    documents = [text(i % 300, 300) for i in range(600)]
    assert near_duplicate_rate(documents) == 0.5
    part = near_duplicate_rate(documents, sample=200)
    assert 0.05 < part < 0.35
    assert part == near_duplicate_rate(documents, sample=200)
    assert part != near_duplicate_rate(documents, sample=200, seed=1)
