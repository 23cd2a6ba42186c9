"""Pipelines in one's own loop: exact gradients, parts over tensor ranks, lost neighbours, the choice of a micro-batch.

Needs gloo; `pytest tests/parallel/test_pipeline_boundary.py`.
"""

import os
import time
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from headway.core.errors import HeadwayError
from headway.models.build import build_model
from headway.models.config import LlamaConfig
from headway.parallel.local import RankFailed, run_ranks
from headway.parallel.pipeline import PipelineRunner, cut_blocks, keep_own_parts, make_stages
from headway.parallel.pipeline.micro_batch import choose_micro_batch
from headway.parallel.pipeline.tables import schedule_table
from headway.workloads.language import NextTokenLoss

T, D, V, LAYERS = 8, 16, 32, 5
SCHEDULES = [("gpipe", 1, 3), ("1f1b", 1, 2), ("1f1b", 1, 5), ("interleaved-1f1b", 2, 2), ("interleaved-1f1b", 2, 4),
             ("interleaved-zero-bubble", 2, 4), ("zbv-zero-bubble", 2, 5)]  # fmt: skip


def model(tied: bool) -> Any:
    config = LlamaConfig(hidden=D, layers=LAYERS, heads=4, kv_heads=2, vocab=V, context=T, tied=tied)
    return build_model(config, seed=0).double()


def data(rows: int) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(1)
    tokens = torch.randint(V, (rows, T + 1), generator=made)
    segments = (torch.arange(T) >= torch.randint(1, T, (rows, 1), generator=made)).long()
    return {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous(), "segments": segments}


def alone(tied: bool, rows: int) -> tuple[float, dict[str, torch.Tensor]]:
    whole, batch = model(tied), data(rows)
    total, count = NextTokenLoss()(whole, batch)
    (total / int(count)).backward()
    return float(total.detach()), {name: p.grad for name, p in whole.named_parameters()}


def runner_of(rank: int, mesh: Any, name: str, chunks: int, micro: int, tied: bool, tensor: Any = None) -> Any:
    whole = model(tied)
    cuts = cut_blocks(LAYERS, 2, chunks, there_and_back=name.startswith("zbv"))
    keep_own_parts(whole, cuts, rank)
    stages = make_stages(whole, cuts, rank)
    stages[-1].loss = NextTokenLoss()
    return whole, PipelineRunner(stages, cuts, mesh, schedule=name, micro_batches=micro, width=D, tokens=T,
                                 dtype=torch.float64, device=torch.device("cpu"), tensor=tensor)  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_every_schedule_gives_one_processs_gradients(tied: bool) -> None:
    def work(rank: int) -> list[Any]:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pipeline",))
        found = []
        for name, chunks, micro in SCHEDULES:
            whole, runner = runner_of(rank, mesh, name, chunks, micro, tied)
            batch = data(2 * micro)
            loss = float(runner.forward_backward(batch, batch["targets"].numel()))
            grads = {key: p.grad.clone() for key, p in whole.named_parameters()}
            value = runner.evaluate(batch)
            assert all(torch.equal(grads[key], p.grad) for key, p in whole.named_parameters()), (
                "evaluation touches them"
            )
            found.append((loss, value, grads, runner.events()))
        return found

    by_rank = run_ranks(2, work)
    for case, (name, chunks, micro) in enumerate(SCHEDULES):
        loss, expected = alone(tied, 2 * micro)
        together: dict[str, torch.Tensor] = {}
        for rank in range(2):
            found_loss, value, grads, events = by_rank[rank][case]
            assert found_loss == pytest.approx(loss, rel=1e-12) and value == pytest.approx(loss, rel=1e-12), name
            for key, grad in grads.items():
                together[key] = together.get(key, 0) + grad  # a shared matrix is on both ranks
            # gpipe and 1f1b are run by torch's loops, the others by the table: both must be what the tables say.
            done = sorted((e.stage, e.micro) for e in events if e.kind == "forward")
            table = schedule_table(name, 2, chunks, micro)[rank]
            assert done == sorted((a.stage, a.micro) for a in table if a.kind == "forward"), name
        assert together.keys() == expected.keys()
        assert max(float((together[key] - expected[key]).abs().max()) for key in expected) < 1e-12, name


@pytest.mark.parametrize(("name", "chunks"), [("1f1b", 1), ("interleaved-1f1b", 2), ("zbv-zero-bubble", 2)])
def test_parts_over_tensor_ranks_are_bit_equal_and_a_fraction(name: str, chunks: int) -> None:
    micro, b = 4, 2

    def work(rank: int) -> list[Any]:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "tensor"))
        found = []
        for tensor in (None, mesh["tensor"]):
            whole, runner = runner_of(rank // 2, mesh["pipeline"], name, chunks, micro, True, tensor)
            batch = data(b * micro)
            for _ in range(2):  # buffers are used again
                whole.zero_grad()
                loss = float(runner.forward_backward(batch, batch["targets"].numel()))
            found.append((loss, {key: p.grad for key, p in whole.named_parameters()}, runner.sent_bytes))
        return found

    hops = {"1f1b": 1, "interleaved-1f1b": 3, "zbv-zero-bubble": 2}[name]
    results = run_ranks(4, work)
    for plain, parts in results:
        assert plain[0] == parts[0]
        assert all(torch.equal(plain[1][key], parts[1][key]) for key in plain[1])
        assert parts[2] * 2 == plain[2] > 0
    sent = sum(results[rank][1][2] for rank in (0, 2))  # one tensor rank of either pipeline rank
    assert sent == 2 * 2 * hops * micro * b * T * D * 8 // 2, "steps x directions x hops x m x b s h / t"


@pytest.mark.parametrize("late", [False, True])
def test_a_neighbour_that_is_gone_or_late_is_named(late: bool) -> None:
    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pipeline",))
        _, runner = runner_of(rank, mesh, "1f1b", 1, 2, False)
        batch = data(2)
        runner.forward_backward(batch, 1)
        if rank == 1 and late:
            time.sleep(30)
        if rank == 1:
            os._exit(0)
        runner.forward_backward(batch, 1)

    lost = r"(got no backward|could not send the forward) pass of micro-batch \d (for|from) stage 0 (from|to) pipeline"
    with pytest.raises(RankFailed, match=lost + (r" rank 1: .*[Tt]imed out" if late else " rank 1")):
        run_ranks(2, work, timeout=2 if late else 20)


def test_a_rank_that_fails_at_its_own_work_says_what_failed() -> None:
    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pipeline",))
        _, runner = runner_of(rank, mesh, "interleaved-1f1b", 2, 2, False)
        if rank == 0:
            runner.stages[1].model.blocks[3].attention.attend = lambda *_, **__: 1 / 0
        runner.forward_backward(data(2), 1)

    with pytest.raises(RankFailed, match="division by zero"):
        run_ranks(2, work, timeout=20)


def test_the_chosen_micro_batch_is_the_best_of_all() -> None:
    times = {b: 0.5 + 0.2 * b for b in (1, 2, 3, 4, 8, 16)}  # 3 divides no share of 64
    best, steps = choose_micro_batch(times, 128, 2, 4)
    brute = {b: (64 // b + 3) * times[b] for b in times if b != 3}
    assert steps == pytest.approx(brute) and best == min(brute, key=brute.__getitem__) not in (1, 16)
    with pytest.raises(HeadwayError, match=r"10 cannot be shared by 4 pipelines.*8 or 12"):
        choose_micro_batch(times, 10, 4, 2)
    with pytest.raises(HeadwayError, match=r"measured at 4.*one of 1, 3"):
        choose_micro_batch({4: 1.0}, 6, 2, 2)
