"""Number formats as data: which number each code stands for.

A format is a finite table from codes (0 ... 2^bits - 1) to numbers, given by a rule (`decode`) and not by a dtype, so
that any of them can be enumerated, tested and emulated. Nothing here needs torch, but for `codes()`.

Sources: IEEE 754-2019, section 3 (binary formats: exponent, bias, subnormals); OCP 8-bit Floating Point Specification
(OFP8) 1.0, section 3 (E4M3 without infinity and with one NaN pattern, E5M2 as IEEE); OCP Microscaling Formats (MX) 1.0,
section 5 (E2M3, E3M2, E2M1, INT8 with six fraction bits, E8M0 scales); Gupta et al. 2015, section 3 (fixed point).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from headway.core.errors import HeadwayError

if TYPE_CHECKING:
    import torch

MAX_BITS = 16  # a table of 65536 numbers; more bits than that are no longer a format to emulate by its table

Specials = Literal["ieee", "fn", "fnuz", "none"]


@dataclass(frozen=True)
class Format:
    """What every format has: a name, a width, and a number for each code."""

    name: str
    bits: int

    has_inf = False
    has_nan = False

    def decode(self, code: int) -> float:
        """The number that ``code`` (0 ... 2^bits - 1) stands for; every one fits a Python float exactly."""
        return self.numbers[code]

    @cached_property
    def numbers(self) -> tuple[float, ...]:
        """``decode`` of every code, in the order of the codes."""
        return tuple(self.decode(code) for code in range(2**self.bits))

    @cached_property
    def max(self) -> float:
        """The largest finite number that an encoder may produce."""
        return max(number for number in self.numbers if math.isfinite(number))

    @cached_property
    def min(self) -> float:
        """The lowest finite number that an encoder may produce."""
        return min(number for number in self.numbers if math.isfinite(number))

    @cached_property
    def smallest(self) -> float:
        """The smallest positive number."""
        return min(number for number in self.numbers if number > 0)

    @property
    def exponent_of_max(self) -> int:
        """``floor(log2(max))``: the `emax` of the MX specification."""
        return math.frexp(self.max)[1] - 1

    @property
    def significant_bits(self) -> int | None:
        """Fraction bits of the numbers near `max`, or None where the format has no such regularity."""
        return None

    def codes(self, device: torch.device | str | None = None) -> torch.Tensor:
        """The whole table: fp64 [2^bits], NaN where a code is no number."""
        import torch

        return torch.tensor(self.numbers, dtype=torch.float64, device=device)

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles carry the rule, not the numbers computed from it."""
        return type(self), tuple(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class FloatFormat(Format):
    """Sign, exponent and mantissa, with subnormals and signed zeros.

    Args of `make`:
        exponent, mantissa: widths in bits; the code is sign, exponent, mantissa from the top down.
        bias: subtracted from the exponent field; default ``2^(exponent-1) - 1``, one more for ``fnuz``.
        specials: what is not a finite number.
            ``ieee``: the highest exponent is infinity (mantissa 0) and NaN; ``fn``: the code with all ones is NaN, no
            infinity; ``fnuz``: minus zero's code is the one NaN, no infinity; ``none``: every code is finite.
    """

    exponent: int
    mantissa: int
    bias: int
    specials: Specials

    @classmethod
    def make(
        cls, name: str, exponent: int, mantissa: int, bias: int | None = None, specials: Specials = "ieee"
    ) -> FloatFormat:
        """A format of your own.

        Raises:
            HeadwayError: widths that leave no format, or a bias whose numbers would not fit fp64.
        """
        if specials not in ("ieee", "fn", "fnuz", "none"):
            raise HeadwayError(name, "has no such specials", got=specials, expected="ieee, fn, fnuz or none")
        _whole(name, "exponent bits", exponent, 1, 8)
        _whole(name, "mantissa bits", mantissa, 0, 10)
        _whole(name, "bits altogether", 1 + exponent + mantissa, 2, MAX_BITS)
        if exponent == 1 and specials == "ieee":
            raise HeadwayError(name, "has no exponent left: IEEE's specials take the only one", hint="specials: none")
        if bias is None:
            bias = 2 ** (exponent - 1) - (0 if specials == "fnuz" else 1)
        _whole(name, "bias", bias, -512, 512)
        return cls(name, 1 + exponent + mantissa, exponent, mantissa, bias, specials)

    @property
    def has_inf(self) -> bool:  # type: ignore[override]
        """Whether an infinity can be written down."""
        return self.specials == "ieee"

    @property
    def has_nan(self) -> bool:  # type: ignore[override]
        """Whether NaN can be written down; IEEE without mantissa bits has infinities alone."""
        return self.specials in ("fn", "fnuz") or (self.specials == "ieee" and self.mantissa > 0)

    @property
    def emin(self) -> int:
        """The exponent of the smallest normal number, which the subnormals share."""
        return 1 - self.bias

    @property
    def max_code(self) -> int:
        """The code of the largest finite number."""
        ones = 2 ** (self.exponent + self.mantissa) - 1
        if self.specials == "ieee":
            return ones - 2**self.mantissa
        return ones - 1 if self.specials == "fn" else ones

    @property
    def sign_code(self) -> int:
        """The bit that makes a code negative."""
        return 2 ** (self.exponent + self.mantissa)

    @property
    def inf_code(self) -> int:
        """The code of plus infinity, where there is one."""
        return self.max_code + 1

    @property
    def nan_code(self) -> int:
        """The NaN that encoders write for a positive NaN: all ones, as torch does (``fnuz``: the one there is)."""
        return self.sign_code if self.specials == "fnuz" else self.sign_code - 1

    @property
    def significant_bits(self) -> int:
        """The mantissa's width."""
        return self.mantissa

    def decode(self, code: int) -> float:
        """IEEE 754-2019, section 3.4, with the specials of this format."""
        sign = -1.0 if code & self.sign_code else 1.0
        magnitude = code & (self.sign_code - 1)
        if self.specials == "fnuz" and code == self.sign_code:
            return math.nan
        if magnitude > self.max_code:
            return sign * math.inf if self.specials == "ieee" and magnitude == self.inf_code else math.nan
        field, fraction = magnitude >> self.mantissa, magnitude & (2**self.mantissa - 1)
        if field == 0:
            return sign * math.ldexp(fraction, self.emin - self.mantissa)
        return sign * math.ldexp(fraction + 2**self.mantissa, field - self.bias - self.mantissa)


@dataclass(frozen=True)
class FixedFormat(Format):
    """Two's complement integers times ``2^-fraction``; with ``fraction`` 0 these are INT8, INT4 and the like.

    ``narrow`` leaves the lowest code out (INT8 then reaches from -127 to 127), so that a number and its negative are
    both there; the code still decodes.
    """

    fraction: int
    signed: bool
    narrow: bool

    @classmethod
    def make(cls, name: str, bits: int, fraction: int = 0, signed: bool = True, narrow: bool = False) -> FixedFormat:
        """A format of your own; Gupta's <IL, FL> has ``bits = IL + FL`` and ``fraction = FL``.

        Raises:
            HeadwayError: widths that leave no format.
        """
        _whole(name, "bits", bits, 1, MAX_BITS)
        _whole(name, "fraction bits", fraction, -64, 64)
        if narrow and (not signed or bits < 2):
            raise HeadwayError(name, "cannot be narrow", expected="a signed format of two bits or more")
        return cls(name, bits, fraction, signed, narrow)

    @property
    def low(self) -> int:
        """The lowest integer that an encoder may produce."""
        return (-(2 ** (self.bits - 1)) + self.narrow) if self.signed else 0

    @property
    def high(self) -> int:
        """The highest integer."""
        return 2 ** (self.bits - self.signed) - 1

    @cached_property
    def min(self) -> float:
        """The lowest number that an encoder may produce."""
        return math.ldexp(self.low, -self.fraction)

    @property
    def significant_bits(self) -> int:
        """Bits below the leading one of the highest number."""
        return max(self.bits - self.signed - 1, 0)

    def decode(self, code: int) -> float:
        """Two's complement."""
        wrapped = code - 2**self.bits if self.signed and code >= 2 ** (self.bits - 1) else code
        return math.ldexp(wrapped, -self.fraction)


@dataclass(frozen=True)
class TableFormat(Format):
    """Any numbers at all: ``entries[code]``; NaN marks codes that mean nothing. Ties go to the number of even rank."""

    entries: tuple[float, ...]

    def __post_init__(self) -> None:  # one NaN object, or a format read from a file would not equal itself
        entries = tuple(math.nan if math.isnan(entry) else entry for entry in self.entries)
        object.__setattr__(self, "entries", entries)

    @classmethod
    def make(cls, name: str, entries: Any) -> TableFormat:
        """A format of your own from 2, 4, 16, 256 ... numbers in any order.

        Raises:
            HeadwayError: not a power of two of numbers, an infinity, or no two finite ones.
        """
        values = tuple(float(entry) for entry in entries)
        bits = max((len(values) - 1).bit_length(), 1)
        if len(values) != 2**bits or bits > MAX_BITS:
            raise HeadwayError(name, "has the wrong number of entries", got=len(values), expected="a power of two")
        if any(math.isinf(value) for value in values) or len({v for v in values if not math.isnan(v)}) < 2:
            raise HeadwayError(name, "needs two different finite numbers or more, and no infinity")
        return cls(name, bits, values)

    @property
    def has_nan(self) -> bool:  # type: ignore[override]
        """Whether some code is NaN."""
        return any(math.isnan(entry) for entry in self.entries)

    def decode(self, code: int) -> float:
        """The entry."""
        return self.entries[code]


def _whole(name: str, what: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise HeadwayError(
            name, f"has an impossible number of {what}", got=value, expected=f"a whole number from {low} to {high}"
        )


INT8 = FixedFormat.make("int8", 8, narrow=True)
INT4 = FixedFormat.make("int4", 4, narrow=True)
INT2 = FixedFormat.make("int2", 2, narrow=True)
UINT8 = FixedFormat.make("uint8", 8, signed=False)
UINT4 = FixedFormat.make("uint4", 4, signed=False)
MXINT8_ELEMENT = FixedFormat.make("int8_1.6", 8, fraction=6, narrow=True)
E4M3 = FloatFormat.make("e4m3", 4, 3, specials="fn")
E5M2 = FloatFormat.make("e5m2", 5, 2, specials="ieee")
E4M3FNUZ = FloatFormat.make("e4m3fnuz", 4, 3, specials="fnuz")
E5M2FNUZ = FloatFormat.make("e5m2fnuz", 5, 2, specials="fnuz")
E2M3 = FloatFormat.make("e2m3", 2, 3, specials="none")
E3M2 = FloatFormat.make("e3m2", 3, 2, specials="none")
E2M1 = FloatFormat.make("e2m1", 2, 1, specials="none")
FP16 = FloatFormat.make("fp16", 5, 10, specials="ieee")
BF16 = FloatFormat.make("bf16", 8, 7, specials="ieee")
E8M0 = TableFormat.make("e8m0", [*(2.0 ** (code - 127) for code in range(255)), math.nan])

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (INT8, INT4, INT2, UINT8, UINT4, E4M3, E5M2, E4M3FNUZ, E5M2FNUZ, E2M3, E3M2, E2M1, FP16, BF16, E8M0)
}
