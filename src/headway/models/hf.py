"""Hugging Face folders both ways: ``load_hf`` and ``save_hf``, for Llama, Mistral, Qwen2, Qwen3, Mixtral,
Qwen3-MoE and GPT-2."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from headway.core.errors import ModelError
from headway.core.files import sync_folder, write_json
from headway.models.build import empty_model
from headway.models.config import GLAConfig, GPT2Config, LlamaConfig
from headway.models.hf_config import hf_config, model_type, read_config
from headway.models.hf_weights import Weight, parameters_of, weight_map

__all__ = ["load_hf", "load_weights", "read_config", "save_hf"]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Buffers that old versions of transformers stored and every version computes.
_COMPUTED = re.compile(r"(\.rotary_emb\.inv_freq|\.attn\.bias|\.attn\.masked_bias)$")
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip


def load_hf(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model in a Hugging Face folder, as our own on the CPU.

    Args:
        folder: ``config.json`` with ``model.safetensors``, or with shards and their index.
        dtype: of the parameters, whatever the folder stores.

    Raises:
        ModelError: something is missing, unreadable, truncated, of the wrong shape or of no use; it is named.
        UnsupportedModel: our families do not cover it, transformers may.
    """
    config = read_config(folder)
    model = empty_model(config, dtype)
    load_weights(model, folder)
    return model


@torch.no_grad()
def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Copy the weights of a Hugging Face folder into our own model of the same shape, in place.

    Raises:
        ModelError: as for ``load_hf``; also where the folder's weights do not fit the model.
    """
    config: Any = model.config
    weights = weight_map(config)
    parameters = parameters_of(model, weights)
    with ExitStack() as stack:
        tensors = _TensorFolder(Path(folder), stack)
        prefix = _missing_prefix(config, tensors)
        wanted = {weight.theirs.removeprefix(prefix) for weight in weights}
        _check_names(tensors, wanted, config)
        for weight in weights:
            tensor = tensors.get(weight.theirs.removeprefix(prefix), weight.shape(parameters))
            for name, part in weight.parts(tensor):
                weight.target(parameters[name]).copy_(part)


def save_hf(
    model: Any,
    folder: str | Path,
    tokenizer_file: str | Path | None = None,
    *,
    eos: int | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a model as a folder that ``transformers.AutoModelForCausalLM.from_pretrained`` loads.

    Weights keep their dtype. All files are written beside their places first: a full disk leaves the folder as it was.

    Args:
        model: one of our own, or a TransformersModel.
        folder: made if it is not there; a model that is in it is replaced.
        tokenizer_file: a ``tokenizer.json``, or a folder with the files of a tokenizer, to copy along.
        eos: number of the token that ends a text.
        shard_bytes: largest size of one file of weights.

    Raises:
        ModelError: transformers has no such family, methods replaced parts of the model, or a file cannot be written.
    """
    folder = Path(folder)
    if isinstance(model.config, GLAConfig):
        raise ModelError("model.family", "is gla, which transformers does not have",
                         hint="`headway generate` and `headway eval` read the run itself")  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".export-", dir=folder) as name:
            stage = Path(name)
            if isinstance(model.config, LlamaConfig | GPT2Config):
                _write_model(model, stage, eos, shard_bytes)
            else:
                model.model.save_pretrained(stage, max_shard_size=shard_bytes)
            if tokenizer_file is not None:
                _copy_tokenizer(Path(tokenizer_file), stage, model.context, eos)
            _move_in(stage, folder)
    except (OSError, SafetensorError) as error:
        raise ModelError(str(folder), f"cannot be written ({getattr(error, 'strerror', None) or error})") from error


def _write_model(model: Any, folder: Path, eos: int | None, shard_bytes: int) -> None:
    model_type(model.config)  # refuses, with the setting's name, what transformers lacks
    weights = weight_map(model.config)
    parameters = parameters_of(model, weights)
    dtype = str(next(iter(parameters.values())).dtype).removeprefix("torch.")
    write_json(folder / "config.json", hf_config(model.config, eos, dtype))
    _write_shards(_their_tensors(model.config, weights, parameters), folder, shard_bytes)


def _move_in(stage: Path, folder: Path) -> None:
    """Replace the model in ``folder``; no mixture looks like a model: ``config.json`` goes first and comes last."""
    new = sorted((path.name for path in stage.iterdir()), key=lambda name: name == "config.json")
    (folder / "config.json").unlink(missing_ok=True)
    for old in (*folder.glob("model*.safetensors"), folder / _INDEX):
        if old.name not in new:
            old.unlink(missing_ok=True)  # transformers would read a stale file before the new ones
    for name in new:
        with (stage / name).open("rb") as file:
            os.fsync(file.fileno())
        (stage / name).replace(folder / name)
    sync_folder(folder)


class _TensorFolder:
    """The tensors of a folder by name, read one at a time."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self._files = folder, {}
        if (folder / _SINGLE).is_file():
            self.source, names = folder / _SINGLE, [_SINGLE]
        elif (folder / _INDEX).is_file():
            self.source, names = folder / _INDEX, _shards(folder / _INDEX)
        else:
            others = [path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in folder.glob(pattern)]
            raise ModelError(
                str(folder),
                f"has neither {_SINGLE} nor {_INDEX}",
                hint=f"only safetensors are read, not {others[0]}" if others else "",
            )
        for name in names:
            handle = _open(folder / name, stack)
            self._files.update(dict.fromkeys(handle.keys(), (folder / name, handle)))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor, which must have this shape and be of a floating type."""
        path, handle = self._files[name]
        found = tuple(handle.get_slice(name).get_shape())
        if found != shape:
            raise ModelError(str(path), f"tensor {name!r} has the wrong shape", got=found, expected=str(shape))
        tensor: Tensor = handle.get_tensor(name)
        if not tensor.is_floating_point():
            raise ModelError(str(path), f"tensor {name!r} is quantised", got=str(tensor.dtype), expected="a float type")
        return tensor


def _open(path: Path, stack: ExitStack) -> Any:
    if not path.is_file():
        raise ModelError(str(path), "is missing", hint=f"{_INDEX} names it: the folder is incomplete")
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except (SafetensorError, OSError) as error:
        raise ModelError(str(path), f"is truncated or no safetensors file ({error})") from None


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(str(index), f"is no index of shards ({error!r})") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(str(index), "names a file outside the folder", got=name)
    return names


def _missing_prefix(config: LlamaConfig | GPT2Config, tensors: _TensorFolder) -> str:
    """GPT-2's original folder stores the bare model, without the ``transformer.`` of the one with a head."""
    bare = isinstance(config, GPT2Config) and "wte.weight" in tensors
    return "transformer." if bare else ""


def _check_names(tensors: _TensorFolder, wanted: set[str], config: LlamaConfig | GPT2Config) -> None:
    missing = sorted(name for name in wanted if name not in tensors)
    ignored = {"lm_head.weight"} if config.tied else set()
    surplus = sorted(name for name in tensors if name not in wanted | ignored and not _COMPUTED.search(name))
    for names, what in ((missing, "lacks"), (surplus, "holds, without a place for them in the configuration,")):
        if names:
            some = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ModelError(str(tensors.source), f"{what} {len(names)} tensors: {some}")


def _their_tensors(
    config: LlamaConfig | GPT2Config, weights: list[Weight], parameters: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    for weight in weights:
        name, tensor = weight.theirs, weight.whole(parameters).detach()
        yield name, tensor
        if model_type(config) == "qwen2" and re.search(r"\.[qkv]_proj\.weight$", name):
            assert isinstance(config, LlamaConfig)
            if not config.qkv_bias:
                yield name.removesuffix("weight") + "bias", tensor.new_zeros(tensor.shape[0])


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path, shard_bytes: int) -> None:
    """Write the tensors in files of at most ``shard_bytes``, or one tensor each."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    count = len(shards)
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [_SINGLE]
    for file, shard in zip(files, shards, strict=True):
        # transformers asks for the metadata; views are copied here, one shard at a time.
        save_file({name: t.cpu().contiguous() for name, t in shard.items()}, folder / file, {"format": "pt"})
    if count == 1:
        return
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _copy_tokenizer(source: Path, folder: Path, context: int | None, eos: int | None) -> None:
    """Copy a tokenizer's files; a lone ``tokenizer.json`` gets the configuration that ``AutoTokenizer`` asks for."""
    files = [source / name for name in _TOKENIZER_FILES] if source.is_dir() else [source]
    found = [file for file in files if file.is_file()]
    if not found:
        raise ModelError(str(source), "holds no tokenizer", expected="a tokenizer.json or a folder with one")
    for file in found:
        shutil.copyfile(file, folder / (file.name if source.is_dir() else "tokenizer.json"))
    if not (folder / "tokenizer_config.json").is_file():
        options: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if context is not None:
            options["model_max_length"] = context
        added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("added_tokens", [])
        end = next((token["content"] for token in added if token["id"] == eos), None)
        if end is not None:
            options["eos_token"] = end
        write_json(folder / "tokenizer_config.json", options)
