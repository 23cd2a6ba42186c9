"""Code tables, all of them, against tables built another way.

Needs: torch; ml_dtypes, where it is installed, is one more witness. Run: pytest tests/precision
"""

import copy
import itertools
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch

from headway.core.errors import HeadwayError
from headway.precision.blocks import BLOCK_FORMATS, format_named
from headway.precision.formats import FORMATS, FixedFormat, FloatFormat, TableFormat
from headway.precision.tables import decode, torch_dtype

FLOATS = [f for f in FORMATS.values() if isinstance(f, FloatFormat)]
FIXED = [f for f in FORMATS.values() if isinstance(f, FixedFormat)]


def same(got, expected):
    """Equal to the sign of zero, NaN where NaN is."""
    got, expected = (torch.as_tensor(numbers, dtype=torch.float64).numpy() for numbers in (got, expected))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    there = ~np.isnan(expected)
    np.testing.assert_array_equal(got[there], expected[there])
    np.testing.assert_array_equal(np.signbit(got[there]), np.signbit(expected[there]))


def floats_by_bits(exponent, mantissa, bias, specials):
    """The definition, bit by bit and in fractions: sum of 2^-i over mantissa bits, times 2^(field - bias)."""
    table = []
    for bits in itertools.product((0, 1), repeat=1 + exponent + mantissa):
        sign, field_bits, mantissa_bits = bits[0], bits[1 : 1 + exponent], bits[1 + exponent :]
        field = int("".join(map(str, field_bits)), 2)
        fraction = sum((Fraction(bit, 2**i) for i, bit in enumerate(mantissa_bits, 1)), Fraction(0))
        special = specials == "ieee" and all(field_bits)
        value = float((fraction + (field > 0)) * Fraction(2) ** (max(field, 1) - bias))
        if special:
            value = math.inf if fraction == 0 else math.nan
        if (specials == "fn" and all(bits[1:])) or (specials == "fnuz" and sign and not any(bits[1:])):
            value = math.nan
        table.append(-value if sign else value)
    return table


@pytest.mark.parametrize("format", FLOATS, ids=str)
def test_every_code_of_the_floating_formats(format):
    assert len(format.numbers) == 2 ** (1 + format.exponent + format.mantissa)
    same(format.codes(), floats_by_bits(format.exponent, format.mantissa, format.bias, format.specials))


@pytest.mark.parametrize("specials", ["ieee", "fn", "fnuz", "none"])
@pytest.mark.parametrize("shape", [(1, 2, 1), (2, 0, None), (3, 4, -2), (5, 3, 20), (4, 1, 7), (8, 2, 127)])
def test_every_code_of_formats_of_your_own(shape, specials):
    if shape[0] == 1 and specials == "ieee":
        pytest.skip("one exponent bit leaves IEEE nothing")
    format = FloatFormat.make("mine", *shape, specials)
    same(format.codes(), floats_by_bits(format.exponent, format.mantissa, format.bias, specials))


@pytest.mark.parametrize("kind", ["e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e8m0fnu"])
def test_torch_decodes_the_same(kind):
    dtype = getattr(torch, f"float8_{kind}")
    codes = torch.arange(256, dtype=torch.uint8)
    ours = {"e8m0fnu": FORMATS["e8m0"]}.get(kind) or next(f for f in FLOATS if torch_dtype(f) is dtype)
    same(ours.codes(), codes.view(dtype).double())
    same(decode(codes, ours), codes.view(dtype).float())


@pytest.mark.parametrize("name,dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_torch_decodes_sixteen_bits_the_same(name, dtype):
    codes = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    same(FORMATS[name].codes(), codes.view(dtype).double())
    same(decode(codes, FORMATS[name], torch.float64), codes.view(dtype).double())


@pytest.mark.parametrize(
    "name,other",
    [("e4m3", "float8_e4m3fn"), ("e5m2", "float8_e5m2"), ("e4m3fnuz", "float8_e4m3fnuz"),
     ("e5m2fnuz", "float8_e5m2fnuz"),
     ("e2m3", "float6_e2m3fn"), ("e3m2", "float6_e3m2fn"), ("e2m1", "float4_e2m1fn"), ("e8m0", "float8_e8m0fnu")],
)  # fmt: skip
def test_ml_dtypes_decodes_the_same(name, other):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    format = FORMATS[name]
    codes = np.arange(2**format.bits, dtype=np.uint8)
    same(format.codes(), codes.view(getattr(ml_dtypes, other)).astype(np.float64))


@pytest.mark.parametrize(
    "format",
    [*FIXED, BLOCK_FORMATS["mxint8"].element, format_named("fixed<2,7>"), format_named("fixed<3,2>")],
    ids=str,
)
def test_every_code_of_the_fixed_formats(format):
    """Two's complement as a sum of its bits: the top one counts negative."""
    expected = []
    for bits in itertools.product((0, 1), repeat=format.bits):
        weights = [Fraction(2) ** (format.bits - 1 - i - format.fraction) for i in range(format.bits)]
        if format.signed:
            weights[0] = -weights[0]
        expected.append(float(sum((w * b for w, b in zip(weights, bits)), Fraction(0))))
    same(format.codes(), expected)


def test_the_numbers_that_the_specifications_print():
    """OFP8 1.0 table 1; MX 1.0 tables 1 to 5."""
    e4m3, e5m2, e3m2, e2m3, e2m1 = (FORMATS[n] for n in ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1"))
    assert (e4m3.max, e4m3.smallest, e4m3.exponent_of_max) == (448, 2**-9, 8)
    assert (e5m2.max, e5m2.smallest, e5m2.exponent_of_max) == (57344, 2**-16, 15)
    assert (e3m2.max, e3m2.smallest, e3m2.exponent_of_max) == (28, 0.0625, 4)
    assert (e2m3.max, e2m3.smallest, e2m3.exponent_of_max) == (7.5, 0.125, 2)
    assert (e2m1.max, e2m1.smallest, e2m1.exponent_of_max) == (6, 0.5, 2)
    assert [v for v in e2m1.numbers if not math.copysign(1, v) < 0] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    mxint8 = BLOCK_FORMATS["mxint8"].element
    assert (mxint8.max, mxint8.min, mxint8.smallest, mxint8.exponent_of_max) == (1 + 63 / 64, -(1 + 63 / 64), 2**-6, 0)
    assert (FORMATS["int8"].min, FORMATS["int8"].max, FORMATS["int4"].min) == (-127, 127, -7)
    gupta = format_named("fixed<2,14>")
    assert (gupta.bits, gupta.min, gupta.max) == (16, -2, 2 - 2**-14)
    assert gupta.numbers == tuple(np.arange(2**16).astype(np.uint16).view(np.int16) / 2.0**14)
    assert BLOCK_FORMATS["mxfp4"].bits == 4.25 and BLOCK_FORMATS["nvfp4"].bits == 4.5


@pytest.mark.parametrize(
    "make,said",
    [
        (lambda: format_named("e4m4"), "Did you mean 'e4m3'"),
        (lambda: format_named("fixed<12,14>"), "from 1 to 16"),
        (lambda: FloatFormat.make("mine", 1, 3), "IEEE's specials"),
        (lambda: FloatFormat.make("mine", 4, 3, specials="nan"), "ieee, fn, fnuz or none"),
        (lambda: FloatFormat.make("mine", 9, 3), "exponent bits"),
        (lambda: FloatFormat.make("mine", 8, 9), "bits altogether"),
        (lambda: FloatFormat.make("mine", 4, 3, bias=1.5), "bias"),
        (lambda: FixedFormat.make("mine", 0), "bits"),
        (lambda: FixedFormat.make("mine", 8, signed=False, narrow=True), "narrow"),
        (lambda: TableFormat.make("mine", [1.0, 2.0, 3.0]), "power of two"),
        (lambda: TableFormat.make("mine", [1.0, math.inf]), "finite"),
        (lambda: TableFormat.make("mine", [1.0, 1.0]), "finite"),
    ],
)
def test_impossible_formats_get_a_sentence(make, said):
    with pytest.raises(HeadwayError, match=said):
        make()


@pytest.mark.parametrize("format", [*FORMATS.values(), *BLOCK_FORMATS.values(), format_named("fixed<2,14>")], ids=str)
def test_formats_survive_files_and_copies(format):
    assert format.bits > 0 and (format in BLOCK_FORMATS.values() or format.numbers)
    stored = pickle.dumps(format)
    assert len(stored) < 6000
    for other in (pickle.loads(stored), copy.deepcopy(format)):
        assert other == format and hash(other) == hash(format) and str(other) == format.name
