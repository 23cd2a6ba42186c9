"""Marks in a profile: which phase and which module is running; hooks put them there and come off again."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

from headway.core.errors import HeadwayError
from headway.plan.dissect.tree import PHASES

STEP, PHASE, MODULE, COMPILED = "headway/step", "headway/phase/", "headway/module/", "headway/compiled/"


def phase(name: str) -> record_function:
    """Mark what runs inside ``with phase("data"):`` as that phase of the step.

    Forward, backward and recompute are told apart without marks.

    Raises:
        HeadwayError: ``name`` is not one of ``PHASES``.
    """
    if name not in PHASES:
        raise HeadwayError("phase", got=name, expected=" or ".join(PHASES))
    return record_function(PHASE + name)


@contextmanager
def marked(model: nn.Module, optimizer: Any = None, collapse: bool = True) -> Iterator[None]:
    """Every module of ``model`` and every step of ``optimizer`` opens a profiler scope while this is open.

    A compiled module is marked from outside and its inside left alone: hooks in there would be compiled, or break
    the graph.

    Args:
        collapse: give the modules of a list of equals one name, ``blocks.*``.
    """
    handles: list[Any] = []
    undo: list[Any] = []
    try:
        for path, module in _outside_of_graphs(model, collapse):
            scope = (COMPILED if _is_graph(module) else MODULE) + "/".join(path)
            if (compiled := module._compiled_call_impl) is not None:
                module._compiled_call_impl = _scoped(compiled, scope)
                undo.append((module, compiled))
                continue
            enter, leave = _open_and_close(scope)
            handles.append(module.register_forward_pre_hook(enter))
            # always_call: a recomputation stops in the middle of a module by an exception.
            handles.append(module.register_forward_hook(leave, always_call=True))
        for part in _torch_optimizers(optimizer):
            enter, leave = _open_and_close(PHASE + "optimizer")
            handles.append(part.register_step_pre_hook(enter))
            handles.append(part.register_step_post_hook(leave))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, compiled in undo:
            module._compiled_call_impl = compiled


def _outside_of_graphs(model: nn.Module, collapse: bool) -> Iterator[tuple[tuple[str, ...], nn.Module]]:
    """Every module once with its path, but none inside a module that is compiled as a whole."""
    seen: set[int] = set()
    pending: list[tuple[tuple[str, ...], nn.Module]] = [((), model)]
    while pending:
        path, module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        if _is_graph(module):
            continue
        children = list(module.named_children())
        equals = len({type(child) for _, child in children}) == 1 and len(children) > 1
        for key, child in reversed(children):
            if not key.isdigit() or not path:
                pending.append(((*path, key), child))
            else:  # blocks.0: a list is no level of its own
                pending.append(((*path[:-1], f"{path[-1]}.{'*' if collapse and equals else key}"), child))


def _is_graph(module: nn.Module) -> bool:
    """``module.compile()``, ``torch.compile(module)``, or an instance with a compiled ``forward``."""
    if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
        return True
    return hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")


def _open_and_close(scope: str) -> tuple[Any, Any]:
    """A hook that opens a scope and one that closes the scope opened last."""
    opened: list[record_function] = []

    def enter(*_: Any) -> None:
        opened.append(record_function(scope))
        opened[-1].__enter__()

    def leave(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    return enter, leave


def _scoped(call: Any, scope: str) -> Any:
    def scoped(*args: Any, **kwargs: Any) -> Any:
        with record_function(scope):
            return call(*args, **kwargs)

    return scoped


def _torch_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The torch optimizers in ``optimizer``: itself, several, or the one inside a wrapper that has ``inner``."""
    if optimizer is None:
        return []
    if isinstance(optimizer, torch.optim.Optimizer):
        return [optimizer]
    if isinstance(optimizer, list | tuple):
        return list(itertools.chain.from_iterable(_torch_optimizers(part) for part in optimizer))
    inner = getattr(optimizer, "inner", None)
    if inner is None:
        raise HeadwayError("optimizer", f"is a {type(optimizer).__name__}", expected="a torch optimizer, or several")
    return _torch_optimizers(inner)
