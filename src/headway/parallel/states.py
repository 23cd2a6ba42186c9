"""The state of a training of which every rank has a part: which tensors it has, and which the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headway.resilience.flatten import ELSEWHERE


def without(state: Any, name: str) -> Any:
    """A nested state without any entry of that name."""
    if not isinstance(state, dict):
        return state
    return {key: without(value, name) for key, value in state.items() if key != name}


def tensors_of(state: Any) -> dict[str, Any]:
    """The places of a nested state's tensors, without the tensors."""
    found: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            found[key] = None
        elif isinstance(value, dict) and (inner := tensors_of(value)):
            found[key] = inner
    return found


def with_others(state: dict[str, Any], places: dict[str, Any]) -> dict[str, Any]:
    """``state`` with a mark at each of the places where it has nothing."""
    merged = dict(state)
    for key, inner in places.items():
        if inner is None:
            merged.setdefault(key, ELSEWHERE)
        else:
            merged[key] = with_others(merged.get(key, {}), inner)
    return merged


def make_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Have the optimizer make its state, so that a checkpoint can be read into it: a step of no length."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    getattr(optimizer, "inner", optimizer).step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
