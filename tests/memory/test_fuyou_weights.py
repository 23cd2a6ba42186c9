"""Working weights on disk: never more blocks in memory than asked for, and the same bits.

Needs nothing. Run: pytest tests/memory/test_fuyou_weights.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from headway.core.errors import MethodError
from headway.core.surgery import replace_blocks
from headway.memory.fuyou import TieredOptimizer, WeightsOnDisk, block_groups
from headway.memory.lanes import Lanes
from headway.memory.recompute import RecomputedBlock
from headway.memory.streambp.stream import stream_backward
from tests.memory.test_fuyou import assert_same, everything, loss_of, plain, tiny, train


def on_disk(model: Any, dtype: torch.dtype, folder: Path, most: int = 2, **options: Any) -> Any:
    groups = block_groups(model)
    chosen = frozenset(i for i, group in enumerate(groups) if group.block is not None)
    optimizer = TieredOptimizer(plain(model, dtype), groups, folder, weights_on_disk=chosen, **options)
    WeightsOnDisk(list(model.blocks), optimizer, most)
    return optimizer


def held(optimizer: Any) -> int:
    return sum(flat.storage.nbytes() > 0 for flat in optimizer.weights.flats.values())


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize(("dtype", "micro"), [(torch.float32, 2), (torch.bfloat16, 1)])
@pytest.mark.parametrize("overlap", [True, False])
def test_same_bits_as_in_memory(tmp_path: Path, dtype: torch.dtype, micro: int, most: int, overlap: bool) -> None:
    model = tiny(layers=4)
    reference = plain(model, dtype)
    train(model, reference, 5, micro)
    with torch.no_grad():
        evaluated = loss_of(model, 99)
    expected = everything(model, reference)

    model = tiny(layers=4)
    optimizer = on_disk(model, dtype, tmp_path, most)
    most_held = 0
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda *_: seen.append(held(optimizer)))
    seen: list[int] = []
    train(model, optimizer, 5, micro, overlap)
    with torch.no_grad():
        assert torch.equal(loss_of(model, 99), evaluated)
    most_held = max(seen)
    assert 1 <= most_held <= most
    assert held(optimizer) <= most
    optimizer.close()  # brings them back
    assert_same(everything_closed(model, optimizer), {k: v for k, v in expected.items() if k.startswith("weight")})


def everything_closed(model: nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    return {f"weight {k}": p.detach().clone() for k, p in model.named_parameters()}


def test_states_too_and_weights_that_are_away_are_no_numbers(tmp_path: Path) -> None:
    model = tiny()
    reference = plain(model)
    train(model, reference, 3)
    expected = {k: v for k, v in everything(model, reference).items() if not k.startswith("weight")}
    model = tiny()
    optimizer = on_disk(model, torch.float32, tmp_path)
    train(model, optimizer, 3)
    assert all(p.isnan().all() for p in model.blocks.parameters())
    assert not model.embedding.weight.isnan().any()
    found = everything(model, optimizer)
    assert_same({k: v for k, v in found.items() if not k.startswith("weight")}, expected)
    optimizer.close()


def test_rollback_and_loading_forget_what_is_here(tmp_path: Path) -> None:
    model = tiny()
    optimizer = on_disk(model, torch.float32, tmp_path)
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    with torch.no_grad():
        at_two = loss_of(model, 5)
    optimizer.arm()
    loss_of(model, 2).backward()
    optimizer.rollback()
    with torch.no_grad():
        assert torch.equal(loss_of(model, 5), at_two)
    train(model, optimizer, 2, first=2)
    with torch.no_grad():
        assert not torch.equal(loss_of(model, 5), at_two)
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        assert torch.equal(loss_of(model, 5), at_two)
    optimizer.close()


@pytest.mark.parametrize("how", ["recompute", "streambp"])
def test_with_blocks_that_others_have_replaced(tmp_path: Path, how: str) -> None:
    def built() -> Any:
        model = tiny()
        if how == "recompute":
            replace_blocks(model.blocks, RecomputedBlock, "test")
        else:
            stream_backward(model.blocks, chunk=8)
        return model

    model = built()
    reference = plain(model)
    train(model, reference, 3)
    expected = {k: v for k, v in everything(model, reference).items() if k.startswith("weight")}
    model = built()
    optimizer = on_disk(model, torch.float32, tmp_path, most=1)
    train(model, optimizer, 3)
    optimizer.close()
    assert_same(everything_closed(model, optimizer), expected)


def test_new_weights_come_from_a_buffer_that_is_not_written_yet(tmp_path: Path) -> None:
    """The last group to be updated is the first block to run: it does not wait for the drive."""
    model = tiny(layers=2)
    lanes = Lanes(rates={"disk_write": 2e6})
    optimizer = on_disk(model, torch.float32, tmp_path, lanes=lanes, buffers=6)
    train(model, optimizer, 1)
    before = lanes["host_to_device"].report.jobs
    with torch.no_grad():
        loss_of(model, 0)
    assert lanes["host_to_device"].report.jobs > before
    optimizer.close()
    lanes.close()


def test_blocks_that_are_not_needed_after_all_give_their_buffers_back(tmp_path: Path) -> None:
    model = tiny()
    lanes = Lanes(rates={"disk_write": 2e5})
    optimizer = on_disk(model, torch.float32, tmp_path, most=3, lanes=lanes, buffers=6)
    train(model, optimizer, 1)
    lanes["host_to_device"].rate = 2e5
    optimizer.weights.need(0, 1)  # and 1 and 2 ahead, from buffers that are still to be written
    optimizer.weights.forget()
    lanes["host_to_device"].rate = lanes["disk_write"].rate = None
    optimizer.drain()
    assert not any(buffer.users for buffer in optimizer._buffers)
    optimizer.close()
    lanes.close()


@pytest.mark.parametrize("frozen", [[0, 1, 2], [0, 1], [1], [2]], ids=str)
def test_frozen_blocks_stay_in_memory(tmp_path: Path, frozen: list[int]) -> None:
    def built() -> Any:
        model = tiny(tied=False)
        for i in frozen:
            model.blocks[i].requires_grad_(False)
        return model

    model = built()
    reference = plain(model)
    train(model, reference, 3)
    expected = {k: v for k, v in everything(model, reference).items() if k.startswith("weight")}
    model = built()
    optimizer = on_disk(model, torch.float32, tmp_path)
    train(model, optimizer, 3)
    optimizer.close()
    assert_same(everything_closed(model, optimizer), expected)


def test_a_block_that_runs_again_in_the_backward_pass_keeps_its_weights(tmp_path: Path) -> None:
    """As where `torch.utils.checkpoint` runs the whole block anew, hooks included."""

    def built() -> Any:
        model = tiny()

        class Again(type(model.blocks[0])):  # type: ignore[misc]
            def __call__(self, *args: Any, **shared: Any) -> Any:
                return checkpoint(super().__call__, *args, use_reentrant=False, **shared)

        for block in model.blocks:
            block.__class__ = Again
        return model

    with set_checkpoint_early_stop(False):
        model = built()
        reference = plain(model)
        train(model, reference, 3)
        expected = {k: v for k, v in everything(model, reference).items() if k.startswith("weight")}
        model = built()
        optimizer = on_disk(model, torch.float32, tmp_path)
        train(model, optimizer, 3)
    optimizer.close()
    assert_same(everything_closed(model, optimizer), expected)


def test_blocks_that_share_weights_are_refused(tmp_path: Path) -> None:
    model = tiny()
    model.blocks[1].mlp = model.blocks[0].mlp
    with pytest.raises(MethodError, match="share weights"):
        on_disk(model, torch.float32, tmp_path)


def test_with_a_model_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
                                      num_key_value_heads=2, vocab_size=61, tie_word_embeddings=False)  # fmt: skip

    def losses(optimize: Any) -> list[float]:
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        optimizer = optimize(model)
        found = []
        for step in range(4):
            x = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(step))
            if isinstance(optimizer, TieredOptimizer):
                optimizer.arm()
            loss = model(input_ids=x, labels=x, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    def tiered(model: Any) -> Any:
        groups = block_groups(model)
        assert [group.name for group in groups] == ["head", "block 2", "block 1", "block 0", "embedding"]
        chosen = frozenset(i for i, group in enumerate(groups) if group.block is not None)
        optimizer = TieredOptimizer(plain(model), groups, tmp_path, weights_on_disk=chosen)
        WeightsOnDisk(list(model.model.layers), optimizer)
        return optimizer

    assert losses(tiered) == losses(plain)
