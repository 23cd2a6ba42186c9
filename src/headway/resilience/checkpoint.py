"""Checkpoints of one process, written while training waits: complete or absent, the last few kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from headway.core.options import Options as BaseOptions
from headway.core.units import Count
from headway.resilience.folders import clean, folder_name, new_folder, prune
from headway.resilience.manifest import write_bytes, write_manifest
from headway.resilience.reading import STATE, SavedStates, cannot_be_written


class PlainCheckpointer(SavedStates):
    """Saves a nested state of tensors and plain data (see ``flatten``) in ``folder``, one sub-folder a step.

    A sub-folder holds the tensors in the format of torch.distributed.checkpoint (``*.distcp``, ``.metadata``),
    everything else in ``state.json``, and ``manifest.json`` with the size and BLAKE2b checksum of each. It is written
    under a temporary name, synced and renamed, so that a kill or a power cut at any moment leaves the checkpoints
    there were. Saving a step again replaces its checkpoint. One process at a time writes to a folder; any number may
    read.

    Args:
        options: how often and how many.
        folder: made when the first checkpoint is saved. What killed writers left in it is removed.

    Raises:
        CheckpointError: ``folder`` is a file.
    """

    class Options(BaseOptions):
        """When and how a run is saved."""

        mode: Literal["plain"] = "plain"
        """How: `plain` writes everything from one process before training goes on."""
        every: Count | None = Field(None, ge=1)
        """Optimizer steps between checkpoints; `null` saves only at the end and when interrupted."""
        keep: int = Field(2, ge=1)
        """How many of the newest checkpoints stay; one at least is wise as a spare for a damaged newest."""

    def __init__(self, options: Options, folder: Path) -> None:
        super().__init__(folder)
        self.options = options
        clean(self.folder)

    @property
    def every(self) -> int | None:
        """Optimizer steps between checkpoints; None: only at the end and on interruption."""
        return self.options.every

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Save ``state`` as the checkpoint of ``step``, then remove those that are no longer kept.

        Raises:
            CheckpointError: the state holds what cannot be saved, or the disk is full or refuses; earlier checkpoints
            stay.
        """
        from headway.core.meters import versions
        from headway.resilience.flatten import flatten
        from headway.resilience.tensors import write_tensors

        final = self.folder / folder_name(step)
        plain, tensors = flatten(state)
        try:
            with new_folder(self.folder, step) as temporary:
                files = write_tensors(temporary, tensors)
                files.append(write_bytes(temporary / STATE, json.dumps(plain, allow_nan=False).encode()))
                write_manifest(temporary, step, files, versions())
        except OSError as error:
            raise cannot_be_written(final, error) from error
        self._damaged.discard(final)
        prune(self.folder, self.options.keep, step, self._damaged)
        return final

    def fence(self) -> None:
        """Whatever was saved has been read."""

    def wait(self) -> None:
        """Whatever was saved is on the disk."""

    def report(self) -> dict[str, Any]:
        """Nothing is kept of it: training stood still meanwhile."""
        return {}

    def close(self) -> None:
        """Nothing is open between two calls."""
