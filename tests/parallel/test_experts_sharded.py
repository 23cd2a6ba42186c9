"""Divided experts under FSDP2, and their checkpoints with other numbers of ranks.

Needs nothing. Run: pytest tests/parallel/test_experts_sharded.py
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from headway.core.surgery import replace_blocks
from headway.memory.recompute import RecomputedBlock
from headway.models.build import build_model
from headway.models.config import MoEConfig
from headway.parallel.experts.grids import fold
from headway.parallel.experts.parallel import expert_mesh, expert_parallel
from headway.parallel.local import run_ranks
from headway.parallel.tensor import tensor_parallel

CONFIG = MoEConfig(hidden=16, layers=2, heads=2, intermediate=32, vocab=50, context=16, experts=4, top_k=2)
TOTAL = 4 * 2 * 9
"""Targets of a step over all ranks."""


def model_of(std: float = 0.3) -> Any:
    model = build_model(CONFIG, seed=0).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(std / 0.02)
    return model


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    """This rank's share of the step's mean: a sum over its targets by the global number of them."""
    hidden = model.hidden(tokens[:, :-1]).flatten(0, 1)
    return torch.nn.functional.cross_entropy(hidden @ whole(model.head_weight).T, tokens[:, 1:].flatten(),
                                             reduction="sum") / TOTAL  # fmt: skip


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


class Step(torch.nn.Module):
    """The model and its loss in one forward pass, so that FSDP2's hooks see both."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return loss_of(self.model, tokens)


def test_experts_over_expert_data_and_the_rest_over_all_ranks_sum_to_one_process() -> None:
    """The recipe: ``fully_shard(experts, mesh=expert_data)``, then the rest over shard x sequence; divide by 1."""
    tokens = torch.randint(50, (4, 2, 10), generator=torch.Generator().manual_seed(1))
    alone = model_of()
    loss_of(alone, tokens.flatten(0, 1)).backward()

    def work(rank: int) -> None:
        for options in ({"expert": 2}, {"expert": 2, "expert_tensor": 2}, {"expert_tensor": 2}, {"expert": 4}):
            mesh, everyone = expert_mesh(fold(4, **options)), init_device_mesh("cpu", (4,))
            model = model_of()
            expert_parallel(model, mesh["expert"], mesh["expert_tensor"])
            for block in model.blocks:
                fully_shard(block.mlp.experts, mesh=mesh["expert_data"])
                fully_shard(block, mesh=everyone)
            step: Any = fully_shard(Step(model), mesh=everyone)
            for module in step.modules():
                if isinstance(module, FSDPModule):
                    module.set_gradient_divide_factor(1.0)
                    module.set_force_sum_reduction_for_comms(True)
            step(tokens[rank]).backward()
            for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
                assert ours.grad is not None and theirs.grad is not None and isinstance(ours, DTensor)
                if "experts" in name:
                    assert ours.to_local().numel() * 4 == theirs.numel(), "a quarter of the experts on each rank"
                error = (ours.grad.full_tensor() - theirs.grad).norm() / theirs.grad.norm()
                assert error < 1e-10, f"{options} {name}: {error:.1e}"

    run_ranks(4, work)


def test_a_step_of_every_division_leaves_the_weights_of_one_process() -> None:
    """Without FSDP2: gradients summed by hand, dense ones over all ranks, experts' over expert_data; and then SGD."""
    tokens = torch.randint(50, (4, 2, 10), generator=torch.Generator().manual_seed(1))
    alone = model_of()
    loss_of(alone, tokens.flatten(0, 1)).backward()
    torch.optim.SGD(alone.parameters(), 0.5).step()

    def work(rank: int) -> None:
        mesh = expert_mesh(fold(4, expert=2))
        model = model_of()
        expert_parallel(model, mesh["expert"])
        loss_of(model, tokens[rank]).backward()
        for name, parameter in model.named_parameters():
            grad: Any = parameter.grad
            dist.all_reduce(grad.to_local() if ".experts." in name else grad,
                            group=mesh.get_group("expert_data") if ".experts." in name else None)  # fmt: skip
        torch.optim.SGD(model.parameters(), 0.5).step()
        for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(whole(ours), theirs, rtol=1e-10, atol=1e-12, msg=name)

    run_ranks(4, work)


@pytest.mark.parametrize("recomputed", [False, True])
def test_tensor_ranks_with_their_share_of_the_tokens_hold_experts_of_their_own(recomputed: bool) -> None:
    """Data 2 x tensor 2: after the sums over data and expert_data ranks, every gradient is one process's."""
    tokens = torch.randint(50, (2, 4, 9), generator=torch.Generator().manual_seed(1))
    alone = model_of()
    head_loss(alone, tokens.flatten(0, 1)).backward()

    def work(rank: int) -> None:
        for options in ({"expert": 4}, {"expert": 2}, {"expert": 2, "expert_tensor": 2}):
            both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
            mesh, model = expert_mesh(fold(4, tensor=2, **options)), model_of()
            tensor_parallel(model, both["tensor"], apart=("blocks.*.mlp.experts",))
            expert_parallel(model, mesh["expert"], mesh["expert_tensor"])
            if recomputed:
                replace_blocks(model.blocks, RecomputedBlock, "test")
            head_loss(model, tokens[rank // 2]).backward()
            for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
                grad: Any = ours.grad
                group = mesh.get_group("expert_data") if ".experts." in name else both.get_group("data")
                dist.all_reduce(grad.to_local(), group=group)
                error = (grad.full_tensor() - theirs.grad).norm() / theirs.grad.norm()
                assert error < 1e-10, f"{options} {name}: {error:.1e}"

    run_ranks(4, work)


def test_compiled_blocks_leave_dispatch_and_experts_alone() -> None:
    tokens = torch.randint(50, (2, 2, 10), generator=torch.Generator().manual_seed(1))

    def work(rank: int) -> None:
        mesh, models = expert_mesh(fold(2, expert=2)), (model_of(), model_of())
        for model in models:
            expert_parallel(model, mesh["expert"])
        for block in models[0].blocks:
            block.compile(backend="eager")
        for batch in (tokens, tokens.flip(0)):  # other numbers of rows
            for model in models:
                loss_of(model, batch[rank]).backward()
        for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-14)

    run_ranks(2, work)


def head_loss(model: Any, tokens: Tensor) -> Tensor:
    """As ``loss_of``, by the model's own head, which tensor parallelism replaces."""
    hidden = model.hidden(tokens[:, :-1]).flatten(0, 1)
    return model.head_loss(hidden, model.head_weight, tokens[:, 1:].flatten())[0] / TOTAL


def test_a_checkpoint_of_four_expert_ranks_is_read_by_two_and_by_one(tmp_path: Path) -> None:
    values = {name: p.detach().clone() for name, p in model_of().named_parameters()}

    def divided(world: int, **options: int) -> Any:
        model = model_of()
        mesh = expert_mesh(fold(world, **options))
        expert_parallel(model, mesh["expert"], mesh["expert_tensor"])
        return model

    def save(rank: int) -> None:
        model = divided(4, expert=4)
        assert model.blocks[0].mlp.experts.gate.shape == (4, 16, 16)
        dcp.save({"model": model.state_dict()}, checkpoint_id=str(tmp_path / "saved"))

    def load(rank: int, options: dict[str, int]) -> None:
        model = divided(2, **options) if options else copy.deepcopy(model_of())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        dcp.load({"model": model.state_dict()}, checkpoint_id=str(tmp_path / "saved"))
        for name, parameter in model.named_parameters():
            assert torch.equal(whole(parameter), values[name]), name

    run_ranks(4, save)
    for options in ({"expert": 2}, {"expert_tensor": 2}):
        run_ranks(2, load, options)
    run_ranks(1, load, {})
