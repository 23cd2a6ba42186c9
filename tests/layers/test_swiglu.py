"""SwiGLU against its equation, gradients included. Needs torch alone: pytest tests/layers."""

import pytest
import torch

from headway.layers.swiglu import swiglu, swiglu_reference


@pytest.mark.parametrize("shape", [(3, 5, 16), (0, 8), (7,), (2, 33)])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
def test_values_and_gradients_are_the_equations(shape, dtype, tolerance):
    torch.manual_seed(0)
    gate = (3 * torch.randn(shape)).to(dtype).requires_grad_()
    up = torch.randn(shape).to(dtype).requires_grad_()
    out = swiglu(gate, up)
    assert out.dtype == dtype
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, (gate, up), upstream)
    g, u = gate.detach().double().requires_grad_(), up.detach().double().requires_grad_()
    expected = swiglu_reference(g, u)
    wanted = torch.autograd.grad(expected, (g, u), upstream.double())
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def test_halves_of_one_projection():
    both = torch.randn(4, 6, 32, requires_grad=True)
    out = swiglu(*both.chunk(2, dim=-1))
    got = torch.autograd.grad(out.square().sum(), both)[0]
    wanted = torch.autograd.grad(swiglu_reference(*both.chunk(2, dim=-1)).square().sum(), both)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_gradcheck():
    gate, up = (torch.randn(3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(swiglu, (gate, up))


def test_extreme_gates_are_finite():
    gate = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4], requires_grad=True)
    out = swiglu(gate, torch.ones(5))
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(gate.grad).all()
