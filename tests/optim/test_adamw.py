"""Parameter groups, AdamW against its equations, clipping against torch. Needs torch alone: pytest tests/optim."""

import math

import pytest
import torch
from torch import nn

from headway.core.clip import clip_
from headway.optim.adamw import build_adamw, param_groups


def test_only_matrices_decay_and_a_tied_one_once():
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 5))
    model[2].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    decayed, plain = param_groups(model, 0.1)
    assert [p.dim() for p in decayed["params"]] == [2] and decayed["weight_decay"] == 0.1
    assert {id(p) for p in plain["params"]} == {id(model[1].weight), id(model[2].bias)}
    assert plain["weight_decay"] == 0.0


def test_there_are_no_empty_groups():
    assert len(param_groups(nn.Linear(3, 3, bias=False), 0.1)) == 1


def test_steps_are_the_papers():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    lr, betas, eps, decay = 0.01, (0.8, 0.9), 1e-6, 0.3
    optimizer = build_adamw(param_groups(model, decay), lr, betas, eps)
    expected = {name: [p.detach().double(), 0.0, 0.0] for name, p in model.named_parameters()}
    for step in range(1, 6):
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            theta, m, v = expected[name]
            g = p.grad.double()
            m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
            theta = theta * (1 - lr * (decay if p.dim() == 2 else 0))
            theta = theta - lr * (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
            expected[name] = [theta, m, v]
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.double(), expected[name][0], rtol=1e-5, atol=1e-6)


def test_plain_parameters_do_not_decay():
    optimizer = build_adamw(nn.Linear(2, 2).parameters(), 0.1)
    assert optimizer.param_groups[0]["weight_decay"] == 0.0 and optimizer.param_groups[0]["fused"]


@pytest.mark.parametrize("max_norm", [0.5, 1e3, None, math.inf])
def test_clipping_is_torchs(max_norm):
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(n)) for n in (3, 5, 7)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    for a, b in zip(ours[:2], theirs[:2]):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    norm = clip_(iter(ours), max_norm)
    wanted = nn.utils.clip_grad_norm_(theirs, math.inf if max_norm is None else max_norm)
    torch.testing.assert_close(norm, wanted)
    for a, b in zip(ours[:2], theirs[:2]):
        torch.testing.assert_close(a.grad, b.grad)
    assert ours[2].grad is None


def test_a_gradient_that_is_not_finite_is_reported_and_left():
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.tensor([1.0, math.nan])
    assert clip_([p], 1.0).isnan() and p.grad[0] == 1.0


def test_no_gradients_have_norm_zero():
    assert clip_([nn.Parameter(torch.ones(2))], 1.0) == 0
