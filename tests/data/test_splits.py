"""The split: a stable hash of each document alone, pieces of paragraphs where documents are few.

Needs nothing. Run: pytest tests/data/test_splits.py
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from headway.core.errors import DataError
from headway.data import splits
from headway.data.sources import Document, MemorySource, StdlibSource, TextSource
from headway.data.splits import Corpus, cut, joined, stable_share, survey

TEXT = "\n\n".join(f"Paragraph {i} begins.\nIt has a second line, {'long ' * (i % 13)}and ends." for i in range(900))


def both(source: object, fraction: float, memo: Path) -> tuple[list[Document], list[Document]]:
    found = survey(source, fraction, memo)  # type: ignore[arg-type]
    return tuple(list(Corpus(source, found, side).documents()) for side in ("train", "validation"))  # type: ignore


def test_shares_are_stable_and_uniform() -> None:
    assert stable_share("abc.py") == 0.2703966808253567
    shares = [stable_share(str(i)) for i in range(4000)]
    assert all(0 <= s < 1 for s in shares)
    assert abs(sum(s < 0.05 for s in shares) / 4000 - 0.05) < 0.012


@pytest.mark.parametrize("size", [1, 16, 100, 5000, 10**6])
@pytest.mark.parametrize("text", [TEXT, "x" * 5000, "a\n" * 3000, "\n" * 999, "", "short", "ends\n\n"])
def test_cut_loses_nothing(text: str, size: int) -> None:
    pieces = list(cut(text, size))
    assert "".join(pieces) == text
    assert all(len(p) >= size for p in pieces[:-1])
    assert all(pieces)


def test_cut_ends_at_blank_lines_then_at_lines() -> None:
    assert all(p.endswith("\n\n") for p in list(cut(TEXT, 200))[:-1])
    assert all(p.endswith("\n") for p in list(cut("some words\n" * 100, 30))[:-1])
    assert {len(p) for p in list(cut("x" * 1000, 20))[:-1]} == {80}


def test_files_are_split_by_name_and_each_is_alone(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i}.txt").write_text(f"text {i}")
    train, validation = both(TextSource(str(folder)), 0.2, tmp_path / "memo")
    names = {d.id for d in validation}
    assert names == {f"{i}.txt" for i in range(60) if stable_share(f"{i}.txt") <= 0.2}
    assert {d.id for d in train} == {f"{i}.txt" for i in range(60)} - names
    # other content, other files beside it, another place: a file stays on its side
    for i in range(60, 90):
        (folder / f"{i}.txt").write_text("more")
    (folder / "0.txt").write_text("changed")
    moved = folder.rename(tmp_path / "elsewhere")
    _, later = both(TextSource(str(moved)), 0.2, tmp_path / "memo")
    assert {d.id for d in later} & {f"{i}.txt" for i in range(60)} == names


def test_records_are_split_by_text_so_that_copies_stay_together(tmp_path: Path) -> None:
    texts = [f"record {i % 50}" for i in range(200)]
    random.Random(0).shuffle(texts)
    train, validation = both(MemorySource(texts), 0.1, tmp_path)
    assert len(train) + len(validation) == 200
    assert not {d.text for d in train} & {d.text for d in validation}
    _, shuffled = both(MemorySource(sorted(texts)), 0.1, tmp_path)
    assert sorted(d.text for d in shuffled) == sorted(d.text for d in validation)


def test_a_single_text_is_split_by_paragraphs(tmp_path: Path) -> None:
    train, validation = both(MemorySource([TEXT]), 0.05, tmp_path)
    length = sum(len(d.text) for d in validation)
    assert 0.01 < length / len(TEXT) < 0.12
    assert length + sum(len(d.text) for d in train) == len(TEXT)
    whole = sorted([*train, *validation], key=lambda d: int(d.id.split("#")[1]))
    assert "".join(d.text for d in whole) == TEXT
    assert len(train) < 80, "neighbouring pieces are one document"


def test_pieces_of_two_documents_never_join(tmp_path: Path) -> None:
    texts = [TEXT, TEXT.replace("Paragraph", "Section"), TEXT.upper()]
    for document in both(MemorySource(texts), 0.05, tmp_path)[0]:
        assert sum(document.text in text for text in texts) == 1
        assert not document.continues


def test_a_long_file_is_read_in_pieces_that_join_up(tmp_path: Path) -> None:
    text = "".join(f"Zeile {i} hat Umlaute: äöü, 漢字, 🙂.\n" + "\n" * (i % 7 == 0) for i in range(120_000))
    (tmp_path / "long.txt").write_bytes(text.encode())
    pieces = list(TextSource(str(tmp_path / "long.txt")).documents())
    assert len(pieces) > 3
    assert "".join(p.text for p in pieces) == text
    assert [p.continues for p in pieces] == [False] + [True] * (len(pieces) - 1)
    assert all(p.text.endswith("\n\n") for p in pieces[:-1])
    train, validation = both(TextSource(str(tmp_path / "long.txt")), 0.05, tmp_path / "memo")
    assert sum(len(d.text) for d in [*train, *validation]) == len(text)
    assert 0.02 < sum(len(d.text) for d in validation) / len(text) < 0.09


def test_joined_keeps_to_its_limit() -> None:
    pieces = [Document(f"{i}", "x" * 10, i not in (0, 4)) for i in range(8)]
    assert [(d.id, len(d.text), d.continues) for d in joined(iter(pieces), 20)] == [
        ("0", 20, False), ("2", 20, True), ("4", 20, False), ("6", 20, True)
    ]  # fmt: skip


def test_neither_side_is_ever_empty(tmp_path: Path) -> None:
    for seed in range(40):
        texts = [f"{seed} {i}" for i in range(20)]
        train, validation = both(MemorySource(texts), 0.05, tmp_path)
        assert train and validation


def test_stdlib_is_split_by_file_and_skips_what_is_no_utf8(tmp_path: Path) -> None:
    folder = tmp_path / "lib"
    for name in ("a.py", "b/c.py", "b/test/t.py", "site-packages/x.py", "config-3-x/y.py", "b/tests/z.py", "d.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"# {name}\n")
    (folder / "bad.py").write_bytes(b"# \xff\n")
    (folder / "_sysconfigdata_x.py").write_text("machine")
    source = StdlibSource(folder)
    assert [d.id for d in source.documents()] == ["a.py", "b/c.py"]
    assert source.skipped == 1


def test_the_real_stdlib(tmp_path: Path) -> None:
    train, validation = both(StdlibSource(), 0.05, tmp_path)
    assert len(train) > 300
    assert 0.02 < len(validation) / (len(train) + len(validation)) < 0.09
    assert not any({"site-packages", "test"} & set(d.id.split("/")) for d in [*train, *validation])
    assert all(stable_share(d.id) <= 0.05 for d in validation)


def test_the_survey_is_kept_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    file.write_text(TEXT)
    os.utime(file, (1, 1))
    now = time.time
    monkeypatch.setattr(splits.time, "time", lambda: now() + 10)
    looks: list[int] = []
    look = splits._look
    monkeypatch.setattr(splits, "_look", lambda *a: looks.append(1) or look(*a))
    first = survey(TextSource(str(file)), 0.05, tmp_path / "memo")
    assert survey(TextSource(str(file)), 0.05, tmp_path / "memo") == first
    assert len(looks) == 1
    file.write_text(TEXT.replace("5", "6"))
    os.utime(file, (1, 1))  # same size, same time: the inode's own change time tells
    assert survey(TextSource(str(file)), 0.05, tmp_path / "memo").fingerprint != first.fingerprint
    assert len(looks) == 2
    for kept in (tmp_path / "memo").iterdir():
        kept.write_text("{damaged")
    survey(TextSource(str(file)), 0.05, tmp_path / "memo")
    assert len(looks) == 3


def test_a_file_changed_just_now_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    survey(TextSource(str(tmp_path / "a.txt")), 0.05, tmp_path / "memo")
    assert not (tmp_path / "memo").exists()


def test_the_key_follows_text_split_and_side(tmp_path: Path) -> None:
    def key(texts: list[str], fraction: float | None, side: str) -> str:
        source = MemorySource(texts)
        return Corpus(source, survey(source, fraction, tmp_path), side).key  # type: ignore[arg-type]

    texts = [f"text {i}" for i in range(100)]
    keys = [
        *(key(texts, 0.05, "train"), key(texts, 0.05, "validation"), key(texts, 0.1, "train"), key(texts, None, "all")),
        *(key([*texts, "x"], 0.05, "train"), key([t + "." for t in texts], 0.05, "train")),
    ]
    assert len(set(keys)) == len(keys)
    assert key(list(texts), 0.05, "train") == keys[0]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "holds no text"),
        ([""], "holds no text"),
        (["short"], "cannot be split into train and validation: it is too short"),
        (["the same"] * 100, "its documents are all the same"),
        (["fine", "not \ud800 fine"], "document 1: holds half of a surrogate pair at character 4"),
    ],
)
def test_what_cannot_be_split_is_refused(texts: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        survey(MemorySource(texts), 0.05, tmp_path)
    assert message in str(caught.value)
