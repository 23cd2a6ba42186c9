"""Where the parts of a causal language model are: embedding, blocks, final norm, head.

Methods that work on blocks or on the head ask here, so that they work on any family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from headway.core.errors import ModelError

_NORM_NAMES = (
    "norm", "ln_f", "norm_f", "final_layer_norm", "final_layernorm", "final_norm", "out_norm", "ln_out", "layer_norm",
    "embedding_norm",
)  # fmt: skip
"""What transformers' families call the norm after the last block."""


@dataclass(frozen=True)
class Structure:
    """The parts of one model; they are the modules themselves, not copies."""

    embedding: nn.Module
    """``weight`` is [V, D]."""
    blocks: nn.ModuleList
    """The repeated blocks, in the order in which they run."""
    norm: nn.Module
    """Runs after the last block; ``nn.Identity`` where a model has none."""
    head: nn.Module
    """``weight`` is [V, D]. In our own tied models this is the embedding itself."""

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one matrix."""
        return self.head.weight is self.embedding.weight


def structure(model: Any) -> Structure:
    """The parts of any causal language model: ours, or one of transformers.

    Raises:
        ModelError: it is none, or its blocks cannot be told.
    """
    own = getattr(model, "structure", None)
    if callable(own):
        return own()
    name = type(model).__name__
    if not hasattr(model, "get_input_embeddings") or not hasattr(model, "get_output_embeddings"):
        raise ModelError(name, "is not a causal language model of Headway or transformers")
    try:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:
        embedding = head = None
    if getattr(embedding, "weight", None) is None:
        raise ModelError(name, "has no token embedding that can be found")
    if getattr(head, "weight", None) is None:
        raise ModelError(
            name, "has no output head", expected="a causal language model", hint="its class ends in ForCausalLM"
        )
    parent, blocks = _blocks(model)
    return Structure(embedding, blocks, _final_norm(parent), head)


def _blocks(model: Any) -> tuple[nn.Module, nn.ModuleList]:
    """The outermost list of as many modules as the configuration has layers, and the module that holds it."""
    config: Any = model.config
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0
    ]
    found = [(path, module) for path, module in lists if len(module) == layers]
    if not found:
        seen = ", ".join(f"{path} ({len(module)})" for path, module in lists) or "none"
        raise ModelError(
            type(model).__name__,
            f"has no list of {layers} blocks that can be found",
            expected="one nn.ModuleList of num_hidden_layers blocks",
            hint=f"its module lists are: {seen}",
        )
    # Several lists may have that length (per-layer adapters, an encoder): the blocks hold the most parameters.
    path, blocks = max(found, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return model.get_submodule(path.rpartition(".")[0]), blocks


def _final_norm(parent: nn.Module) -> nn.Module:
    children = dict(parent.named_children())
    for name in _NORM_NAMES:
        if isinstance(children.get(name), nn.Module):
            return children[name]
    return nn.Identity()
