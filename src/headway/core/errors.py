"""Errors that a user can act on: what is wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable
from typing import Any

_MISSING = object()


class HeadwayError(Exception):
    """A mistake or a damaged input: printed as one message, exit status 2, no traceback.

    Args:
        where: the recipe path (``methods.ema.decay``) or the file that is at fault.
        what: what is wrong with it, as the rest of a sentence.
        got: the offending value, if showing it helps.
        expected: what would have been right.
        hint: what to do.
    """

    def __init__(self, where: str, what: str = "", *, got: Any = _MISSING, expected: str = "", hint: str = "") -> None:
        self.where, self.what, self.expected, self.hint = where, what, expected, hint
        parts = [f"{where}: {what}" if what else where]
        if got is not _MISSING:
            parts.append(f"got {shown(got)}" if what else f": got {shown(got)}")
        if expected:
            parts.append(f"expected {expected}")
        message = ", ".join(parts).replace(", : ", ": ")
        if hint:  # a sentence of its own, unless it begins with a name such as `strict:` or model.safetensors
            word = hint.split()[0]
            message += f". {hint[0].upper() if word.rstrip(',;').isalpha() else hint[0]}{hint[1:]}"
        super().__init__(message)


class RecipeError(HeadwayError):
    """A recipe that cannot be run; ``where`` is the path of the key in the recipe."""


class MethodError(HeadwayError):
    """A method that cannot do what it was asked, or that would have changed nothing."""


class DataError(HeadwayError):
    """A source, tokenizer or token cache that is missing, empty, damaged or of the wrong kind."""


class ModelError(HeadwayError):
    """A model folder or configuration that cannot be used."""


class CheckpointError(HeadwayError):
    """A checkpoint that is missing, incomplete, damaged or of another run."""


class DivergedError(HeadwayError):
    """Training produced a loss or gradient that is not finite."""


class Interrupted(Exception):
    """Training was asked to stop by a signal; it finished its step and saved."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(f"stopped by {signal.Signals(signum).name}")


def shown(value: Any) -> str:
    """``repr(value)``, cut where it would bury the message."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:160]} ... ({len(text)} characters)"


def nearest(name: str, names: Iterable[str]) -> str:
    """``did you mean 'x'?`` or, where nothing is near, the list of the names there are."""
    names = sorted(names)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.55)
    if close:
        return f"did you mean {close[0]!r}?"
    return "there are: " + ", ".join(names) if names else "none are known here"


def require(module: str, extra: str, what: str) -> Any:
    """Import an optional dependency, or say in one line which extra brings it.

    Raises:
        HeadwayError: the module is not installed.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise HeadwayError(
            what, f"needs the package {module.split('.')[0]!r}", hint=f"`pip install 'headway[{extra}]'`"
        ) from error


def reason(error: BaseException) -> str:
    """An exception's cause in a few words: the system's own for an OSError, else its message or its kind."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the system, or torch on whatever device, ran out of memory."""
    said = str(error).lower()
    words = ("not enough memory", "out of memory", "cannot allocate memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(word in said for word in words)
