"""Sources of text: each yields documents in a fixed order and can say cheaply whether it has changed."""

from __future__ import annotations

import codecs
import os
import sys
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from headway.core.errors import DataError
from headway.data.options import DataOptions
from headway.data.paths import find_files

BLOCK = 1 << 20
"""Long files are read, and given on, in pieces of about this many characters."""


class Document(NamedTuple):
    """One text, or a further piece of the text before it."""

    id: str
    text: str
    continues: bool = False


class Source(ABC):
    """Documents in a fixed order."""

    name: str
    """How messages call it."""
    split_by_text = False
    """Whether the train/validation split goes by a document's text rather than by its name (see `splits.py`)."""
    skipped = 0
    """Files left out by the latest `documents()`."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """All documents, empty ones too.

        Raises:
            DataError: a file is missing, damaged or not of this kind.
        """

    @abstractmethod
    def signature(self) -> list[Any] | None:
        """What changes when the text changes and is cheap to find, such as file sizes and times; None if nothing is."""


def stat_signature(files: Sequence[Path], root: Path) -> list[Any]:
    """Name, size, inode and times of files, as version-control systems use them to skip reading unchanged files."""
    rows = []
    for file in files:
        try:
            s = file.stat()
        except OSError as error:
            raise DataError(str(file), f"cannot be read ({error.strerror})") from error
        rows.append([file.relative_to(root).as_posix(), s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns])
    return rows


class FileSource(Source):
    """Documents in files."""

    def __init__(self, kind: str, path: str, suffixes: tuple[str, ...] = ()) -> None:
        self.name = path
        self.kind = kind
        self.root, self.files = find_files(path, suffixes)

    def signature(self) -> list[Any] | None:
        """Kind and file times."""
        return [self.kind, stat_signature(self.files, self.root)]

    def relative(self, file: Path) -> str:
        """The name of ``file`` that does not change when the folder moves."""
        return file.relative_to(self.root).as_posix()


class TextSource(FileSource):
    """Text files, one document each; UTF-8, line ends kept as they are."""

    def __init__(self, path: str) -> None:
        super().__init__("text", path)

    def documents(self) -> Iterator[Document]:
        """One document per file; a long one in pieces that end at a blank line if there is one."""
        for file in self.files:
            buffer, continues = "", False
            for block in _decoded(file):
                buffer += block
                while len(buffer) > BLOCK:
                    end = max(buffer.rfind("\n\n", 0, BLOCK) + 2, 2)
                    end = end if end > 2 else buffer.rfind("\n", 0, BLOCK) + 1 or BLOCK
                    yield Document(self.relative(file), buffer[:end], continues)
                    buffer, continues = buffer[end:], True
            if buffer or not continues:
                yield Document(self.relative(file), buffer, continues)


def _decoded(file: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    position = 0
    try:
        with file.open("rb") as handle:
            while True:
                block = handle.read(BLOCK)
                pending = len(decoder.getstate()[0])
                try:
                    yield decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    raise not_utf8(file, error, position - pending) from None
                if not block:
                    return
                position += len(block)
    except OSError as error:
        raise DataError(str(file), f"cannot be read ({error.strerror})") from error


def not_utf8(file: Path, error: UnicodeDecodeError, position: int) -> DataError:
    """The error for a file that is not UTF-8 text; ``position`` is where the decoded bytes begin in it."""
    return DataError(
        str(file),
        f"is not UTF-8 text ({error.reason} at byte {position + error.start})",
        hint="convert it, or leave it out with a glob such as path/**/*.txt",
    )


class StdlibSource(Source):
    """The Python sources of the running interpreter's standard library, one document per file.

    Test packages are left out because slim installations have none, ``_sysconfigdata`` and ``config-*`` because they
    describe the machine: so the text is the same wherever the same Python version is installed. Files that are not
    UTF-8 are left out too and counted in ``skipped``.
    """

    name = "python-stdlib"
    LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or Path(sysconfig.get_path("stdlib"))
        self.files = []
        for base, folders, names in os.walk(self.root):
            folders[:] = sorted(f for f in folders if f not in self.LEFT_OUT and not f.startswith("config-"))
            self.files += [Path(base) / n for n in names if n.endswith(".py") and not n.startswith("_sysconfigdata")]
        self.files.sort()
        if not self.files:
            raise DataError(
                str(self.root),
                "holds no Python sources (this installation keeps only compiled ones)",
                hint="give text of your own: data.source: text and data.path",
            )

    def documents(self) -> Iterator[Document]:
        """One document per file."""
        self.skipped = 0
        for file in self.files:
            try:
                text = file.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                self.skipped += 1
                continue
            except OSError as error:
                raise DataError(str(file), f"cannot be read ({error.strerror})") from error
            yield Document(file.relative_to(self.root).as_posix(), text)

    def signature(self) -> list[Any] | None:
        """Python's version and file times."""
        return ["python-stdlib", sys.version, stat_signature(self.files, self.root)]


class MemorySource(Source):
    """A list of strings."""

    name = "data.documents"
    split_by_text = True

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def documents(self) -> Iterator[Document]:
        """One document per string."""
        for index, text in enumerate(self.texts):
            yield Document(str(index), text)

    def signature(self) -> list[Any] | None:
        """None: the text is at hand."""
        return None


def open_source(options: DataOptions, *, validation: bool = False) -> Source:
    """The source that ``options`` name; with ``validation``, the one at ``validation_path``.

    Raises:
        DataError: nothing is there, or a package is missing.
    """
    path = (options.validation_path if validation else options.path) or ""
    match options.source:
        case "python-stdlib":
            return StdlibSource()
        case "text":
            return TextSource(path)
        case "memory":
            return MemorySource(options.documents or ())
        case _:
            from headway.data.records import open_records

            return open_records(options, path)
