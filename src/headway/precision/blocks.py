"""Formats that come with their groups and scales (MX, NVFP4), and one table of every name.

Source: OCP Microscaling Formats (MX) 1.0, section 5 (blocks of 32 with one E8M0 scale) and 6.3 (conversion); NVFP4 as
NVIDIA describes it: blocks of 16 E2M1 with an E4M3 scale and an fp32 scale of the tensor.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from headway.core.errors import HeadwayError, nearest
from headway.precision.formats import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    FORMATS,
    MXINT8_ELEMENT,
    FixedFormat,
    Format,
)
from headway.precision.granularity import Granularity
from headway.precision.scales import Rule, Scale


@dataclass(frozen=True)
class BlockFormat:
    """An element format, the groups it is used in, and how their scales are chosen and stored."""

    name: str
    element: Format
    size: int
    scale: Scale

    def granularity(self, dim: int = -1, pad: bool = False) -> Granularity:
        """Groups along ``dim``."""
        return Granularity.group(self.size, dim, pad)

    def with_rule(self, rule: Rule) -> BlockFormat:
        """The same with another choice of scale, such as ``rceil`` for training."""
        return replace(self, scale=replace(self.scale, rule=rule))

    @property
    def bits(self) -> float:
        """Bits for each number, scales of whole blocks included."""
        return self.element.bits + 8 / self.size

    def __str__(self) -> str:
        return self.name


def mx(name: str, element: Format, rule: Rule = "floor", size: int = 32) -> BlockFormat:
    """Blocks of ``size`` with one power of two as scale, in E8M0."""
    return BlockFormat(name, element, size, Scale(rule, "e8m0"))


BLOCK_FORMATS: dict[str, BlockFormat] = {
    block.name: block
    for block in (
        mx("mxfp8_e4m3", E4M3),
        mx("mxfp8_e5m2", E5M2),
        mx("mxfp6_e2m3", E2M3),
        mx("mxfp6_e3m2", E3M2),
        mx("mxfp4", E2M1),
        mx("mxint8", MXINT8_ELEMENT),
        BlockFormat("nvfp4", E2M1, 16, Scale("absmax", "e4m3", tensor=True)),
    )
}


def format_named(name: str | Format | BlockFormat) -> Format | BlockFormat:
    """``e4m3``, ``int8``, ``mxfp4``, ``nvfp4`` ..., or ``fixed<2,14>`` for 2 integer (with sign) and 14 fraction bits.

    Raises:
        HeadwayError: no such name, with the nearest that there is.
    """
    if isinstance(name, Format | BlockFormat):
        return name
    fixed = re.fullmatch(r"fixed<(\d+),(\d+)>", str(name))
    if fixed:
        return FixedFormat.make(str(name), int(fixed[1]) + int(fixed[2]), int(fixed[2]))
    found = FORMATS.get(name) or BLOCK_FORMATS.get(name)
    if found is None:
        hint = nearest(str(name), [*FORMATS, *BLOCK_FORMATS, "fixed<2,14>"])
        raise HeadwayError("format", "is not known", got=name, hint=hint)
    return found
