"""The token cache: layout, damage found and repaired, several builders at once, a full disk.

Needs nothing. Run: pytest tests/data/test_token_cache.py
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headway.core import files
from headway.core.errors import DataError, HeadwayError
from headway.core.fallback import FallbackLog, use_log
from headway.data import cache as module
from headway.data.cache import open_cache
from headway.data.sources import Document, MemorySource, Source
from headway.data.splits import Corpus, survey
from headway.data.tokenizers import ByteTokenizer, Tokenizer, train_bpe

TEXTS = [f"text {i}: " + "wörds " * (i % 5) for i in range(50)]


class Counted(MemorySource):
    """Counts how often it is read."""

    reads = 0

    def documents(self) -> Any:
        Counted.reads += 1
        return super().documents()


def corpus(texts: list[str] = TEXTS, side: Any = "all") -> Corpus:
    return Corpus(Counted(texts), survey(Counted(texts), None if side == "all" else 0.1, Path()), side)


@pytest.fixture
def log() -> Any:
    use_log(log := FallbackLog())
    yield log
    use_log(FallbackLog())


def paths(folder: Path) -> tuple[Path, Path]:
    (data,) = folder.glob("*.bin")
    return data, data.with_suffix(".json")


def test_stream_starts_and_bytes(tmp_path: Path) -> None:
    found = open_cache(corpus(["ab", "", "ä", "xyz"]), ByteTokenizer(), tmp_path)
    assert found.stream.tolist() == [256, 97, 98, 256, 0xC3, 0xA4, 256, 120, 121, 122, 256]
    assert found.stream.dtype == np.uint16
    assert isinstance(found.stream, np.memmap) and not found.stream.flags.writeable
    assert found.starts.tolist() == [0, 3, 6]
    assert found.bytes.tolist() == [2, 2, 3]
    assert found.lossless
    data, header = paths(tmp_path)
    assert json.loads(header.read_text())["checksum"] == files.checksum(data)


def test_pieces_of_one_document_are_one(tmp_path: Path) -> None:
    class Pieces(Source):
        name = "pieces"

        def signature(self) -> None:
            return None

        def documents(self) -> Any:
            yield Document("a", "one ")
            yield Document("a", "two", True)
            yield Document("b", "three")

    source = Pieces()
    found = open_cache(Corpus(source, survey(source, None, tmp_path), "all"), ByteTokenizer(), tmp_path)
    assert bytes(t if t < 256 else 124 for t in found.stream) == b"|one two|three|"
    assert found.bytes.tolist() == [7, 5]


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    class Wide(ByteTokenizer):
        vocab, eos = 70_000, 69_999

    found = open_cache(corpus(), Wide(), tmp_path)
    assert found.stream.dtype == np.uint32
    assert found.stream[0] == 69_999


def test_the_second_time_nothing_is_read(tmp_path: Path, log: FallbackLog) -> None:
    text = corpus()
    first = open_cache(text, ByteTokenizer(), tmp_path)
    Counted.reads = 0
    again = open_cache(text, ByteTokenizer(), tmp_path)
    assert Counted.reads == 0
    assert again.fingerprint == first.fingerprint
    assert (again.stream == first.stream).all()
    assert not log.entries


def test_text_tokenizer_and_side_have_caches_of_their_own(tmp_path: Path) -> None:
    bpe = train_bpe(TEXTS, 280)
    keys = {
        open_cache(c, t, tmp_path).fingerprint
        for c in (corpus(), corpus(TEXTS[1:]), corpus(side="train"), corpus(side="validation"))
        for t in (ByteTokenizer(), bpe)
    }
    assert len(keys) == 8


def _cut(data: Path, header: Path) -> None:
    os.truncate(data, data.stat().st_size - 10)


def _longer(data: Path, header: Path) -> None:
    data.write_bytes(data.read_bytes() + b"\0" * 8)


def _one_bit(data: Path, header: Path) -> None:
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 1
    data.write_bytes(raw)


def _bad_header(data: Path, header: Path) -> None:
    header.write_text(header.read_text()[:20])


def _other_header(data: Path, header: Path) -> None:
    header.write_text(json.dumps(json.loads(header.read_text()) | {"tokens": 12}))


def _data_gone(data: Path, header: Path) -> None:
    data.unlink()


def _emptied(data: Path, header: Path) -> None:
    data.write_bytes(b"")


DAMAGE = [_cut, _longer, _one_bit, _bad_header, _other_header, _data_gone, _emptied]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_said_and_repaired(damage: Any, tmp_path: Path, log: FallbackLog) -> None:
    whole = np.array(open_cache(corpus(), ByteTokenizer(), tmp_path).stream)
    data, header = paths(tmp_path)
    before = (data.read_bytes(), header.read_bytes())
    damage(data, header)
    assert (open_cache(corpus(), ByteTokenizer(), tmp_path).stream == whole).all()
    assert len(log.entries) == 1
    assert str(data) in log.entries[0]["what"]
    assert (data.read_bytes(), header.read_bytes()) == before
    open_cache(corpus(), ByteTokenizer(), tmp_path)
    assert len(log.entries) == 1


def test_damage_is_an_error_in_a_strict_run(tmp_path: Path) -> None:
    open_cache(corpus(), ByteTokenizer(), tmp_path)
    _one_bit(*paths(tmp_path))
    use_log(FallbackLog(strict=True))
    with pytest.raises(HeadwayError, match="does not match its checksum"):
        open_cache(corpus(), ByteTokenizer(), tmp_path)
    use_log(FallbackLog())


def test_data_without_a_header_is_an_unfinished_build(tmp_path: Path, log: FallbackLog) -> None:
    whole = np.array(open_cache(corpus(), ByteTokenizer(), tmp_path).stream)
    data, header = paths(tmp_path)
    header.unlink()
    data.write_bytes(b"half")
    assert (open_cache(corpus(), ByteTokenizer(), tmp_path).stream == whole).all()
    assert not log.entries


def test_a_full_disk_is_one_message_and_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(HeadwayError, match=r"\.bin: cannot be written \(No space left on device\)"):
            open_cache(corpus(), ByteTokenizer(), tmp_path)
    assert [f.suffix for f in tmp_path.iterdir()] == [".lock"]
    open_cache(corpus(), ByteTokenizer(), tmp_path)


def test_an_unusable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HeadwayError, match="cannot be written"):
        open_cache(corpus(), ByteTokenizer(), tmp_path / "file" / "tokens")


def test_no_text_for_a_side(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no text"):
        open_cache(Corpus(MemorySource(["", ""]), corpus().survey, "all"), ByteTokenizer(), tmp_path)


def test_a_lossy_tokenizer_is_known(tmp_path: Path) -> None:
    class Lower(ByteTokenizer):
        def encode_arrays(self, texts: Any) -> list[np.ndarray]:
            return super().encode_arrays([t.lower() for t in texts])

    assert not open_cache(corpus(["Text"]), Lower(), tmp_path).lossless


class Slow(ByteTokenizer):
    """Takes its time, and notes in a folder that it worked."""

    def __init__(self, notes: Path) -> None:
        self.notes = notes

    def encode_arrays(self, texts: Any) -> list[np.ndarray]:
        time.sleep(0.5)
        (self.notes / str(os.getpid())).touch()
        return super().encode_arrays(texts)


def _build(folder: Path, tokenizer: Tokenizer, results: Any) -> None:
    results.put(open_cache(corpus(), tokenizer, folder).stream.tolist())


@pytest.mark.parametrize("locks", [True, False])
def test_many_builders_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool) -> None:
    """With locks one of them builds; without (some network file systems) all do, and the result is as sound."""
    notes = tmp_path / "notes"
    notes.mkdir()
    if not locks:

        def no_locks(*_: Any) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr("fcntl.flock", no_locks)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    builders = [context.Process(target=_build, args=(tmp_path / "t", Slow(notes), results)) for _ in range(4)]
    for builder in builders:
        builder.start()
    streams = [results.get(timeout=30) for _ in builders]
    for builder in builders:
        builder.join()
    whole = open_cache(corpus(), ByteTokenizer(), tmp_path / "other").stream.tolist()
    assert all(stream == whole for stream in streams)
    assert len(list(notes.iterdir())) == (1 if locks else 4)
    assert not list((tmp_path / "t").glob("*.tmp"))


def test_long_work_shows_its_progress(capsys: pytest.CaptureFixture[str]) -> None:
    progress = module._Progress(corpus(), every=0.0)
    progress.add(100)
    assert "headway: tokenized 100B of " in capsys.readouterr().err
