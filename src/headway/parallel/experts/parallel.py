"""A model's experts divided among ranks: each keeps its own, and tokens go where their experts are."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from headway.core.errors import MethodError, nearest
from headway.core.surgery import Absent
from headway.layers.experts import Experts, MoE
from headway.parallel.experts.dispatcher import DISPATCHERS, Dispatcher
from headway.parallel.experts.grids import EXPERTS, Grids, check_experts
from headway.parallel.order import rising_group

# The dimension of an expert's width F in each stacked matrix: gate and up [E, F, D], down [E, D, F].
WIDTH_DIMENSION = {"gate": 1, "up": 1, "down": 2}


def expert_mesh(grids: Grids, device_type: str = "cpu") -> DeviceMesh:
    """The experts' grid as a device mesh with the dimensions ``pipeline, expert_data, expert, expert_tensor``.

    FSDP2 shards experts over ``mesh["expert_data"]`` when ``expert_parallel`` was given dimensions of the same mesh.
    """
    grid = grids.experts
    return DeviceMesh(device_type, torch.tensor(grid.ranks).view(grid.shape), mesh_dim_names=EXPERTS)


def expert_parallel(
    model: nn.Module,
    expert: DeviceMesh | dist.ProcessGroup,
    expert_tensor: DeviceMesh | None = None,
    *,
    dispatcher: str = "all-to-all",
    sequence: dist.ProcessGroup | None = None,
    node: int | None = None,
) -> list[str]:
    """Keep this rank's experts of every MoE layer, in place, and have tokens sent to theirs.

    Weights become DTensors of the whole's name and shape, so that checkpoints can be read with other numbers of ranks.
    Gradients of experts are sums over all tokens of the ``expert`` and ``expert_tensor`` ranks: what is left to add is
    over expert_data ranks. Nothing is averaged, so that there is nothing to rescale. Every rank must bring tokens of
    its own: with tensor parallelism, the sequence must be divided among the tensor ranks.

    Args:
        expert: the ranks that hold different experts: a 1-D mesh, a 2-D mesh of ``expert`` and ``expert_tensor`` ranks,
            or a group.
        expert_tensor: the ranks that hold parts of the same experts: a 1-D mesh with the parent of ``expert``.
        dispatcher: ``all-to-all`` or ``all-gather``.
        sequence: the ranks that share sequences, where a layer's capacity is to be decided over whole sequences; None:
            over each rank's tokens.
        node: ranks per node, for the count of bytes that leave it.

    Returns:
        Sentences for ``changes()``.

    Raises:
        RecipeError: the ranks do not divide the experts or their width.
        MethodError: the model has no MoE layer, its layers are divided already, or there is no such dispatcher.
        ModelError: the ranks' order in a mesh is not that of their group.
    """
    mesh = _mesh(expert, expert_tensor)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
    if not layers and not any(isinstance(module, Absent) for module in model.modules()):
        raise MethodError("parallel.experts", "finds no MoE layer in the model", hint="take model.family=moe")
    if dispatcher not in DISPATCHERS:
        raise MethodError("parallel.experts.dispatcher", got=dispatcher, hint=nearest(dispatcher, DISPATCHERS))
    ep, et = mesh.size(0), mesh.size(1) if mesh.ndim == 2 else 1
    for name, moe in layers.items():
        _check(name, moe, ep, et, sequence)
    groups = [rising_group(mesh, "parallel.experts", dimension) for dimension in range(mesh.ndim)]
    for moe in layers.values():
        count = moe.experts.count
        _divide(moe.experts, mesh)
        moe.dispatch = DISPATCHERS[dispatcher](count, *groups, capacity=moe.capacity, sequence=sequence, node=node)
    said = [f"{len(layers)} MoE layers over {ep} expert ranks{f' x {et} expert_tensor ranks' * (et > 1)}, {dispatcher}"]
    return said if layers else []


def dispatchers(model: nn.Module) -> dict[str, Dispatcher]:
    """The dispatcher of every divided MoE layer by the layer's name: its traffic, dropped share and imbalance."""
    return {
        name: module.dispatch
        for name, module in model.named_modules()
        if isinstance(module, MoE) and isinstance(module.dispatch, Dispatcher)
    }


def load_report(model: nn.Module) -> list[str]:
    """One line per divided MoE layer: the dropped share and the busiest expert of the last call, and what to do."""
    lines = []
    for name, dispatcher in dispatchers(model).items():
        load = dispatcher.load
        line = (
            f"{name}: {load.dropped:.2%} dropped, {sum(load.received)} rows, busiest expert {load.imbalance:.2f} x mean"
        )
        if load.imbalance > 2 and dispatcher.capacity is None:
            line += "; memory follows the busiest: model.capacity or smaller micro-batches bound it"
        lines.append(line)
    return lines


def _mesh(expert: Any, expert_tensor: DeviceMesh | None) -> DeviceMesh:
    if not isinstance(expert, DeviceMesh):
        device = "cuda" if dist.get_backend(expert) == "nccl" else "cpu"
        expert = DeviceMesh.from_group(expert, device)
    if expert_tensor is None or expert_tensor.size() == 1:
        return expert
    return DeviceMesh._concatenate([expert, expert_tensor])


def _check(name: str, moe: MoE, ep: int, et: int, sequence: dist.ProcessGroup | None) -> None:
    gate = moe.experts.gate
    if isinstance(gate, DTensor):
        raise MethodError("parallel.experts", f"finds the experts of {name} divided already")
    check_experts("parallel.experts", gate.shape[0], ep, gate.shape[1], et)
    if moe.capacity is not None and moe.capacity.pad and sequence is not None:
        raise MethodError("model.pad", "cannot go with a capacity of whole sequences: any one rank might need all rows",
                          hint="decide over each rank's tokens")  # fmt: skip


def _divide(experts: Experts, mesh: DeviceMesh) -> None:
    """Replace the stacked matrices by this rank's part of them, in place."""
    for name, dimension in WIDTH_DIMENSION.items():
        whole: nn.Parameter = getattr(experts, name)
        placements = [Shard(0), Shard(dimension)][: mesh.ndim]
        part: Tensor = whole.detach()
        for axis, placement in enumerate(placements):
            part = part.chunk(mesh.size(axis), placement.dim)[mesh.get_local_rank(axis)]
        part = part.clone(memory_format=torch.contiguous_format)  # a copy, so that the whole can be freed
        divided = DTensor.from_local(part, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())
        setattr(experts, name, nn.Parameter(divided, requires_grad=whole.requires_grad))
