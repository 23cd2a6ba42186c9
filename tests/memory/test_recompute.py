"""Recomputation: same gradients, and exactly the operations that were not kept run twice.

Needs: nothing. Run: pytest tests/memory/test_recompute.py
"""

import collections
import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from headway.core.meters import live_rise
from headway.core.surgery import replace_blocks, restore_blocks
from headway.memory.recompute import RecomputedBlock
from headway.models.build import build_model
from headway.models.config import GPT2Config, LlamaConfig
from headway.models.structure import structure

LLAMA = LlamaConfig(hidden=64, layers=3, heads=4, kv_heads=2, vocab=97, context=64, intermediate=96)
GPT2 = GPT2Config(hidden=64, layers=3, heads=4, vocab=97, context=64)


class Counted(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.calls[operation.name().partition(".")[0]] += 1
        return operation(*args, **(kwargs or {}))


def backward(model, tokens):
    with Counted() as counted:
        model(tokens).square().sum().backward()
    return counted.calls, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("keep", ["nothing", "attention", "products"])
def test_gradients_are_those_of_the_plain_run_and_only_what_is_not_kept_runs_twice(config, keep):
    plain = build_model(config, seed=0).double()
    model = copy.deepcopy(plain)
    tokens = torch.randint(0, 97, (2, 64), generator=torch.Generator().manual_seed(0))
    blocks = structure(model).blocks
    replace_blocks(blocks, lambda block: RecomputedBlock(block, keep), "test")
    once, expected = backward(plain, tokens)
    again, found = backward(model, tokens)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    attention = "headway::blocked_attention"
    assert once[attention] == len(blocks)
    assert again[attention] == len(blocks) * (2 if keep == "nothing" else 1)
    products = sum(once[name] for name in ("aten::mm", "aten::addmm"))
    twice = sum(again[name] for name in ("aten::mm", "aten::addmm"))
    assert (twice == products) if keep == "products" else (twice > products)
    restore_blocks(blocks)
    assert not any(isinstance(block, RecomputedBlock) for block in structure(model).blocks)


def test_the_more_is_kept_the_more_memory_it_takes():
    tokens = torch.randint(0, 97, (4, 64))
    peaks = {}
    for keep in (None, "products", "attention", "nothing"):
        model = build_model(LLAMA.model_copy(update={"layers": 6}), seed=0)
        if keep:
            replace_blocks(structure(model).blocks, lambda block, keep=keep: RecomputedBlock(block, keep), "test")
        model(tokens).square().sum().backward()  # gradients exist from here on
        peaks[keep] = live_rise(lambda model=model: model(tokens).square().sum().backward(), torch.device("cpu"))[1]
    assert peaks[None] > peaks["products"] > peaks["attention"] > peaks["nothing"]


@pytest.mark.parametrize("keep", ["attention", "products"])
def test_selective_recomputation_trains_compiled_and_in_bf16(tiny, keep):
    from headway.core.build import build_trainer
    from headway.core.recipe import Recipe

    train = {"precision": "bf16", "compile": True}
    chosen = build_trainer(Recipe.load(tiny(train=train, methods={"recompute": {"keep": keep}})))
    plain = build_trainer(Recipe.load(tiny(train=train)))
    for _ in range(2):
        assert chosen.train_step()["loss"] == pytest.approx(plain.train_step()["loss"], rel=1e-2)
