"""How ranks are laid out: sizes and groups by dimension as plain numbers, and torch's device mesh made of them.

Outer to inner: ``pipeline, replicate, shard, sequence, tensor``. Ranks that differ in an inner dimension alone are
neighbours, and so most likely on one machine: what talks most is innermost.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headway.core.errors import RecipeError
from headway.core.layout import ParallelOptions

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DIMENSIONS = ("pipeline", "replicate", "shard", "sequence", "tensor")


@dataclass(frozen=True)
class Layout:
    """Ranks along each dimension."""

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    sequence: int = 1
    tensor: int = 1
    expert: int = 1
    """Ranks that share the experts, out of those of one pipeline stage,"""
    expert_tensor: int = 1
    """and each expert's matrices."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Ranks along each dimension, outer to inner."""
        return tuple(getattr(self, name) for name in DIMENSIONS)

    @property
    def world(self) -> int:
        """All ranks."""
        return math.prod(self.shape)

    @property
    def data(self) -> int:
        """Shares into which the samples of a step are divided."""
        return self.replicate * self.shard

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where ``rank`` stands along each dimension."""
        found = {}
        for name, size in zip(reversed(DIMENSIONS), reversed(self.shape), strict=True):
            rank, found[name] = divmod(rank, size)
        return {name: found[name] for name in DIMENSIONS}

    def rank(self, **at: int) -> int:
        """The rank at these coordinates; 0 along the dimensions that are left out."""
        rank = 0
        for name, size in zip(DIMENSIONS, self.shape, strict=True):
            rank = rank * size + at.get(name, 0)
        return rank

    def groups(self, *names: str) -> list[list[int]]:
        """The ranks that differ in these dimensions alone, group by group; each in the order of the mesh."""
        kept = [name for name in DIMENSIONS if name not in names]
        along = [name for name in DIMENSIONS if name in names]
        return [
            [
                self.rank(**dict(zip(kept, outer)), **dict(zip(along, inner)))
                for inner in itertools.product(*(range(getattr(self, name)) for name in along))
            ]
            for outer in itertools.product(*(range(getattr(self, name)) for name in kept))
        ]

    def __str__(self) -> str:
        names = [f"{name} {size}" for name, size in zip(DIMENSIONS, self.shape, strict=True) if size > 1]
        names += [f"{name.replace('_', ' ')} {getattr(self, name)}" for name in ("expert", "expert_tensor")
                  if getattr(self, name) > 1]  # fmt: skip
        return " x ".join(names) or "one rank"


def settle(options: ParallelOptions, world: int, batch: int | None = None) -> Layout:
    """The layout of ``world`` ranks that the options ask for.

    Where they ask for nothing, the ranks share the samples as far as ``batch`` can be divided among them, and each
    sequence beyond that.

    Args:
        batch: sequences in a step.

    Raises:
        RecipeError: the dimensions do not make up ``world``, with the nearest that do.
    """
    fixed = {
        "pipeline": options.pipeline.degree,
        "replicate": options.replicate,
        "sequence": options.sequence.degree,
        "tensor": options.tensor.degree,
    }
    product = math.prod(fixed.values())
    asked = " x ".join(f"{name} {size}" for name, size in fixed.items() if size > 1)
    if options.shard == "auto":
        if world % product:
            below = world - world % product
            near = " or ".join(str(n) for n in (below, below + product) if n)
            raise RecipeError("parallel", f"{asked} makes groups of {product} ranks, which do not make up {world}",
                              hint=f"start {near} ranks, or take {one_of(divisors(world))} for the "
                              "product")  # fmt: skip
        shard = world // product
        if product == 1 and batch is not None and batch % shard:
            shard = math.gcd(batch, world)
            fixed["sequence"] = world // shard
    else:
        shard = options.shard
        if product * shard != world:
            full = " x ".join(part for part in (asked, f"shard {shard}" if shard > 1 else "") if part)
            raise RecipeError("parallel", f"{full or 'one rank'} makes {product * shard} ranks, and there are {world}",
                              hint=f"start {product * shard} ranks, or set parallel.shard to auto")  # fmt: skip
    return Layout(shard=shard, expert=options.experts.degree, expert_tensor=options.experts.tensor, **fixed)


def divisors(number: int) -> list[int]:
    """The numbers that divide it, rising."""
    return [d for d in range(1, number + 1) if number % d == 0]


def one_of(numbers: Iterable[int], near: int | None = None, most: int = 8) -> str:
    """``1, 2 or 4``: at most ``most`` of the numbers, those nearest to ``near``."""
    listed = sorted(numbers)
    if near is not None:
        listed = sorted(sorted(listed, key=lambda n: abs(n - near))[:most])
    listed = listed[:most] if near is None else listed
    return " or ".join([", ".join(map(str, listed[:-1])), str(listed[-1])] if len(listed) > 1 else map(str, listed))


def own_group(groups: Iterable[list[int]], rank: int, backend: str | None = None) -> Any:
    """The process group that ``rank`` is in; every rank takes part in making every group, in the same order."""
    import torch.distributed as dist

    own = None
    for group in groups:
        made = dist.new_group(group, backend=backend)
        own = made if rank in group else own
    return own


class Mesh:
    """The process groups of a layout; torch.distributed must be initialized with ``layout.world`` ranks.

    Sharding needs shard and sequence ranks as one dimension, ``weights``, beside tensor ranks in one mesh: that mesh is
    made apart from the one that knows the two as dimensions of their own.
    """

    def __init__(self, layout: Layout, rank: int, device_type: str = "cpu") -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.layout, self.rank = layout, rank
        self.at = layout.coordinates(rank)
        pipeline, replicate, shard, sequence, tensor = layout.shape
        self._weights: Any = init_device_mesh(
            device_type,
            (pipeline, replicate, shard * sequence, tensor),
            mesh_dim_names=("pipeline", "replicate", "weights", "tensor"),
        )
        self._all: Any = None
        if sequence > 1:
            self._all = init_device_mesh(device_type, layout.shape, mesh_dim_names=DIMENSIONS)

    def __getitem__(self, name: str) -> DeviceMesh:
        """The one-dimensional mesh of the ranks that differ in dimension ``name`` alone; ``weights`` is shard and
        sequence in one."""
        mesh: DeviceMesh = (self._all if name in ("shard", "sequence") else self._weights)[name]
        return mesh

    def weights(self) -> DeviceMesh:
        """The mesh over which weights are divided and gradients summed; two-dimensional where there are replicas."""
        mesh: DeviceMesh = self._weights["replicate", "weights"] if self.layout.replicate > 1 else self["weights"]
        return mesh
