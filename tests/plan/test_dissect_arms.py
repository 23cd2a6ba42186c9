"""The techniques that the study's experiment compares: exact where they say so, 4-bit weights near the originals.

Needs torch with gloo; trains tiny models: pytest tests/plan/test_dissect_arms.py
"""

import pytest
import torch
from torch import nn

from headway.core.build import build_trainer
from headway.core.recipe import Recipe
from headway.plan.dissect.arms import NF4, Linear4Bit, LoRALinear, dequantize_nf4, quantize_nf4
from headway.plan.dissect.collectives import on_ranks
from headway.plan.dissect.memory import memory_breakdown
from headway.plan.dissect.sharded import sharded_steps
from headway.plan.dissect.training import dissect_trainer

ARMS = "methods.headway.plan.dissect.arms:"


@pytest.fixture
def train(tiny):
    def build(*overrides):
        return build_trainer(Recipe.load(tiny(model={"hidden": 64, "layers": 2}), overrides))

    return build


@pytest.mark.parametrize("arm", ["EagerAttention={}", "DiskStates={}"])
def test_exact_arms_train_as_the_plain_recipe(train, arm):
    plain, other = train(), train(ARMS + arm)
    assert other.changes
    losses = [[trainer.train_step()["loss"] for _ in range(5)] for trainer in (plain, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_state_is_on_disk_between_steps(train):
    plain, disk = train(), train(ARMS + "DiskStates={}")
    held = [memory_breakdown(t.train_step, t.model, t.optimizer).before.optimizer for t in (plain, disk)]
    assert held[1] < 0.01 * held[0]


def test_recompute_in_a_recipe_is_recompute_in_its_tree(train):
    tree = dissect_trainer(train("methods.recompute={}"), steps=1, warmup=1, plain=1, peaks={})
    forward, again = (tree.phases[name].children["blocks.*"] for name in ("forward", "recompute"))
    for part in ("q", "k", "v", "out"):
        module = "attention", part
        assert again.children[module[0]].children[part].flops == forward.children[module[0]].children[part].flops
    assert tree.root.flops == tree.counted_flops


def test_lora_starts_as_the_model_and_trains_its_updates_alone(train):
    plain, lora = train(), train(ARMS + "LoRA={rank: 2}")
    assert lora.train_step()["loss"] == pytest.approx(plain.train_step()["loss"], rel=1e-5)
    trained = {name for name, p in lora.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 14 and all(name.endswith((".a", ".b")) for name in trained)
    losses = [lora.train_step()["loss"] for _ in range(10)]
    assert losses[-1] < losses[0]


def test_nf4_is_the_nearest_level_of_each_group():
    torch.manual_seed(0)
    weight = torch.randn(8, 128)
    packed, scale = quantize_nf4(weight)
    assert packed.shape == (8 * 128 // 2,) and packed.dtype == torch.uint8 and scale.shape == (16,)
    back = dequantize_nf4(packed, scale, weight.shape, torch.float32)
    levels = torch.tensor(NF4)
    for row, group_scale, group in zip(weight.reshape(-1, 64), scale.float(), back.reshape(-1, 64)):
        best = ((row[:, None] - levels * group_scale).abs()).min(1).values
        torch.testing.assert_close((row - group).abs(), best)
    assert (weight - back).abs().mean() < 0.1
    again, _ = quantize_nf4(back)
    assert torch.equal(again, packed), "what is on a level stays on it"


def test_a_4_bit_layer_is_the_layer_of_its_rounded_weights():
    torch.manual_seed(0)
    base = nn.Linear(64, 32, bias=False)
    layer = Linear4Bit(base)
    assert layer.nbytes == 64 * 32 // 2 + 64 * 32 // 64 * 2
    rounded = dequantize_nf4(layer.packed, layer.scale, layer.shape, torch.float32)
    x = torch.randn(3, 5, 64, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, x @ rounded.T)
    upstream = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, upstream)[0], upstream @ rounded)
    assert not any(True for _ in layer.parameters())
    adapted = LoRALinear(base, rank=2, four_bit=True)
    assert {name for name, _ in adapted.named_parameters()} == {"a", "b"}


def test_zero2_and_zero3_train_alike_and_keep_other_amounts():
    model = {"hidden": 32, "layers": 2, "heads": 2, "vocab": 64, "context": 32}
    found = on_ranks(sharded_steps, 2, model, 1, 16, 2)
    zero2, zero3 = found[0]["zero2"], found[0]["zero3"]
    assert zero2["losses"] == zero3["losses"] and len(zero2["losses"]) == 3
    assert len(zero2["seconds"]) == 2
    assert zero3["parameter_bytes"] / zero2["parameter_bytes"] == pytest.approx(1 / 3, rel=0.02), "1/2 P and 3/2 P"
