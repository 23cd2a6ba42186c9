"""Sizes as people write them: ``5M`` tokens, ``64k``, ``2h``, ``6GiB``, ``5%``."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator

_COUNT = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip
_SECONDS = {"": 1.0, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _parse(text: Any, units: dict[str, Any], kind: str, examples: str) -> Any:
    if isinstance(text, bool) or text is None:
        raise ValueError(f"expected {kind} such as {examples}")
    if isinstance(text, int | float):
        return text
    match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)\s*([a-zA-Z]*)\s*", str(text))
    if not match or match[2].lower() not in units:
        raise ValueError(f"expected {kind} such as {examples}")
    return float(match[1].replace("_", "")) * units[match[2].lower()]


def count(text: Any) -> int:
    """``64k`` -> 64000, ``5M`` -> 5000000: a number of things, in powers of ten."""
    value = _parse(text, _COUNT, "a number", "1000, 64k, 5M or 1.5B")
    if value != int(value):
        raise ValueError("expected a whole number")
    return int(value)


def bytes_(text: Any) -> int:
    """``6GiB`` -> 6442450944, ``1kB`` -> 1000: a number of bytes."""
    return int(_parse(text, _BYTES, "a size in bytes", "512MiB, 6GiB or 2GB"))


def seconds(text: Any) -> float:
    """``2h`` -> 7200.0, ``90`` -> 90.0: a duration in seconds."""
    return float(_parse(text, _SECONDS, "a duration", "90s, 30min, 2h or 1d"))


def share(text: Any) -> float | int:
    """``5%`` -> 0.05 (a share of the run); a whole number stays a number of steps; so does ``2k``."""
    if isinstance(text, str) and text.strip().endswith("%"):
        try:
            return float(text.strip()[:-1]) / 100
        except ValueError:
            raise ValueError("expected a share such as 5% or a number of steps such as 100") from None
    if isinstance(text, float) and 0 <= text < 1:
        return text
    return count(text)


def human(value: float, unit: str = "") -> str:
    """1234567 -> ``1.23M``; with unit ``B``, powers of 1024: ``1.18MiB``."""
    base, names = (1024.0, ["", "Ki", "Mi", "Gi", "Ti"]) if unit == "B" else (1000.0, ["", "k", "M", "G", "T"])
    index = 0
    while abs(value) >= base and index < len(names) - 1:
        value, index = value / base, index + 1
    digits = 0 if index == 0 and value == int(value) else (2 if abs(value) < 10 else 1)
    return f"{value:.{digits}f}{names[index]}{unit}"


def human_seconds(value: float) -> str:
    """3725 -> ``1h02m``; 95 -> ``1m35s``; 8.25 -> ``8.2s``."""
    if value < 60:
        return f"{value:.1f}s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


Count = Annotated[int, BeforeValidator(count)]
Bytes = Annotated[int, BeforeValidator(bytes_)]
Seconds = Annotated[float, BeforeValidator(seconds)]
Share = Annotated[int | float, BeforeValidator(share)]
