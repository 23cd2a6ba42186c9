"""Two grids over the same ranks: one for attention, one for experts. Numbers only; nothing here imports torch.

Attention wants few ranks that share each sequence and matrix; experts want many ranks that hold different experts.
Folding lays the experts' grid over a pipeline stage's ranks without asking what attention uses them for; unfolded,
as older frameworks have it, expert ranks are a part of the data ranks.

Source: "MoE Parallel Folding", arXiv 2504.14960, section 3.2; Megatron-LM's order ``tp-cp-ep-dp-pp``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from headway.core.errors import RecipeError
from headway.parallel.mesh import divisors, one_of

ATTENTION = ("pipeline", "data", "sequence", "tensor")
EXPERTS = ("pipeline", "expert_data", "expert", "expert_tensor")


@dataclass(frozen=True)
class Grid:
    """Ranks in a box: ``ranks`` lists them with the last of ``names`` running fastest."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, names: tuple[str, ...], shape: tuple[int, ...]) -> Grid:
        """Ranks 0, 1, 2, ... along the box."""
        return cls(names, shape, tuple(range(math.prod(shape))))

    @property
    def world(self) -> int:
        """All ranks."""
        return len(self.ranks)

    def size(self, name: str) -> int:
        """Ranks along one dimension."""
        return self.shape[self.names.index(name)]

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where ``rank`` stands along each dimension."""
        place, found = self.ranks.index(rank), {}
        for name, size in zip(reversed(self.names), reversed(self.shape), strict=True):
            place, found[name] = divmod(place, size)
        return {name: found[name] for name in self.names}

    def groups(self, *along: str) -> list[list[int]]:
        """The ranks that differ in these dimensions alone, group by group, the innermost dimension running fastest."""
        stride = {name: math.prod(self.shape[i + 1 :]) for i, name in enumerate(self.names)}

        def offsets(names: list[str]) -> list[int]:
            ranges = (range(0, self.size(name) * stride[name], stride[name]) for name in names)
            return [sum(at) for at in itertools.product(*ranges)]

        inside = offsets([name for name in self.names if name in along])
        outside = offsets([name for name in self.names if name not in along])
        return [[self.ranks[o + i] for i in inside] for o in outside]

    def __str__(self) -> str:
        return " x ".join(f"{name} {size}" for name, size in zip(self.names, self.shape, strict=True))


@dataclass(frozen=True)
class Grids:
    """The two grids of one run; their pipeline groups are the same."""

    attention: Grid
    experts: Grid
    folded: bool = True

    def groups(self, *along: str) -> list[list[int]]:
        """The groups of dimensions of either grid."""
        grid = self.attention if set(along) <= set(ATTENTION) else self.experts
        return grid.groups(*along)

    def sizes(self) -> dict[str, int]:
        """Ranks along every dimension of both grids."""
        return {name: grid.size(name) for grid in (self.attention, self.experts) for name in grid.names}


def fold(
    world: int,
    *,
    pipeline: int = 1,
    sequence: int = 1,
    tensor: int = 1,
    expert: int = 1,
    expert_tensor: int = 1,
    tensor_sequence: bool = True,
) -> Grids:
    """The two grids, the experts' laid over the ranks of each pipeline stage whatever attention uses them for.

    Args:
        world: number of ranks; data ranks and expert_data ranks are what the other dimensions leave.
        tensor_sequence: tokens between attention and experts are divided among the tensor ranks.

    Raises:
        RecipeError: the dimensions of a grid do not make up the world, or tensor ranks hold the same tokens.
    """
    _check(world, pipeline, sequence, tensor, expert, expert_tensor, tensor_sequence)
    stage = world // pipeline
    return Grids(
        Grid.of(ATTENTION, (pipeline, stage // (sequence * tensor), sequence, tensor)),
        Grid.of(EXPERTS, (pipeline, stage // (expert * expert_tensor), expert, expert_tensor)),
    )


def unfolded(world: int, *, pipeline: int = 1, sequence: int = 1, tensor: int = 1, expert: int = 1) -> Grids:
    """The grids of older frameworks, to compare with: expert ranks are a part of the data ranks, and each expert's
    matrices are cut over the tensor ranks.

    Raises:
        RecipeError: as ``fold``, and where the expert ranks do not divide the data ranks.
    """
    _check(world, pipeline, sequence, tensor, 1, 1, True)
    data = world // (pipeline * sequence * tensor)
    if data % expert:
        raise RecipeError("parallel.experts", f"of {expert} ranks is no part of the {data} data ranks",
                          hint=f"take {one_of(divisors(data))}, or fold")  # fmt: skip
    # Experts are copied over the sequence ranks as well: those join the expert_data dimension.
    ranks = []
    for p, d, s, e, t in itertools.product(*map(range, (pipeline, data // expert, sequence, expert, tensor))):
        ranks.append((((p * (data // expert) + d) * expert + e) * sequence + s) * tensor + t)
    shape = (pipeline, data // expert * sequence, expert, tensor)
    return Grids(
        Grid.of(ATTENTION, (pipeline, data, sequence, tensor)), Grid(EXPERTS, shape, tuple(ranks)), folded=False
    )


def mappings(world: int, *, pipeline: int = 1, experts: int | None = None, width: int | None = None) -> Iterator[Grids]:
    """Every folded pair of grids of ``world`` ranks.

    Args:
        experts: their number, which the expert ranks must divide.
        width: channels of an expert, which the expert_tensor ranks must divide.
    """
    stage = world // pipeline
    for tensor, sequence in _pairs(stage):
        for expert, expert_tensor in _pairs(stage):
            if (experts or expert) % expert == 0 and (width or expert_tensor) % expert_tensor == 0:
                yield fold(world, pipeline=pipeline, sequence=sequence, tensor=tensor,
                           expert=expert, expert_tensor=expert_tensor)  # fmt: skip


def fold_report(grids: Grids, node: int) -> list[str]:
    """One line per dimension: its groups of ranks, and whether they leave a node.

    Args:
        node: ranks per node.
    """
    lines = [f"attention: {grids.attention}", f"experts: {grids.experts}"]
    for name in (*ATTENTION, *EXPERTS[1:]):
        groups = grids.groups(name)
        leaving = sum(leaves(group, node) for group in groups)
        where = f"{leaving} of {len(groups)} leave a node" if leaving else "all within a node"
        shown = " ".join("[" + ", ".join(map(str, group)) + "]" for group in groups[:8])
        more = " ..." if len(groups) > 8 else ""
        if len(groups[0]) > 1:
            lines.append(f"{name}: {len(groups)} of {len(groups[0])} ranks, {where} of {node}: {shown}{more}")
    return lines


def leaves(group: list[int], node: int) -> bool:
    """Whether the ranks are on more than one node of ``node`` ranks."""
    return len({rank // node for rank in group}) > 1


def check_experts(where: str, experts: int, expert: int, width: int, expert_tensor: int) -> None:
    """Refuse expert ranks that do not divide the experts, and expert_tensor ranks that do not divide their width.

    Raises:
        RecipeError: with the numbers that would do.
    """
    if experts % expert:
        raise RecipeError(f"{where}.degree", f"of {expert} does not divide the {experts} experts",
                          hint=f"take {one_of(divisors(experts))}")  # fmt: skip
    if width % expert_tensor:
        near = [d for d in divisors(width) if d <= 2 * expert_tensor]
        raise RecipeError(f"{where}.tensor", f"of {expert_tensor} does not divide the {width} channels of an expert",
                          hint=f"take {one_of(near)}")  # fmt: skip


def _check(
    world: int, pipeline: int, sequence: int, tensor: int, expert: int, expert_tensor: int, tensor_sequence: bool
) -> None:
    if world % pipeline:
        raise RecipeError("parallel.pipeline", f"of {pipeline} stages does not divide {world} ranks",
                          hint=f"take {one_of(divisors(world))}")  # fmt: skip
    stage = world // pipeline
    attention, experts = sequence * tensor, expert * expert_tensor
    left = f"the {stage} ranks of a stage ({world} ranks / pipeline {pipeline})"
    if stage % attention:
        near = _nearest(stage, tensor, sequence)
        raise RecipeError("parallel", f"attention's groups of {attention} (sequence {sequence} x tensor {tensor}) do "
                          f"not make up {left}, beside the experts' groups of {experts} (expert {expert} x "
                          f"expert_tensor {expert_tensor})", hint="the nearest are "
                          + "; ".join(f"sequence {s} x tensor {t}" for t, s in near))  # fmt: skip
    if stage % experts:
        near = _nearest(stage, expert, expert_tensor)
        raise RecipeError("parallel.experts", f"the experts' groups of {experts} (expert {expert} x expert_tensor "
                          f"{expert_tensor}) do not make up {left}, beside attention's data {stage // attention} x "
                          f"sequence {sequence} x tensor {tensor}",
                          hint="the nearest are "
                          + "; ".join(f"expert {e} x expert_tensor {t}" for e, t in near))  # fmt: skip
    if tensor > 1 and not tensor_sequence:
        raise RecipeError("parallel.tensor.sequence", f"is false, so that each of {tensor} tensor ranks would send the "
                          "same tokens to the experts", hint="set it to true")  # fmt: skip


def _nearest(stage: int, one: int, other: int) -> list[tuple[int, int]]:
    """The two pairs whose product divides ``stage`` that are nearest in the logarithm."""
    return sorted(_pairs(stage), key=lambda p: abs(math.log(p[0] / one)) + abs(math.log(p[1] / other)))[:2]


def _pairs(stage: int) -> list[tuple[int, int]]:
    return [(a, b) for a in divisors(stage) for b in divisors(stage // a)]
