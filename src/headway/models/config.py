"""What a model is made of: the option classes of the families. Nothing here imports torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from headway.core.errors import ModelError, nearest
from headway.core.options import Options
from headway.core.units import Count

ROPE_SCALINGS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor"}), frozenset()),
    "llama3": (
        frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
        frozenset({"original_max_position_embeddings"}),
    ),
    "yarn": (
        frozenset({"factor"}),
        frozenset(
            {
                "original_max_position_embeddings",
                "attention_factor",
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
                "truncate",
            }
        ),
    ),
}
"""Kind of scaling -> the keys that it needs and those that it may have."""


class LlamaConfig(Options):
    """A pre-norm decoder with RMSNorm, rotary positions, grouped queries and SwiGLU: Llama, Mistral, Qwen2, Qwen3."""

    family: Literal["llama"] = "llama"
    """The family's name."""
    hidden: int = Field(ge=1)
    """Width of the residual stream, channels."""
    layers: int = Field(ge=1)
    """Number of blocks."""
    heads: int = Field(ge=1)
    """Query heads per block."""
    kv_heads: int | None = Field(None, ge=1)
    """Key and value heads per block (grouped-query attention); default: as many as `heads`."""
    head_dim: int | None = Field(None, ge=2)
    """Channels per head, even; default: `hidden / heads`."""
    intermediate: Count | None = Field(None, ge=1)
    """Width of the feed-forward block, channels; default: 8/3 of `hidden`, rounded up to a multiple of 64."""
    vocab: Count | None = Field(None, ge=1)
    """Entries of the vocabulary; default: the tokenizer's."""
    context: Count = Field(2048, ge=1)
    """Tokens the model is made for: the longest prompt with its continuation."""
    rope_theta: float = Field(10000.0, gt=1)
    """Base of the wavelengths of the rotary embedding."""
    rope_scaling: dict[str, Any] | None = None
    """How the rotary embedding is stretched to a longer context: `{rope_type: KIND, factor: NUMBER, ...}`, where KIND
    is linear, dynamic, llama3 or yarn and the keys are those of transformers' configurations."""
    qk_norm: bool = False
    """Normalise queries and keys per head, as Qwen3 does."""
    qkv_bias: bool = False
    """Biases on queries, keys and values, as Qwen2 has them."""
    window: int | None = Field(None, ge=1)
    """Sliding window, tokens: a query sees itself and the `window - 1` tokens before it."""
    window_layers: tuple[int, ...] | None = None
    """The blocks (from 0) to which `window` applies; default: all of them."""
    tied: bool = True
    """Share one matrix between embedding and output head."""
    norm_eps: float = Field(1e-5, gt=0)
    """Added to the mean square in each norm."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout after the embedding and after each residual branch; attention weights are never dropped."""
    initializer_range: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights."""

    @field_validator("kv_heads")
    @classmethod
    def _groups(cls, value: int | None, info: ValidationInfo) -> int | None:
        heads = info.data.get("heads")
        if value is not None and heads is not None and heads % value:
            raise ValueError(f"a divisor of heads ({heads})")
        return value

    @field_validator("head_dim")
    @classmethod
    def _head_dim(cls, value: int | None, info: ValidationInfo) -> int | None:
        hidden, heads = info.data.get("hidden"), info.data.get("heads")
        if hidden is None or heads is None:
            return value
        if value is None and hidden % heads:
            raise ValueError(f"an explicit head_dim, because hidden ({hidden}) is no multiple of heads ({heads})")
        if (value or hidden // heads) % 2:
            raise ValueError("an even number of channels per head (hidden / heads, or head_dim), for rotary positions")
        return value

    @field_validator("rope_scaling")
    @classmethod
    def _rope_scaling(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        return check_rope_scaling(value)

    @field_validator("window_layers")
    @classmethod
    def _window_layers(cls, value: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...] | None:
        if value is None:
            return None
        if info.data.get("window") is None:
            raise ValueError("window to be set as well")
        layers = info.data.get("layers", 0)
        if any(not 0 <= layer < layers for layer in value):
            raise ValueError(f"block numbers from 0 to {layers - 1}")
        return tuple(sorted(set(value)))

    @property
    def kv_head_count(self) -> int:
        """``kv_heads``, or its default."""
        return self.kv_heads or self.heads

    @property
    def head_width(self) -> int:
        """``head_dim``, or its default."""
        return self.head_dim or self.hidden // self.heads

    @property
    def intermediate_width(self) -> int:
        """``intermediate``, or its default."""
        return self.intermediate or -(-8 * self.hidden // (3 * 64)) * 64

    @property
    def vocabulary(self) -> int:
        """``vocab``; it must be known by now."""
        return _known(self.vocab)

    def window_of(self, layer: int) -> int | None:
        """The sliding window of one block, tokens; ``None`` where it sees everything before it."""
        return self.window if self.window_layers is None or layer in self.window_layers else None


class MoEConfig(LlamaConfig):
    """A Llama whose feed-forward blocks are many experts, of which each token visits a few: Mixtral, Qwen3-MoE."""

    family: Literal["moe"] = "moe"  # type: ignore[assignment]
    """The family's name."""
    experts: int = Field(8, ge=1)
    """Experts per block."""
    top_k: int = Field(2, ge=1)
    """Experts that a token visits."""
    expert_width: Count | None = Field(None, ge=1)
    """Channels inside an expert; default: `intermediate` divided by `top_k`, rounded up to a multiple of 8."""
    shared_experts: int = Field(0, ge=0)
    """Experts that every token visits besides, as one network of so many times `expert_width`."""
    dense_layers: int = Field(0, ge=0)
    """So many of the first blocks have one plain feed-forward network, of width `intermediate`."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """How scores become probabilities: over all experts together, or each expert by itself."""
    normalize: bool = True
    """Divide the weights of the experts that a token visits by their sum."""
    router_bias: bool = False
    """A bias by which experts are chosen, not weighed; a method that balances without a loss moves it."""
    capacity: float | None = Field(None, gt=0)
    """Tokens that an expert takes in training, as a multiple of the mean; the rest is dropped. Default: drop nothing.
    """
    drop: Literal["probs", "position"] = "probs"
    """With `capacity`: which tokens stay, those of the largest weights or the first."""
    pad: bool = False
    """With `capacity`: fill every expert up to it, so that all shapes are the same in every step."""

    @field_validator("top_k")
    @classmethod
    def _top_k(cls, value: int, info: ValidationInfo) -> int:
        experts = info.data.get("experts")
        if experts is not None and value > experts:
            raise ValueError(f"at most experts ({experts})")
        return value

    @field_validator("dense_layers")
    @classmethod
    def _dense_layers(cls, value: int, info: ValidationInfo) -> int:
        layers = info.data.get("layers")
        if layers is not None and value >= layers:
            raise ValueError(f"fewer than layers ({layers}): some block must have experts")
        return value

    @field_validator("pad")
    @classmethod
    def _pad(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("capacity") is None:
            raise ValueError("capacity to be set as well")
        return value

    @property
    def expert_channels(self) -> int:
        """``expert_width``, or its default."""
        return self.expert_width or -(-self.intermediate_width // (8 * self.top_k)) * 8


class GPT2Config(Options):
    """A pre-norm decoder with LayerNorm, learned positions and GELU: GPT-2."""

    family: Literal["gpt2"] = "gpt2"
    """The family's name."""
    hidden: int = Field(ge=1)
    """Width of the residual stream, channels."""
    layers: int = Field(ge=1)
    """Number of blocks."""
    heads: int = Field(ge=1)
    """Heads per block."""
    intermediate: Count | None = Field(None, ge=1)
    """Width of the feed-forward block, channels; default: 4 times `hidden`."""
    vocab: Count | None = Field(None, ge=1)
    """Entries of the vocabulary; default: the tokenizer's."""
    context: Count = Field(1024, ge=1)
    """Learned positions: no sequence may be longer, tokens."""
    tied: bool = True
    """Share one matrix between embedding and output head."""
    norm_eps: float = Field(1e-5, gt=0)
    """Added to the variance in each norm."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout after the embedding and after each residual branch; attention weights are never dropped."""
    initializer_range: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights."""

    @field_validator("heads")
    @classmethod
    def _heads(cls, value: int, info: ValidationInfo) -> int:
        hidden = info.data.get("hidden")
        if hidden is not None and hidden % value:
            raise ValueError(f"a divisor of hidden ({hidden})")
        return value

    @property
    def head_width(self) -> int:
        """Channels per head."""
        return self.hidden // self.heads

    @property
    def intermediate_width(self) -> int:
        """``intermediate``, or its default."""
        return self.intermediate or 4 * self.hidden

    @property
    def vocabulary(self) -> int:
        """``vocab``; it must be known by now."""
        return _known(self.vocab)


class GLAConfig(Options):
    """A pre-norm decoder with gated linear attention, RMSNorm and SwiGLU; some blocks may have softmax attention."""

    family: Literal["gla"] = "gla"
    """The family's name."""
    hidden: int = Field(ge=1)
    """Width of the residual stream, channels."""
    layers: int = Field(ge=1)
    """Number of blocks."""
    heads: int = Field(ge=1)
    """Heads per block."""
    expand_k: float = Field(0.5, gt=0)
    """Channels of queries and keys of all heads, as a multiple of `hidden`."""
    expand_v: float = Field(1.0, gt=0)
    """Channels of values of all heads, as a multiple of `hidden`."""
    decay: Literal["channel", "head", "none"] = "channel"
    """What forgets at a rate of its own at every token: each channel of the keys (GLA), each head, or nothing."""
    gate_rank: int = Field(16, ge=1)
    """Width between the two matrices that give the decays."""
    gate_temperature: float = Field(16.0, gt=0)
    """Divides the logarithms of the decays: higher ones forget more slowly at first."""
    chunk: int = Field(64, ge=1)
    """Tokens that are worked on together, a power of two; the result does not depend on it."""
    softmax_layers: tuple[int, ...] = ()
    """The blocks (from 0) that have softmax attention with rotary positions instead."""
    kv_heads: int | None = Field(None, ge=1)
    """Key and value heads of those blocks; default: as many as `heads`."""
    rope_theta: float = Field(10000.0, gt=1)
    """Base of the wavelengths of their rotary embedding."""
    intermediate: Count | None = Field(None, ge=1)
    """Width of the feed-forward block, channels; default: 8/3 of `hidden`, rounded up to a multiple of 64."""
    vocab: Count | None = Field(None, ge=1)
    """Entries of the vocabulary; default: the tokenizer's."""
    context: Count = Field(2048, ge=1)
    """Tokens the model is made for: the longest prompt with its continuation."""
    tied: bool = True
    """Share one matrix between embedding and output head."""
    norm_eps: float = Field(1e-5, gt=0)
    """Added to the mean square in each norm."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout after the embedding and after each residual branch."""
    initializer_range: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights."""

    @field_validator("expand_k", "expand_v")
    @classmethod
    def _whole_heads(cls, value: float, info: ValidationInfo) -> float:
        hidden, heads = info.data.get("hidden"), info.data.get("heads")
        if hidden is not None and heads is not None and (not (hidden * value).is_integer() or hidden * value % heads):
            raise ValueError(f"a multiple of hidden ({hidden}) that makes whole channels for each of {heads} heads")
        return value

    @field_validator("chunk")
    @classmethod
    def _chunk(cls, value: int) -> int:
        if value & (value - 1):
            near = 1 << (value.bit_length() - 1)
            raise ValueError(f"a power of two, such as {near} or {2 * near}")
        return value

    @field_validator("softmax_layers")
    @classmethod
    def _softmax_layers(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        layers, hidden, heads = (info.data.get(name, 0) for name in ("layers", "hidden", "heads"))
        if any(not 0 <= layer < layers for layer in value):
            raise ValueError(f"block numbers from 0 to {layers - 1}")
        if value and heads and hidden % (2 * heads):
            raise ValueError(f"hidden ({hidden}) to give each of {heads} heads an even number of channels")
        return tuple(sorted(set(value)))

    @field_validator("kv_heads")
    @classmethod
    def _groups(cls, value: int | None, info: ValidationInfo) -> int | None:
        heads = info.data.get("heads")
        if value is not None and heads is not None and heads % value:
            raise ValueError(f"a divisor of heads ({heads})")
        return value

    @property
    def key_width(self) -> int:
        """Channels of queries and keys, all heads together."""
        return int(self.hidden * self.expand_k)

    @property
    def value_width(self) -> int:
        """Channels of values, all heads together."""
        return int(self.hidden * self.expand_v)

    @property
    def head_width(self) -> int:
        """Channels per head of the blocks with softmax attention."""
        return self.hidden // self.heads

    @property
    def intermediate_width(self) -> int:
        """``intermediate``, or its default."""
        return self.intermediate or -(-8 * self.hidden // (3 * 64)) * 64

    @property
    def vocabulary(self) -> int:
        """``vocab``; it must be known by now."""
        return _known(self.vocab)

    def softmax(self) -> LlamaConfig:
        """The configuration of the blocks with softmax attention, as those of a Llama."""
        shared = ("hidden", "layers", "heads", "kv_heads", "rope_theta", "context", "norm_eps", "dropout")
        return LlamaConfig(**{name: getattr(self, name) for name in shared})


class TransformersConfig(Options):
    """A causal language model in a Hugging Face folder: any family that the transformers library knows."""

    family: Literal["transformers"] = "transformers"
    """The family's name."""
    path: str
    """The folder: `config.json` and, unless `fresh`, the weights as safetensors."""
    native: bool = True
    """Run a folder of the families Llama, Mistral, Qwen2, Qwen3 and GPT-2 as Headway's own model: the same function in
    larger matrix products."""
    fresh: bool = False
    """Take the architecture from the folder and start from new random weights."""
    vocab: Count | None = Field(None, ge=1)
    """Entries of the vocabulary that are needed; `fresh` models get just these, others must have at least as many."""


ModelConfig = LlamaConfig | MoEConfig | GPT2Config | GLAConfig | TransformersConfig

FAMILIES: dict[str, type[Options]] = {
    "llama": LlamaConfig, "moe": MoEConfig, "gpt2": GPT2Config, "gla": GLAConfig, "transformers": TransformersConfig,
}  # fmt: skip
"""Name of a family -> its option class."""


def check_rope_scaling(value: dict[str, Any] | None) -> dict[str, Any] | None:
    """A rope scaling with ``rope_type`` and the keys of its kind; ``None`` where it scales nothing.

    Raises:
        ValueError: the kind is unknown, or a key is missing, superfluous or no positive number.
    """
    if value is None:
        return None
    value = dict(value)
    kind = value.setdefault("rope_type", value.pop("type", None))
    value.pop("type", None)
    if kind == "default":
        return None
    if kind not in ROPE_SCALINGS:
        raise ValueError(f"a rope_type of {', '.join(ROPE_SCALINGS)} ({nearest(str(kind), ROPE_SCALINGS)})")
    needed, possible = ROPE_SCALINGS[kind]
    given = set(value) - {"rope_type"}
    if needed - given:
        raise ValueError(f"{', '.join(sorted(needed - given))} for rope_type {kind!r}")
    if given - needed - possible:
        wrong = sorted(given - needed - possible)[0]
        raise ValueError(f"keys of rope_type {kind!r} only, not {wrong!r} ({nearest(wrong, needed | possible)})")
    for key in sorted(given - {"truncate"}):
        number = value[key]
        absent = number is None and key in possible
        if not absent and (isinstance(number, bool) or not isinstance(number, int | float) or number <= 0):
            raise ValueError(f"a positive number as {key}")
    return value


def _known(vocab: int | None) -> int:
    if vocab is None:
        raise ModelError("model.vocab", "is not known", hint="set it, or take it from the tokenizer")
    return vocab
