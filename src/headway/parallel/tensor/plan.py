"""Which part a module plays in tensor parallelism: declared beside each model, read here.

A model's ``tensor_plan`` maps names of modules, in which ``*`` stands for one component, to these words:

    vocabulary   embedding or head, [V, D]: each rank has some of the vocabulary
    positions    embedding of positions: whole, looked up for the tokens that a rank has outside
    enter        norm before a region in which each rank works on its own channels; all tokens go in
    heads        linear by query heads:                     its output channels are divided
    kv_heads     linear by key and value heads:             its output channels are divided
    column       linear in front of the activation:         its output channels are divided
    row          linear at the end of a region:             its input channels are divided, outputs are summed
    inside       module that works on the channels of a region, whole on every rank
    leave        the final norm: what it gives is for all ranks alike
    tokens       module that works on tokens outside of the regions, whole on every rank
    apart        module that somebody else divides

Outside of the regions each rank has its share of the tokens, or all of them, as ``tensor_parallel`` was told.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from headway.core.errors import ModelError
from headway.core.surgery import Shell

ROLES = frozenset({
    "vocabulary", "positions", "enter", "heads", "kv_heads", "column", "row", "inside", "leave", "tokens", "apart",
})  # fmt: skip


def read_plan(model: nn.Module) -> dict[str, str]:
    """Name -> role of every module that has one in the model's plan.

    Raises:
        ModelError: the model declares no plan, the plan leaves out a parameter or has a word that nobody knows, or
            methods have wrapped parts of the model.
    """
    name = type(model).__name__
    plan: dict[str, str] | None = getattr(model, "tensor_plan", None)
    if plan is None:
        raise ModelError(name, "declares no tensor_plan, and so cannot be made tensor-parallel",
                         expected="a model of Headway: llama, gpt2 or moe")  # fmt: skip
    if odd := sorted(set(plan.values()) - ROLES):
        raise ModelError(f"{name}.tensor_plan", got=odd[0], expected=" or ".join(sorted(ROLES)))
    patterns = {re.compile(re.escape(key).replace(r"\*", "[^.]+")): role for key, role in plan.items()}
    roles: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, Shell):
            raise ModelError(path, f"is wrapped by {type(module).__name__} already",
                             hint="make the model tensor-parallel before methods work on it")  # fmt: skip
        role = next((role for pattern, role in patterns.items() if pattern.fullmatch(path)), None)
        if role is not None:
            roles[path] = role
    for path, _ in model.named_parameters():
        if not any(path.startswith(f"{owner}.") for owner in roles):
            raise ModelError(f"{name}.tensor_plan", f"says nothing about {path}")
    return roles


def check_degree(model: nn.Module, roles: dict[str, str], degree: int) -> None:
    """Whether the heads and channels of ``model`` can be divided among ``degree`` ranks.

    Raises:
        ModelError: they cannot, with the degrees next to it that can.
    """
    config: Any = model.config
    heads = config.heads
    kv_heads = getattr(config, "kv_head_count", heads)
    widths = {
        width for path, role in roles.items() if role in ("column", "row") for width in _widths(model, path, role)
    }

    def fits(t: int) -> bool:
        grouped = kv_heads % t == 0 or t % kv_heads == 0
        return heads % t == 0 and grouped and all(width % t == 0 for width in widths)

    if fits(degree):
        return
    legal = [t for t in range(1, heads + 1) if fits(t)]
    near = [max((t for t in legal if t < degree), default=0), min((t for t in legal if t > degree), default=0)]
    raise ModelError(
        "parallel.tensor.degree",
        f"of {degree} cannot divide {heads} heads, {kv_heads} key and value heads "
        f"and {', '.join(map(str, sorted(widths)))} channels",
        hint=f"take {' or '.join(str(t) for t in near if t)}",
    )


def _widths(model: nn.Module, path: str, role: str) -> list[int]:
    linear: Any = model.get_submodule(path)
    inner, attention = (linear.out_features if role == "column" else linear.in_features), ".attention." in f".{path}."
    return [] if attention else [inner]
