"""A table of tensors in the format of torch.distributed.checkpoint (DCP), with checksums, read without a template.

The files are what DCP's own ``FileSystemWriter`` makes, and its tools (``dcp.load``, ``dcp_to_torch_save``) read them.
No process group is needed: the table is one process's.
"""

from __future__ import annotations

import os
import pickle
import threading
import uuid
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from headway.core.errors import CheckpointError
from headway.resilience.manifest import DamagedError, HashedFile, raise_errors, write_bytes

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
    with _damage(folder):
        reader = _Reader(folder)
        index = reader.read_metadata().state_dict_metadata
        tensors = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in index.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        with _quiet():
            dcp.load(cast(Any, tensors), storage_reader=reader, no_dist=True)
    return tensors


def fill_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Read ``tensors`` in place, each DTensor its own shards, however many processes wrote them.

    Raises:
        CheckpointError: the checkpoint holds another set of tensors, or other shapes.
        DamagedError: DCP cannot make sense of the files.
    """
    with _damage(folder):
        reader = _Reader(folder)
        index = {
            key: entry
            for key, entry in reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
    if missing := tensors.keys() - index.keys():
        raise CheckpointError(str(folder), f"does not hold {', '.join(sorted(missing)[:4])}")
    for key, tensor in tensors.items():
        if tensor.shape != index[key].size:
            raise CheckpointError(str(folder), f"holds {key} in another shape: {tuple(index[key].size)}",
                                  expected=str(tuple(tensor.shape)))  # fmt: skip
    with _damage(folder), _quiet(), torch.no_grad():
        dcp.load(cast(Any, tensors), storage_reader=reader, no_dist=True)


@contextmanager
def _damage(folder: Path) -> Iterator[None]:
    """What DCP and pickle raise over files that are not what was written."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, AttributeError, KeyError, TypeError, AssertionError, EOFError,
            pickle.UnpicklingError) as error:  # fmt: skip
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedError(str(folder), f"cannot be read ({reason})") from error


@dataclass(frozen=True)
class Item:
    """One box of a tensor, and where its bytes are."""

    key: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    dtype: str
    """Such as ``float32``."""
    offsets: tuple[int, ...]
    """Of the box in the whole tensor."""
    sizes: tuple[int, ...]
    file: str
    offset: int
    length: int
    """Bytes of what ``torch.save`` makes of the box, from ``offset`` on."""

    @classmethod
    def from_list(cls, values: list[Any]) -> Item:
        """From its fields as JSON has them."""
        fields: list[Any] = [tuple(value) if isinstance(value, list) else value for value in values]
        return cls(*fields)


def write_index(folder: Path, items: Iterable[Item]) -> HashedFile:
    """Write ``.metadata``, from which DCP finds every box of every tensor.

    Raises:
        CheckpointError: the boxes of a tensor do not fill it, or differ in shape or dtype.
        OSError: it cannot be written.
    """
    index: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for item in items:
        size, offsets = torch.Size(item.shape), torch.Size(item.offsets)
        place = MetadataIndex(item.key, offsets)
        if place in places:
            continue  # a copy of what another process holds
        properties = TensorProperties(dtype=getattr(torch, item.dtype))
        entry = index.setdefault(item.key, TensorStorageMetadata(properties, size, []))
        if (entry.size, entry.properties.dtype) != (size, properties.dtype):
            raise CheckpointError(item.key, "has another shape or dtype in another process")
        places[place] = _StorageInfo(item.file, item.offset, item.length)
        entry.chunks.append(ChunkStorageMetadata(offsets, torch.Size(item.sizes)))
    for key, entry in index.items():
        if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
            raise CheckpointError(key, "was not saved as a whole", hint="every process must save at the same step")
    metadata = Metadata(dict(index), {key: (key,) for key in index}, places, StorageMeta(save_id=uuid.uuid4().hex),
                        version=CURRENT_DCP_VERSION)  # fmt: skip
    return write_bytes(folder / METADATA, pickle.dumps(metadata))


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
