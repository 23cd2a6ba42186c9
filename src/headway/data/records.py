"""Sources whose documents are a field of records: JSON lines, Parquet, Hugging Face ``datasets``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headway.core.errors import DataError, nearest, require
from headway.data.options import DataOptions
from headway.data.paths import locate, looked_in
from headway.data.sources import Document, FileSource, Source, not_utf8, stat_signature


def open_records(options: DataOptions, path: str) -> Source:
    """The source of records at ``path``.

    Raises:
        DataError: nothing is there, or a package is missing.
    """
    match options.source:
        case "jsonl":
            return JsonlSource(path, options.field)
        case "parquet":
            return ParquetSource(path, options.field)
        case _:
            return DatasetsSource(path, options.field, options.split, options.subset)


def _no_field(where: str, field: str, fields: list[str]) -> DataError:
    near = nearest(field, fields)
    hint = f"set data.field; {near}" if fields else ""
    return DataError(where, f"has no field {field!r}", expected=f"one of its fields: {', '.join(fields)}", hint=hint)


def _text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise DataError(where, f"holds {kind} in its field {field!r}", expected="a string")
    return value


class JsonlSource(FileSource):
    """One JSON object per line; blank lines are skipped."""

    split_by_text = True

    def __init__(self, path: str, field: str) -> None:
        super().__init__("jsonl", path, (".jsonl", ".ndjson"))
        self.field = field

    def documents(self) -> Iterator[Document]:
        """One document per line."""
        for file in self.files:
            try:
                yield from self._lines(file)
            except OSError as error:
                raise DataError(str(file), f"cannot be read ({error.strerror})") from error

    def _lines(self, file: Path) -> Iterator[Document]:
        position = 0
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    text = line.decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise not_utf8(file, error, position) from None
                position += len(line)
                if text and not text.isspace():
                    yield Document(f"{self.relative(file)}:{number}", self._read(text, f"{file}:{number}"))

    def _read(self, text: str, where: str) -> str:
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(where, f"is not JSON ({error.msg.removesuffix(' at')} at column {error.colno})") from None
        except RecursionError:
            raise DataError(where, "is nested too deeply") from None
        if not isinstance(record, dict):
            raise DataError(
                where, f"holds a {type(record).__name__}", expected=f"an object with the field {self.field!r}"
            )
        if self.field not in record:
            raise _no_field(where, self.field, list(record))
        return _text(record[self.field], self.field, where)

    def signature(self) -> list[Any] | None:
        """File times and the field."""
        return [*(super().signature() or []), self.field]


class ParquetSource(FileSource):
    """A string column of Parquet files; needs the extra ``parquet``."""

    split_by_text = True

    def __init__(self, path: str, field: str) -> None:
        super().__init__("parquet", path, (".parquet",))
        self.field = field

    def documents(self) -> Iterator[Document]:
        """One document per row."""
        parquet = require("pyarrow.parquet", "parquet", "data.source: parquet")
        arrow = require("pyarrow", "parquet", "data.source: parquet")
        for file in self.files:
            try:
                with parquet.ParquetFile(file) as table:
                    schema = table.schema_arrow
                    if self.field not in schema.names:
                        raise _no_field(str(file), self.field, list(schema.names))
                    row = 0
                    for batch in table.iter_batches(batch_size=1024, columns=[self.field]):
                        for value in batch.column(0).to_pylist():
                            where = f"{file}, row {row}"
                            yield Document(f"{self.relative(file)}:{row}", _text(value, self.field, where))
                            row += 1
            except (arrow.ArrowException, OSError) as error:
                raise DataError(str(file), f"is not a readable Parquet file ({error})") from error

    def signature(self) -> list[Any] | None:
        """File times and the field."""
        return [*(super().signature() or []), self.field]


class DatasetsSource(Source):
    """A column of a Hugging Face data set: a ``save_to_disk`` folder, a folder of data files, or a name on the Hub."""

    split_by_text = True

    def __init__(self, path: str, field: str, split: str, subset: str | None) -> None:
        self.name, self.field, self.split, self.subset = path, field, split, subset
        self.folder = locate(path)
        self._rows: Any = None
        if self.folder is None and (path.startswith((".", "/", "~")) or path.count("/") > 1):
            raise DataError(path, "does not exist", hint=looked_in(path))

    def _saved(self) -> bool:
        return self.folder is not None and any((self.folder / n).exists() for n in ("dataset_dict.json", "state.json"))

    def _load(self) -> Any:
        if self._rows is not None:
            return self._rows
        library = require("datasets", "hf", "data.source: datasets")
        try:
            if self._saved():
                loaded = library.load_from_disk(str(self.folder))
            else:
                loaded = library.load_dataset(str(self.folder or self.name), self.subset)
        except Exception as error:  # the library raises whatever its readers and the network raise
            detail = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            hint = "" if self.folder else f"it is no folder here either ({looked_in(self.name)})"
            raise DataError(self.name, f"cannot be loaded as a data set ({detail})", hint=hint) from error
        if hasattr(loaded, "keys"):
            if self.split not in loaded:
                raise DataError(
                    self.name, f"has no split {self.split!r}", hint=f"set data.split; {nearest(self.split, loaded)}"
                )
            loaded = loaded[self.split]
        elif self.split != "train":
            raise DataError(self.name, f"is one table without splits, so there is no split {self.split!r}")
        if self.field not in loaded.column_names:
            raise _no_field(self.name, self.field, list(loaded.column_names))
        self._rows = loaded.select_columns([self.field])
        return self._rows

    def documents(self) -> Iterator[Document]:
        """One document per row."""
        for row, record in enumerate(self._load()):
            yield Document(str(row), _text(record[self.field], self.field, f"{self.name}, row {row}"))

    def signature(self) -> list[Any] | None:
        """File times, or the library's own fingerprint of a data set from the Hub."""
        kind = ["datasets", self.field, self.split, self.subset]
        if self.folder is not None:
            files = [self.folder] if self.folder.is_file() else sorted(f for f in self.folder.rglob("*") if f.is_file())
            return [*kind, stat_signature(files, self.folder)]
        files = sorted(Path(file["filename"]) for file in self._load().cache_files)
        return [*kind, self.name, stat_signature(files, files[0].parent)]
