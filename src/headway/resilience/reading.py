"""Reading checkpoints back: what every mode of saving shares, whoever wrote them."""

from __future__ import annotations

import errno
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from headway.core.errors import CheckpointError
from headway.core.fallback import fallback
from headway.resilience.folders import checkpoints
from headway.resilience.manifest import DamagedError, verify

STATE = "state.json"


class SavedStates:
    """The checkpoints in a folder, to read: one sub-folder a step, whole and verified or passed over.

    Loading needs no template. It reads ``.metadata``, a pickle of torch's, with an unpickler that knows only the
    classes of such an index, and tensors with ``torch.load(weights_only=True)``: no code of a checkpoint is run. The
    checksums find accidents, not forgeries.

    Args:
        folder: of the checkpoints; it need not exist.

    Raises:
        CheckpointError: ``folder`` is a file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._damaged: set[Path] = set()
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(str(self.folder), "is a file", expected="a folder for checkpoints")

    def load(self) -> dict[str, Any] | None:
        """The state of the newest complete checkpoint, or None if there is none; tensors are on the CPU.

        A damaged one is passed over, through ``fallback``, for the one before it.

        Raises:
            CheckpointError: there are checkpoints and all are damaged, or the newest was written by a newer Headway.
        """
        found = self._newest()
        return found and found[1]

    def load_from(self, path: str | Path) -> dict[str, Any]:
        """The state of the checkpoint in the folder ``path``, after all of its files were verified.

        Raises:
            CheckpointError: there is none, or it is damaged, which the message explains.
        """
        return self._read(Path(path))

    def _newest(self, into: Any = None, optional: Collection[str] = ()) -> tuple[Path, dict[str, Any]] | None:
        problems: list[str] = []
        found = checkpoints(self.folder)
        for step, path in found.items():
            try:
                state = self._read(path, into, optional)
            except DamagedError as error:
                if not path.exists():
                    return self._newest(
                        into, optional
                    )  # the run that writes here has just removed it, and so has a newer one
                self._damaged.add(path)
                problems.append(str(error))
                continue
            if problems:
                lost = max(found) - step
                cost = f"{lost} steps of training"
                fallback(f"the checkpoint {path.name}", "; ".join(problems), cost)
            return path, state
        if problems:
            raise CheckpointError(
                str(self.folder),
                f"holds no checkpoint that can be read ({'; '.join(problems)})",
                hint="restore one from a copy, or start the run from the beginning with --fresh",
            )
        return None

    def _read(
        self, path: Path, into: Any = None, optional: Collection[str] = (), verified: bool = False
    ) -> dict[str, Any]:
        """The state in ``path``; its tensors those of ``into``, filled, if that is given."""
        from headway.resilience.flatten import flatten, unflatten
        from headway.resilience.tensors import fill_tensors, read_tensors

        if not path.is_dir():
            raise CheckpointError(str(path), "there is no such checkpoint")
        if not verified and STATE not in verify(path)["files"]:
            raise DamagedError(str(path), f"has no {STATE}")
        try:
            plain = json.loads((path / STATE).read_bytes())
            if into is None:
                return unflatten(plain, read_tensors(path))
            saved = {key: {name: v for name, v in into[key].items() if name in plain[key]} for key in optional}
            tensors = flatten({**into, **saved}, sharded=True)[1]
            fill_tensors(path, tensors)
            return unflatten(plain, tensors, partial=True)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedError(str(path / STATE), f"cannot be read ({error})") from error


def cannot_be_written(path: Path, error: OSError, hint: str = "start the run again") -> CheckpointError:
    """What to tell of a checkpoint that the disk did not take."""
    remedy = "make room on that disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check that folder"
    return CheckpointError(str(path), f"cannot be written ({error.strerror or error})",
                           hint=f"{remedy} and {hint}: earlier checkpoints are untouched")  # fmt: skip
