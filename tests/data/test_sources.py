"""Sources of text and records, and what each says of missing, empty and damaged input.

Needs the extras parquet and hf for their parts. Run: pytest tests/data/test_sources.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headway.core.errors import DataError, HeadwayError
from headway.data.options import DataOptions
from headway.data.paths import find_files
from headway.data.sources import Document, open_source

RECORDS = [{"text": f"row {i} ä", "label": i} for i in range(5)]


def read(source: str, path: Path | str, **options: Any) -> list[Document]:
    return list(open_source(DataOptions(source=source, path=str(path), **options)).documents())  # type: ignore[arg-type]


def fails(call: Callable[[], Any]) -> str:
    with pytest.raises(HeadwayError) as caught:
        call()
    assert "Traceback" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and no HEADWAY_DATA."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HEADWAY_DATA", raising=False)
    return tmp_path


# --- where files are ---


def test_folder_glob_and_file(here: Path) -> None:
    for name in ("b.txt", "a.txt", "in/c.md", "in/.hidden", ".git/x.txt"):
        (here / "t" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "t" / name).write_text(name)
    assert [d.id for d in read("text", "t")] == ["a.txt", "b.txt", "in/c.md"]
    assert [d.id for d in read("text", here / "t")] == ["a.txt", "b.txt", "in/c.md"]
    assert [d.id for d in read("text", "t/*.txt")] == ["a.txt", "b.txt"]
    assert [d.id for d in read("text", "t/**/*.md")] == ["in/c.md"]
    assert [d.id for d in read("text", f"{here}/t/**/*.md")] == ["in/c.md"]
    assert read("text", "t/in/c.md") == [Document("c.md", "in/c.md")]


def test_headway_data_is_the_second_place(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = here / "store"
    (there / "corpus").mkdir(parents=True)
    (there / "corpus" / "a.txt").write_text("store")
    assert "HEADWAY_DATA, a second place to look, is not set" in fails(lambda: read("text", "corpus"))
    monkeypatch.setenv("HEADWAY_DATA", str(there))
    assert read("text", "corpus")[0].text == "store"
    assert read("text", "corpus/*.txt")[0].text == "store"
    (here / "corpus").mkdir()
    (here / "corpus" / "a.txt").write_text("here")
    assert read("text", "corpus")[0].text == "here"


def test_text_is_kept_to_the_byte(here: Path) -> None:
    raw = "\ufeffline\r\nline\rline\n\n\x00 ä".encode()
    (here / "a.txt").write_bytes(raw)
    assert read("text", "a.txt")[0].text.encode() == raw


# --- what is wrong ---


def test_missing_paths(here: Path) -> None:
    (here / "corpus.txt").write_text("x")
    (here / "empty").mkdir()
    assert fails(lambda: read("text", "corpsu.txt")).startswith(
        "corpsu.txt: does not exist. Did you mean 'corpus.txt'?"
    )
    assert "matches no file" in fails(lambda: read("text", "*.md"))
    assert f"{here / 'empty'}: holds no file" in fails(lambda: read("text", "empty"))
    assert "holds no *.parquet file" in fails(lambda: read("parquet", "empty"))
    assert "/no/such/place: does not exist" in fails(lambda: read("text", "/no/such/place"))


@pytest.mark.parametrize("offset", [0, 10, 1_048_575, 1_048_576, 2_500_000])
@pytest.mark.parametrize("bad", [b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xe2\x82"])
def test_invalid_utf8_is_named_to_the_byte(here: Path, offset: int, bad: bytes) -> None:
    (here / "a.txt").write_bytes(b"x" * offset + bad)
    message = fails(lambda: read("text", "a.txt"))
    assert message.startswith(f"{here / 'a.txt'}: is not UTF-8 text (")
    assert f"at byte {offset})" in message


def test_multibyte_characters_on_block_borders(here: Path) -> None:
    for shift in range(4):
        text = "x" * shift + "🙂" * 600_000
        (here / "a.txt").write_text(text)
        assert "".join(d.text for d in read("text", "a.txt")) == text


def test_jsonl(here: Path) -> None:
    (here / "a.jsonl").write_text("\n".join(map(json.dumps, RECORDS)) + "\n\n")
    assert [d.text for d in read("jsonl", "a.jsonl")] == [r["text"] for r in RECORDS]
    assert [d.id for d in read("jsonl", ".")][:2] == ["a.jsonl:1", "a.jsonl:2"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut of', ":2: is not JSON (Unterminated string starting at column 10)"),
        ('["text"]', ":2: holds a list, expected an object with the field 'text'"),
        (
            '{"body": "x", "texts": 1}',
            ":2: has no field 'text', expected one of its fields: body, texts. Set data.field",
        ),
        ('{"body": "x", "texts": 1}', "did you mean 'texts'?"),
        ("{}", ":2: has no field 'text'"),
        ('{"text": 5}', ":2: holds int in its field 'text', expected a string"),
        ('{"text": null}', ":2: holds null in its field 'text'"),
        ("[" * 100_000, ":2: is "),
    ],
)
def test_bad_lines(here: Path, line: str, message: str) -> None:
    (here / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    text = fails(lambda: read("jsonl", "a.jsonl"))
    assert text.startswith(f"{here / 'a.jsonl'}:2")
    assert message in text


def test_jsonl_that_is_no_utf8(here: Path) -> None:
    (here / "a.jsonl").write_bytes(b'{"text": "good"}\n{"text": "\xe4"}\n')
    assert "is not UTF-8 text (invalid continuation byte at byte 27)" in fails(lambda: read("jsonl", "a.jsonl"))


def test_parquet(here: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.Table.from_pylist(RECORDS)
    parquet.write_table(table, here / "a.parquet", row_group_size=2)
    parquet.write_table(table.set_column(0, "text", table["text"].cast(arrow.large_string())), here / "b.parquet")
    assert [d.text for d in read("parquet", ".")] == [r["text"] for r in RECORDS] * 2
    assert (
        "has no field 'txet', expected one of its fields: text, label. Set data.field; did you mean 'text'?"
        in fails(lambda: read("parquet", "a.parquet", field="txet"))
    )
    assert "a.parquet, row 0: holds int in its field 'label'" in fails(
        lambda: read("parquet", "a.parquet", field="label")
    )
    parquet.write_table(arrow.Table.from_pylist([{"text": "a"}, {"text": None}]), here / "null.parquet")
    assert "null.parquet, row 1: holds null" in fails(lambda: read("parquet", "null.parquet"))
    (here / "cut.parquet").write_bytes((here / "a.parquet").read_bytes()[:-20])
    assert "cut.parquet: is not a readable Parquet file" in fails(lambda: read("parquet", "cut.parquet"))


def test_datasets_folders(here: Path) -> None:
    library = pytest.importorskip("datasets")
    table = library.Dataset.from_list(RECORDS)
    table.save_to_disk(str(here / "one"))
    library.DatasetDict({"train": table, "extra": table.select([4])}).save_to_disk(str(here / "several"))
    wanted = [r["text"] for r in RECORDS]
    assert [d.text for d in read("datasets", "one")] == wanted
    assert [d.text for d in read("datasets", "several")] == wanted
    assert [d.text for d in read("datasets", "several", split="extra")] == wanted[4:]
    assert "has no split 'trian'. Set data.split; did you mean 'train'?" in fails(
        lambda: read("datasets", "several", split="trian")
    )
    assert "no split 'validation'" in fails(lambda: read("datasets", "one", split="validation"))
    assert "has no field 'body', expected one of its fields: text, label" in fails(
        lambda: read("datasets", "one", field="body")
    )
    assert "row 0: holds int" in fails(lambda: read("datasets", "one", field="label"))


def test_datasets_from_data_files_with_configurations(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", here / "cache")
    (here / "raw").mkdir()
    for name in ("a", "b"):
        (here / "raw" / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    (here / "raw" / "README.md").write_text(
        "---\nconfigs:\n" + "".join(f"- config_name: {n}\n  data_files: {n}.jsonl\n" for n in "ab") + "---\n"
    )
    assert [d.text for d in read("datasets", "raw", subset="b")] == ["b"]
    assert "cannot be loaded as a data set" in fails(lambda: read("datasets", "raw", subset="c"))


def test_datasets_that_are_not_there(here: Path) -> None:
    pytest.importorskip("datasets")
    assert "./nowhere: does not exist" in fails(lambda: read("datasets", "./nowhere"))
    (here / "empty").mkdir()
    assert "cannot be loaded as a data set" in fails(lambda: read("datasets", "empty"))


def test_a_missing_package_names_its_extra(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (here / "a.parquet").write_text("")
    assert "headway[parquet]" in fails(lambda: read("parquet", "a.parquet"))


def test_find_files_keeps_names_relative_to_the_fixed_part(here: Path) -> None:
    (here / "a" / "b").mkdir(parents=True)
    (here / "a" / "b" / "c.txt").write_text("x")
    root, files = find_files("a/*/c.txt")
    assert (root, [f.relative_to(root).as_posix() for f in files]) == (here / "a", ["b/c.txt"])
    with pytest.raises(DataError):
        find_files("a/*/d.txt")
