"""``config.json`` of a Hugging Face folder <-> our configurations, for the families that both have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headway.core.errors import ModelError, RecipeError
from headway.core.options import parse_options
from headway.models.config import ROPE_SCALINGS, GPT2Config, LlamaConfig, MoEConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
"""The ``model_type`` that we run ourselves -> its class in transformers."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "head_dim": 128,
    },
    "mixtral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
}
"""What transformers takes for a key that ``config.json`` leaves out."""


class UnsupportedModel(ModelError):
    """A folder that transformers can run and our own families cannot.

    Attributes:
        known_family: the family is one of ours, but not with these settings.
    """

    known_family = False


def read_config(folder: str | Path) -> LlamaConfig | GPT2Config:
    """Our configuration of the model in a Hugging Face folder.

    Raises:
        ModelError: the folder or its ``config.json`` is missing, unreadable or describes no possible model.
        UnsupportedModel: it is of another family, or has settings that our families lack.
    """
    path, raw = read_json(folder)
    kind = raw.get("model_type")
    if kind not in ARCHITECTURES:
        raise _unsupported(path, "model_type", kind, ", ".join(ARCHITECTURES), known=False)
    if "quantization_config" in raw:
        raise _unsupported(path, "quantization_config", "present", "unquantised weights")
    cls: type[LlamaConfig] | type[GPT2Config]
    if kind == "gpt2":
        cls, fields = GPT2Config, _gpt2_fields(path, raw)
    else:
        cls, fields = LlamaConfig, _llama_fields(path, raw, kind)
        if kind in ("mixtral", "qwen3_moe"):
            cls, fields = MoEConfig, fields | _moe_fields(path, _DEFAULTS[kind] | raw, kind)
    try:
        return parse_options(cls, fields)
    except RecipeError as error:
        raise ModelError(str(path), f"describes no possible model ({error})") from None


def read_json(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """Path and content of a folder's ``config.json``.

    Raises:
        ModelError: there is no such folder or file, or it is no JSON object.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not folder.is_dir():
        raise ModelError(str(folder), "there is no such folder", expected="a folder with config.json and safetensors")
    if not path.is_file():
        raise ModelError(str(folder), "has no config.json", expected="a Hugging Face model folder")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(str(path), f"cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ModelError(str(path), f"is no JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ModelError(
            str(path), f"holds a {type(raw).__name__}", expected="an object with the model's configuration"
        )
    return path, raw


def model_type(config: LlamaConfig | GPT2Config) -> str:
    """The ``model_type`` under which transformers computes the same function.

    Raises:
        ModelError: there is none.
    """
    if isinstance(config, GPT2Config):
        return "gpt2"
    if isinstance(config, MoEConfig):
        return _moe_type(config)
    if config.qk_norm and config.qkv_bias:
        raise ModelError(
            "model.qkv_bias",
            "cannot be exported together with qk_norm",
            hint="no family of transformers that we write has both",
        )
    if config.qk_norm:
        return "qwen3"
    some_windows = config.window is not None and len(_windowed(config)) < config.layers
    if config.qkv_bias or some_windows:
        return "qwen2"  # without biases of our own: biases of zero are the same function
    if config.window is not None or config.hidden % config.heads:
        return "mistral"  # transformers' Llama refuses a width that is no multiple of its heads
    return "llama"


def hf_config(config: LlamaConfig | GPT2Config, eos: int | None, dtype: str) -> dict[str, Any]:
    """The content of ``config.json`` that makes transformers compute the same function.

    Args:
        eos: the token that ends a text. Left out, transformers would stop at its family's own number.
        dtype: of the weights, such as ``float32``.

    Raises:
        ModelError: transformers has no such family.
    """
    kind = model_type(config)
    common = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocabulary,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tied,
        "bos_token_id": None,
        "eos_token_id": eos,
        "torch_dtype": dtype,
    }
    if isinstance(config, GPT2Config):
        return common | {
            "n_positions": config.context,
            "n_embd": config.hidden,
            "n_layer": config.layers,
            "n_head": config.heads,
            "n_inner": config.intermediate_width,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": config.norm_eps,
            "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "attn_pdrop": 0.0,
        }
    fields = common | {
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_head_count,
        "head_dim": config.head_width,
        "intermediate_size": config.intermediate_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "attention_dropout": 0.0,
    }
    if isinstance(config, MoEConfig):
        fields |= _moe_config(config, kind)
    if kind == "mistral":
        fields["sliding_window"] = config.window
    if kind in ("qwen2", "qwen3"):
        windowed = _windowed(config)
        fields["use_sliding_window"] = bool(windowed)
        fields["sliding_window"] = config.window if windowed else None
        fields["max_window_layers"] = min(windowed, default=config.layers)
        names = ("full_attention", "sliding_attention")
        fields["layer_types"] = [names[layer in windowed] for layer in range(config.layers)]
    return fields


def _windowed(config: LlamaConfig) -> list[int]:
    return [layer for layer in range(config.layers) if config.window_of(layer) is not None]


def _llama_fields(path: Path, raw: dict[str, Any], kind: str) -> dict[str, Any]:
    raw = _DEFAULTS[kind] | raw
    if raw.get("hidden_act", "silu") != "silu":
        raise _unsupported(path, "hidden_act", raw["hidden_act"], "silu")
    for bias in ("attention_bias", "mlp_bias"):
        if raw.get(bias) and kind != "qwen2":
            raise _unsupported(path, bias, True, "false")
    theta, scaling = _rope(path, raw)
    layers = _required(path, raw, "num_hidden_layers")
    window, window_layers = _windows(raw, kind, layers)
    return {
        "hidden": _required(path, raw, "hidden_size"),
        "layers": layers,
        "heads": _required(path, raw, "num_attention_heads"),
        "kv_heads": raw.get("num_key_value_heads"),
        "head_dim": raw.get("head_dim"),
        "intermediate": _required(path, raw, "intermediate_size"),
        "vocab": _required(path, raw, "vocab_size"),
        "context": raw["max_position_embeddings"],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "qk_norm": kind in ("qwen3", "qwen3_moe"),
        "qkv_bias": kind == "qwen2",
        "window": window,
        "window_layers": window_layers,
        "tied": raw.get("tie_word_embeddings", False),
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "initializer_range": raw.get("initializer_range", 0.02),
    }


def _moe_type(config: MoEConfig) -> str:
    kind = "qwen3_moe" if config.qk_norm else "mixtral"
    some_windows = config.window is not None and len(_windowed(config)) < config.layers
    for key, alien in (
        ("router", config.router != "softmax"),
        ("router_bias", config.router_bias),
        ("shared_experts", config.shared_experts > 0),
        ("qkv_bias", config.qkv_bias),
        ("window_layers", some_windows),
        ("normalize", kind == "mixtral" and not config.normalize),
        ("dense_layers", kind == "mixtral" and config.dense_layers > 0),
    ):
        if alien:
            name = {"mixtral": "Mixtral (qk_norm would make it Qwen3-MoE)", "qwen3_moe": "Qwen3-MoE"}[kind]
            raise ModelError(f"model.{key}", "cannot be exported", got=getattr(config, key),
                             hint=f"transformers' {name} has no such setting")  # fmt: skip
    return kind


def _moe_config(config: MoEConfig, kind: str) -> dict[str, Any]:
    fields = {"num_experts_per_tok": config.top_k, "num_local_experts": config.experts}
    if kind == "mixtral":
        return fields | {"intermediate_size": config.expert_channels, "sliding_window": config.window}
    return fields | {
        "num_experts": config.experts,  # its name before transformers 5
        "moe_intermediate_size": config.expert_channels,
        "norm_topk_prob": config.normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(config.dense_layers)),
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
    }


def _moe_fields(path: Path, raw: dict[str, Any], kind: str) -> dict[str, Any]:
    """What a mixture of experts has beside the fields of a Llama."""
    experts = raw.get("num_local_experts") or raw.get("num_experts") or 128  # Qwen3-MoE's default
    fields = {"experts": experts, "top_k": raw["num_experts_per_tok"]}
    if kind == "mixtral":
        return fields | {"expert_width": _required(path, raw, "intermediate_size")}
    if raw.get("decoder_sparse_step", 1) != 1:
        raise _unsupported(path, "decoder_sparse_step", raw["decoder_sparse_step"], "1")
    dense = sorted(raw.get("mlp_only_layers") or [])
    if dense != list(range(len(dense))):
        raise _unsupported(path, "mlp_only_layers", dense, "the first blocks")
    return fields | {
        "expert_width": raw["moe_intermediate_size"],
        "normalize": raw.get("norm_topk_prob", False),
        "dense_layers": len(dense),
    }


def _gpt2_fields(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    for key, ours in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if raw.get(key, ours) != ours:
            raise _unsupported(path, key, raw[key], json.dumps(ours))
    if raw.get("activation_function", "gelu_new") not in ("gelu_new", "gelu_pytorch_tanh"):
        raise _unsupported(path, "activation_function", raw["activation_function"], "gelu_new")
    return {
        "hidden": _required(path, raw, "n_embd"),
        "layers": _required(path, raw, "n_layer"),
        "heads": _required(path, raw, "n_head"),
        "intermediate": raw.get("n_inner"),
        "vocab": _required(path, raw, "vocab_size"),
        "context": raw.get("n_positions", 1024),
        "tied": raw.get("tie_word_embeddings", True),
        "norm_eps": raw.get("layer_norm_epsilon", 1e-5),
        "dropout": raw.get("resid_pdrop", 0.1),
        "initializer_range": raw.get("initializer_range", 0.02),
    }


def _rope(path: Path, raw: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling, from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before)."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise ModelError(str(path), "rope_scaling is no object", got=given)
    theta = given.get("rope_theta") or raw.get("rope_theta") or 10000.0
    partial = given.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise _unsupported(path, "partial_rotary_factor", partial, "1.0")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ROPE_SCALINGS:
        raise _unsupported(path, "rope_type", kind, ", ".join(ROPE_SCALINGS))
    needed, possible = ROPE_SCALINGS[kind]
    # transformers, too, ignores keys that belong to other kinds.
    return theta, {"rope_type": kind} | {key: given[key] for key in given if key in needed | possible}


def _windows(raw: dict[str, Any], kind: str, layers: Any) -> tuple[Any, Any]:
    """Window and the blocks that have it (``None``: all)."""
    if kind in ("mistral", "mixtral"):
        return raw["sliding_window"], None
    if kind == "qwen3_moe":
        return (raw["sliding_window"] if raw.get("use_sliding_window") else None), None
    if kind == "llama" or not raw.get("use_sliding_window", False):
        return None, None
    types = raw.get("layer_types")
    if types is not None:
        windowed = [layer for layer, name in enumerate(types) if name == "sliding_attention"]
    else:
        windowed = list(range(raw.get("max_window_layers", 28), layers))
    if not windowed or raw["sliding_window"] is None:
        return None, None
    return raw["sliding_window"], None if len(windowed) == layers else windowed


def _required(path: Path, raw: dict[str, Any], key: str) -> Any:
    if raw.get(key) is None:
        raise ModelError(str(path), f"does not say {key}")
    return raw[key]


def _unsupported(path: Path, key: str, got: Any, expected: str, known: bool = True) -> UnsupportedModel:
    error = UnsupportedModel(
        str(path),
        f"{key} is not one that Headway runs itself",
        got=got,
        expected=expected,
        hint="`model: {family: transformers, path: FOLDER}` trains it through transformers",
    )
    error.known_family = known
    return error
