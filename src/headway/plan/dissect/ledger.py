"""The log of a grid: one line of JSON per measurement, appended only; a line that a kill cut short is passed over."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headway.core.meters import hardware, versions

Line = dict[str, Any]


def fingerprint(value: Any) -> str:
    """Twelve hexadecimal digits that name plain data."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=6).hexdigest()


def environment() -> dict[str, Any]:
    """The machine and the versions on which a measurement depends."""
    return {**hardware(), **versions()}


class Log:
    """A file of lines.

    Args:
        path: made when the first line is appended.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, line: Line) -> None:
        """Write one line and force it to the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            if file.tell() and not self._ends_whole(file):
                file.write(b"\n")
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def _ends_whole(file: Any) -> bool:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"

    def __iter__(self) -> Iterator[Line]:
        """The lines in the order in which they were written."""
        if not self.path.is_file():
            return
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                yield line
