"""Shared sequences with bf16, recomputed blocks, compiled blocks and matrices divided by tensor parallelism.

Needs nothing. Run: pytest tests/parallel/test_ulysses_compose.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from headway.core.surgery import replace_blocks
from headway.layers.attention import attention_reference
from headway.memory.recompute import RecomputedBlock
from headway.models.build import build_model
from headway.models.config import LlamaConfig
from headway.parallel.local import run_ranks
from headway.parallel.sequence import sequence_parallel, shard_batch
from headway.parallel.sequence.batch import own_positions
from headway.parallel.sequence.ring import ring_attention
from headway.parallel.sequence.ulysses import ulysses_attention
from headway.parallel.tensor import tensor_parallel

CONFIG = LlamaConfig(hidden=32, layers=2, heads=4, kv_heads=2, vocab=40, context=32)
TEXT = torch.randint(40, (2, 25), generator=torch.Generator().manual_seed(0))
BATCH = {"tokens": TEXT[:, :-1].contiguous(), "targets": TEXT[:, 1:].contiguous()}


def loss_of(model: Any, part: dict[str, torch.Tensor]) -> torch.Tensor:
    hidden = model.hidden(part["tokens"], positions=part.get("positions")).flatten(0, 1)
    loss: torch.Tensor = model.head_loss(hidden, model.head_weight, part["targets"].flatten())[0]
    return loss


@pytest.mark.parametrize("kind", ["ulysses", "ring"])
def test_bf16_stays_bf16_and_near_fp32(kind: str) -> None:
    def work(rank: int) -> list[float]:
        own = own_positions(64, rank, 2, kind)
        generator = torch.Generator().manual_seed(0)
        whole = [torch.randn(2, h, 64, 16, generator=generator).bfloat16() for h in (4, 2, 2)]
        wide = [x.float().requires_grad_() for x in whole]
        y = attention_reference(*wide)
        y.sum().backward()
        part = [x[:, :, own].clone().requires_grad_() for x in whole]
        z = (ulysses_attention if kind == "ulysses" else ring_attention)(*part)
        z.float().sum().backward()
        assert z.dtype == torch.bfloat16
        pairs = [(z, y), *((a.grad, b.grad) for a, b in zip(part, wide, strict=True))]
        return [float((a - b[:, :, own]).norm() / b[:, :, own].norm()) for a, b in pairs]

    for errors in run_ranks(2, work):
        assert max(errors) < 0.02, errors


@pytest.mark.parametrize("how", ["recompute", "compile"])
def test_blocks_that_are_recomputed_or_compiled(how: str) -> None:
    model = build_model(CONFIG, seed=0).double()
    loss_of(model, BATCH).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}

    def work(rank: int) -> float:
        model = build_model(CONFIG, seed=0).double()
        sequence_parallel(model, init_device_mesh("cpu", (2,)), kind="usp", ring=2)
        if how == "recompute":
            replace_blocks(model.blocks, RecomputedBlock, "test")
        else:
            for block in model.blocks:
                block.compile(backend="eager")
        loss_of(model, shard_batch(BATCH, rank, 2, kind="usp", ring=2)).backward()
        worst = 0.0
        for name, parameter in model.named_parameters():
            dist.all_reduce(parameter.grad)
            worst = max(worst, float((parameter.grad - expected[name]).norm() / expected[name].norm()))
        return worst

    assert max(run_ranks(2, work)) < 1e-9


@pytest.mark.parametrize("kind", ["ulysses", "ring"])
@pytest.mark.parametrize("sequence", [False, True])
def test_tensor_parallelism_cuts_heads_first(kind: str, sequence: bool) -> None:
    model = build_model(CONFIG, seed=0).double()
    expected = loss_of(model, BATCH)
    expected.backward()
    wanted = model.blocks[0].attention.q.weight.grad

    def work(rank: int) -> tuple[float, float]:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("sequence", "tensor"))
        model = build_model(CONFIG, seed=0).double()
        tensor_parallel(model, mesh["tensor"], sequence=sequence)
        sequence_parallel(model, mesh["sequence"], kind=kind)
        loss = loss_of(model, shard_batch(BATCH, rank // 2, 2, kind=kind))
        loss.backward()
        total, grad = loss.detach().clone(), model.blocks[0].attention.q.weight.grad
        dist.all_reduce(total, group=mesh["sequence"].get_group())
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        dist.all_reduce(grad, group=mesh["sequence"].get_group())
        return float(total - expected), float((grad - wanted).norm() / wanted.norm())

    for loss, grad in run_ranks(4, work):
        assert abs(loss) < 1e-9 and grad < 1e-9


def test_heads_that_tensor_parallelism_has_cut_are_said() -> None:
    def work(rank: int) -> list[str]:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("sequence", "tensor"))
        model = build_model(LlamaConfig(hidden=24, layers=1, heads=6, kv_heads=6, vocab=40, context=32), seed=0)
        tensor_parallel(model, mesh["tensor"])
        return sequence_parallel(model, mesh["sequence"])

    assert "3 heads do not divide among 2 ranks: they attend with 2 or 1" in run_ranks(4, work)[0][1]


@pytest.mark.parametrize("heads", [(3, 1), (2, 2)])
def test_attention_recomputed_by_itself_where_a_rank_has_no_heads(heads: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(2, h, 24, 8, generator=generator, dtype=torch.float64) for h in (heads[0], heads[1], heads[1])]
    leaves = [x.clone().requires_grad_() for x in whole]
    expected = torch.autograd.grad(attention_reference(*leaves).pow(2).sum(), leaves)

    def work(rank: int) -> float:
        own = own_positions(24, rank, 4)
        part = [x[:, :, own].clone().requires_grad_() for x in whole]
        y = checkpoint(ulysses_attention, *part, use_reentrant=False)
        found = torch.autograd.grad(y.pow(2).sum(), part)
        return max(float((a - b[:, :, own]).abs().max()) for a, b in zip(found, expected, strict=True))

    assert max(run_ranks(4, work, timeout=20)) < 1e-12
