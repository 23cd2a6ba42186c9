"""Packing against the obvious reference: every token a target once, masked documents, filling, exact bytes.

Needs nothing. Run: pytest tests/data/test_packing.py
"""

from __future__ import annotations

import pytest
import torch
from tests.data.packed import EOS, documents, token_set

from headway.data.packing import IGNORE


@pytest.mark.parametrize("sequence", [1, 2, 7, 16, 64, 10_000])
def test_every_token_is_a_target_once_and_in_order(sequence: int) -> None:
    texts = documents()
    data = token_set(texts, sequence)
    wanted = [t for text in texts for t in [*text, EOS]]
    batch = data.batch(range(len(data)))
    assert batch["tokens"].dtype == batch["targets"].dtype == torch.int64
    assert batch["tokens"].shape == batch["targets"].shape == (len(data), sequence)
    flat = batch["targets"].flatten()
    assert flat[flat != IGNORE].tolist() == wanted
    inputs = batch["tokens"].flatten()[: len(wanted)].tolist()
    assert inputs == [EOS, *wanted[:-1]]
    assert data.targets == len(wanted) == int((flat != IGNORE).sum())
    assert "segments" not in batch


def test_length_where_the_stream_just_fits() -> None:
    data = token_set([b"abc", b"de"], 7)  # abc eos de eos: seven targets
    assert len(data) == 1
    assert not (data[0]["targets"] == IGNORE).any()
    assert len(token_set([b"abc", b"de"], 6)) == 2


def test_an_item_is_a_row_of_the_batch() -> None:
    data = token_set(documents(), 16, mask=True)
    batch = data.batch([len(data) - 1, 0, 3, 3])
    for row, index in enumerate([-1, 0, 3, 3]):
        for key, value in data[index].items():
            assert torch.equal(value, batch[key][row])
    with pytest.raises(IndexError):
        data[len(data)]


@pytest.mark.parametrize("sequence", [5, 16, 64])
def test_segments_are_the_documents(sequence: int) -> None:
    texts = documents(1)
    data = token_set(texts, sequence, mask=True)
    batch = data.batch(range(len(data)))
    # reference: walk over the inputs; each end of text as an input begins a document
    document, rows = -1, []
    for token, target in zip(batch["tokens"].flatten().tolist(), batch["targets"].flatten().tolist(), strict=True):
        document += token == EOS and target != IGNORE
        rows.append(document if target != IGNORE else len(texts))
    reference = torch.tensor(rows).view(-1, sequence)
    assert torch.equal(batch["segments"], reference - reference[:, :1])
    assert batch["segments"].dtype == torch.int64


def test_no_masked_target_depends_on_another_document() -> None:
    """Within a segment, inputs are `eos d` and targets `d eos` of one and the same document."""
    texts = documents(2)
    data = token_set(texts, 64, mask=True)
    found: list[bytes] = []
    for row in range(len(data)):
        item = data[row]
        for segment in item["segments"].unique().tolist():
            here = item["segments"] == segment
            targets = item["targets"][here]
            if (targets == IGNORE).all():
                continue
            inputs = item["tokens"][here].tolist()
            assert inputs[1:] == targets[:-1].tolist(), "inside a segment the targets are the inputs, one further"
            assert EOS not in inputs[1:], "a segment holds one document"
            if inputs[0] == EOS:
                found.append(b"")
            found[-1] += bytes(t for t in targets.tolist() if t < 256)
    assert found == texts


def test_filling_rows_count_nothing() -> None:
    data = token_set(documents(), 16, mask=True)
    batch = data.batch([-1, 0])
    assert (batch["targets"][0] == IGNORE).all()
    assert torch.equal(batch["targets"][1], data[0]["targets"])
    assert data.counts([-1, 0, -1]) == (16, 16)


def test_counts_are_those_of_the_batch() -> None:
    data = token_set(documents(), 16)
    for index in ([0, 1], [len(data) - 1], [2, len(data) - 1, -1], [-1]):
        assert data.counts(index)[1] == int((data.batch(index)["targets"] != IGNORE).sum())


def test_sample_is_whole_documents_with_exact_bytes() -> None:
    texts = documents(number=200)
    data = token_set(texts, 16)
    sample = data.sample(20)
    assert 15 <= len(sample) <= 20
    targets = sample.batch(range(len(sample)))["targets"].flatten()
    parts = bytes(t if t < 256 else 0 for t in targets[targets != IGNORE].tolist())
    assert sample.text_bytes == int((targets[targets != IGNORE] != EOS).sum())
    chosen = [t for t in texts if t + b"\0" in parts]
    assert 10 < len(chosen) < 60
    assert chosen != texts[: len(chosen)], "not merely the first ones"
    again = token_set(texts, 16).sample(20)
    assert torch.equal(again.batch([0, 1, 2])["tokens"], sample.batch([0, 1, 2])["tokens"])
    assert data.sample(10_000) is data


def test_sample_of_documents_that_are_all_too_long_takes_the_shortest() -> None:
    data = token_set([b"a" * 100, b"b" * 90, b"c" * 95], 8)
    assert data.sample(2).text_bytes == 90


def test_fingerprints_tell_sets_apart() -> None:
    texts = documents()
    sets = [token_set(texts, 16), token_set(texts, 8), token_set(texts, 16, mask=True), token_set(texts, 16).sample(3)]
    assert len({s.fingerprint for s in sets}) == 4
    assert token_set(texts, 16).fingerprint == sets[0].fingerprint
