"""Groups of parameters whose optimizer state moves together, and how a group lies in a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from headway.models.structure import structure

ALIGNMENT = 4096
STATES = ("master", "exp_avg", "exp_avg_sq")
"""Regions of fp32 values in a group's file."""
WEIGHTS = "weights"
"""The region of rounded working weights, where they live on disk and are not fp32."""
_PAD = 16  # elements: every parameter begins on a cache line, in fp32


@dataclass(frozen=True)
class Group:
    """Parameters that are updated together, by name, in one order for ever."""

    name: str
    names: tuple[str, ...]
    params: tuple[Tensor, ...]
    block: int | None = None
    """Which block of the model it is; None for what lies outside of the blocks."""


def block_groups(model: nn.Module) -> list[Group]:
    """One group a block, one each for what lies before and after them, in the order in which a backward pass ends.

    A parameter that occurs in several places (a tied head) belongs to the first; autograd hands out its gradient once,
    after the last of its uses. Frozen parameters belong to no group.

    Raises:
        ModelError: the model is no causal language model.
    """
    parts = structure(model)
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
    taken: set[Tensor] = set()

    def take(name: str, candidates: Iterable[Tensor], block: int | None = None) -> list[Group]:
        params = [p for p in dict.fromkeys(candidates) if p in names and p not in taken]
        taken.update(params)
        return [Group(name, tuple(names[p] for p in params), tuple(params), block)] if params else []

    embedding = take("embedding", parts.embedding.parameters())
    blocks = [take(f"block {i}", block.parameters(), i) for i, block in enumerate(parts.blocks)]
    head = take("head", [*parts.head.parameters(), *parts.norm.parameters()])
    rest = take("rest", names)
    return [*head, *(group for found in reversed(blocks) for group in found), *rest, *embedding]


def groups_of(params: Sequence[Tensor], elements: int = 1 << 24) -> list[Group]:
    """Groups of about ``elements`` elements of any parameters, last first, for models without blocks."""
    found: list[Group] = []
    names: list[str] = []
    chosen: list[Tensor] = []
    size = 0
    for index in reversed(range(len(params))):
        names.append(str(index))
        chosen.append(params[index])
        size += params[index].numel()
        if size >= elements or index == 0:
            found.append(Group(f"group {len(found)}", tuple(names), tuple(chosen)))
            names, chosen, size = [], [], 0
    return found


class Layout:
    """Where a group's values lie in a file and in a buffer: regions on pages, parameters on cache lines.

    Args:
        shapes: of the parameters.
        weights: dtype of the working weights, where the file holds them beside the fp32 states.
    """

    def __init__(self, shapes: Sequence[torch.Size], weights: torch.dtype | None = None) -> None:
        self.shapes, self.weights = tuple(shapes), weights
        starts, offset = [], 0
        for shape in self.shapes:
            starts.append(offset)
            offset += -(-shape.numel() // _PAD) * _PAD
        self.starts, self.elements = tuple(starts), offset
        """First element of each parameter in its region, and all elements of a region."""

    @cached_property
    def regions(self) -> dict[str, tuple[int, int]]:
        """Name -> (first byte, bytes), both in whole pages."""
        found, offset = {}, 0
        for name in (*STATES, *((WEIGHTS,) if self.weights is not None else ())):
            width = 4 if self.weights is None or name != WEIGHTS else self.weights.itemsize
            nbytes = -(-max(1, self.elements * width) // ALIGNMENT) * ALIGNMENT
            found[name] = (offset, nbytes)
            offset += nbytes
        return found

    @property
    def nbytes(self) -> int:
        """Of the whole file."""
        return sum(nbytes for _, nbytes in self.regions.values())

    @property
    def working(self) -> str:
        """The region that holds the working weights: the masters themselves in fp32."""
        return WEIGHTS if self.weights is not None else STATES[0]

    @classmethod
    def of(cls, group: Group, weights_on_disk: bool) -> Layout:
        """The layout of a group's file; working weights in fp32 are the masters themselves."""
        dtype = group.params[0].dtype
        return cls([p.shape for p in group.params], dtype if weights_on_disk and dtype != torch.float32 else None)

    def views(self, whole: Tensor, region: str, first: int | None = None) -> list[Tensor]:
        """The parameters' views of ``region``.

        Args:
            whole: uint8, of the whole file, or of what begins at byte ``first`` of it.
        """
        offset = self.regions[region][0] - (first or 0)
        dtype = self.weights if region == WEIGHTS and self.weights is not None else torch.float32
        size = self.elements * dtype.itemsize
        flat = whole[offset : offset + size].view(dtype)
        return [flat[s : s + shape.numel()].view(shape) for s, shape in zip(self.starts, self.shapes, strict=True)]
