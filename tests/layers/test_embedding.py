"""The embedding against torch's in fp64, frequent tokens in bf16 included. Needs torch alone: pytest tests/layers."""

import pytest
import torch
import torch.nn.functional as F

from headway.layers.embedding import Embedding, embedding


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (0,)])
def test_values_and_gradient_are_torchs(dtype, tolerance, shape):
    torch.manual_seed(0)
    weight = torch.randn(11, 6).to(dtype).requires_grad_()
    tokens = torch.randint(0, 11, shape)
    out = embedding(tokens, weight)
    upstream = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, weight, upstream)
    wide = weight.detach().double().requires_grad_()
    expected = F.embedding(tokens, wide)
    (wanted,) = torch.autograd.grad(expected, wide, upstream.double())
    assert out.dtype == got.dtype == dtype
    torch.testing.assert_close(out.double(), expected)
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


def test_a_frequent_token_keeps_its_gradient_in_bf16():
    weight = torch.zeros(3, 4, dtype=torch.bfloat16, requires_grad=True)
    embedding(torch.zeros(4096, dtype=torch.long), weight).sum().backward()
    assert weight.grad[0].tolist() == [4096.0] * 4  # torch's own kernel stops at 256


def test_the_module_is_an_embedding():
    module = Embedding(5, 4)
    tokens = torch.tensor([[1, 4]])
    assert isinstance(module, torch.nn.Embedding)
    torch.testing.assert_close(module(tokens), F.embedding(tokens, module.weight))
