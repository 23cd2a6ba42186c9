"""The state of a training in terms of parameter names and fp32 master weights.

Optimizers number their parameters; names survive surgery, other layouts and other optimizers. A low-precision run
keeps fp32 masters inside its optimizer, and those, not their rounded copies, are the state to save, average or hand
over.

An optimizer that keeps masters or states somewhere else, such as on disk, offers them itself: ``named_masters() ->
{parameter: fp32 values}`` and ``named_states() -> {parameter: {key: values}}``, which may be read only when they are
looked at, and ``load_masters`` and ``load_states`` for the way back. What is saved is the same.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn

from headway.core.errors import CheckpointError


def master_weights(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Name -> the fp32 tensor that the optimizer updates, for every trained or frozen parameter; tied ones once."""
    offered = getattr(optimizer, "named_masters", None)
    masters: dict[torch.Tensor, torch.Tensor] = offered() if offered else getattr(optimizer, "masters", {})
    return {name: masters.get(p, p.detach()) for name, p in model.named_parameters()}


def refresh_weights(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Copy the masters into the model after something has changed them."""
    if hasattr(optimizer, "named_masters"):
        return  # `load_masters`, the one way to change them, has done it
    with torch.no_grad():
        for parameter, master in getattr(optimizer, "masters", {}).items():
            parameter.copy_(master)


def model_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The model's persistent buffers and its parameters as fp32 masters."""
    buffers = {
        k: v for k, v in model.state_dict().items() if k not in dict(model.named_parameters(remove_duplicate=False))
    }
    return {**master_weights(model, optimizer), **buffers}


def load_model_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, torch.Tensor]) -> None:
    """Put back what ``model_state`` gave.

    Raises:
        CheckpointError: names or shapes differ.
    """
    own = model_state(model, optimizer)
    if missing := own.keys() ^ state.keys():
        raise CheckpointError(
            "checkpoint", f"holds other weights than this model: {', '.join(sorted(missing)[:4])} ..."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                shapes = f"{tuple(state[name].shape)} for {tuple(tensor.shape)}"
                raise CheckpointError("checkpoint", f"holds {name} in another shape: {shapes}")
        elsewhere = _offered(model, optimizer)
        for name in own.keys() - elsewhere.keys():
            own[name].copy_(state[name])
        if elsewhere:
            optimizer.load_masters({p: state[name] for name, p in elsewhere.items()})  # type: ignore[attr-defined]
    refresh_weights(model, optimizer)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Parameter name -> its optimizer state."""
    if offered := getattr(optimizer, "named_states", None):
        states = offered()
        return {name: states[p] for name, p in _offered(model, optimizer).items() if p in states}
    inner = getattr(optimizer, "inner", optimizer)
    return {
        name: dict(inner.state[master]) for name, master in _trained(model, optimizer).items() if master in inner.state
    }


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, dict[str, Any]]) -> None:
    """Put back what ``optimizer_state`` gave.

    Raises:
        CheckpointError: it holds parameters that the optimizer does not train.
    """
    inner = getattr(optimizer, "inner", optimizer)
    trained = _trained(model, optimizer)
    if unknown := state.keys() - trained.keys():
        raise CheckpointError(
            "checkpoint", f"holds optimizer state of unknown parameters: {', '.join(sorted(unknown)[:4])}"
        )
    if elsewhere := _offered(model, optimizer):
        optimizer.load_states({elsewhere[name]: values for name, values in state.items()})  # type: ignore[attr-defined]
        return
    for name in trained.keys() - state.keys():
        inner.state.pop(trained[name], None)
    for name, values in state.items():
        master = trained[name]
        inner.state[master] = {
            key: value.to(value.device if value.ndim == 0 else master.device).clone()
            if isinstance(value, torch.Tensor)
            else value
            for key, value in values.items()
        }


def _offered(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Name -> parameter, for those that the optimizer keeps itself."""
    if not hasattr(optimizer, "named_masters"):
        return {}
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    masters: dict[torch.Tensor, torch.Tensor] = getattr(optimizer, "masters", {})
    return {name: masters.get(p, p) for name, p in model.named_parameters() if p.requires_grad}


def rng_state() -> dict[str, Any]:
    """The states of every random generator that training may draw from."""
    numpy_state: Any = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": _listed(random.getstate()),
        "numpy": [numpy_state[0], torch.from_numpy(np.asarray(numpy_state[1]).astype(np.int64)), *numpy_state[2:]],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def load_rng_state(state: dict[str, Any]) -> None:
    """Put back what ``rng_state`` gave."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


def seed_everything(seed: int) -> None:
    """Seed every random generator that training may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _listed(value: Any) -> Any:
    return [_listed(v) for v in value] if isinstance(value, tuple) else value
