"""What can be told about a transformers model only by trying it, once, on a handful of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.core.errors import ModelError
from headway.models.gpt2 import positions_in_documents


def document_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask that lets a query see its own document's past: 0 where it may look, the lowest number elsewhere.

    Args:
        segments: integer [B, T].
        dtype: of the mask.

    Returns:
        [B, 1, T, T].
    """
    T = segments.shape[1]
    same = segments[:, :, None] == segments[:, None, :]
    seen = same & torch.ones(T, T, dtype=torch.bool, device=segments.device).tril()
    return torch.zeros(seen.shape, dtype=dtype, device=segments.device).masked_fill(~seen, torch.finfo(dtype).min)[
        :, None
    ]


def apart_by(model: Any, takes_positions: bool, options: dict[str, Any]) -> str:
    """How this model keeps packed documents apart: by restarted ``positions``, or by a ``mask`` beside them.

    Two documents packed together must give what the second one gives alone. A model with a sliding window never gets a
    mask, which would replace the window's own.

    Args:
        model: a causal language model of transformers.
        takes_positions: its ``forward`` knows ``position_ids``.
        options: what it is called with in any case.

    Raises:
        ModelError: neither does it (a recurrent model, say, carries its state over).
    """
    segments = torch.tensor([[0] * 3 + [1] * 5], device=model.device)
    tokens = torch.arange(2, 10, device=model.device)[None] % model.get_input_embeddings().weight.shape[0]
    restarted = {"position_ids": positions_in_documents(segments)} if takes_positions else {}
    ways = {"positions": restarted} if takes_positions else {}
    if not getattr(model.config.get_text_config(decoder=True), "sliding_window", None):
        ways["mask"] = restarted | {"attention_mask": document_mask(segments, model.dtype)}
    with _evaluating(model):
        alone = model(input_ids=tokens[:, 3:], **options).logits
        for name, way in ways.items():
            try:
                packed = model(input_ids=tokens, **way, **options).logits[:, 3:]
            except (RuntimeError, ValueError, TypeError):  # it has another idea of a mask
                continue
            if torch.allclose(packed, alone, rtol=1e-3, atol=1e-3 * float(alone.abs().max())):
                return name
    raise ModelError(
        type(model).__name__,
        "cannot keep packed documents apart",
        hint="set data.mask_documents: false, or take one of Headway's own families",
    )


def has_plain_head(model: Any) -> bool:
    """Whether the logits are the last hidden state times the head's weight, and nothing else.

    The head's output is blown up on its way out: a cap, which would not show in a new model's small logits, does then.
    """
    head, seen = model.get_output_embeddings(), {}

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen["input"], seen["output"] = inputs[0], output
        return output * 1024

    tokens = torch.tensor([[1, 0, 1]], device=model.device)
    with _evaluating(model):
        hidden = model.base_model(input_ids=tokens).last_hidden_state
        handle = head.register_forward_hook(watch)
        try:
            logits = model(input_ids=tokens).logits
        finally:
            handle.remove()
        if "output" not in seen or seen["input"].shape != hidden.shape:
            return False
        return (
            torch.allclose(seen["input"], hidden, rtol=1e-4, atol=1e-5)
            and torch.allclose(seen["output"], F.linear(seen["input"], head.weight), rtol=1e-4, atol=1e-5)
            and torch.allclose(logits, seen["output"] * 1024, rtol=1e-4, atol=1e-2)
        )


def matmul_parameters(model: Any) -> float:
    """Weights that one token is multiplied with: matrices outside embeddings, its share of the experts, the head."""
    config = model.config.get_text_config(decoder=True)
    counts = (getattr(config, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
    experts = next((count for count in counts if count), None)
    used = (getattr(config, "num_experts_per_tok", None) or experts) / experts if experts else 1.0
    head, total, counted = model.get_output_embeddings(), 0.0, set()
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2 or id(parameter) in counted:
                continue
            counted.add(id(parameter))
            routed = "experts" in f"{path}.{name}".split(".") and parameter is not head.weight
            total += parameter.numel() * (used if routed else 1.0)
    return total


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
