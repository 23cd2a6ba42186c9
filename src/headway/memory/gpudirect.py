"""Files that a GPU writes and reads itself, without a copy in host memory: GPUDirect Storage through kvikio."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headway.core.errors import HeadwayError
from headway.memory.backends import FileBackend, Stored, as_bytes


def disk_backend(folder: str | Path, verify: bool = True) -> FileBackend:
    """The way to files that suits this machine: straight from the GPU where there is one, kvikio is installed and no
    checksum is asked for, which needs the bytes in host memory; through host memory otherwise."""
    if not verify and torch.cuda.is_available() and importlib.util.find_spec("kvikio") is not None:
        return GPUDirectBackend(folder)
    return FileBackend(folder, verify)


class GPUDirectBackend(FileBackend):
    """`FileBackend` whose files of CUDA tensors are moved by kvikio; others go the usual way. Keeps no checksums."""

    name = "disk, GPUDirect"

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder, verify=False)
        self._kvikio: Any = importlib.import_module("kvikio")

    def on_device(self, tensor: Tensor) -> bool:
        """Whether kvikio is to move it."""
        return tensor.is_cuda and tensor.numel() > 0

    def write(self, tensor: Tensor) -> Stored:
        """Write a new file.

        Raises:
            OSError: the disk is full or fails; no file is left.
        """
        if not self.on_device(tensor):
            return super().write(tensor)
        source = as_bytes(tensor)
        path = self.new_path()
        try:
            with self._kvikio.CuFile(path, "w") as file:
                written = file.write(source)
            if written != source.numel():
                raise OSError(f"{path} took {written} bytes of {source.numel()}")
        except RuntimeError as error:  # what kvikio raises for the system's errors
            path.unlink(missing_ok=True)
            raise OSError(f"{path} cannot be written: {error}") from error
        except OSError:
            path.unlink(missing_ok=True)
            raise
        self.count(source.numel())
        return Stored(path, source.numel())

    def read(self, stored: Stored, into: Tensor) -> None:
        """Read a file back.

        Raises:
            HeadwayError: the file is shorter than it was, or cannot be read.
        """
        if not self.on_device(into):
            return super().read(stored, into)
        try:
            held = stored.place.stat().st_size
            with self._kvikio.CuFile(stored.place, "r") as file:
                got = file.read(as_bytes(into)) if held >= stored.nbytes else held
        except (OSError, RuntimeError) as error:
            raise HeadwayError(str(stored.place), f"cannot be read back ({error})") from error
        if got < stored.nbytes:
            raise HeadwayError(str(stored.place), f"holds {got} bytes of {stored.nbytes}", hint="the drive lost data")
