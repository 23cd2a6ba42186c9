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
from collections.abc import Sequence
from typing import Any

from torch import nn

from headway.core.errors import ModelError
from headway.core.surgery import Absent, Shell

ROLES = frozenset({
    "vocabulary", "positions", "enter", "heads", "kv_heads", "column", "row", "inside", "leave", "tokens", "apart",
})  # fmt: skip


def read_plan(model: nn.Module, apart: Sequence[str] = ()) -> dict[str, str]:
    """Name -> role of every module that has one in the model's plan.

    Args:
        model: declares a ``tensor_plan``.
        apart: patterns of the modules that somebody else divides, whatever the plan says of them.

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
    words = dict.fromkeys(apart, "apart") | {key: role for key, role in plan.items() if key not in apart}
    patterns = {re.compile(re.escape(key).replace(r"\*", "[^.]+")): role for key, role in words.items()}
    roles: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, Shell):
            raise ModelError(path, f"is wrapped by {type(module).__name__} already",
                             hint="make the model tensor-parallel before methods work on it")  # fmt: skip
        role = next((role for pattern, role in patterns.items() if pattern.fullmatch(path)), None)
        if role is not None and not isinstance(module, Absent):
            roles[path] = role
    for path, _ in model.named_parameters():
        if not any(path.startswith(f"{owner}.") for owner in roles):
            raise ModelError(f"{name}.tensor_plan", f"says nothing about {path}")
    return roles


def check_modules(model: nn.Module, roles: dict[str, str], classes: dict[str, tuple[type, ...]]) -> None:
    """Whether the modules are of the very classes that can play their roles.

    Args:
        model: whose modules they are.
        roles: from `read_plan`.
        classes: role -> the classes; a role that is not in it can be played by any module.

    Raises:
        ModelError: one is not.
    """
    for path, role in roles.items():
        module = model.get_submodule(path)
        if role in classes and type(module) not in classes[role]:
            raise ModelError(path, f"is a {type(module).__name__}, which cannot be divided (as {role})",
                             expected=" or ".join(kind.__name__ for kind in classes[role]),
                             hint="make the model tensor-parallel before methods work on it")  # fmt: skip


def kv_heads_of(model: Any) -> int:
    """Key and value heads of each block, of all ranks together."""
    count: int = getattr(model.config, "kv_head_count", model.config.heads)
    return count


def check_degree(model: Any, roles: dict[str, str], degree: int) -> None:
    """Whether the heads and channels of ``model`` can be divided among ``degree`` ranks.

    Raises:
        ModelError: they cannot, with the degrees next to it that can.
    """
    heads, kv_heads = model.config.heads, kv_heads_of(model)
    # Channels of feed-forward blocks; those of attention are divided by heads.
    columns = [model.get_submodule(path) for path, role in roles.items() if role == "column"]
    widths = {linear.out_features for linear in columns}

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
