"""Weights, gradients and optimizer state divided among ranks: FSDP2, and HSDP where groups hold whole copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from headway.core.surgery import Absent
from headway.models.moe import moe_layers
from headway.models.structure import structure

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp64": None}


def shard_weights(
    model: nn.Module,
    parts: Sequence[nn.Module],
    mesh: DeviceMesh,
    precision: str = "fp32",
    experts: DeviceMesh | None = None,
) -> list[str]:
    """Divide the weights of a model of Headway or transformers over ``mesh``, block by block, in place.

    Gradients are summed over the mesh, not averaged: each rank's loss is its part of the whole step's.

    Args:
        parts: what runs as a whole: the model itself, or its pipeline stages on this rank.
        mesh: one dimension, or (replicas, shards).
        experts: the ranks that hold the same experts, where others hold others.
        precision: of the products; weights and the sums of gradients stay fp32.

    Returns:
        What was done, as sentences.

    Source: Zhao et al. (arXiv 2304.11277); torch's ``fully_shard``.
    """
    dtype = DTYPES[precision]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
    # A pipeline's stages run once for each micro-batch: to gather their weights each time costs more than it saves.
    again = None if parts[0] is model else False
    blocks = [block for block in structure(model).blocks if not isinstance(block, Absent)]
    if experts is not None:
        for layer in moe_layers(model):
            fully_shard(layer.experts, mesh=experts, mp_policy=policy, reshard_after_forward=again)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=again)
    for part in parts:
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=again)
        if hasattr(part, "hidden"):  # the loss goes through it, past `forward` and the hooks on it
            register_fsdp_forward_method(part, "hidden")
        for module in fsdp_modules(part):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale what it sums
    shards, replicas = mesh.size(mesh.ndim - 1), mesh.size() // mesh.size(mesh.ndim - 1)
    copies = f", {replicas} copies" if replicas > 1 else ""
    return [f"weights, gradients and optimizer state of {len(blocks)} blocks in {shards} parts{copies}"]


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules that FSDP2 gathers as a whole."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Divide again what a forward pass without a backward pass has left gathered."""
    for module in fsdp_modules(model):
        module.reshard()
