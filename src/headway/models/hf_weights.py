"""Which tensor of a Hugging Face folder holds which parameters of ours; read in both directions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headway.core.errors import ModelError
from headway.models.config import GPT2Config, LlamaConfig, MoEConfig


@dataclass(frozen=True)
class Weight:
    """One tensor of a folder and the parameters of ours that it joins along its output channels."""

    ours: tuple[str, ...]
    """Their names in our model, in the order in which they are joined."""
    theirs: str
    """Its name in the folder."""
    rows: tuple[int, ...]
    """Output channels of each of ours: the first dimension of a matrix."""
    transposed: bool = False
    """The folder stores [in, out], as GPT-2's Conv1D does."""
    expert: int | None = None
    """Ours is a stack [E, out, in], and this is the matrix of one expert."""

    def parts(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Name and content of each parameter of ours: views of ``tensor``, which is the folder's."""
        yield from zip(self.ours, (tensor.T if self.transposed else tensor).split(self.rows), strict=True)

    def target(self, parameter: Tensor) -> Tensor:
        """The part of one of our parameters that this is about: a view."""
        return parameter if self.expert is None else parameter[self.expert]

    def whole(self, parameters: dict[str, Tensor]) -> Tensor:
        """The folder's tensor, from our parameters by name: a view of one, a copy of several."""
        parts = [self.target(parameters[name]) for name in self.ours]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        return tensor.T if self.transposed else tensor

    def shape(self, parameters: dict[str, Tensor]) -> tuple[int, ...]:
        """Of the folder's tensor."""
        shape = (sum(self.rows), *self.target(parameters[self.ours[0]]).shape[1:])
        return shape[::-1] if self.transposed else shape


def weight_map(config: LlamaConfig | GPT2Config) -> list[Weight]:
    """Every parameter of the model that ``config`` describes."""
    return _gpt2(config) if isinstance(config, GPT2Config) else _llama(config)


def parameters_of(model: nn.Module, weights: list[Weight]) -> dict[str, Tensor]:
    """The model's parameters by our names.

    Raises:
        ModelError: the model lacks one or has others: a method replaced parts of it.
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    expected = {name for weight in weights for name in weight.ours}
    if parameters.keys() != expected:
        odd = sorted(parameters.keys() ^ expected)
        raise ModelError(
            type(model).__name__,
            f"has no longer the parameters of its family ({_some(odd)})",
            hint="undo or merge what methods replaced in it before it is exchanged with Hugging Face",
        )
    return parameters


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _llama(config: LlamaConfig) -> list[Weight]:
    D, V, F = config.hidden, config.vocabulary, config.intermediate_width
    q, kv = config.heads * config.head_width, config.kv_head_count * config.head_width
    weights = [Weight(("embedding.weight",), "model.embed_tokens.weight", (V,))]
    feed_forward = (("mlp.gate", "mlp.gate_proj", F), ("mlp.up", "mlp.up_proj", F), ("mlp.down", "mlp.down_proj", D))
    for layer in range(config.layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        for name, other, rows in (
            ("attention_norm", "input_layernorm", D),
            ("attention.q", "self_attn.q_proj", q),
            ("attention.k", "self_attn.k_proj", kv),
            ("attention.v", "self_attn.v_proj", kv),
            ("attention.out", "self_attn.o_proj", D),
            ("mlp_norm", "post_attention_layernorm", D),
            *(() if has_experts(config, layer) else feed_forward),
        ):
            weights.append(Weight((f"{ours}.{name}.weight",), f"{theirs}.{other}.weight", (rows,)))
            if config.qkv_bias and name[-2:] in (".q", ".k", ".v"):
                weights.append(Weight((f"{ours}.{name}.bias",), f"{theirs}.{other}.bias", (rows,)))
        if has_experts(config, layer):
            weights += _experts(config, ours, theirs)
        if config.qk_norm:
            for norm in ("q_norm", "k_norm"):
                name = f"{theirs}.self_attn.{norm}.weight"
                weights.append(Weight((f"{ours}.attention.{norm}.weight",), name, (config.head_width,)))
    weights.append(Weight(("norm.weight",), "model.norm.weight", (D,)))
    if not config.tied:
        weights.append(Weight(("head.weight",), "lm_head.weight", (V,)))
    return weights


def has_experts(config: LlamaConfig, layer: int) -> bool:
    """Whether a block's feed-forward network is many."""
    return isinstance(config, MoEConfig) and layer >= config.dense_layers


def _experts(config: LlamaConfig, ours: str, theirs: str) -> list[Weight]:
    assert isinstance(config, MoEConfig)
    D, F = config.hidden, config.expert_channels
    # As `hf_config.model_type` tells the two families apart.
    block, names = ("mlp", ("gate_proj", "up_proj", "down_proj"))
    if not config.qk_norm:
        block, names = ("block_sparse_moe", ("w1", "w3", "w2"))
    weights = [Weight((f"{ours}.mlp.router.weight",), f"{theirs}.{block}.gate.weight", (config.experts,))]
    for name, other, rows in zip(("gate", "up", "down"), names, (F, F, D), strict=True):
        weights += [
            Weight((f"{ours}.mlp.experts.{name}",), f"{theirs}.{block}.experts.{e}.{other}.weight", (rows,), expert=e)
            for e in range(config.experts)
        ]
    return weights


def _gpt2(config: GPT2Config) -> list[Weight]:
    D, V, F = config.hidden, config.vocabulary, config.intermediate_width
    weights = [
        Weight(("embedding.weight",), "transformer.wte.weight", (V,)),
        Weight(("positions.weight",), "transformer.wpe.weight", (config.context,)),
    ]
    for layer in range(config.layers):
        for ours, theirs, rows, matrix in (
            (("attention_norm",), "ln_1", D, False),
            (("attention.q", "attention.k", "attention.v"), "attn.c_attn", D, True),
            (("attention.out",), "attn.c_proj", D, True),
            (("mlp_norm",), "ln_2", D, False),
            (("mlp.up",), "mlp.c_fc", F, True),
            (("mlp.down",), "mlp.c_proj", D, True),
        ):
            for kind in ("weight", "bias"):
                names = tuple(f"blocks.{layer}.{name}.{kind}" for name in ours)
                turned = matrix and kind == "weight"
                weights.append(Weight(names, f"transformer.h.{layer}.{theirs}.{kind}", (rows,) * len(ours), turned))
    weights.append(Weight(("norm.weight",), "transformer.ln_f.weight", (D,)))
    weights.append(Weight(("norm.bias",), "transformer.ln_f.bias", (D,)))
    if not config.tied:
        weights.append(Weight(("head.weight",), "lm_head.weight", (V,)))
    return weights
