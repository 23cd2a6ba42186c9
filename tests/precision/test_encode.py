"""Encoding against exact arithmetic, torch's casts and ml_dtypes.

Needs: torch; ml_dtypes, where it is installed, is one more witness. Run: pytest tests/precision
"""

import bisect
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from headway.core.errors import HeadwayError
from headway.precision.blocks import format_named
from headway.precision.encode import encode
from headway.precision.formats import (
    BF16,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E4M3FNUZ,
    E5M2,
    E5M2FNUZ,
    E8M0,
    FORMATS,
    FP16,
    INT8,
    FixedFormat,
    FloatFormat,
    TableFormat,
)
from headway.precision.tables import decode, torch_dtype

MINE = [
    FloatFormat.make("e3m4", 3, 4),
    FloatFormat.make("e2m0", 2, 0, specials="none"),
    FloatFormat.make("e1m2", 1, 2, specials="none"),
    FloatFormat.make("e5m4", 5, 4, bias=3, specials="fn"),
    FloatFormat.make("e8m2", 8, 2),
]
TABLES = [TableFormat.make("log", [0.0, *(s * 2.0**-k for s in (1, -1) for k in range(7)), math.nan]), E8M0]
SMALL = [f for f in FORMATS.values() if f.bits <= 8] + MINE + TABLES[:1] + [format_named("fixed<3,4>")]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def points(format, dtype, extra=200):
    """Every number, every middle of two neighbours, what lies just beside them, and beyond both ends, in ``dtype``."""
    values = torch.tensor(sorted({v for v in format.numbers if math.isfinite(v)}), dtype=torch.float64)
    middles = (values[:-1] + values[1:]) / 2
    beyond = torch.tensor([1.01, 1.1, 4.0, 1e4]).double()[:, None] * torch.tensor([format.max, format.min or -1.0])
    torch.manual_seed(0)
    random = torch.randn(extra).double() * torch.exp2(torch.randint(-20, 12, (extra,)).double())
    x = torch.cat([values, middles, beyond.flatten(), random, torch.tensor([0.0, -0.0]).double()]).to(dtype)
    if dtype in (torch.float32, torch.float64):
        x = torch.cat([x, torch.nextafter(x, torch.tensor(math.inf, dtype=dtype))])
        x = torch.cat([x, torch.nextafter(x, torch.tensor(-math.inf, dtype=dtype))])
    return x[torch.isfinite(x)]


def neighbours(format):
    """The numbers an encoder may choose, rising: (exact number, code)."""
    found = {}
    for code, value in enumerate(format.numbers):
        if math.isfinite(value) and format.min <= value <= format.max:
            found.setdefault(Fraction(value), code)
    return sorted(found.items())


def nearest_by_search(x, format, ladder, keys):
    """The nearest number by comparing exact distances; a tie goes to the even code, in tables to the even rank."""
    exact = Fraction(x)
    at = bisect.bisect_left(keys, exact)
    around = range(max(at - 1, 0), min(at + 1, len(ladder)))
    odd = (lambda i: i % 2) if isinstance(format, TableFormat) else (lambda i: ladder[i][1] % 2)
    return min(around, key=lambda i: (abs(ladder[i][0] - exact), odd(i)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", SMALL, ids=str)
def test_nearest_is_the_nearest_of_the_table(format, dtype):
    x = points(format, dtype)
    ladder = neighbours(format)
    keys = [value for value, _ in ladder]
    codes = encode(x, format)
    assert torch.equal(codes, encode(x, format, fast=False))
    for value, result in zip(x.tolist(), decode(codes, format, torch.float64).tolist()):
        assert Fraction(result) == ladder[nearest_by_search(value, format, ladder, keys)][0], value
        if isinstance(format, FloatFormat) and format.specials != "fnuz":
            assert math.copysign(1, result) == math.copysign(1, value), "a sign is never lost, zeros' included"


@pytest.mark.parametrize("overflow", ["saturate", "special"])
@pytest.mark.parametrize("format", [f for f in SMALL if isinstance(f, FloatFormat) and f.has_nan], ids=str)
def test_the_table_of_bf16_says_the_same(format, overflow):
    torch.manual_seed(1)
    wide = torch.randint(-(2**31), 2**31 - 1, (200_000,), dtype=torch.int32).view(torch.float32)  # any bits at all
    near = points(format, torch.float32)
    for x in (wide, near, near.half(), wide.bfloat16()):
        assert torch.equal(encode(x, format, overflow=overflow), encode(x, format, overflow=overflow, fast=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", [E4M3, E5M2, E4M3FNUZ, E5M2FNUZ], ids=str)
def test_emulation_writes_the_bytes_that_torch_writes(format, dtype):
    torch.manual_seed(1)
    x = (torch.randn(200_000) * torch.exp2(torch.randint(-24, 20, (200_000,)).float())).to(dtype)
    x = torch.cat([x, torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0]).to(dtype)])
    native, emulated = encode(x, format), encode(x, format, fast=False)
    assert torch.equal(native, emulated)
    within = x.abs() <= format.max
    assert torch.equal(x[within].to(torch_dtype(format)).view(torch.uint8), emulated[within])


def test_all_bf16_numbers():
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for format in (E4M3, E5M2, E4M3FNUZ, E5M2FNUZ):
        assert torch.equal(encode(x, format), encode(x, format, fast=False))
    x = x[~torch.isnan(x)]
    assert torch.equal(encode(x, BF16, overflow="special").view(torch.bfloat16), x)
    halves = encode(x, FP16, overflow="special").view(torch.float16)
    assert torch.equal(halves, x.to(torch.float16))


@pytest.mark.parametrize("format,dtype", [(FP16, torch.float16), (BF16, torch.bfloat16)], ids=str)
def test_sixteen_bits_round_as_torch_does(format, dtype):
    torch.manual_seed(2)
    x = torch.randn(100_000) * torch.exp2(torch.randint(-30, 20, (100_000,)).float())
    x = torch.cat([x, torch.tensor([math.inf, -math.inf, 3.4e38, 1e-45])])
    assert torch.equal(encode(x, format, overflow="special").view(dtype), x.to(dtype))


@pytest.mark.parametrize(
    "format,other",
    [(E4M3, "float8_e4m3fn"), (E5M2, "float8_e5m2"), (E4M3FNUZ, "float8_e4m3fnuz"), (E5M2FNUZ, "float8_e5m2fnuz"),
     (E2M3, "float6_e2m3fn"), (E3M2, "float6_e3m2fn"), (E2M1, "float4_e2m1fn")], ids=str,
)  # fmt: skip
def test_ml_dtypes_rounds_the_same(format, other):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    torch.manual_seed(3)
    x = torch.randn(200_000) * torch.exp2(torch.randint(-24, 20, (200_000,)).float())
    x = torch.cat([x, points(format, torch.float32)])
    special = format.has_nan
    if not special:
        x = x[x.abs() <= format.max]
    got = encode(x, format, overflow="special" if special else "saturate")
    expected = torch.from_numpy(x.numpy().astype(getattr(ml_dtypes, other)).view(np.uint8))
    values, wanted = decode(got, format), decode(expected, format)
    assert torch.equal(torch.isnan(values), torch.isnan(wanted))
    assert torch.equal(got[~torch.isnan(values)], expected[~torch.isnan(values)])


def test_fp64_is_rounded_once():
    just_above_a_tie = torch.tensor([1 + 2**-4 + 2**-40], dtype=torch.float64)
    assert decode(encode(just_above_a_tie, E4M3), E4M3).item() == 1.125
    assert just_above_a_tie.to(torch.float8_e4m3fn).item() == 1.0, "torch rounds twice; if no longer, use its cast"


def test_what_is_too_large():
    """OFP8 1.0, section 5: saturating and not, infinity included; 464 is the tie between 448 and the missing 480."""
    x = torch.tensor([464.0, 465.0, math.inf, -math.inf, -500.0, math.nan])
    assert decode(encode(x, E4M3), E4M3)[:5].tolist() == [448, 448, 448, -448, -448]
    special = decode(encode(x, E4M3, overflow="special"), E4M3)
    assert special[0] == 448 and bool(torch.isnan(special[1:]).all())
    x = torch.tensor([61439.0, 61440.0, -61441.0, math.inf, -math.inf])
    assert decode(encode(x, E5M2), E5M2).tolist() == [57344, 57344, -57344, 57344, -57344]
    assert decode(encode(x, E5M2, overflow="special"), E5M2).tolist() == [
        57344,
        *(math.inf * s for s in (1, -1, 1, -1)),
    ]
    assert decode(encode(x, E5M2, "zero", "special"), E5M2).tolist() == [57344, 57344, -57344, math.inf, -math.inf]
    far = torch.tensor([7e4, -1e9, 1e30, math.inf])
    assert decode(encode(far, E5M2, "zero", "special"), E5M2).tolist() == [57344, -57344, 57344, math.inf]
    fnuz = decode(encode(torch.tensor([1e9, -1e9, math.inf]), E4M3FNUZ, overflow="special"), E4M3FNUZ)
    assert bool(torch.isnan(fnuz).all())
    assert decode(encode(torch.tensor([math.inf, -math.inf, 300.0]), INT8), INT8).tolist() == [127, -127, 127]


def test_not_a_number():
    x = torch.tensor([math.nan, 1.0])
    for format in (E4M3, E5M2, E4M3FNUZ, FORMATS["fp16"], E8M0, TABLES[0]):
        for rounding in ("nearest", "stochastic", "zero"):
            got = decode(encode(x, format, rounding), format, torch.float64)
            assert math.isnan(got[0]) and got[1] == 1
    for format in (INT8, E2M1, E3M2, format_named("fixed<2,14>")):
        with pytest.raises(HeadwayError, match="has no NaN"):
            encode(x, format)


@pytest.mark.parametrize("format", [*SMALL, format_named("fixed<2,14>"), BF16], ids=str)
def test_towards_zero(format):
    x = points(format, torch.float32, extra=100)
    x = x[(x <= format.max) & (x >= format.min)]
    x = x[:: max(len(x) // 2000, 1)]
    got = decode(encode(x, format, "zero"), format, torch.float64)
    assert bool((got.abs() <= x.double().abs()).all() | (format is E8M0))
    keys = [value for value, _ in neighbours(format)]
    for value, result in zip(x.tolist(), got.tolist()):
        below = bisect.bisect_right(keys, Fraction(value)) - 1
        up = value < 0 and keys[max(below, 0)] != Fraction(value)
        assert Fraction(result) == keys[max(below, 0) + up]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("format", [E4M3, E5M2, E2M1, E3M2, INT8, format_named("fixed<2,14>"), TABLES[0]], ids=str)
def test_stochastic_rounding_takes_the_two_neighbours_and_has_the_right_mean(format, dtype):
    """Ten places between neighbours, 20 000 draws each: the mean within 4.5 sigma, the variance p (1 - p) step^2."""
    keys = [float(value) for value, _ in neighbours(format)]
    generator = torch.Generator().manual_seed(5)
    n = 20_000
    for place, part in zip(range(1, len(keys) - 1, max(len(keys) // 10, 1)), np.linspace(0.03, 0.96, 10)):
        low, high = keys[place], keys[place + 1]
        x = torch.full((n,), low + part * (high - low), dtype=dtype)
        p = (x[0].item() - low) / (high - low)
        got = decode(encode(x, format, "stochastic", generator=generator), format, torch.float64)
        assert set(got.tolist()) <= {low, high}
        share = (got == high).double().mean().item()
        assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("format", [f for f in SMALL if f is not E8M0], ids=str)
def test_what_is_a_number_of_the_format_stays(format):
    x = torch.tensor([v for v in format.numbers if math.isfinite(v) and format.min <= v <= format.max]).double()
    for rounding in ("nearest", "stochastic", "zero"):
        for _ in range(3):
            assert torch.equal(decode(encode(x, format, rounding), format, torch.float64), x)


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24])
def test_the_rarest_draws_leave_the_numbers_of_the_format_alone(monkeypatch, draw):
    monkeypatch.setattr(torch, "rand", lambda shape, **how: torch.full(shape, draw, dtype=how["dtype"]))
    for format in (E4M3, E2M1, INT8, TABLES[0], format_named("fixed<2,14>")):
        x = torch.tensor([v for v in format.numbers if math.isfinite(v) and format.min <= v])
        assert torch.equal(decode(encode(x, format, "stochastic"), format), x)


def test_draws_belong_to_the_generator_and_their_number_to_the_shape():
    x = torch.randn(1000)
    first, second = (encode(x, E4M3, "stochastic", generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    other = encode(x, E4M3, "stochastic", generator=torch.Generator().manual_seed(8))
    assert not torch.equal(first, other)
    states = []
    for numbers in (x, torch.zeros(1000)):
        generator = torch.Generator().manual_seed(7)
        encode(numbers, E4M3, "stochastic", generator=generator)
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_subnormals_of_fp32_go_to_zero_and_keep_their_sign():
    x = torch.tensor([1e-45, -1e-45, 2.0**-127])
    for format in (E4M3, E5M2, E2M1):
        for fast in (True, False):
            got = decode(encode(x, format, fast=fast), format)
            assert got.tolist() == [0, 0, 0] and torch.signbit(got).tolist() == [False, True, False]
    assert decode(encode(x, MINE[4]), MINE[4], torch.float64).tolist() == [0, 0, 2.0**-127]


@pytest.mark.parametrize(
    "call,said",
    [
        (lambda: encode(torch.ones(2, dtype=torch.int32), E4M3), "torch.int32"),
        (lambda: encode(torch.ones(2), E4M3, "up"), "nearest, stochastic or zero"),
        (lambda: encode(torch.ones(2), E4M3, overflow="wrap"), "saturate or special"),
        (lambda: encode(torch.ones(2), E2M1, overflow="special"), "neither infinity nor NaN"),
        (lambda: encode(torch.ones(2), INT8, overflow="special"), "neither infinity nor NaN"),
    ],
)
def test_bad_calls_get_a_sentence(call, said):
    with pytest.raises(HeadwayError, match=said):
        call()


def test_wide_fixed_formats_wrap_into_int16_patterns():
    format = FixedFormat.make("q", 12, 4)
    x = torch.tensor([-1.0, 0.0625, 127.9375, -128.0])
    codes = encode(x, format)
    assert codes.dtype == torch.int16 and codes.tolist() == [0xFF0, 1, 0x7FF, 0x800]
    assert torch.equal(decode(codes, format), x)
