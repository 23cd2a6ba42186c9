"""The structure map over the causal language models of transformers, and its refusals.

Needs: transformers; random weights, no network.
Run: pytest tests/models/test_structure.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from headway.core.errors import ModelError
from headway.models.build import build_model
from headway.models.config import LlamaConfig
from headway.models.structure import structure
from tests.models.references import SIZES, reference

FAMILIES: dict[str, tuple[dict[str, Any], str, str]] = {
    "llama": ({}, "model.layers", "model.norm"),
    "gemma2": ({"head_dim": 8}, "model.layers", "model.norm"),
    "gpt2": ({}, "transformer.h", "transformer.ln_f"),
    "gpt_neox": ({}, "gpt_neox.layers", "gpt_neox.final_layer_norm"),
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 32}, "model.decoder.layers", "model.decoder.final_layer_norm"),
    "phi": ({}, "model.layers", "model.final_layernorm"),
    "bloom": ({"n_layer": 3, "n_head": 4}, "transformer.h", "transformer.ln_f"),
    "mamba": ({"state_size": 4}, "backbone.layers", "backbone.norm_f"),
    "rwkv": ({"attention_hidden_size": 32}, "rwkv.blocks", "rwkv.ln_out"),
    "lfm2": (
        {"layer_types": ["conv", "full_attention", "conv"]},
        "model.layers",
        "model.embedding_norm",
    ),
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2}, "model.layers", "model.norm"),
}


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_parts_of_many_families(kind: str) -> None:
    changes, blocks, norm = FAMILIES[kind]
    model = reference(kind, **changes)
    parts = structure(model)
    assert parts.blocks is model.get_submodule(blocks)
    assert parts.norm is model.get_submodule(norm)
    assert parts.embedding is model.get_input_embeddings()
    assert parts.head is model.get_output_embeddings()
    assert parts.tied is bool(model.config.tie_word_embeddings)
    # The norm found is what makes the hidden state that the head reads.
    seen: dict[str, torch.Tensor] = {}
    parts.norm.register_forward_hook(lambda module, args, output: seen.update(norm=output))
    parts.head.register_forward_hook(lambda module, args, output: seen.update(head=args[0]))
    model(torch.arange(6)[None])
    assert torch.equal(seen["norm"], seen["head"])


def test_our_own_models_answer_for_themselves() -> None:
    model = build_model(LlamaConfig(hidden=16, layers=2, heads=2, vocab=20), seed=0)
    assert structure(model).blocks is model.blocks


def test_of_several_lists_of_that_length_the_blocks_are_the_heaviest() -> None:
    model = reference("llama")
    blocks = model.model.layers
    scales = nn.ModuleList(nn.Linear(1, 1) for _ in blocks)  # one per layer, beside the blocks and found before them
    model.model._modules = {"scales": scales, **model.model._modules}
    assert structure(model).blocks is blocks


def test_a_model_without_a_final_norm() -> None:
    config = transformers.OPTConfig(
        hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=9, word_embed_proj_dim=32
    )
    config._remove_final_layer_norm = True
    assert isinstance(structure(transformers.OPTForCausalLM(config)).norm, nn.Identity)


def test_refusals_say_what_was_looked_for() -> None:
    with pytest.raises(ModelError, match="Linear: is not a causal language model of Headway or transformers"):
        structure(nn.Linear(2, 2))
    headless = reference("llama").model
    with pytest.raises(ModelError, match="LlamaModel: has no output head"):
        structure(headless)
    model = reference("llama", **{**SIZES, "num_hidden_layers": 2})
    model.model.layers = nn.ModuleList([*model.model.layers, nn.Identity()])
    with pytest.raises(ModelError, match=r"no list of 2 blocks.*model.layers \(3\)"):
        structure(model)
