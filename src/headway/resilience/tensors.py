"""A table of tensors in the format of torch.distributed.checkpoint (DCP), with checksums, read without a template.

The files are what DCP's own ``FileSystemWriter`` makes, and its tools (``dcp.load``, ``dcp_to_torch_save``) read them.
No process group is needed: the table is one process's.
"""

from __future__ import annotations

import os
import pickle
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from headway.resilience.manifest import DamagedError, HashedFile, raise_errors

METADATA = ".metadata"
_FILE_BYTES = 32 << 20  # a table of several times this is split over files, which are hashed in parallel
_MAX_FILES = 8


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> list[HashedFile]:
    """Write ``tensors`` (any device and dtype) into ``folder``; the files are synced, the folder is not.

    Raises:
        OSError: a file cannot be written.
    """
    size = sum(tensor.nbytes for tensor in tensors.values())
    count = max(1, min(_MAX_FILES, os.cpu_count() or 1, size // _FILE_BYTES, len(tensors)))
    writer = _Writer(folder, sync_files=False, thread_count=count)
    with _quiet():
        metadata = dcp.save(cast(Any, tensors), storage_writer=writer, no_dist=True)
    raise_errors(writer.files)
    # DCP loses what goes wrong in its threads; the index it made tells.
    if missing := tensors.keys() - {index.fqn for index in metadata.storage_data}:
        raise RuntimeError(f"torch.distributed.checkpoint did not write {', '.join(sorted(missing)[:4])}")
    return writer.files


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors in ``folder``, on the CPU.

    Raises:
        DamagedError: DCP cannot make sense of the files.
    """
    try:
        reader = _Reader(folder)
        index = reader.read_metadata().state_dict_metadata
        tensors = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in index.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        with _quiet():
            dcp.load(cast(Any, tensors), storage_reader=reader, no_dist=True)
    except (OSError, RuntimeError, ValueError, AttributeError, KeyError, TypeError, AssertionError, EOFError,
            pickle.UnpicklingError) as error:  # fmt: skip
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedError(str(folder), f"cannot be read ({reason})") from error
    return tensors


class _Files(FileSystem):
    """Hands out files that hash themselves, and remembers them."""

    def __init__(self) -> None:
        self.files: list[HashedFile] = []
        self._lock = threading.Lock()

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with HashedFile(Path(path)) as file:
            with self._lock:
                self.files.append(file)
            yield file

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        for file in self.files:
            if file.path == Path(path):
                file.path = Path(new_path)


class _Writer(dcp.FileSystemWriter):
    """DCP's writer with checksums, and without this machine's paths in what it writes."""

    def __init__(self, path: Path, **options: Any) -> None:
        super().__init__(path, **options)
        self.fs = _Files()

    @property
    def files(self) -> list[HashedFile]:
        return cast(_Files, self.fs).files

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta(save_id=self.save_id)


class _Reader(dcp.FileSystemReader):
    """DCP's reader, whose index is unpickled without running anything but DCP's own records."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / METADATA).open("rb") as file:
            metadata: Metadata = _IndexUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    """Reads DCP's ``.metadata``, a pickle, and refuses every class and function that is foreign to such an index."""

    _ALLOWED = frozenset(
        {
            ("collections", "OrderedDict"),
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.distributed.checkpoint.metadata", "Metadata"),
            ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
            ("torch.distributed.checkpoint.metadata", "StorageMeta"),
            ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
            ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
            ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
            ("torch.distributed.checkpoint.metadata", "TensorProperties"),
            ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
        }
    )

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its index names {module}.{name}, which does not belong there")


@contextmanager
def _quiet() -> Iterator[None]:
    """DCP as an ordinary function: no warning that there is no process group, and its errors as they were raised."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise cause from None
