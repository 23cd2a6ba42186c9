"""Streamed losses against their textbook forms on whole logits, through a streamed model, in fp64.

Needs nothing. Run: pytest tests/memory/test_streambp_objectives.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from headway.memory.streambp.objectives import chunked_dpo_loss, chunked_grpo_loss, chunked_lm_loss
from headway.memory.streambp.stream import stream_backward
from headway.models.build import build_model
from headway.models.config import LlamaConfig
from headway.models.structure import structure

B, T, V = 8, 17, 40


def setting() -> tuple[Any, Tensor, Tensor]:
    torch.manual_seed(0)
    config = LlamaConfig(hidden=32, layers=2, heads=4, kv_heads=2, vocab=V, context=32)
    tokens, targets = torch.randint(V, (B, T)), torch.randint(V, (B, T))
    for row in range(B):
        targets[row, : row % 5] = -100  # prompts of unequal length
        targets[row, T - row % 3 :] = -100
    return build_model(config, seed=0).double(), tokens, targets


def whole_log_probs(model: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    logits = model(tokens)
    picked = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return torch.where(targets == -100, 0.0, picked)


def assert_same(plain: Any, streamed: Any) -> None:
    model, tokens, targets = setting()
    losses, grads = [], []
    for function in (plain, streamed):
        if function is streamed:
            stream_backward(structure(model).blocks, 6)
        model.zero_grad()
        loss = function(model, tokens, targets)
        loss.backward()
        losses.append(loss.detach())
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=1e-14)
    for name, grad in grads[0].items():
        assert (grads[1][name] - grad).norm() <= 1e-10 * grad.norm(), name


def test_lm() -> None:
    assert_same(
        lambda m, x, y: F.cross_entropy(m(x).flatten(0, 1), y.flatten()),
        lambda m, x, y: chunked_lm_loss(m.hidden(x), m.head_weight, y, chunk=5),
    )


def test_dpo_with_four_pairs() -> None:
    reference = torch.randn(B, dtype=torch.float64) - 20

    def plain(model: Any, x: Tensor, y: Tensor) -> Tensor:
        sums = whole_log_probs(model, x, y).sum(-1)
        total = torch.zeros((), dtype=torch.float64)
        for pair in range(B // 2):
            margin = (sums[pair] - reference[pair]) - (sums[pair + B // 2] - reference[pair + B // 2])
            total = total - torch.log(torch.sigmoid(0.3 * margin))
        return total / (B // 2)

    assert_same(plain, lambda m, x, y: chunked_dpo_loss(m.hidden(x), m.head_weight, y, reference, beta=0.3, chunk=5))


@pytest.mark.parametrize("normalise", ["grpo", "bnpo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_grpo(normalise: Any, beta: float) -> None:
    torch.manual_seed(1)
    old = -3.5 + 0.3 * torch.randn(B, T, dtype=torch.float64)
    reference = -3.5 + 0.3 * torch.randn(B, T, dtype=torch.float64)
    advantages = torch.randn(B, dtype=torch.float64)

    def plain(model: Any, x: Tensor, y: Tensor) -> Tensor:
        log_probs = whole_log_probs(model, x, y)
        total, tokens = torch.zeros((), dtype=torch.float64), int((y != -100).sum())
        for row in range(B):
            kept = [t for t in range(T) if y[row, t] != -100]
            row_loss = torch.zeros((), dtype=torch.float64)
            for t in kept:
                ratio = torch.exp(log_probs[row, t] - old[row, t])
                clipped = ratio.clamp(0.8, 1.2)
                row_loss = row_loss - torch.min(ratio * advantages[row], clipped * advantages[row])
                gap = reference[row, t] - log_probs[row, t]
                row_loss = row_loss + beta * (torch.exp(gap) - gap - 1)
            total = total + row_loss / {"grpo": len(kept) * B, "bnpo": tokens, "dr_grpo": B * 20}[normalise]
        return total

    def streamed(model: Any, x: Tensor, y: Tensor) -> Tensor:
        return chunked_grpo_loss(
            model.hidden(x), model.head_weight, y, old, advantages,
            reference=reference, beta=beta, normalise=normalise, max_length=20, chunk=5,
        )  # fmt: skip

    assert_same(plain, streamed)


def test_missing_arguments() -> None:
    hidden, head, targets = torch.zeros(1, 2, 4), torch.zeros(3, 4), torch.zeros(1, 2, dtype=torch.int64)
    old, advantages = torch.zeros(1, 2), torch.zeros(1)
    with pytest.raises(ValueError, match="reference"):
        chunked_grpo_loss(hidden, head, targets, old, advantages, beta=0.1)
    with pytest.raises(ValueError, match="max_length"):
        chunked_grpo_loss(hidden, head, targets, old, advantages, normalise="dr_grpo")
