"""Checkpoints of one process: complete or absent, checked when they are read, the last few kept."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from headway.core.errors import CheckpointError
from headway.core.fallback import fallback
from headway.core.options import Options as BaseOptions
from headway.core.units import Count
from headway.resilience.folders import checkpoints, clean, folder_name, new_folder, prune
from headway.resilience.manifest import DamagedError, verify, write_bytes, write_manifest

STATE = "state.json"


class PlainCheckpointer:
    """Saves a nested state of tensors and plain data (see ``flatten``) in ``folder``, one sub-folder a step.

    A sub-folder holds the tensors in the format of torch.distributed.checkpoint (``*.distcp``, ``.metadata``),
    everything else in ``state.json``, and ``manifest.json`` with the size and BLAKE2b checksum of each. It is written
    under a temporary name, synced and renamed, so that a kill or a power cut at any moment leaves the checkpoints
    there were. Saving a step again replaces its checkpoint.

    Loading needs no template. It reads ``.metadata``, a pickle of torch's, with an unpickler that knows only the
    classes of such an index, and tensors with ``torch.load(weights_only=True)``: no code of a checkpoint is run. The
    checksums find accidents, not forgeries. One process at a time writes to a folder; any number may read.

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
        self.options, self.folder = options, Path(folder)
        self._damaged: set[Path] = set()
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(str(self.folder), "is a file", expected="a folder for checkpoints")
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
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = "make room on that disk" if full else "check that folder"
            raise CheckpointError(
                str(final),
                f"cannot be written ({error.strerror or error})",
                hint=f"{remedy} and start the run again: earlier checkpoints are untouched",
            ) from error
        self._damaged.discard(final)
        prune(self.folder, self.options.keep, step, self._damaged)
        return final

    def load(self) -> dict[str, Any] | None:
        """The state of the newest complete checkpoint, or None if there is none; tensors are on the CPU.

        A damaged one is passed over, through ``fallback``, for the one before it.

        Raises:
            CheckpointError: there are checkpoints and all are damaged, or the newest was written by a newer Headway.
        """
        problems: list[str] = []
        found = checkpoints(self.folder)
        for step, path in found.items():
            try:
                state = self.load_from(path)
            except DamagedError as error:
                if not path.exists():
                    return self.load()  # the run that writes here has just removed it, and so has a newer one
                self._damaged.add(path)
                problems.append(str(error))
                continue
            if problems:
                lost = max(found) - step
                cost = f"{lost} steps of training"
                fallback(f"the checkpoint {path.name}", "; ".join(problems), cost)
            return state
        if problems:
            raise CheckpointError(
                str(self.folder),
                f"holds no checkpoint that can be read ({'; '.join(problems)})",
                hint="restore one from a copy, or start the run from the beginning with --fresh",
            )
        return None

    def load_from(self, path: str | Path) -> dict[str, Any]:
        """The state of the checkpoint in the folder ``path``, after all of its files were verified.

        Raises:
            CheckpointError: there is none, or it is damaged, which the message explains.
        """
        from headway.resilience.flatten import unflatten
        from headway.resilience.tensors import read_tensors

        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(str(path), "there is no such checkpoint")
        manifest = verify(path)
        if STATE not in manifest["files"]:
            raise DamagedError(str(path), f"has no {STATE}")
        tensors = read_tensors(path)
        try:
            return unflatten(json.loads((path / STATE).read_bytes()), tensors)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedError(str(path / STATE), f"cannot be read ({error})") from error

    def fence(self) -> None:
        """Whatever was saved has been read."""

    def wait(self) -> None:
        """Whatever was saved is on the disk."""

    def close(self) -> None:
        """Nothing is open between two calls."""
