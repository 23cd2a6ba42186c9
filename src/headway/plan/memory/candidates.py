"""What a run can do about its memory: each candidate is a set of switches on the recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from headway.core.errors import HeadwayError
from headway.core.method import resolve
from headway.core.recipe import Recipe
from headway.memory.backends import IN_MEMORY, filesystem, offload_folder

QUEUE = 64 << 20
"""Bytes that may be on their way out: they are still in memory, so that a plan must know how many."""
ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "keep everything": ("nothing is switched on", {}),
    "recompute all but products": (
        "keeps the results of matrix products; norms and activation functions run twice",
        {"recompute": {"keep": "products"}},
    ),
    "recompute all but attention": (
        "keeps the results of attention; the rest of each block runs twice",
        {"recompute": {"keep": "attention"}},
    ),
    "recompute every second block": ("half of the blocks run twice", {"recompute": {"every": 2}}),
    "recompute": ("every block runs twice", {"recompute": {}}),
    "stream": ("every block runs twice, backward a chunk of positions at a time", {"streambp": {}}),
    "activations to disk": ("what autograd saves goes to disk and back", {"ssdtrain": {"policy": "all"}}),
    "activations to host": (
        "what autograd saves goes to the memory of the host and back",
        {"ssdtrain": {"policy": "all", "backend": "host", "queue": QUEUE}},
    ),
    "swap and recompute": ("a part of what autograd saves goes to the host, the rest is recomputed", {"memo": {}}),
}
"""Ways to treat activations: name -> what it does, and the methods that do it."""

STATES: dict[str, tuple[str, dict[str, Any]]] = {
    "states in place": ("the optimizer's state stays where the weights are", {}),
    "states on disk": (
        "the optimizer's state lives on disk, a group at a time in memory",
        {"fuyou": {"params": "memory", "activations": "none"}},
    ),
    "weights and states on disk": (
        "the optimizer's state and the blocks' weights live on disk, a group at a time in memory",
        {"fuyou": {"params": "disk", "activations": "none"}},
    ),
    "states on the host": (
        "the optimizer's state lives in the memory of the host, and is updated there",
        {"deep-optimizer-states": {"stride": None}},
    ),
}
"""Ways to treat the optimizer's state."""

ON_DISK, ON_HOST = ("ssdtrain", "fuyou"), ("memo", "deep-optimizer-states")


@dataclass(frozen=True)
class Candidate:
    """One way to run a recipe."""

    activations: str
    states: str
    micro_batch: int
    methods: dict[str, dict[str, Any]] = field(hash=False)

    @property
    def name(self) -> str:
        """As a person reads it: ``recompute, states on disk, micro-batch 4``."""
        states = "" if self.states == "states in place" else f", {self.states}"
        return f"{self.activations}{states}, micro-batch {self.micro_batch}"

    def apply(self, recipe: Recipe) -> Recipe:
        """The recipe with this candidate's switches beside its own, and without a budget."""
        raw = recipe.to_dict()
        raw["methods"] = {**raw["methods"], **self.methods}
        raw["train"]["micro_batch"] = self.micro_batch
        raw["memory"] = {**raw["memory"], "budget": None}
        return Recipe.load(raw)


def candidate(recipe: Recipe, activations: str, states: str, micro_batch: int) -> Candidate:
    """One candidate, its traffic to disk in the recipe's folder."""
    methods = {**ACTIVATIONS[activations][1], **STATES[states][1]}
    disk = recipe.memory.disk
    if disk:
        methods = {
            name: {**options, "path": disk} if name in ON_DISK and options.get("backend") != "host" else options
            for name, options in methods.items()
        }
    return Candidate(activations, states, micro_batch, methods)


def refused(recipe: Recipe, chosen: Candidate, device: str) -> str:
    """Why this recipe or machine cannot run ``chosen``; empty if it can."""
    to_host = [m for m, o in chosen.methods.items() if m in ON_HOST or o.get("backend") == "host"]
    if to_host and device == "cpu":
        return "the host's memory is the device's own here"
    to_disk = [m for m in chosen.methods if m in ON_DISK and m not in to_host]
    if to_disk and filesystem(offload_folder(recipe.memory.disk)) in IN_MEMORY:
        return "that folder is in memory itself: give memory.disk a folder on a drive"
    if taken := sorted(chosen.methods.keys() & recipe.methods.keys()):
        return f"the recipe sets methods.{taken[0]} itself"
    try:
        resolve(chosen.apply(recipe))
    except HeadwayError as error:
        return str(error)
    return ""


def micro_batches(recipe: Recipe) -> list[int]:
    """The recipe's micro-batch, then divisors of the batch, each at most half of the one before, down to 1."""
    batch = recipe.train.batch
    sizes = [recipe.train.micro_batch or batch]
    for size in range(sizes[0] // 2, 0, -1):
        if batch % size == 0 and 2 * size <= sizes[-1]:
            sizes.append(size)
    return sizes
