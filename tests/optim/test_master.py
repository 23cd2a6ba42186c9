"""The optimizer over fp32 masters against plain fp32 training. Needs torch alone: pytest tests/optim."""

import copy

import pytest
import torch
from torch import nn

from headway.optim.adamw import build_adamw, param_groups
from headway.optim.master import MasterOptimizer


def masters_of(model, lr=0.01, decay=0.1):
    return MasterOptimizer(param_groups(model, decay), lambda groups: build_adamw(groups, lr))


def make_model(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def backward(model, seed, dtype=torch.bfloat16):
    torch.manual_seed(seed)
    model(torch.randn(4, 6).to(dtype)).float().square().mean().backward()


def test_each_step_is_the_inner_optimizers_on_fp32_copies():
    model = make_model()
    optimizer = masters_of(model)
    copies = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    plain = build_adamw(param_groups(nn.ParameterList(copies), 0.1), 0.01)
    for step in range(5):
        probe = copy.deepcopy(model)
        backward(probe, step)
        backward(model, step)
        for c, p in zip(copies, probe.parameters()):
            c.grad = p.grad.float()
        optimizer.step()
        plain.step()
        optimizer.zero_grad()
    for p, c in zip(model.parameters(), copies):
        torch.testing.assert_close(p, c.detach().to(torch.bfloat16), rtol=0, atol=0)


def test_updates_below_the_resolution_of_bf16_add_up():
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterOptimizer([{"params": [weight]}], lambda groups: torch.optim.SGD(groups, lr=1e-3))
    for _ in range(8):
        weight.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert weight[0] == 0.9922  # 0.992 rounded; bf16 alone would have stayed at 1


def test_micro_batches_are_summed_in_fp32_and_low_gradients_freed():
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = MasterOptimizer([{"params": [weight]}], lambda groups: torch.optim.SGD(groups, lr=1.0))
    for value in (256.0, 1.0, 1.0, 1.0):  # bf16 cannot represent 257
        (weight * value).sum().backward()
        assert weight.grad is None
    assert optimizer.params[0].grad.item() == 259.0
    optimizer.zero_grad()
    assert optimizer.params[0].grad is None
    (weight * 2.0).sum().backward()
    assert optimizer.params[0].grad.item() == 2.0


def test_a_tied_weight_has_one_master_and_its_whole_gradient():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(self.embedding(tokens))

    torch.manual_seed(0)
    model = Tied().bfloat16()
    optimizer = masters_of(model)
    assert len(optimizer.params) == 1
    probe = copy.deepcopy(model)
    for m in (model, probe):
        m(torch.tensor([1, 2])).float().square().sum().backward()
    assert model.embedding.weight.grad is None
    torch.testing.assert_close(optimizer.params[0].grad, probe.embedding.weight.grad.float())


def test_fp32_parameters_are_their_own_masters():
    model = make_model(torch.float32)
    model[0].bfloat16()
    optimizer = masters_of(model)
    own = {id(p) for p in model[2].parameters()}
    assert own <= {id(p) for p in optimizer.params}
    model[2](torch.randn(2, 8)).sum().backward()
    assert model[2].weight.grad is not None
    before = model[2].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model[2].weight)
    optimizer.zero_grad()
    assert model[2].weight.grad is None


def test_state_saved_and_restored_in_mid_run_changes_nothing():
    straight, resumed = make_model(), make_model()
    optimizer = masters_of(straight)
    for step in range(6):
        backward(straight, step)
        optimizer.step()
        optimizer.zero_grad()
    first = masters_of(resumed)
    for step in range(3):
        backward(resumed, step)
        first.step()
        first.zero_grad()
    state = copy.deepcopy(first.state_dict())
    first.close()
    fresh = make_model()
    second = masters_of(fresh)
    second.load_state_dict(state)
    for step in range(3, 6):
        backward(fresh, step)
        second.step()
        second.zero_grad()
    for a, b in zip(optimizer.params, second.params):
        assert torch.equal(a, b)
    for a, b in zip(straight.parameters(), fresh.parameters()):
        assert torch.equal(a, b)


def test_a_state_of_other_parameters_is_refused_and_changes_nothing():
    optimizer = masters_of(make_model())
    before = [m.detach().clone() for m in optimizer.params]
    other = masters_of(nn.Linear(6, 8).bfloat16()).state_dict()
    with pytest.raises(ValueError, match="masters"):
        optimizer.load_state_dict(other)
    wrong = copy.deepcopy(optimizer.state_dict())
    wrong["masters"]["1"] = torch.zeros(99, 99)
    with pytest.raises(ValueError, match="master 1"):
        optimizer.load_state_dict(wrong)
    for a, b in zip(before, optimizer.params):
        assert torch.equal(a, b)


def test_a_schedule_reaches_the_inner_optimizer():
    optimizer = masters_of(make_model())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [m.detach().clone() for m in optimizer.params]
    for m in optimizer.params:
        m.grad = torch.ones_like(m)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, optimizer.params))


def test_close_takes_the_hooks_off():
    model = make_model()
    optimizer = masters_of(model)
    optimizer.close()
    backward(model, 0)
    assert model[0].weight.grad is not None and optimizer.params[0].grad is None
