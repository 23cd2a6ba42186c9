"""A model as numbers: weights, operations and kept activations of its parts, for any micro-batch and layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headway.core.errors import ModelError


@dataclass(frozen=True)
class Shape:
    """A decoder of equal blocks between an embedding and a head."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    intermediate: int
    vocab: int
    sequence: int
    """Tokens."""
    gated: bool
    """Three matrices in the feed-forward block (SwiGLU) instead of two."""
    tied: bool
    block_parameters: int
    embedding_parameters: int
    """Token and position embeddings,"""
    head_parameters: int
    """and the head and the final norm, without a matrix that is the embedding's."""
    qk_norm: bool = False
    """Queries and keys are normalised, and kept as they were before too."""

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.layers * self.block_parameters + self.embedding_parameters + self.head_parameters

    @property
    def attention_width(self) -> int:
        """Channels of all queries."""
        return self.heads * self.head_width

    @property
    def block_matrices(self) -> int:
        """Weights of a block's matrix products."""
        attention = self.hidden * self.head_width * (2 * self.heads + 2 * self.kv_heads)
        return attention + (3 if self.gated else 2) * self.hidden * self.intermediate

    def block_flops(self, tokens: float) -> float:
        """Floating-point operations of a block's forward pass over ``tokens`` in sequences of ``sequence``."""
        return tokens * (2 * self.block_matrices + 4 * self.attention_width * self.sequence)

    def head_flops(self, tokens: float) -> float:
        """Floating-point operations of the head's forward pass."""
        return 2 * tokens * self.hidden * self.vocab

    def step_flops(self, batch: int, recompute: bool = False) -> float:
        """Floating-point operations of a step of ``batch`` sequences."""
        tokens = batch * self.sequence
        return (4 if recompute else 3) * self.layers * self.block_flops(tokens) + 3 * self.head_flops(tokens)

    def kept_elements(self, tokens: float, tensor: int = 1, divided: bool = True) -> float:
        """Elements that a block keeps for its backward pass, as autograd saves them with fused attention.

        Two inputs of norms and their two outputs, of the width of the residual stream; queries, keys, values and what
        attention gives; the feed-forward block's inner tensors: before and after the activation, and for SwiGLU both
        factors and their product. Statistics of norms and attention are left out: below one per cent.

        Args:
            divided: the residual stream is divided among the tensor ranks too (``tensor.sequence``). What was gathered
                from it, the norms' outputs, is kept whole all the same.
        """
        stream = 2 * self.hidden / (tensor if divided else 1) + 2 * self.hidden
        inner = 2 * self.attention_width + 2 * self.kv_heads * self.head_width
        inner += (3 if self.gated else 2) * self.intermediate
        inner += self.qk_norm * (self.attention_width + self.kv_heads * self.head_width)
        return tokens * (stream + inner / tensor)


def shape_of(config: Any, sequence: int, vocab: int | None = None) -> Shape:
    """The shape of a Llama or GPT-2 on sequences of ``sequence`` tokens.

    Args:
        config: a `LlamaConfig` or `GPT2Config`.
        vocab: where the configuration leaves it open.

    Raises:
        ModelError: the family has no formulas here.
    """
    family = getattr(config, "family", type(config).__name__)
    if family not in ("llama", "gpt2"):
        raise ModelError("model.family", got=family, expected="llama or gpt2",
                         hint="a plan for a cluster needs a model whose costs are known as formulas")  # fmt: skip
    vocab = config.vocab if config.vocab is not None else vocab
    if vocab is None:
        raise ModelError("model.vocab", "is not known", hint="set it")
    if family == "gpt2":
        return _gpt2(config, sequence, vocab)
    return _llama(config, sequence, vocab)


def _gpt2(config: Any, sequence: int, vocab: int) -> Shape:
    h, inner = config.hidden, config.intermediate_width
    block = (3 * h * h + 3 * h) + (h * h + h) + (h * inner + inner) + (inner * h + h) + 4 * h
    return Shape(
        config.layers, h, config.heads, config.heads, config.head_width, inner, vocab, sequence, False, config.tied,
        block_parameters=block, embedding_parameters=(vocab + config.context) * h,
        head_parameters=2 * h + (0 if config.tied else vocab * h),
    )  # fmt: skip


def _llama(config: Any, sequence: int, vocab: int) -> Shape:
    h, hd, inner = config.hidden, config.head_width, config.intermediate_width
    heads, kv = config.heads, config.kv_head_count
    block = h * hd * (2 * heads + 2 * kv) + 3 * h * inner + 2 * h
    block += hd * (heads + 2 * kv) if config.qkv_bias else 0
    block += 2 * hd if config.qk_norm else 0
    return Shape(
        config.layers, h, heads, kv, hd, inner, vocab, sequence, True, config.tied, block_parameters=block,
        embedding_parameters=vocab * h, head_parameters=h + (0 if config.tied else vocab * h), qk_norm=config.qk_norm,
    )  # fmt: skip
