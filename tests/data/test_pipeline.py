"""From options to batches: every source, exact bytes, the second use, notes.

Needs the extras parquet and hf for their parts. Run: pytest tests/data/test_pipeline.py
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from headway.core.errors import DataError, RecipeError
from headway.core.options import parse_options
from headway.data.options import DataOptions
from headway.data.packing import IGNORE
from headway.data.pipeline import Data, build_data, cache_folder
from headway.data.tokenizers import train_bpe

TEXTS = [f"Document {i}. " + " ".join(f"wörd{(i * j) % 17}" for j in range(i % 40)) for i in range(200)]


def build(**options: Any) -> Data:
    return build_data(DataOptions(**{"sequence": 32, **options}), 0)


def decoded(data: Data, side: str) -> list[str]:
    """The texts that the targets of a whole pass hold."""
    tokens = getattr(data, side)
    targets = tokens.batch(range(len(tokens)))["targets"].flatten()
    texts: list[list[int]] = [[]]
    for token in targets[targets != IGNORE].tolist():
        if token == data.tokenizer.eos:
            texts.append([])
        else:
            texts[-1].append(token)
    assert not texts.pop()
    return [data.tokenizer.decode(ids) for ids in texts]


@pytest.mark.parametrize("source", ["memory", "text", "jsonl", "parquet", "datasets"])
@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_all_text_arrives_and_all_bytes_are_counted(source: str, tokenizer: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"source": source, "tokenizer": tokenizer, "vocab": 300, "path": str(tmp_path / "in")}
    (tmp_path / "in").mkdir()
    rows = [{"text": t} for t in TEXTS]
    if source == "memory":
        options = {"source": source, "documents": TEXTS, "tokenizer": tokenizer, "vocab": 300}
    elif source == "text":
        for i, text in enumerate(TEXTS):
            (tmp_path / "in" / f"{i}.txt").write_text(text)
    elif source == "jsonl":
        (tmp_path / "in" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif source == "parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "in" / "a.parquet")
    else:
        pytest.importorskip("datasets").Dataset.from_list(rows).save_to_disk(str(tmp_path / "in"))
    data = build(**options)
    train, validation = decoded(data, "train"), decoded(data, "validation")
    assert sorted(train + validation) == sorted(TEXTS)
    assert 1 <= len(validation) <= 30
    assert data.validation_bytes == sum(len(t.encode()) for t in validation)
    assert list(data.texts("validation")) == validation
    assert data.text_bytes("validation") == "\n".join(validation).encode()
    assert len(data.text_bytes("train", 100)) == 100
    counted = sum(len(data.tokenizer.encode(t)) + 1 for t in validation)
    assert data.bytes_per_token == data.validation_bytes / counted
    assert data.unique_tokens == sum(len(data.tokenizer.encode(t)) + 1 for t in train)
    assert not [n for n in data.notes if "data.vocab" not in n]


def test_validation_text_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("train me")
    (tmp_path / "held.txt").write_text("hold me")
    data = build(
        source="text", path=str(tmp_path / "train.txt"), validation_path=str(tmp_path / "held.txt"), tokenizer="byte"
    )
    assert decoded(data, "train") == ["train me"]
    assert decoded(data, "validation") == ["hold me"]


def test_the_tokenizer_sees_no_validation_text(tmp_path: Path) -> None:
    data = build(source="memory", documents=TEXTS, vocab=300)
    assert data.tokenizer.fingerprint == train_bpe(list(data.texts("train")), 300).fingerprint
    assert data.tokenizer.fingerprint != train_bpe(TEXTS, 300).fingerprint


def test_a_tokenizer_file(tmp_path: Path) -> None:
    bpe = train_bpe(TEXTS, 280)
    bpe.save(tmp_path / "tok")
    data = build(source="memory", documents=TEXTS, tokenizer=str(tmp_path / "tok"))
    assert data.tokenizer.fingerprint == bpe.fingerprint
    assert sorted(decoded(data, "train") + decoded(data, "validation")) == sorted(TEXTS)


def test_masked_documents_reach_the_batches() -> None:
    step = next(build(source="memory", documents=TEXTS, tokenizer="byte", mask_documents=True).stream(batch=4))
    assert set(step.micro[0]) == {"tokens", "targets", "segments"}
    step = next(build(source="memory", documents=TEXTS, tokenizer="byte").stream(batch=4))
    assert set(step.micro[0]) == {"tokens", "targets"}


def test_the_seed_changes_the_order_and_nothing_else() -> None:
    options = DataOptions(source="memory", documents=tuple(TEXTS), tokenizer="byte", sequence=32)
    one, other = build_data(options, 0), build_data(options, 1)
    assert one.train.fingerprint == other.train.fingerprint
    assert (
        next(one.stream(batch=4)).micro[0]["tokens"].tolist() != next(other.stream(batch=4)).micro[0]["tokens"].tolist()
    )


def test_the_pass_limit_reaches_the_stream() -> None:
    data = build(source="memory", documents=TEXTS, tokenizer="byte", max_passes=2)
    assert sum(step.targets for step in data.stream(batch=8)) == 2 * data.unique_tokens


def test_the_stdlib_and_its_second_use(tmp_path: Path) -> None:
    first = build(tokenizer="byte", cache=str(tmp_path))
    begin = time.process_time()  # of this process alone, whatever else the machine does; about 0.06 s when written
    again = build(tokenizer="byte", cache=str(tmp_path))
    assert time.process_time() - begin < 1.0
    assert again.train.fingerprint == first.train.fingerprint
    assert again.unique_tokens > 5_000_000
    assert again.validation_bytes == sum(len(t.encode()) for t in again.texts("validation"))


def test_notes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS))
    notes = build(source="text", path=str(tmp_path / "a.txt"), vocab=4096).notes
    assert any("validation is some of their paragraphs" in n for n in notes)
    assert any("of the 4096 tokens of data.vocab" in n for n in notes)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWAY_CACHE", "/somewhere")
    assert cache_folder(DataOptions()) == Path("/somewhere")
    assert cache_folder(DataOptions(cache="/else")) == Path("/else")
    monkeypatch.delenv("HEADWAY_CACHE")
    assert cache_folder(DataOptions()) == Path.home() / ".cache" / "headway"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"source": "txt"}, "data.source: got 'txt', expected 'python-stdlib', 'text'"),
        ({"source": "text"}, "data.path: got None, expected a path for source: text"),
        ({"source": "python-stdlib", "path": "x"}, "data.path: got 'x', expected no path"),
        ({"source": "memory"}, "data.documents: got None, expected a list of texts"),
        ({"documents": ["a"]}, "data.documents: "),
        ({"source": "text", "path": "x", "validation_path": ""}, "data.validation_path: got ''"),
        ({"validation_fraction": 0}, "data.validation_fraction: got 0"),
        ({"validation_fraction": 0.9}, "data.validation_fraction: got 0.9"),
        ({"vocab": 256}, "data.vocab: got 256"),
        ({"sequence": 0}, "data.sequence: got 0"),
        ({"sequnce": 8}, "did you mean 'sequence'?"),
        ({"max_passes": 1, "on_exhausted": "repeat"}, "data.on_exhausted: got 'repeat', expected stop or warn"),
        ({"max_passes": 0}, "data.max_passes: got 0"),
    ],
)
def test_options_that_are_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_options(DataOptions, raw, "data")
    assert message.lower() in str(caught.value).lower()


def test_either_half_of_the_pass_limit_brings_the_other() -> None:
    assert DataOptions(max_passes=3).on_exhausted == "stop"
    assert DataOptions(on_exhausted="warn").max_passes == 1
    assert (DataOptions().max_passes, DataOptions().on_exhausted) == (None, "repeat")
    for options in (DataOptions(max_passes=3), DataOptions(on_exhausted="warn"), DataOptions()):
        assert DataOptions(**options.model_dump()) == options


def test_text_errors_reach_the_caller(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"empty\.txt: holds no text"):
        build(source="text", path=str(tmp_path / "empty.txt"))
