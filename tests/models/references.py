"""Small random models of the transformers library, as independent references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2_SIZES = {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "head_dim": 16}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-llama3": ("llama", {"rope_parameters": {"rope_theta": 500000.0, **LLAMA3}}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}}),
    "llama-yarn": ("llama", {"rope_parameters": {"rope_theta": 10000.0, **YARN}}),
    "llama-dynamic": ("llama", {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0}}),
    "mistral-window": ("mistral", {"sliding_window": 7, "head_dim": 16}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-windows": (
        "qwen3",
        {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mixtral": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral-window": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 1, "sliding_window": 7}),
    "qwen3-moe": (
        "qwen3_moe",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 16},
    ),
    "qwen3-moe-dense": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "head_dim": 8,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
            "use_sliding_window": True,
            "sliding_window": 6,
        },
    ),
    "gpt2": ("gpt2", {}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False, "n_inner": 48}),
}
"""Name -> (model_type, what differs from ``SIZES``)."""

TOKENS = 80
"""Longer than the rotary models' 64 positions, so that dynamic scaling sets in, and than every window."""


def reference(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A transformers model in evaluation mode whose norms and biases, too, are random."""
    sizes = GPT2_SIZES if kind == "gpt2" else SIZES
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        # Larger than the usual 0.02: attention must be far from uniform for a wrong mask or position to show.
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def saved(case: str, folder: Path, **options: Any) -> Any:
    """A reference of ``CASES``, written to ``folder``."""
    kind, changes = CASES[case]
    model = reference(kind, **changes)
    model.save_pretrained(folder, **options)
    return model


def tokens(batch: int = 2, length: int = TOKENS, seed: int = 1, vocab: int = 97) -> torch.Tensor:
    """Random tokens [batch, length]."""
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
