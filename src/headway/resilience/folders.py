"""The folders of a run's checkpoints: one appears, whole, under its name, or not at all.

    step-00000100                  a complete checkpoint
    .step-00000100.tmp-4711        being written by process 4711
    .step-00000100.replaced-4711   the old one, while a new one of the same step takes its name; until then it counts
    .step-00000100.removed-4711    being removed

A writer holds a file lock on its temporary folder, which ends with the process however it ends: so a killed writer's
folder is known from a living one's, also where process ids are used again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from headway.core.files import sync_folder

_NAME = re.compile(r"(?:step-(\d+)|\.step-(\d+)\.(tmp|replaced|removed)-\d+)")


def folder_name(step: int) -> str:
    """100 -> ``step-00000100``."""
    return f"step-{step:08d}"


def _parse(path: Path) -> tuple[int, str] | None:
    match = _NAME.fullmatch(path.name)
    return (int(match[1] or match[2]), match[3] or "") if match else None


def _listing(folder: Path) -> Iterator[tuple[int, str, Path]]:
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if (parsed := _parse(path)) and path.is_dir():
                yield (*parsed, path)


def checkpoints(folder: Path) -> dict[int, Path]:
    """Step -> folder of every checkpoint, the newest first."""
    found: dict[int, Path] = {}
    for step, kind, path in _listing(folder):
        if kind == "" or (kind == "replaced" and step not in found):
            found[step] = path
    return dict(sorted(found.items(), reverse=True))


@contextmanager
def new_folder(folder: Path, step: int) -> Iterator[Path]:
    """A temporary folder that takes the name of ``step``'s checkpoint if the block ends well, and vanishes if not.

    Raises:
        OSError: it cannot be made or renamed; everything is then as it was.
    """
    temporary = folder / f".{folder_name(step)}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    made = not folder.exists()
    temporary.mkdir(parents=True)
    lock = os.open(temporary, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks; `_in_use` then goes by the process id
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if made:
            sync_folder(folder.parent)
        yield temporary
        sync_folder(temporary)
        _publish(temporary, folder / folder_name(step))
    finally:
        os.close(lock)
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, final: Path) -> None:
    old = final.with_name(f".{final.name}.replaced-{os.getpid()}")
    replaces = final.exists()
    if replaces:
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    try:
        temporary.rename(final)
    except OSError:
        if replaces:
            old.rename(final)
        raise
    sync_folder(final.parent)
    if replaces:
        shutil.rmtree(old, ignore_errors=True)


def prune(folder: Path, keep: int, latest: int, ignore: Collection[Path] = ()) -> None:
    """Remove all but the ``keep`` newest checkpoints; ``latest`` always stays, those of ``ignore`` do not count."""
    others = [step for step, path in checkpoints(folder).items() if path not in ignore and step != latest]
    kept = {latest, *others[: keep - 1]}
    oldest = min(kept)
    for step, path in checkpoints(folder).items():
        if step not in kept and (path not in ignore or step < oldest):
            remove(path)


def remove(path: Path) -> None:
    """Remove a checkpoint, as far as the file system lets it."""
    # Renamed first: a removal that is cut short must not leave a checkpoint that looks damaged.
    parsed = _parse(path)
    hidden = path.with_name(f".{folder_name(parsed[0] if parsed else 0)}.removed-{os.getpid()}")
    with contextlib.suppress(OSError):
        path.rename(hidden)
        shutil.rmtree(hidden)


def clean(folder: Path) -> None:
    """Remove what killed writers left behind, and give a half-replaced checkpoint its name back."""
    with contextlib.suppress(OSError):  # somebody else's read-only run; the rests do no harm
        found = list(_listing(folder))
        written = [path for _, kind, path in found if kind == "tmp"]
        living = [path for path in written if _in_use(path)]
        for path in written:
            if path not in living:
                shutil.rmtree(path, ignore_errors=True)
        for step, kind, path in found:
            final = folder / folder_name(step)
            if living or kind in ("", "tmp"):
                continue
            if kind == "replaced" and not final.exists():
                path.rename(final)
                sync_folder(folder)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _in_use(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(path.name.rpartition("-")[2]), 0)
            return True
    finally:
        os.close(descriptor)
    return False
