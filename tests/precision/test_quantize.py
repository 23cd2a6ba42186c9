"""Groups, scales and whole tensors against slow loops, and gradients through them.

Needs: torch. Run: pytest tests/precision
"""

import itertools
import math

import pytest
import torch

from headway.core.errors import HeadwayError
from headway.precision.blocks import BLOCK_FORMATS, mx
from headway.precision.encode import encode
from headway.precision.formats import E2M1, E4M3, E5M2, FORMATS, INT8, FixedFormat, FloatFormat
from headway.precision.granularity import Granularity
from headway.precision.packing import pack, unpack
from headway.precision.quantize import fake_quantize, quantize
from headway.precision.scales import Scale
from headway.precision.tables import decode

G = Granularity
FORMATS_TRIED = ["int8", "int4", "int2", "e4m3", "e5m2", "e2m3", "e3m2", "e2m1", "uint8"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def groups_of(granularity, shape):
    """index of an element -> index of its scale, spelt out."""
    d = len(shape)

    def key(index):
        if granularity.kind == "tensor":
            return ()
        dim = granularity.dim % d
        if granularity.kind == "channel":
            return (index[dim],)
        if granularity.kind == "row":
            return index[:dim] + index[dim + 1 :]
        if granularity.kind == "group":
            return (*index[:dim], index[dim] // granularity.size[0], *index[dim + 1 :])
        rows, columns = granularity.size
        return (*index[:-2], index[-2] // rows, index[-1] // columns)

    return key


def slowly(x, format, granularity):
    """Codes, scales and numbers of absmax scaling, one element at a time."""
    key = groups_of(granularity, x.shape)
    indices = list(itertools.product(*map(range, x.shape)))
    wide = torch.promote_types(x.dtype, torch.float32)
    amax = {}
    for index in indices:
        amax[key(index)] = max(amax.get(key(index), 0.0), abs(x[index].item()))
    scale = {k: (torch.tensor(a, dtype=wide) / format.max).float() if a else torch.tensor(1.0) for k, a in amax.items()}
    numbers = torch.empty(x.shape, dtype=torch.float64)
    for index in indices:
        s = scale[key(index)]
        code = encode(x[index].to(wide) / s, format, fast=False)
        numbers[index] = (decode(code, format, wide) * s).to(x.dtype).double()
    return numbers, scale


@pytest.mark.parametrize(
    "granularity",
    [G.tensor(), G.channel(0), G.channel(-1), G.row(), G.row(1), G.group(2), G.group(3, dim=1), G.block(3, 2),
     G.group(4, pad=True), G.group(4, dim=0, pad=True), G.block(4, 4, pad=True)], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", ["int8", "e4m3", "e2m1"])
def test_every_granularity_against_a_loop(name, granularity):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6) * torch.exp2(torch.randint(-8, 8, (2, 3, 6)).float())
    x[0, 0] = 0
    x[1, :, :2] = 0
    expected, scale = slowly(x, FORMATS[name], granularity)
    got = quantize(x, name, granularity)
    assert torch.equal(got.dequantize(torch.float32).double(), expected)
    for index, value in scale.items():
        assert got.scales[index] == value
    assert got.scales.numel() == len(scale)
    assert got.nbytes == got.codes.numel() + 4 * len(scale)
    assert torch.equal(got.dequantize().signbit()[x != 0], x.signbit()[x != 0]) or name == "int8"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS_TRIED)
def test_dtypes_and_round_trips(name, dtype):
    """What came out goes in again unchanged, and nothing moves by more than half a step at the top of its group."""
    torch.manual_seed(1)
    x = torch.randn(5, 64).to(dtype)
    x = x.abs() if name == "uint8" else x
    once = quantize(x, name, G.group(16))
    y = once.dequantize()
    assert y.dtype == dtype and y.shape == x.shape
    format = FORMATS[name]
    steps = sorted({v for v in format.numbers if math.isfinite(v) and format.min <= v <= format.max})
    widest = max(b - a for a, b in itertools.pairwise(steps))
    slack = 1 + 2 * torch.finfo(dtype).eps * format.max / widest * 2
    assert (
        (y.double() - x.double()).view(5, 4, 16).abs() <= once.scales.double()[..., None] * widest / 2 * slack
    ).all()
    if dtype in (torch.float32, torch.float64):
        again = quantize(y, name, G.group(16))
        torch.testing.assert_close(again.dequantize(), y, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 5), (0, 32), (4, 0), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("name", FORMATS_TRIED)
def test_shapes(name, shape):
    torch.manual_seed(2)
    x = torch.randn(shape).abs()
    for granularity in (G.tensor(), G.row(), G.channel(0), G.group(4, pad=True)):
        if not shape and granularity.kind == "group":
            continue
        q = quantize(x, name, granularity)
        y = q.dequantize()
        assert y.shape == x.shape and torch.isfinite(y).all()
        assert torch.equal(q.unpacked(), quantize(x.clone(), name, granularity).unpacked())
        if name == "e4m3":
            torch.testing.assert_close(y, x, rtol=0.07, atol=1e-2)
    bits = FORMATS[name].bits
    last = shape[-1] if shape else 1
    each = 8 // bits if bits in (2, 4) else 1
    wanted = (*shape[:-1], -(-last // each)) if shape or each > 1 else ()
    assert tuple(quantize(x, name).codes.shape) == wanted


def test_strides_do_not_matter():
    torch.manual_seed(3)
    x = torch.randn(64, 96)
    for view in (x.t(), x[::2, 1::3], x.expand(2, 64, 96), x.view(64, 3, 32).permute(1, 0, 2)):
        for name in ("e4m3", "int4", "e3m2", "mxfp4"):
            if name == "mxfp4" and view.shape[-1] % 32:
                continue
            a, b = quantize(view, name), quantize(view.contiguous(), name)
            assert torch.equal(a.codes, b.codes) and torch.equal(a.dequantize(), b.dequantize())


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (8,), (3, 7), (2, 0)], ids=str)
def test_packing(bits, shape):
    torch.manual_seed(4)
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits, shape), codes)
    if bits == 4 and shape == (5,):
        a, b, c, d, e = codes.tolist()
        assert pack(codes, 4).tolist() == [a + 16 * b, c + 16 * d, e], "the first code in the low half, as torch packs"


def mx_block(values, element, exponent_of_max):
    """OCP MX 1.0, section 6.3, one block in Python floats; rounding by search through the element's table."""
    amax = max(abs(v) for v in values)
    shared = math.floor(math.log2(amax)) - exponent_of_max
    found = []
    for v in values:
        scaled = v / 2.0**shared
        table = [(abs(n - scaled), code & 1, n) for code, n in enumerate(element.numbers) if math.isfinite(n)]
        table = [entry for entry in table if element.min <= entry[2] <= element.max]
        found.append(min(table)[2] * 2.0**shared)
    return shared, found


@pytest.mark.parametrize("name,emax", [("mxfp8_e4m3", 8), ("mxfp8_e5m2", 15), ("mxfp6_e2m3", 2), ("mxfp6_e3m2", 4),
                                       ("mxfp4", 2), ("mxint8", 0)])  # fmt: skip
def test_mx_blocks_follow_the_specification(name, emax):
    torch.manual_seed(5)
    x = torch.randn(6, 64) * torch.exp2(torch.randint(-20, 20, (6, 1)).float())
    x[2, :32] *= torch.exp2(-torch.arange(32.0))
    q = quantize(x, name)
    assert q.scales.dtype == torch.uint8 and q.scales.shape == (6, 2)
    y = q.dequantize()
    for row in range(6):
        for block in range(2):
            part = slice(32 * block, 32 * block + 32)
            shared, wanted = mx_block(x[row, part].tolist(), BLOCK_FORMATS[name].element, emax)
            assert q.scales[row, block] == shared + 127
            assert y[row, part].tolist() == wanted


def test_an_mx_block_by_hand():
    """amax 7: the scale is 2^(2 - 2) = 1, 7 clips to 6; 2.5 and 5 are ties and go to the even code."""
    x = torch.zeros(32)
    x[:6] = torch.tensor([7.0, -2.5, 5.0, 0.25, 0.26, -0.1])
    q = quantize(x, "mxfp4")
    assert q.scales.tolist() == [127] and q.dequantize()[:6].tolist() == [6, -2, 4, 0, 0.5, -0.0]
    assert q.codes[:3].tolist() == [0x7 | (0xC << 4), 0x6 | (0x0 << 4), 0x1 | (0x8 << 4)]
    assert q.nbytes == 17
    rceil = quantize(x, BLOCK_FORMATS["mxfp4"].with_rule("rceil"))
    assert rceil.scales.tolist() == [128] and rceil.dequantize()[0] == 8.0  # 3.5 is a tie, between 3 and 4


@pytest.mark.parametrize("amax", [1.0, 1.4, 1.75, 1.76, 1.9, 2.0, 3.5, 6.0, 6.1, 7.0, 7.9, 448.0, 449.0, 3e-39, 1e38])
@pytest.mark.parametrize("element", [E4M3, E5M2, E2M1], ids=str)
def test_the_rules_for_powers_of_two(element, amax):
    """Each by its definition, in logarithms of exact numbers."""
    amax = torch.tensor(amax).item()
    x = torch.tensor([amax] * 32)
    emax = math.frexp(element.max)[1] - 1
    top = math.log2(amax)
    rounded = math.ldexp(math.floor(math.ldexp(math.frexp(amax)[0], element.mantissa + 1) + 0.5), math.frexp(amax)[1])
    wanted = {
        "floor": math.floor(top) - emax,
        "ceil": math.ceil(top) - emax,
        "even": math.floor(math.log2(rounded) - element.mantissa - 1) - emax,
        "rceil": math.ceil(math.log2(amax / element.max)),
    }
    for rule, exponent in wanted.items():
        q = quantize(x, mx("mine", element, rule))
        assert q.scales.item() == min(max(exponent, -127), 127) + 127, rule
        if rule in ("ceil", "rceil") and exponent > -127:
            assert amax / 2.0**exponent <= element.max or rule == "ceil"
            assert rule == "ceil" or amax / 2.0 ** (exponent - 1) > element.max


def test_the_ends_of_e8m0():
    x = torch.zeros(4, 32)
    x[1] = 3.4e38
    x[2] = 1e-45
    q = quantize(x, "mxfp4")
    assert q.scales[:, 0].tolist() == [127, 252, 0, 127]
    assert q.dequantize()[0].tolist() == [0.0] * 32 and q.dequantize()[1, 0] == 6 * 2.0**125
    assert torch.equal(quantize(x.double(), "mxfp4").codes, q.codes)


def test_mx_along_another_dimension_is_its_transpose():
    torch.manual_seed(6)
    x = torch.randn(64, 5)
    a, b = quantize(x, "mxfp8_e4m3", G.group(32, dim=0)), quantize(x.t(), "mxfp8_e4m3")
    assert torch.equal(a.dequantize(), b.dequantize().t()) and torch.equal(a.scales, b.scales.t())


def test_nvfp4_has_two_levels():
    torch.manual_seed(7)
    x = torch.randn(8, 64) * torch.exp2(torch.randint(-6, 6, (8, 64)).float())
    q = quantize(x, "nvfp4")
    tensor = x.abs().amax() / (6 * 448)
    assert torch.equal(q.tensor_scale, tensor) and q.scales.shape == (8, 4) and q.codes.shape == (8, 32)
    amax = x.view(8, 4, 16).abs().amax(-1)
    block = ((amax / 6) / tensor).clamp(2.0**-9, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(q.scale_values(), block * tensor)
    steps = x.view(8, 4, 16) / (block * tensor)[..., None]
    assert torch.equal(q.unpacked().view(8, 4, 16), encode(steps, E2M1, fast=False))
    assert q.nbytes == 8 * 32 + 8 * 4 + 4
    faint = torch.cat([torch.full((16,), 6.0 * 448), torch.full((16,), 6 * 0.9 * 2.0**-10)])
    q = quantize(faint, "nvfp4")
    assert q.tensor_scale == 1 and q.scale_values().tolist() == [448, 2.0**-9]
    assert q.dequantize()[16:].tolist() == [3 * 2.0**-9] * 16, "a block too faint for its scale still counts"
    zero = quantize(torch.zeros(16), "nvfp4")
    assert zero.dequantize().tolist() == [0.0] * 16


def test_scales_in_bf16_and_scales_given():
    torch.manual_seed(8)
    x = torch.randn(4, 32)
    q = quantize(x, "e4m3", G.group(16), scale=Scale("absmax", "bf16"))
    assert q.scales.dtype == torch.bfloat16
    assert torch.equal(q.scales, (x.view(4, 2, 16).abs().amax(-1) / 448).bfloat16())
    given = torch.full((4,), 0.01)
    q = quantize(x, "int8", G.row(), scale=given)
    assert torch.equal(q.dequantize(), (x / given[:, None]).round().clamp(-127, 127) * given[:, None])
    with pytest.raises(HeadwayError, match="wrong shape"):
        quantize(x, "int8", scale=given)
    x[0, 0] = math.nan
    for how in (given, Scale("none")):
        with pytest.raises(HeadwayError, match="has no NaN"):
            quantize(x, "int8", G.row(), scale=how)
    with pytest.raises(HeadwayError, match="above zero"):
        quantize(x, "int8", G.row(), scale=given * 0)


def test_fixed_point_has_no_scale():
    q = quantize(torch.tensor([0.3, -5.0, 1e-4]), "fixed<2,14>")
    assert q.scales is None and q.nbytes == 6
    assert q.dequantize().tolist() == [round(0.3 * 2**14) / 2**14, -2, 2 / 2**14]
    assert quantize(torch.tensor([300.0]), "e4m3", scale="none").dequantize().item() == 288


def test_formats_of_your_own():
    mine = FloatFormat.make("e3m4", 3, 4, specials="none")
    x = torch.randn(100)
    y = quantize(x, mine, rounding="stochastic", generator=torch.Generator().manual_seed(0)).dequantize()
    assert (x - y).abs().max() < x.abs().max() / 16
    assert quantize(x, FixedFormat.make("ternary", 2, narrow=True), scale="absmax").dequantize().unique().numel() == 3


def test_huge_and_tiny_numbers_keep_finite_scales():
    for value, name in itertools.product((1e-45, 1e-38, 3.4e38), ("int8", "e4m3", "e2m1", "mxfp8_e4m3", "nvfp4")):
        y = quantize(torch.full((32,), value), name).dequantize()
        assert torch.isfinite(y).all() and (y <= value * 1.2).all()
    with pytest.raises(HeadwayError, match="beyond fp32"):
        quantize(torch.tensor([1e300], dtype=torch.float64), "int8")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["int8", "int4", "e4m3", "e2m1", "mxfp4", "mxfp8_e5m2", "nvfp4"])
def test_numbers_that_are_not_finite(name, bad):
    x = torch.randn(4, 32)
    x[1, 3] = bad
    granularity = {"nvfp4": G.group(16)}.get(name, G.group(32))
    with pytest.raises(HeadwayError, match="not finite in 1 of"):
        quantize(x, name, granularity)
    y = quantize(x, name, granularity, nonfinite="propagate").dequantize()
    assert torch.isnan(y[1, :16]).all()
    clean = x.clone()
    clean[1, : granularity.size[0]] = 0  # the rest may hold the largest number of the tensor
    others = [0, 2, 3]
    assert torch.equal(y[others], quantize(clean, name, granularity).dequantize()[others])


def test_stochastic_quantisation_is_unbiased():
    """Mean of 400 draws within 4.5 sigma for each of 64 numbers, with scales in play."""
    torch.manual_seed(9)
    x = torch.randn(64)
    generator = torch.Generator().manual_seed(1)
    for name in ("int8", "int4", "e4m3", "mxfp4"):
        format = BLOCK_FORMATS["mxfp4"].with_rule("rceil") if name == "mxfp4" else name
        granularity = None if name == "mxfp4" else G.group(32)
        draws = torch.stack(
            [quantize(x, format, granularity, "stochastic", generator).dequantize() for _ in range(400)]
        )
        low, high = draws.amin(0), draws.amax(0)
        assert ((draws == low) | (draws == high)).all()
        inner = quantize(x, format, granularity, "zero")
        step = inner.scale_values().repeat_interleave(32)
        if not name.startswith("int"):
            table, codes = inner.format.codes().float().abs(), inner.unpacked().long()
            step = step * (table[(codes + 1) % len(table)] - table[codes]).nan_to_num(1e9).abs()
        assert (high - low <= step * 1.001).all()
        assert ((draws.mean(0) - x).abs() <= 4.5 * step / 2 / 400**0.5 + 1e-5).all()


def test_fake_quantisation_lets_the_gradient_through():
    for dtype in DTYPES:
        x = torch.randn(3, 32, dtype=dtype, requires_grad=True)
        y = fake_quantize(x, "mxfp4")
        assert y.dtype == dtype and torch.equal(y, quantize(x, "mxfp4").dequantize())
        upstream = torch.randn_like(y)
        (gradient,) = torch.autograd.grad(y, x, upstream)
        assert torch.equal(gradient, upstream)


def test_a_clipped_gradient_stops_where_the_format_ends():
    x = torch.tensor([0.5, 1.0, 1.28, -1.27, -2.0], requires_grad=True)
    y = fake_quantize(x, "int8", scale=torch.tensor(0.01), gradient="clipped")
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.tolist() == [1, 1, 0, 1, 0]
    x = torch.tensor([1.9, 3.0, -3.0], requires_grad=True)
    y = fake_quantize(x, "fixed<2,14>", gradient="clipped")
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [1, 0, 0]
    x = torch.randn(3, 5, requires_grad=True)
    y = fake_quantize(x, "e2m1", G.group(4, pad=True), gradient="clipped")
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [[1.0] * 5] * 3


@pytest.mark.parametrize(
    "call,said",
    [
        (lambda x: quantize(x, "e4m3", G.group(5)), "do not divide dimension 1 of shape"),
        (lambda x: quantize(x, "mxfp4"), "groups of 32"),
        (lambda x: quantize(x, "mxfp4", G.group(16)), "has groups of 32"),
        (lambda x: quantize(x, "mxfp4", scale="absmax"), "chooses its scales itself"),
        (lambda x: quantize(x, "e4m3", G.row(3)), "no dimension 3"),
        (lambda x: quantize(x[0], "e4m3", G.block(2, 2)), "two dimensions"),
        (lambda x: quantize(x[0, 0], "e4m3", G.group(2)), "with dimensions"),
        (lambda x: quantize(x, "mxpf4"), "mxfp4"),
        (lambda x: quantize(x, "e4m3", scale="amax"), "absmax"),
        (lambda x: quantize(x, "e4m3", scale=Scale("absmax", "e8m0")), "power of two"),
        (lambda x: quantize(x, "e4m3", scale=Scale("absmax", tensor=True)), "e4m3"),
        (lambda x: quantize(x, "e4m3", scale=Scale("floor", "int3")), "There are: bf16"),
        (lambda x: quantize(x, "e4m3", nonfinite="ignore"), "raise or propagate"),
        (lambda x: quantize(x.int(), "e4m3"), "torch.int32"),
        (lambda x: quantize(x, "e4m3", rounding="up"), "nearest, stochastic or zero"),
        (lambda x: fake_quantize(x, "e4m3", gradient="none"), "straight or clipped"),
        (lambda x: G.group(0), "from 1 up"),
        (lambda x: quantize(x, FORMATS["e8m0"], scale="even"), "no mantissa"),
    ],
)
def test_bad_calls_get_a_sentence(call, said):
    with pytest.raises(HeadwayError, match=said):
        call(torch.ones(3, 8))


def test_it_moves_between_devices_and_knows_its_bytes():
    q = quantize(torch.randn(4, 32), "nvfp4").to("cpu")
    assert q.scales is not None and q.nbytes == 64 + 8 + 4
    assert INT8.bits == 8
