"""Streamed log-probabilities against the whole logits.

Needs nothing. Run: pytest tests/layers/test_linear_log_probs.py
"""

from __future__ import annotations

import pytest
import torch

from headway.layers.linear_log_probs import linear_log_probs, linear_log_probs_reference


@pytest.mark.parametrize("chunk", [1, 5, 13, 100])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_equals_the_reference(chunk: int, scale: float) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(13, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (13,))
    targets[3] = -100
    incoming = torch.randn(13, dtype=torch.float64)
    expected = linear_log_probs_reference(hidden, weight, targets, logit_scale=scale)
    got = linear_log_probs(hidden, weight, targets, chunk=chunk, logit_scale=scale)
    torch.testing.assert_close(got, expected)
    assert got[3] == 0
    for ours, theirs in zip(
        torch.autograd.grad(got, (hidden, weight), incoming), torch.autograd.grad(expected, (hidden, weight), incoming)
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_bf16_sums_in_fp32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32), torch.randn(100, 32)
    targets = torch.randint(100, (64,))
    exact = linear_log_probs_reference(hidden, weight, targets)
    low = linear_log_probs(hidden.bfloat16(), weight.bfloat16(), targets)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, rtol=0.05, atol=0.2)


def test_nothing_in_nothing_out() -> None:
    assert linear_log_probs(torch.zeros(0, 4), torch.zeros(3, 4), torch.zeros(0, dtype=torch.int64)).shape == (0,)
