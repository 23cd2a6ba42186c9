"""Causal language models of transformers behind our own interface, by the path of their folder.

Needs: transformers; random weights, no network.
Run: pytest tests/models/test_transformers_model.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from headway.core.errors import HeadwayError, ModelError
from headway.core.fallback import FallbackLog, use_log
from headway.models.build import build_model
from headway.models.config import TransformersConfig
from headway.models.gpt2 import GPT2
from headway.models.hf import save_hf
from headway.models.llama import Llama
from headway.models.transformers_model import TransformersModel
from headway.models.transformers_probe import apart_by
from headway.serve.cache import Cache
from headway.workloads.language import NextTokenLoss
from tests.models.references import reference, saved, tokens

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_neox": {},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "phi": {},  # its head has a bias
    "gemma2": {"head_dim": 8, "sliding_window": 5},  # its logits are capped
    "bloom": {"n_layer": 3, "n_head": 4},  # takes no positions
}


@pytest.fixture(autouse=True)
def fallbacks() -> FallbackLog:
    log = FallbackLog()
    use_log(log)
    return log


def by_path(kind: str, folder: Path, **changes: Any) -> tuple[Any, Any]:
    theirs = reference(kind, **{**FAMILIES.get(kind, {}), **changes})
    theirs.save_pretrained(folder)
    return theirs, build_model(TransformersConfig(path=str(folder)), seed=0).eval()


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_it_computes_what_transformers_computes(kind: str, tmp_path: Path) -> None:
    theirs, ours = by_path(kind, tmp_path / "theirs")
    assert isinstance(ours, TransformersModel)
    x = tokens(length=40)
    expected = theirs(x).logits
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-5)
    assert ours.vocab == 97 and len(ours.structure().blocks) == 3
    assert ours.plain_head is (kind not in ("phi", "gemma2"))
    if ours.plain_head:
        torch.testing.assert_close(ours.hidden(x) @ ours.head_weight.T, expected, rtol=0, atol=1e-4)
    else:
        with pytest.raises(ModelError, match="head is more than a weight"):
            _ = ours.head_weight
    save_hf(ours, tmp_path / "again")
    again = build_model(TransformersConfig(path=str(tmp_path / "again")), seed=0).eval()
    assert torch.equal(again(x), ours(x))


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_packed_documents_equal_separate_passes_or_are_refused(kind: str, tmp_path: Path) -> None:
    _, model = by_path(kind, tmp_path)
    x, lengths = tokens(batch=1, length=40), (17, 1, 22)
    segments = torch.tensor([[i for i, n in enumerate(lengths) for _ in range(n)]])
    if kind == "bloom":
        with pytest.raises(ModelError, match=r"cannot keep packed documents apart.*mask_documents: false"):
            model(x, segments=segments)
        return
    packed = model(x, segments=segments)
    alone = [model(part) for part in x.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=0, atol=1e-4)
    assert not torch.allclose(packed, model(x), atol=1e-2)
    hidden = model.hidden(x, segments=segments)
    torch.testing.assert_close(hidden[:, 18:], model.hidden(x[:, 18:]), rtol=0, atol=1e-4)


def test_a_mask_never_replaces_a_sliding_window() -> None:
    # For a few tokens it would look right: the documents that are tried are shorter than any real window.
    model = reference("gemma2", head_dim=8, sliding_window=32)
    assert apart_by(model, True, {"use_cache": False}) == "positions"
    with pytest.raises(ModelError, match="cannot keep packed documents apart"):
        apart_by(model, False, {"use_cache": False})


def test_a_recurrent_model_refuses_packed_documents(tmp_path: Path) -> None:
    _, model = by_path("mamba", tmp_path, state_size=4)
    with pytest.raises(ModelError, match="cannot keep packed documents apart"):
        model(tokens(batch=1, length=6), segments=torch.tensor([[0, 0, 0, 1, 1, 1]]))
    assert model.training is False and model(tokens(batch=1, length=6)).shape == (1, 6, 97)


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_its_cache_continues_where_it_stopped(kind: str, tmp_path: Path) -> None:
    _, model = by_path(kind, tmp_path)
    x = tokens(batch=1, length=20)
    cache = model.new_cache(1, 20)
    assert isinstance(cache, Cache) and cache.length == 0
    steps = [model(x[:, :12], cache=cache), *(model(x[:, i : i + 1], cache=cache) for i in range(12, 20))]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(x), rtol=0, atol=1e-4)
    assert cache.length == 20 and cache.state


@pytest.mark.parametrize("kind", ["phi", "gemma2", "gpt_neox"])
def test_the_language_loss_is_that_of_all_logits(kind: str, tmp_path: Path) -> None:
    theirs, ours = by_path(kind, tmp_path)
    x = tokens(length=12)
    labels = x.clone()
    labels[:, :5] = -100
    expected = theirs(x, labels=labels).loss  # the mean over 14 targets, shifted
    targets = torch.cat((labels[:, 1:], torch.full((2, 1), -100)), dim=1)
    loss, count = NextTokenLoss()(ours, {"tokens": x, "targets": targets})
    assert int(count) == 14
    torch.testing.assert_close(loss / count, expected, rtol=1e-5, atol=0)
    loss.backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())


def test_gradients_reach_every_parameter(tmp_path: Path) -> None:
    _, model = by_path("gpt_neox", tmp_path)
    model.train()
    (model.hidden(tokens(length=8)) @ model.head_weight.T).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("gpt_neox", {}), ("opt", {}), ("gemma3_text", {"sliding_window": 64})],
)
def test_flops_per_token_equal_those_that_torch_counts(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    _, model = by_path(kind, tmp_path, **changes)
    B, T = 2, 64
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model(tokens(B, T)).sum().backward()
    counted = counter.get_total_flops() / (B * T)
    assert abs(counted / model.flops_per_token(T) - 1) < 0.01


def test_only_the_experts_that_a_token_uses_count(tmp_path: Path) -> None:
    _, all_ = by_path("mixtral", tmp_path / "4", num_local_experts=4, num_experts_per_tok=4)
    _, half = by_path("mixtral", tmp_path / "2", num_local_experts=4, num_experts_per_tok=2)
    assert all_.flops_per_token(8) - half.flops_per_token(8) == 6 * 3 * 2 * (3 * 32 * 64)


def test_casting_the_weights_does_not_round_the_rotary_frequencies(tmp_path: Path) -> None:
    _, model = by_path("gemma2", tmp_path)
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    assert before
    model.to(torch.bfloat16)
    after = dict(model.named_buffers())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_a_folder_of_our_families_runs_natively_if_it_may(tmp_path: Path, fallbacks: FallbackLog) -> None:
    theirs = saved("qwen3", tmp_path)
    x = tokens(length=40)
    native = build_model(TransformersConfig(path=str(tmp_path)), seed=0).eval()
    foreign = build_model(TransformersConfig(path=str(tmp_path), native=False), seed=0).eval()
    assert isinstance(native, Llama) and isinstance(foreign, TransformersModel)
    for model in (native, foreign):
        torch.testing.assert_close(model(x), theirs(x).logits, rtol=0, atol=1e-4)
    assert not fallbacks.entries


def test_settings_that_ours_lack_fall_back_out_loud(tmp_path: Path, fallbacks: FallbackLog) -> None:
    _, model = by_path("llama", tmp_path / "llama", mlp_bias=True)
    assert isinstance(model, TransformersModel)
    assert "mlp_bias" in fallbacks.entries[0]["why"]
    # GPT-2 drops attention weights in training, ours does not.
    saved("gpt2", tmp_path / "gpt2")
    model = build_model(TransformersConfig(path=str(tmp_path / "gpt2")), seed=0)
    assert isinstance(model, GPT2) and model.config.dropout == 0.1
    assert "dropout" in fallbacks.entries[1]["what"]
    use_log(FallbackLog(strict=True))
    with pytest.raises(HeadwayError, match="attention without dropout"):
        build_model(TransformersConfig(path=str(tmp_path / "gpt2")), seed=0)


@pytest.mark.parametrize("kind", ["gpt_neox", "llama"])
def test_fresh_weights_follow_from_the_seed(kind: str, tmp_path: Path) -> None:
    reference(kind).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    config = TransformersConfig(path=str(tmp_path), fresh=True, vocab=50)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    first = build_model(config, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(10)
    again, other = build_model(config, seed=1), build_model(config, seed=2)
    assert first.vocab == 50 and first.head_weight.shape == (50, 32)
    assert {parameter.dtype for parameter in first.parameters()} == {torch.float32}
    for a, b, c in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.ndim < 2 or not torch.equal(a, c)


@pytest.mark.parametrize("kind", ["gpt_neox", "llama"])
def test_a_vocabulary_that_is_too_small_is_refused(kind: str, tmp_path: Path) -> None:
    reference(kind).save_pretrained(tmp_path)
    build_model(TransformersConfig(path=str(tmp_path), vocab=97), seed=0)
    with pytest.raises(ModelError, match=r"model.vocab.*got 97, expected at least 98.*fresh: true"):
        build_model(TransformersConfig(path=str(tmp_path), vocab=98), seed=0)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    reference("gpt_neox").save_pretrained(tmp_path)
    config = TransformersConfig(path=str(tmp_path))
    weights = load_file(tmp_path / "model.safetensors")
    name = "gpt_neox.final_layer_norm.weight"
    for change, message in (
        ({name: torch.ones(31)}, "has in another shape 1 tensors: .*final_layer_norm"),
        ({name: None}, f"lacks 1 tensors: {name}"),
    ):
        tensors = {key: value for key, value in {**weights, **change}.items() if value is not None}
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=message):
            build_model(config, seed=0)
    (tmp_path / "model.safetensors").write_bytes(b"none")
    with pytest.raises(ModelError, match="transformers cannot load it"):
        build_model(config, seed=0)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "x.Y"}}))
    with pytest.raises(ModelError, match="needs code from its folder"):
        build_model(config, seed=0)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 9}))
    with pytest.raises(ModelError, match=str(tmp_path)):
        build_model(config, seed=0)
    with pytest.raises(ModelError, match="there is no such folder"):
        build_model(TransformersConfig(path=str(tmp_path / "none")), seed=0)
