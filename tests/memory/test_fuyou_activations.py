"""Swapped and recomputed activations: the same bits, and the products that the plan says are the ones recomputed.

Needs nothing. Run: pytest tests/memory/test_fuyou_activations.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headway.core.meters import live_peak
from headway.core.surgery import replace_blocks, restore_blocks
from headway.memory.backends import FileBackend, HostBackend
from headway.memory.fuyou import Activations, Tiers, plan_tiers
from headway.memory.store import TieredStore
from headway.models.build import build_model
from headway.models.config import GPT2Config, LlamaConfig

VOCAB = 61
LLAMA = LlamaConfig(hidden=32, layers=3, heads=2, vocab=VOCAB, context=64, dropout=0.1)
GPT2 = GPT2Config(hidden=32, layers=3, heads=2, vocab=VOCAB, context=64)


def gradients(model: Any, seed: int = 0) -> list[Tensor]:
    for p in model.parameters():
        p.grad = None
    torch.manual_seed(seed)
    x = torch.randint(VOCAB, (2, 64))
    loss = nn.functional.cross_entropy(model(x).flatten(0, 1).float(), x.flatten())
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def planned(model: Any, store: TieredStore | None, mode: Any) -> Activations:
    blocks = list(model.blocks)
    activations = Activations(blocks, store, mode)
    replace_blocks(model.blocks, lambda block: activations.shell(block, blocks.index(block)), "test")
    return activations


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_prefix_of_the_plan_gives_the_same_bits(tmp_path: Path, config: Any, dtype: torch.dtype) -> None:
    model = build_model(config, seed=0).to(dtype)
    expected = gradients(model)
    store = TieredStore(FileBackend(tmp_path))
    activations = planned(model, store, "swap")
    got = gradients(model)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert activations.recomputed == 0
    units = activations.recomputable()
    for count in range(len(units) + 1):
        activations.choose(count)
        activations.reused = activations.recomputed = 0
        got = gradients(model)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert (activations.reused, activations.recomputed) == (count, len(units) - count)
    assert store._held == 0  # nothing of a graph that is gone is kept
    activations.close()


def test_recompute_needs_no_store() -> None:
    model = build_model(LLAMA, seed=0)
    expected = gradients(model)
    activations = planned(model, None, "recompute")
    got = gradients(model)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert activations.reused == 0
    assert activations.recomputed == 21  # seven products in each of three blocks
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.int64))  # an evaluation passes through
    activations.close()
    restore_blocks(model.blocks)


def test_units_are_known_with_their_bytes_and_flops(tmp_path: Path) -> None:
    model = build_model(LLAMA, seed=0)
    store = TieredStore(HostBackend())
    activations = planned(model, store, "auto")
    gradients(model)
    tokens = 128
    for unit in activations.recomputable():
        linear = model.blocks[unit.layer].original.get_submodule(unit.kind)
        assert unit.nbytes == tokens * linear.out_features * 4
        assert unit.flops == 2 * tokens * linear.in_features * linear.out_features
    kinds = [unit.kind for unit in activations.recomputable()]
    # ordered by benefit: flops per byte grow with the width of the input
    assert kinds[:3] == ["mlp.down"] * 3
    rest = ("attention.k", "attention.out", "attention.q", "attention.v", "mlp.gate", "mlp.up")
    assert sorted(kinds[3:]) == sorted(rest * 3)
    assert sum(activations.checkpoint_bytes.values()) == 3 * tokens * 32 * 4
    activations.close()


def test_the_blocks_last_product_is_no_unit_where_nobody_needs_it_again() -> None:
    """torch's checkpoint stops early; without dropout the output of MLP down goes into the residual stream only."""
    model = build_model(LLAMA.model_copy(update={"dropout": 0.0}), seed=0)
    activations = planned(model, TieredStore(HostBackend()), "swap")
    gradients(model)
    assert "mlp.down" not in {unit.kind for unit in activations.recomputable()}
    activations.close()


@pytest.mark.parametrize(("rate", "swapped"), [(1e15, 21), (1.0, 0)])
def test_auto_decides_by_the_cost_model(rate: float, swapped: int) -> None:
    model = build_model(LLAMA, seed=0)
    expected = gradients(model)
    activations = planned(model, TieredStore(HostBackend()), "auto")
    gradients(model)
    profile = activations.profile(0.0, 1e9, weight_bytes=0.0)
    tiers = Tiers(1e9, float("inf"), float("inf"), rate, rate)
    plan = activations.decide(profile, tiers)
    assert len(plan.swapped) == swapped
    assert plan == plan_tiers(profile, tiers)
    activations.reused = 0
    got = gradients(model)
    assert activations.reused == swapped
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert activations.report()["planned_units"] == swapped
    activations.close()


def test_swapping_takes_less_memory_than_keeping(tmp_path: Path) -> None:
    model = build_model(LlamaConfig(hidden=64, layers=6, heads=2, vocab=VOCAB, context=64), seed=0)
    gradients(model)
    plain = live_peak(lambda: gradients(model))[1]
    activations = planned(model, TieredStore(FileBackend(tmp_path)), "swap")
    gradients(model)
    assert live_peak(lambda: gradients(model))[1] < plain
    activations.close()


def test_a_damaged_file_is_an_error_and_no_gradient(tmp_path: Path) -> None:
    from headway.core.errors import HeadwayError

    model = build_model(LLAMA, seed=0)
    backend = FileBackend(tmp_path)
    store = TieredStore(backend)
    activations = planned(model, store, "swap")
    x = torch.randint(VOCAB, (2, 64))
    loss = nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten())
    store.drain()
    for path in backend.folder.glob("0*"):
        content = bytearray(path.read_bytes())
        content[10] ^= 1
        path.write_bytes(content)
    with pytest.raises(HeadwayError, match="came back with other bytes"):
        loss.backward()
    activations.close()
