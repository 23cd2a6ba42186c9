"""The memory of a step by purpose: it adds up to the meter's peak, and the known parts have their known sizes.

Needs torch alone: pytest tests/plan/test_dissect_memory.py
"""

import pytest
import torch
import torch.nn.functional as F
from dissect_models import Decoder
from torch import nn

from headway.core.meters import live_peak
from headway.optim.adamw import AdamW
from headway.optim.options import OptimizerOptions
from headway.plan.dissect.memory import memory_breakdown


def training(recompute=None, dtype=torch.float32, batch=4, sequence=64):
    torch.manual_seed(0)
    model = Decoder(dim=64, layers=4)
    model.recompute = recompute
    optimizer = AdamW.build(model, OptimizerOptions(), dtype)

    def step():
        tokens, targets = torch.randint(0, 128, (2, batch, sequence))
        F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, model, optimizer


@pytest.mark.parametrize("recompute", [None, "plain", "reentrant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_parts_add_up_to_the_meters_peak(recompute, dtype):
    step, model, optimizer = training(recompute, dtype)
    report = memory_breakdown(step, model, optimizer)
    _, peak = live_peak(step)
    assert report.peak.total == peak
    parameters = sum(p.numel() for p in model.parameters())
    small = 8 * len(list(model.parameters()))  # AdamW counts the steps of each parameter
    assert report.before.parameters == report.peak.parameters == parameters * dtype.itemsize
    states = 2 if dtype == torch.float32 else 3  # moments, and masters under bf16
    assert report.before.optimizer == pytest.approx(states * 4 * parameters, abs=small)
    assert report.peak.optimizer == report.before.optimizer
    assert report.before.activations == 0
    assert all(value >= 0 for value in vars(report.peak).values() if isinstance(value, int))
    if recompute is None:
        ours = report.peak.other - report.before.other  # what else lives in the process is none of the step's
        assert ours < 0.5 * report.peak.activations
    if dtype == torch.bfloat16:
        assert report.before.gradients == 4 * parameters, "the buffers that fp32 gradients are summed in are kept"


def test_recompute_frees_activations_and_nothing_else():
    plain = memory_breakdown(*training())
    less = memory_breakdown(*training("plain"))
    assert less.peak.activations < 0.6 * plain.peak.activations
    assert less.peak.parameters == plain.peak.parameters and less.peak.optimizer == plain.peak.optimizer


def test_gradients_are_whole_when_the_optimizer_makes_the_peak():
    model = nn.Linear(256, 256, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True, fused=False)
    x = torch.randn(2, 256)

    def step():
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    report = memory_breakdown(step, model, optimizer)
    weight = 4 * 256 * 256
    assert report.peak_phase == "other", "the temporaries of an update that is not fused"
    assert report.peak.gradients == weight
    assert report.peak.other - report.before.other == pytest.approx(weight, rel=0.05)
    assert report.before.gradients == 0
    assert report.peak.total == live_peak(step)[1]


def test_gradients_kept_between_steps_are_gradients_before():
    model = nn.Linear(64, 64, bias=False)
    report = memory_breakdown(lambda: model(torch.randn(8, 64)).sum().backward(), model)
    assert report.before.gradients == 4 * 64 * 64
    assert report.before.optimizer == 0
    assert report.reserved_bytes is None
    assert report.to_dict()["peak_bytes"] == report.peak.total


def test_hooks_are_taken_off_after_an_error():
    model = nn.Linear(8, 8)
    calls = 0

    def step():
        nonlocal calls
        calls += 1
        model(torch.randn(2, 8)).sum().backward()
        if calls == 2:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        memory_breakdown(step, model)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert memory_breakdown(step, model).peak.total > 0, "the profiler is free again"
