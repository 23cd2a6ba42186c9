"""Attention against its equation written out with loops and masks. Needs torch alone: pytest tests/layers."""

import math

import pytest
import torch

from headway.layers import blocked_attention as blocked
from headway.layers.attention import attention, attention_reference
from headway.layers.masks import attention_mask

CASES = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 5},
    "window longer than the keys": {"window": 1000},
    "scale": {"scale": 0.3},
    "segments": {"segments": "two"},
    "segments and window": {"segments": "two", "window": 4},
    "two-sided window": {"window": 4, "causal": False},
}


def by_hand(q, k, v, *, segments=None, window=None, causal=True, scale=None, offset=0):
    """One query at a time, in Python."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    groups = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                i = t + offset
                seen = [
                    j
                    for j in range(k.shape[2])
                    if (not causal or j <= i)
                    and (window is None or abs(i - j) < window)
                    and (segments is None or segments[b, i] == segments[b, j])
                ]
                p = (k[b, h // groups, seen] @ q[b, h, t] * scale).softmax(0)
                out[b, h, t] = p @ v[b, h // groups, seen]
    return out


def inputs(kv_heads=2, dtype=torch.float32, t=17, s=None, options=None):
    torch.manual_seed(0)
    options = dict(options or {})
    q = torch.randn(2, t, 4, 8).to(dtype).transpose(1, 2)
    k, v = (torch.randn(2, s or t, kv_heads, 8).to(dtype).transpose(1, 2) for _ in range(2))
    if options.get("segments"):
        options["segments"] = torch.stack([torch.arange(t) // 6, (torch.arange(t) >= 3).long()])
    return [x.requires_grad_() for x in (q, k, v)], options


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_the_reference_is_the_equation(name, kv_heads):
    (q, k, v), options = inputs(kv_heads, torch.float64, t=11, options=CASES[name])
    torch.testing.assert_close(attention_reference(q, k, v, **options), by_hand(q, k, v, **options))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_values_and_gradients_are_the_references(name, kv_heads, dtype, tolerance):
    qkv, options = inputs(kv_heads, dtype, options=CASES[name])
    out = attention(*qkv, **options)
    assert out.dtype == dtype and out.shape == qkv[0].shape
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, qkv, upstream)
    wide = [x.detach().double().requires_grad_() for x in qkv]
    expected = attention_reference(*wide, **options)
    wanted = torch.autograd.grad(expected, wide, upstream.double())
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("t", [1, 3])
def test_a_cache_gives_the_last_rows_of_the_whole(window, t):
    (q, k, v), _ = inputs(t=12)
    whole = attention(q, k, v, window=window)
    part = attention(q[:, :, -t:], k, v, window=window, offset=12 - t)
    torch.testing.assert_close(part, whole[:, :, -t:])


def test_segments_with_a_cache():
    (q, k, v), options = inputs(t=12, options={"segments": True})
    whole = attention(q, k, v, **options)
    torch.testing.assert_close(attention(q[:, :, -3:], k, v, offset=9, **options), whole[:, :, -3:])


def test_documents_do_not_see_each_other():
    (q, k, v), options = inputs(options={"segments": True})
    out = attention(q, k, v, **options)
    alone = attention(q[:1, :, 6:12], k[:1, :, 6:12], v[:1, :, 6:12])
    torch.testing.assert_close(out[:1, :, 6:12], alone)


def test_the_mask_is_none_where_everything_is_seen():
    assert attention_mask(4, 4, causal=False) is None


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_blocks_of_queries_give_the_same(name, kv_heads, keep, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(blocked, "_KEEP", 1000 if keep else 0)
    qkv, options = inputs(kv_heads, dtype, t=37, options=CASES[name])
    options.setdefault("scale", 1 / math.sqrt(8))
    out = blocked.blocked_attention(*qkv, block=8, **options)
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, qkv, upstream)
    wide = [x.detach().double().requires_grad_() for x in qkv]
    expected = attention_reference(*wide, **options)
    wanted = torch.autograd.grad(expected, wide, upstream.double())
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", [None, 5])
def test_blocks_of_new_queries_against_a_cache(window):
    (q, k, v), _ = inputs(t=37)
    whole = attention_reference(q, k, v, window=window)
    part = blocked.blocked_attention(q[:, :, 11:], k, v, window=window, scale=1 / math.sqrt(8), offset=11, block=8)
    torch.testing.assert_close(part, whole[:, :, 11:])


@pytest.mark.parametrize("keep", [True, False])
def test_gradcheck_of_the_blocks(keep, monkeypatch):
    monkeypatch.setattr(blocked, "_KEEP", 1000 if keep else 0)
    q = torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 1, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(lambda q, k, v: blocked.blocked_attention(q, k, v, scale=0.7, block=2), (q, k, v))


def test_hidden_blocks_are_never_computed():
    """Counted: rows times keys of all scores, against the whole square."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Scores(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if "_softmax.default" in str(function):
                self.count += out.numel()
            return out

    (q, k, v), _ = inputs(kv_heads=4, t=64)
    for options, share in (({}, 0.625), ({"window": 8}, 0.5), ({"causal": False}, 1.0)):
        with Scores() as scores:
            blocked.blocked_attention(q, k, v, block=16, **options)
        assert scores.count <= share * 2 * 4 * 64 * 64


def test_the_output_needs_no_copy_before_the_projection():
    (q, k, v), _ = inputs(t=37)
    assert blocked.blocked_attention(q, k, v, block=8).transpose(1, 2).is_contiguous()
