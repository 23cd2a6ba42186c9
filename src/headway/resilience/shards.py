"""One process's files of a checkpoint, written batch by batch as the copies arrive."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, cast

import torch

from headway.resilience.manifest import HashedFile, raise_errors
from headway.resilience.staging import Batch
from headway.resilience.tensors import Item


class Shards:
    """The files ``__RANK_NUMBER.distcp`` of one process: as many as write at the same time, none without tensors."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.files: list[HashedFile] = []
        self.items: list[Item] = []
        self._idle: list[HashedFile] = []
        self._lock = threading.Lock()

    def write(self, folder: Path, batch: Batch) -> None:
        """Append the batch's copies to a file that nobody is writing now.

        Raises:
            OSError: the disk is full or fails.
        """
        file = self._file(folder)
        items = []
        for piece, view in batch.views():
            offset = file.tell()
            torch.save(view, cast(Any, file))
            source, dtype = piece.source, str(view.dtype).removeprefix("torch.")
            items += [
                Item(key, source.shape, dtype, offsets, piece.sizes, file.path.name, offset, file.tell() - offset)
                for key, offsets in piece.names
            ]
            del view  # while it is alive its memory must be known as the host's, which ends with the next turn
        raise_errors([file])
        with self._lock:
            self._idle.append(file)
            self.items += items

    def _file(self, folder: Path) -> HashedFile:
        with self._lock:
            if self._idle:
                return self._idle.pop()
            file = HashedFile(folder / f"__{self.rank}_{len(self.files)}.distcp")
            self.files.append(file)
            return file

    def close(self) -> None:
        """Sync and close the files.

        Raises:
            OSError: what was written is not all on the disk.
        """
        for file in self.files:
            file.close()
        raise_errors(self.files)
