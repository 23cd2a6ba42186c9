"""RMSNorm against its equation and torch's own, gradients included. Needs torch alone: pytest tests/layers."""

import pytest
import torch
import torch.nn.functional as F

from headway.layers.norm import RMSNorm, rms_norm, rms_norm_reference


@pytest.mark.parametrize("shape", [(3, 5, 16), (1, 8), (0, 8), (2, 3, 4, 24), (7, 40)])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
def test_values_and_gradients_are_the_equations(shape, dtype, tolerance):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    w = torch.randn(shape[-1], dtype=dtype, requires_grad=True)
    out = rms_norm(x, w, 1e-5)
    assert out.dtype == dtype
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, (x, w), upstream)

    xw, ww = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    expected = rms_norm_reference(xw, ww, 1e-5)
    wanted = torch.autograd.grad(expected, (xw, ww), upstream.double())
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(
            a.double(), b, rtol=tolerance, atol=tolerance * max(1.0, float(b.abs().max()) if b.numel() else 1.0)
        )


def test_agrees_with_torch():
    x, w = torch.randn(4, 9, 32), torch.randn(32)
    torch.testing.assert_close(rms_norm(x, w, 1e-6), F.rms_norm(x, (32,), w, 1e-6))


def test_gradcheck():
    x, w = (
        torch.randn(3, 6, dtype=torch.float64, requires_grad=True),
        torch.randn(6, dtype=torch.float64, requires_grad=True),
    )
    torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (x, w))


def test_non_contiguous_input():
    x = torch.randn(6, 4, 16).transpose(0, 1).requires_grad_()
    w = torch.randn(16, requires_grad=True)
    out = rms_norm(x, w, 1e-5)
    torch.testing.assert_close(out, rms_norm_reference(x, w, 1e-5))
    got = torch.autograd.grad(out.sum(), (x, w))
    wanted = torch.autograd.grad(rms_norm_reference(x, w, 1e-5).sum(), (x, w))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_large_fp16_values_do_not_overflow_the_statistics():
    small = torch.full((2, 64), 3e4, dtype=torch.float16)
    out = rms_norm(small, torch.ones(64, dtype=torch.float16), 1e-5)
    torch.testing.assert_close(out, torch.ones_like(out))


def test_module():
    norm = RMSNorm(8, eps=1e-4)
    x = torch.randn(2, 8)
    torch.testing.assert_close(norm(x), rms_norm_reference(x, torch.ones(8), 1e-4))
    assert "eps=0.0001" in repr(norm)
