"""A nested state as plain JSON data and a flat table of tensors, and back.

The plain data keeps the structure; where a tensor was stands ``{"$tensor": key}``. The key is the tensor's path joined
with dots, as torch.distributed.checkpoint would name it, so that its tools find ``model.blocks.0.weight`` where they
expect it.

| value | in JSON |
|---|---|
| None, bool, int, finite float, str | as they are; ``repr`` of a float reads back to the same bits |
| inf, nan | ``{"$float": "inf"}`` |
| an integer beyond Python's limit on decimal digits | ``{"$int": "-0x1f..."}`` |
| a string that is not valid Unicode (lone surrogates) | ``{"$str": hexadecimal}`` |
| list | an array |
| tuple | ``{"$tuple": [...]}`` |
| dict with string keys, none of which starts with ``$`` | an object, in its own order |
| any other dict | ``{"$dict": [[key, value], ...]}`` |
| ``ELSEWHERE`` | as a tensor, which is in the files of another process |
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

from headway.core.errors import CheckpointError


class Elsewhere:
    """Stands for a tensor that another process has and saves."""


ELSEWHERE = Elsewhere()

_DIGITS_LIMIT = 10**600  # below every limit that sys.set_int_max_str_digits accepts


def flatten(state: Any, sharded: bool = False) -> tuple[Any, dict[str, torch.Tensor]]:
    """``state`` as JSON data and its tensors by key.

    Args:
        sharded: let DTensors pass.

    Raises:
        CheckpointError: it holds something that is neither plain data nor a plain tensor; the path says where.
    """
    tensors = _Table(sharded)
    return _encode(state, (), tensors), tensors


class _Table(dict[str, torch.Tensor]):
    """Key -> tensor."""

    def __init__(self, sharded: bool) -> None:
        super().__init__()
        self.types: tuple[type, ...] = (torch.Tensor, torch.nn.Parameter)
        if sharded and (module := sys.modules.get("torch.distributed.tensor")):  # slow to import; without it no DTensor
            self.types += (module.DTensor,)


def unflatten(plain: Any, tensors: dict[str, torch.Tensor], partial: bool = False) -> Any:
    """What ``flatten`` was given.

    Args:
        partial: put None where a tensor is missing.

    Raises:
        ValueError: ``plain`` is not what ``flatten`` makes.
        KeyError: a tensor is missing.
    """
    if isinstance(plain, list):
        return [unflatten(item, tensors, partial) for item in plain]
    if not isinstance(plain, dict):
        return plain
    tag = next(iter(plain), "")
    if not tag.startswith("$"):
        return {key: unflatten(value, tensors, partial) for key, value in plain.items()}
    value = plain[tag]
    match tag:
        case "$tensor":
            return tensors.get(value) if partial else tensors[value]
        case "$float":
            return float(value)
        case "$int":
            return int(value, 16)
        case "$str":
            return bytes.fromhex(value).decode("utf-32-le", "surrogatepass")
        case "$tuple":
            return tuple(unflatten(item, tensors, partial) for item in value)
        case "$dict":
            return {unflatten(key, tensors): unflatten(item, tensors, partial) for key, item in value}
    raise ValueError(f"unknown tag {tag!r}")


def _encode(value: Any, path: tuple[str, ...], tensors: _Table) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < _DIGITS_LIMIT else {"$int": hex(value)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, str):
        return str(value) if _valid(value) else {"$str": value.encode("utf-32-le", "surrogatepass").hex()}
    if isinstance(value, Elsewhere):
        return {"$tensor": _key_of(path)}
    if isinstance(value, torch.Tensor):
        return {"$tensor": _add(value, path, tensors)}
    if isinstance(value, list):
        return [_encode(item, (*path, str(i)), tensors) for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": [_encode(item, (*path, str(i)), tensors) for i, item in enumerate(value)]}
    if isinstance(value, dict):
        if all(isinstance(key, str) and _valid(key) and not key.startswith("$") for key in value):
            return {str(key): _encode(item, (*path, key), tensors) for key, item in value.items()}
        pairs = [[_key(key, path), _encode(item, (*path, repr(key)), tensors)] for key, item in value.items()]
        return {"$dict": pairs}
    raise _refused(path, f"is a {type(value).__name__}", "None, bool, int, float, str, list, tuple, dict or a tensor")


def _key(key: Any, path: tuple[str, ...]) -> Any:
    if key is None or isinstance(key, bool | int | float | str):
        return _encode(key, path, _Table(False))
    raise _refused(path, f"has the key {key!r}", "None, bool, int, float or str as key")


def _add(tensor: torch.Tensor, path: tuple[str, ...], tensors: _Table) -> str:
    if type(tensor) is torch.nn.Parameter:
        tensor = tensor.detach()
    if type(tensor) not in tensors.types:
        raise _refused(path, f"is a {type(tensor).__name__}", "a plain tensor")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "a quantized" if tensor.is_quantized else "a meta" if tensor.is_meta else f"a {tensor.layout}"
        raise _refused(path, f"is {kind} tensor", "a dense tensor that holds data")
    name = key = _key_of(path)
    number = 1
    while key in tensors:  # {"a.b": t} and {"a": {"b": t}} in one state
        number += 1
        key = f"{name}~{number}"
    tensors[key] = tensor.detach().resolve_conj().resolve_neg() if type(tensor) is torch.Tensor else tensor.detach()
    return key


def _key_of(path: tuple[str, ...]) -> str:
    return ".".join(path).encode("utf-8", "backslashreplace").decode()


def _valid(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refused(path: tuple[str, ...], what: str, expected: str) -> CheckpointError:
    return CheckpointError("the state's " + (".".join(path) or "root"), what, expected=expected)
