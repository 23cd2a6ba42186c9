"""Our own families as modules: packed documents, windows, positions, numbers formats, FLOPs, step-by-step use.

Equality with transformers is in test_hf.py; here each property has a reference of its own.
Needs: nothing.
Run: pytest tests/models/test_llama.py
"""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from headway.core.errors import ModelError
from headway.layers.attention import attention_reference
from headway.models.build import build_model, init_weights
from headway.models.config import GPT2Config, LlamaConfig
from headway.models.gpt2 import positions_in_documents
from headway.models.hf import load_hf
from tests.models.references import saved, tokens

CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(hidden=32, layers=3, heads=4, kv_heads=2, vocab=97, context=128, qk_norm=True),
    "window": LlamaConfig(hidden=32, layers=3, heads=4, vocab=97, context=128, window=6, window_layers=(0, 2)),
    "yarn": LlamaConfig(
        hidden=32, layers=2, heads=4, vocab=97, context=128, rope_scaling={"rope_type": "yarn", "factor": 2.0}
    ),
    "gpt2": GPT2Config(hidden=32, layers=3, heads=4, vocab=97, context=128),
}


def model_of(name: str) -> Any:
    model = build_model(CONFIGS[name], seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_packed_documents_equal_separate_passes(name: str) -> None:
    model = model_of(name)
    lengths = [[17, 1, 22], [9, 28, 3]]
    x = tokens(batch=2, length=40)
    segments = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in lengths])
    packed = model(x, segments=segments)
    for row in range(2):
        start = 0
        for length in lengths[row]:
            alone = model(x[row : row + 1, start : start + length])
            torch.testing.assert_close(packed[row : row + 1, start : start + length], alone, rtol=0, atol=2e-5)
            start += length
    assert not torch.allclose(packed, model(x), atol=1e-2)  # the mask matters


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_future_is_not_seen_and_the_past_only_within_windows(name: str) -> None:
    model, x = model_of(name), tokens(batch=1, length=40)
    y = x.clone()
    y[0, 20] = (y[0, 20] + 1) % 97
    changed = ((model(x) - model(y)).abs().amax(-1) > 1e-5)[0]
    assert not changed[:20].any() and changed[20:26].all()
    # Blocks 0 and 2 see 6 tokens, block 1 everything: through it, all later tokens change.
    assert changed[26:].any()


@torch.no_grad()
def test_windows_in_all_blocks_bound_what_is_seen() -> None:
    config = LlamaConfig(hidden=32, layers=2, heads=4, vocab=97, window=6)
    model, x = build_model(config, seed=0).eval(), tokens(batch=1, length=40)
    y = x.clone()
    y[0, 20] = (y[0, 20] + 1) % 97
    changed = ((model(x) - model(y)).abs().amax(-1) > 0)[0]
    assert changed[20:31].all() and not changed[31:].any()  # two blocks, five tokens back each


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_hidden_times_head_is_the_logits_and_the_blocks_can_be_run_one_by_one(name: str) -> None:
    model, x = model_of(name), tokens(length=20)
    logits = model(x)
    assert torch.equal(model.hidden(x) @ model.head_weight.T, logits)
    parts = model.structure()
    y, shared = model.embed(x)
    for block in parts.blocks:
        y = block(y, **shared)
    assert torch.equal(parts.norm(y) @ parts.head.weight.T, logits)
    assert parts.embedding.weight.shape == (97, 32) and len(parts.blocks) == CONFIGS[name].layers


@torch.no_grad()
def test_rotary_positions_are_relative_and_learned_ones_are_not() -> None:
    x = tokens(length=20)
    for name, relative in (("llama", True), ("yarn", True), ("gpt2", False)):
        model = model_of(name)
        same = torch.allclose(model(x), model(x, positions=torch.arange(50, 70)), atol=1e-4)
        assert same is relative
    positions = torch.stack((torch.arange(20), torch.arange(30, 50)))  # [B, T]
    model = model_of("gpt2")
    rows = [model(x[i : i + 1], positions=positions[i]) for i in range(2)]
    torch.testing.assert_close(model(x, positions=positions), torch.cat(rows), rtol=0, atol=1e-5)


@torch.no_grad()
def test_dynamic_scaling_goes_by_the_farthest_position(tmp_path: Path) -> None:
    theirs = saved("llama-dynamic", tmp_path)  # for 64 positions
    ours = load_hf(tmp_path).eval()
    x, far = tokens(length=20), torch.arange(70, 90)
    expected = theirs(x, position_ids=far.expand(2, -1)).logits
    torch.testing.assert_close(ours(x, positions=far), expected, rtol=0, atol=1e-4)
    assert not torch.allclose(ours(x), expected, atol=1e-2)


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_stays_behind_on_another_device(name: str) -> None:
    model = model_of(name).to("meta")
    x = torch.zeros(2, 9, dtype=torch.long, device="meta")
    assert model(x).device.type == model(x, segments=x).device.type == "meta"
    cache = model.new_cache(2, 12)
    model(x, cache=cache)
    assert model(x[:, :1], cache=cache).shape == (2, 1, 97) and cache.state["keys.0"].is_meta
    with torch.device("meta"):  # made there, then moved to real memory: its frequencies are real as well
        made = type(model)(CONFIGS[name])
    made = made.to_empty(device="cpu")
    init_weights(made, 0.02, seed=0)
    assert torch.equal(made(tokens(length=9)), build_model(CONFIGS[name], seed=0)(tokens(length=9)))


def test_positions_in_documents() -> None:
    segments = torch.tensor([[4, 4, 4, 7, 7, 4], [0, 1, 2, 2, 2, 2]])
    assert positions_in_documents(segments).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3]]
    assert positions_in_documents(segments[:, :1]).tolist() == [[0], [0]]


def test_gpt2_refuses_what_its_positions_do_not_cover() -> None:
    model = model_of("gpt2")
    with pytest.raises(ModelError, match=r"model.context: 129 tokens do not fit the 128 learned positions"):
        model(tokens(length=129))
    documents = torch.arange(129)[None] // 100
    assert model(tokens(batch=1, length=129), segments=documents).shape == (1, 129, 97)
    with pytest.raises(ModelError, match="129 tokens do not fit"):
        model(tokens(batch=1, length=129), segments=torch.zeros(1, 129, dtype=torch.long))


def test_segments_and_a_cache_exclude_each_other() -> None:
    for name in ("llama", "gpt2"):
        model = model_of(name)
        with pytest.raises(ValueError, match="exclude each other"):
            model(tokens(length=4), segments=torch.zeros(2, 4), cache=model.new_cache(2, 8))


@torch.no_grad()
def test_casting_the_model_does_not_round_the_rotary_frequencies() -> None:
    model, x = model_of("llama"), tokens(batch=1, length=100)
    before = model.rope.frequencies.clone()
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert torch.equal(half.rope.frequencies, before)
    # Rounded once to bf16, the weights differ by 0.4 %; rounded frequencies would turn far positions by radians.
    rounded = copy.deepcopy(half).float()
    difference = (half(x).float() - rounded(x)).abs().mean() / rounded(x).std()
    assert difference < 0.03


@pytest.mark.parametrize("name", CONFIGS)
def test_models_are_copied_and_pickled_whole(name: str) -> None:
    model, x = model_of(name), tokens(length=12)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(copied(x), model(x))
        assert copied.head_weight is copied.embedding.weight  # tied still
        assert copied.embedding.weight is not model.embedding.weight


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dropout_acts_in_training_only(name: str) -> None:
    config = CONFIGS[name].model_copy(update={"dropout": 0.3})
    model, x = build_model(config, seed=0), tokens(length=12)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    assert torch.equal(model(x), build_model(CONFIGS[name], seed=0)(x))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_flops_per_token_equal_those_that_torch_counts(family: str, tied: bool) -> None:
    shape: dict[str, Any] = {"hidden": 64, "layers": 2, "heads": 4, "vocab": 200, "context": 128, "tied": tied}
    config = LlamaConfig(**shape, kv_heads=2) if family == "llama" else GPT2Config(**shape)
    model, B, T = build_model(config, seed=0), 2, 128
    # The reference does the products that the formula counts; a fast path may skip some, or do some twice.
    for block in model.blocks:
        block.attention.attend = attention_reference
    with FlopCounterMode(display=False) as counter:
        model(tokens(B, T, vocab=200)).sum().backward()
    assert abs(counter.get_total_flops() / (B * T) / model.flops_per_token(T) - 1) < 0.01


def test_flops_count_only_the_keys_within_a_window() -> None:
    full, window = build_model(CONFIGS["llama"], 0), build_model(CONFIGS["window"], 0)
    assert full.flops_per_token(200) - full.flops_per_token(100) == 12 * 32 * 3 * 100
    assert window.flops_per_token(200) - window.flops_per_token(100) == 12 * 32 * 1 * 100
