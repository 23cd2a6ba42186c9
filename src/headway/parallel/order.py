"""The order of a mesh and of its process group: torch sorts the ranks of a group, whatever order a mesh gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist

from headway.core.errors import ModelError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def rising_group(mesh: DeviceMesh, where: str, dimension: int = 0) -> dist.ProcessGroup:
    """This rank's group along a dimension of a mesh, whose ranks have the places there that the mesh gives them.

    Raises:
        ModelError: they have others, so that what is meant for one rank would go to another.
    """
    group, at = mesh.get_group(dimension), mesh.get_coordinate()
    assert at is not None
    ranks = mesh.mesh[tuple(slice(None) if d == dimension else place for d, place in enumerate(at))].tolist()
    members = dist.get_process_group_ranks(group)
    if ranks != members:
        raise ModelError(where, f"has its ranks in the order {ranks}, and their group is {members}",
                         hint="make the mesh of rising ranks: a group has them in that order")  # fmt: skip
    return group
