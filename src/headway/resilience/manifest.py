"""The manifest of a checkpoint: what it must hold to be whole, and the checksums that prove it.

Checksums are taken of what was meant to be written, while it is written, so that a disk which lies is found out too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from headway.core.errors import CheckpointError
from headway.core.files import checksum

FORMAT = 1
MANIFEST = "manifest.json"


class DamagedError(CheckpointError):
    """A checkpoint, or a file of one, that does not hold what was saved; an older one may still be good."""


class HashedFile:
    """A file being written, hashed on the way and synced to disk when it is closed.

    The first failure to write is kept in ``error`` and the rest of the bytes are dropped: writers in native code and in
    threads do not pass an ``OSError`` on, so whoever made the file looks there when they are through.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.bytes = path, 0
        self.error: OSError | None = None
        self._digest = hashlib.blake2b(digest_size=16)
        self._file = path.open("wb", buffering=1 << 20)

    def write(self, data: bytes | memoryview) -> int:
        """Write ``data`` and return its length in bytes."""
        size = memoryview(data).nbytes
        self._digest.update(data)
        self.bytes += size
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        return size

    def tell(self) -> int:
        """Bytes written so far."""
        return self.bytes

    def flush(self) -> None:
        """Do nothing: the file is flushed once, when it is closed."""

    def close(self) -> None:
        """Flush and sync; what fails is kept in ``error``."""
        if self._file.closed:
            return
        try:
            if self.error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as error:
            self.error = error
        try:
            self._file.close()
        except OSError as error:
            self.error = self.error or error

    def entry(self) -> dict[str, Any]:
        """The file's line in the manifest."""
        return {"bytes": self.bytes, "blake2b": self._digest.hexdigest()}

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def raise_errors(files: Iterable[HashedFile]) -> None:
    """Raise the first ``OSError`` that any of ``files`` met."""
    for file in files:
        if file.error is not None:
            raise file.error


def write_bytes(path: Path, data: bytes) -> HashedFile:
    """Write, hash and sync a small file.

    Raises:
        OSError: it cannot be written.
    """
    with HashedFile(path) as file:
        file.write(data)
    raise_errors([file])
    return file


def write_manifest(
    folder: Path,
    step: int,
    files: Iterable[HashedFile],
    versions: dict[str, str],
    others: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Write ``manifest.json``, which makes the checkpoint in ``folder`` complete; it must be the last file.

    Args:
        others: the lines of files that other processes wrote.

    Raises:
        OSError: it cannot be written.
    """
    entries = {file.path.name: file.entry() for file in files} | (others or {})
    content = {"format": FORMAT, "step": step, **versions, "files": dict(sorted(entries.items()))}
    write_bytes(folder / MANIFEST, _render(content))


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of the checkpoint in ``folder``, after every file was read and found to be as it was written.

    Raises:
        DamagedError: naming the file that is missing, cut short, changed or unreadable.
        CheckpointError: it was written by a newer Headway.
    """
    content = read_manifest(folder)
    files = content["files"]
    # Large files first, so that no thread starts the largest one when the others are through.
    paths = sorted((folder / name for name in files), key=lambda path: -files[path.name]["bytes"])
    with ThreadPoolExecutor(max(1, min(len(paths), os.cpu_count() or 1, 8))) as pool:
        for path, problem in zip(paths, pool.map(lambda path: _problem(path, files[path.name]), paths), strict=True):
            if problem:
                raise DamagedError(str(path), problem)
    return content


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest alone, itself checked; the files are not looked at.

    Raises:
        DamagedError: it is missing, unreadable or changed.
        CheckpointError: it was written by a newer Headway.
    """
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DamagedError(str(path), "is missing") from None
    except OSError as error:
        raise DamagedError(str(path), f"cannot be read ({error.strerror or error})") from None
    try:
        content = json.loads(data)
        own = content.pop("checksum")
        whole = _checksum(content) == own and _render(content) == data
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise DamagedError(str(path), "is damaged (it is not what was written)")
    if content["format"] != FORMAT:
        raise CheckpointError(
            str(path),
            f"has format {content['format']}",
            expected=str(FORMAT),
            hint="use the Headway version that wrote it",
        )
    return content


def _problem(path: Path, entry: dict[str, Any]) -> str:
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"is damaged ({size} bytes long instead of {entry['bytes']})"
        if checksum(path) != entry["blake2b"]:
            return "is damaged (its checksum is not the one in the manifest)"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return ""


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def _render(content: dict[str, Any]) -> bytes:
    return (json.dumps({**content, "checksum": _checksum(content)}, indent=2) + "\n").encode()
