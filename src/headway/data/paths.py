"""Where user data is: the given path, then the same path under ``$HEADWAY_DATA``."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from headway.core.errors import DataError, nearest


def data_roots() -> list[Path]:
    """Folders in which a relative path is looked for, in order."""
    root = os.environ.get("HEADWAY_DATA")
    return [Path.cwd(), *([Path(root).expanduser()] if root else [])]


def locate(path: str) -> Path | None:
    """The file or folder that ``path`` names, or None."""
    given = Path(path).expanduser()
    candidates = [given] if given.is_absolute() else [root / given for root in data_roots()]
    return next((candidate for candidate in candidates if candidate.exists()), None)


def find_files(path: str, suffixes: tuple[str, ...] = ()) -> tuple[Path, list[Path]]:
    """The files that ``path`` (a file, a folder or a glob) names, sorted, and the folder their names are relative to.

    Args:
        suffixes: which files of a folder are meant; none means all. Hidden files and folders are left out.

    Raises:
        DataError: nothing is there.
    """
    found = locate(path)
    if found is not None and found.is_file():
        return found.parent, [found]
    if found is not None:
        files = [Path(folder) / name for folder, _, names in _walk(found) for name in names]
        files = sorted(file for file in files if not suffixes or file.suffix in suffixes)
        if not files:
            kind = f"{' or '.join('*' + s for s in suffixes)} file" if suffixes else "file"
            raise DataError(str(found), f"holds no {kind}")
        return found, files
    if glob.has_magic(path):
        expanded = str(Path(path).expanduser())
        for root in [Path("/")] if Path(expanded).is_absolute() else data_roots():
            hits = glob.glob(expanded, root_dir=root, recursive=True)  # noqa: PTH207 - follows links, skips hidden files
            files = sorted(file for file in (root / hit for hit in hits) if file.is_file())
            if files:
                return _fixed_part(root, expanded), files
        raise DataError(path, "matches no file", hint=looked_in(path))
    raise DataError(path, "does not exist", hint=looked_in(path))


def looked_in(path: str) -> str:
    """A hint: where ``path`` was looked for, and a file of nearly that name."""
    given = Path(path).expanduser()
    roots = [Path("/")] if given.is_absolute() else data_roots()
    where = "" if given.is_absolute() else f"looked in {' and '.join(map(str, roots))}"
    if where and len(roots) == 1:
        where += "; HEADWAY_DATA, a second place to look, is not set"
    folder = next((root / given.parent for root in roots if (root / given.parent).is_dir()), None)
    names = [entry.name for entry in folder.iterdir()] if folder else []
    near = nearest(given.name, names) if names else ""
    return "; ".join(part for part in (near if near.startswith("did you mean") else "", where) if part)


def _walk(folder: Path) -> list[tuple[str, list[str], list[str]]]:
    tree = []
    for base, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        tree.append((base, folders, [name for name in names if not name.startswith(".")]))
    return tree


def _fixed_part(root: Path, pattern: str) -> Path:
    """The folder before the first wildcard: names relative to it do not change when the tree moves."""
    fixed = []
    for part in Path(pattern).parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return root.joinpath(*fixed)
