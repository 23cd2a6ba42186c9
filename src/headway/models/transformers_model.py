"""Any causal language model of the transformers library, by the path of its folder, with the interface of our own."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from headway.core.errors import ModelError, require
from headway.core.fallback import fallback
from headway.models.build import empty_model, init_weights
from headway.models.config import GPT2Config, LlamaConfig, TransformersConfig
from headway.models.gpt2 import positions_in_documents
from headway.models.hf import load_weights
from headway.models.hf_config import UnsupportedModel, read_config, read_json
from headway.models.structure import Structure, structure
from headway.models.transformers_probe import apart_by, document_mask, has_plain_head, matmul_parameters


def build_from_folder(config: TransformersConfig, seed: int) -> Any:
    """The model of a folder: our own where ``native`` and possible, else a ``TransformersModel``; CPU, fp32.

    Raises:
        ModelError: the folder cannot be used, or its vocabulary is smaller than ``config.vocab``.
    """
    if config.native:
        try:
            known = read_config(config.path)
        except UnsupportedModel as reason:
            if reason.known_family:
                fallback("the implementation of transformers", reason.what, "the speed of Headway's own")
        else:
            return _native(config, known, seed)
    return _foreign(config, seed)


def _native(config: TransformersConfig, known: LlamaConfig | GPT2Config, seed: int) -> Any:
    path, raw = read_json(config.path)
    dropped = max(raw.get("attention_dropout") or 0.0, raw.get("attn_pdrop") or 0.0)
    if dropped:
        fallback("attention without dropout", f"{path} asks for {dropped}, ours has none", "a little regularisation")
    if config.fresh:
        known = known.model_copy(update={"vocab": config.vocab or known.vocab})
        model = empty_model(known)
        init_weights(model, known.initializer_range, seed)
        return model
    _check_vocabulary(config, known.vocabulary)
    model = empty_model(known)
    load_weights(model, config.path)
    return model


def _foreign(config: TransformersConfig, seed: int) -> TransformersModel:
    path, raw = read_json(config.path)
    auto: Any = require("transformers", "hf", f"the model in {config.path}")
    if raw.get("auto_map") and raw.get("model_type") not in auto.CONFIG_MAPPING:
        raise ModelError(
            str(path), "needs code from its folder", hint="Headway runs only families that transformers has"
        )
    try:
        hf_config = auto.AutoConfig.from_pretrained(config.path, local_files_only=True)
        if config.fresh:
            _text(hf_config).vocab_size = config.vocab or _text(hf_config).vocab_size
            setattr(hf_config, "dtype" if hasattr(hf_config, "dtype") else "torch_dtype", torch.float32)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = auto.AutoModelForCausalLM.from_config(hf_config)
        else:
            _check_vocabulary(config, _text(hf_config).vocab_size)
            model, loaded = auto.AutoModelForCausalLM.from_pretrained(
                config.path, config=hf_config, local_files_only=True, output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, with their names
            )  # fmt: skip
            # transformers would train on with random weights in their place.
            for key, what in (("missing_keys", "lacks"), ("mismatched_keys", "has in another shape")):
                names = sorted(item if isinstance(item, str) else item[0] for item in loaded.get(key) or ())
                if names:
                    raise ModelError(config.path, f"{what} {len(names)} tensors: {', '.join(names[:5])}")
    except ModelError:
        raise
    except Exception as error:  # transformers has no class of its own for what can be wrong with a folder
        reason = str(error).strip().splitlines()
        raise ModelError(config.path, f"transformers cannot load it ({reason[0] if reason else error!r})") from error
    return TransformersModel(model.float(), config)


def _check_vocabulary(config: TransformersConfig, vocab: int) -> None:
    if config.vocab is not None and vocab < config.vocab:
        raise ModelError(
            "model.vocab",
            f"is smaller in {config.path} than the tokenizer's",
            got=vocab,
            expected=f"at least {config.vocab}",
            hint="use the folder's own tokenizer, or `fresh: true`",
        )


def _text(config: Any) -> Any:
    """The configuration of the decoder, which is a part of it in models that also see or hear."""
    return config.get_text_config(decoder=True)


class TransformersCache:
    """The cache that a transformers model keeps, behind the interface of ours."""

    def __init__(self) -> None:
        self.inner: Any = None
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values [B, Hkv, T, hd] to one layer; all of it comes back."""
        return self.inner.update(k, v, layer)

    @property
    def state(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        tensors = {}
        for index, layer in enumerate(getattr(self.inner, "layers", ())):
            for name, value in vars(layer).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}.{index}"] = value
        return tensors


class TransformersModel(nn.Module):
    """A causal language model of transformers that offers ``hidden``, ``head_weight`` and the rest as ours do."""

    residual_projections: tuple[str, ...] = ()

    def __init__(self, model: Any, config: TransformersConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        text = _text(model.config)
        head: Any = self.structure().head
        self.vocab: int = head.weight.shape[0]
        self.context: int | None = getattr(text, "max_position_embeddings", None)
        known = inspect.signature(model.base_model.forward).parameters
        self._takes_positions = "position_ids" in known
        self._cache_name = next((name for name in ("cache", "past_key_values") if name in known), None)
        self.plain_head = has_plain_head(model)
        self._apart: str | None = None

    def hidden(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: TransformersCache | None = None,
    ) -> Tensor:
        """The last hidden state after the final norm.

        Args:
            tokens: int64 [B, T].
            positions: integer [T] or [B, T]; by default the model's own.
            segments: integer [B, T], the document of each token; attention stays within a document. Not with a cache.
            cache: from ``new_cache``; it takes up the new tokens.

        Returns:
            [B, T, D].

        Raises:
            ModelError: the model cannot keep documents apart.
        """
        return self._run(self.model.base_model, tokens, positions, segments, cache).last_hidden_state

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: TransformersCache | None = None,
    ) -> Tensor:
        """Logits [B, T, V], with whatever bias, scale or cap the model has; arguments as for ``hidden``."""
        return self._run(self.model, tokens, positions, segments, cache).logits

    @property
    def head_weight(self) -> Tensor:
        """[V, D].

        Raises:
            ModelError: the logits are more than ``hidden @ head_weight.T`` (a bias, a scale, a cap): use ``forward``.
        """
        if not self.plain_head:
            raise ModelError(
                type(self.model).__name__,
                "adds a bias, a scale or a cap to its logits, so that its head is more than a weight",
                hint="take the logits from forward()",
            )
        head: Any = self.structure().head
        return head.weight

    def structure(self) -> Structure:
        """The parts that methods work on."""
        return structure(self.model)

    def flops_per_token(self, sequence: int) -> float:
        """Floating-point operations of a forward and backward pass per token, in sequences of ``sequence`` tokens.

        Six per weight of a matrix product (of experts, those that a token uses) and 12 per key and channel of
        attention, as for our own families.
        """
        text = _text(self.model.config)
        heads = getattr(text, "num_attention_heads", 0)
        width = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
        window = getattr(text, "sliding_window", None) or sequence
        types = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
        keys = {"full_attention": sequence, "sliding_attention": min(sequence, window)}
        attention = sum(12.0 * heads * width * keys.get(kind, 0) for kind in types)
        return 6.0 * matmul_parameters(self.model) + attention

    def new_cache(self, batch: int, length: int, dtype: torch.dtype | None = None) -> TransformersCache:
        """An empty cache; it grows with use, so that ``batch``, ``length`` and ``dtype`` bind nothing.

        Raises:
            ModelError: the model keeps no cache that can be handed on.
        """
        if self._cache_name is None:
            raise ModelError(type(self.model).__name__, "keeps no cache that can be handed on", hint="use_cache=False")
        return TransformersCache()

    def _apply(self, fn: Any, recurse: bool = True) -> TransformersModel:
        """Move or cast; buffers keep their number format, because rounded rotary frequencies ruin far positions."""
        before = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            path, _, key = name.rpartition(".")
            buffers = self.get_submodule(path)._buffers
            now = buffers[key]
            if now is not None and now.dtype != buffer.dtype:
                buffers[key] = buffer.to(now.device)
        return self

    def _run(
        self,
        module: Any,
        tokens: Tensor,
        positions: Tensor | None,
        segments: Tensor | None,
        cache: TransformersCache | None,
    ) -> Any:
        options: dict[str, Any] = {"return_dict": True}
        if self._cache_name is not None:
            options["use_cache"] = cache is not None
        if segments is not None:
            if cache is not None:
                raise ValueError("segments and a cache exclude each other: a cache holds one document per row")
            if self._apart is None:
                self._apart = apart_by(self.model, self._takes_positions, options)
            positions = positions_in_documents(segments) if positions is None else positions
            if self._apart == "mask":
                options["attention_mask"] = document_mask(segments, self.model.dtype)
        if positions is not None:
            if self._takes_positions:
                options["position_ids"] = positions.expand(tokens.shape)
            elif segments is None:
                raise ModelError(type(self.model).__name__, "takes no positions")
        if cache is not None and self._cache_name is not None and cache.inner is not None:
            options[self._cache_name] = cache.inner
        output = module(input_ids=tokens, **options)
        if cache is not None and self._cache_name is not None:
            cache.inner = getattr(output, self._cache_name)
            cache.length += tokens.shape[1]
        return output
