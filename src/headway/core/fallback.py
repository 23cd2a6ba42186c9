"""The one way in which anything in Headway may fall back to something slower or lesser."""

from __future__ import annotations

import sys
from contextvars import ContextVar
from dataclasses import dataclass, field

from headway.core.errors import HeadwayError


@dataclass
class FallbackLog:
    """The fallbacks of one run; ``strict`` turns the first of them into an error."""

    strict: bool = False
    entries: list[dict[str, str]] = field(default_factory=list)


_current: ContextVar[FallbackLog | None] = ContextVar("headway_fallbacks", default=None)


def use_log(log: FallbackLog | None) -> None:
    """Record the fallbacks of this context in ``log`` from now on."""
    _current.set(log)


def current() -> FallbackLog | None:
    """The log of this context, for whoever lets several runs take turns."""
    return _current.get()


def entries() -> list[dict[str, str]]:
    """The fallbacks that this context has seen so far."""
    log = _current.get()
    return list(log.entries) if log else []


def fallback(what: str, why: str, cost: str) -> None:
    """Say once that ``what`` replaces what was asked for, why, and at what cost.

    Raises:
        HeadwayError: the run is ``strict``.
    """
    log = _current.get()
    entry = {"what": what, "why": why, "cost": cost}
    if log is not None:
        if log.strict:
            raise HeadwayError(what, f"is a fallback ({why}; {cost})", hint="strict: true allows none")
        if entry in log.entries:
            return
        log.entries.append(entry)
    print(f"headway: fallback: {what}, because {why}; it costs {cost}", file=sys.stderr)
