"""Sharded training on several ranks: parameters kept whole until backward, or gathered again (ZeRO-2, ZeRO-3)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from headway.core.meters import live_bytes
from headway.models.build import build_model
from headway.models.config import LlamaConfig

ARMS = {"zero2": False, "zero3": True}
"""Name -> whether a block's parameters are freed after its forward pass."""


@dataclass
class _Arm:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    seconds: list[float]


def sharded_steps(rank: int, model: dict[str, Any], batch: int, sequence: int, rounds: int) -> dict[str, Any]:
    """Train both arms in turns on every rank (run it with ``collectives.on_ranks``).

    Gradients and optimizer state are sharded in both. The first of each arm's steps is not counted.

    Args:
        model: options of a Llama.
        batch: sequences per rank.
        rounds: counted steps per arm.

    Returns:
        Per arm ``seconds`` of each step, ``parameter_bytes`` alive after a forward pass (shards, and what was gathered
        and kept) and ``losses``.
    """
    torch.manual_seed(0)
    arms = {name: _build(model, reshard) for name, reshard in ARMS.items()}
    vocab = model["vocab"]
    tokens = torch.randint(0, vocab, (batch, sequence + 1), generator=torch.Generator().manual_seed(rank))
    losses: dict[str, list[float]] = {name: [] for name in arms}
    for index in range(rounds + 1):
        order = list(arms) if index % 2 == 0 else list(arms)[::-1]
        for name in order:
            dist.barrier()
            start = time.perf_counter()
            losses[name].append(_step(arms[name], tokens))
            dist.barrier()
            if index:
                arms[name].seconds.append(time.perf_counter() - start)
    return {
        name: {"seconds": arm.seconds, "parameter_bytes": _kept(arm.model, tokens), "losses": losses[name]}
        for name, arm in arms.items()
    }


def _build(options: dict[str, Any], reshard: bool) -> _Arm:
    model = build_model(LlamaConfig(**options), seed=0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.structure().blocks:  # type: ignore[operator]
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    return _Arm(model, torch.optim.AdamW(model.parameters(), lr=1e-3), [])


def _step(arm: _Arm, tokens: Tensor) -> float:
    logits = arm.model(tokens[:, :-1])  # [B, T, V]
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    arm.optimizer.step()
    arm.optimizer.zero_grad()
    return float(loss.detach())


def _kept(model: nn.Module, tokens: Tensor) -> int:
    """Bytes of parameters alive after a forward pass."""
    shards = sum(_local(p).nbytes for p in model.parameters())
    before = live_bytes(torch.device("cpu"))
    with torch.no_grad():
        model(tokens[:, :-1])
    return shards + live_bytes(torch.device("cpu")) - before


def _local(parameter: Any) -> Tensor:
    to_local: Callable[[], Tensor] | None = getattr(parameter, "to_local", None)
    return to_local() if to_local else parameter
