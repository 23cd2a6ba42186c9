"""Room for a pipeline's messages, its timeline, and parts of boundaries in a whole training.

Needs gloo; `pytest tests/parallel/test_pipeline.py`.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from headway.parallel.local import run_ranks
from headway.parallel.parity import parity
from headway.parallel.pipeline.room import Room, buffers
from headway.parallel.pipeline.tables import Action, schedule_table
from headway.parallel.pipeline.trace import Span, chrome_trace
from tests.parallel.recipes import recipe
from tests.parallel.test_pipeline_boundary import D, T, data, runner_of

SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved-1f1b", 2), ("interleaved-zero-bubble", 2), ("zbv-zero-bubble", 2)]
MICRO, B = 8, 2
BOUNDARY = B * T * D * 8
"""Bytes of the residual stream of a micro-batch."""


def steps(rank: int, mesh: Any, name: str, chunks: int) -> tuple[list[Any], int, int]:
    """Gradients of two steps; the most bytes of room during the second, and those after it."""
    whole, runner = runner_of(rank, mesh, name, chunks, MICRO, False)
    most = [0]

    def watch(*_: Any) -> None:
        stages = runner._wrapped
        most[0] = max(most[0], sum(b.untyped_storage().nbytes() for stage in stages for b in buffers(stage)))

    for stage in runner.stages:
        stage.register_forward_pre_hook(watch)
    batch, found = data(B * MICRO), []
    for _ in range(2):
        whole.zero_grad()
        runner.forward_backward(batch, 1)
        found.append({key: p.grad.clone() for key, p in whole.named_parameters()})
    return found, most[0], runner._wrapped[0].room.bytes


def test_room_is_taken_only_while_a_micro_batch_is_at_work() -> None:
    def work(rank: int) -> list[Any]:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pipeline",))
        found = []
        for name, chunks in SCHEDULES:
            lean = steps(rank, mesh, name, chunks)
            with pytest.MonkeyPatch.context() as plain:
                plain.setattr(Room, "empty", lambda self: None)
                found.append((name, lean, steps(rank, mesh, name, chunks)))
            dist.barrier()
        return found

    for rank, found in enumerate(run_ranks(2, work)):
        for name, (lean, most, after), (plain, before, _) in found:
            for step in range(2):
                assert all(torch.equal(lean[step][key], plain[step][key]) for key in plain[step]), name
            assert after == 0, "nothing is kept from step to step"
            assert before >= MICRO * BOUNDARY, "torch has room for every micro-batch"
            if name == "1f1b":
                assert most <= (2 - rank) * BOUNDARY, (rank, most / BOUNDARY)


def test_a_timeline_shows_every_rank_following_its_table() -> None:
    def work(rank: int) -> list[list[Span]]:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pipeline",))
        found = []
        for name, chunks in SCHEDULES:
            _, runner = runner_of(rank, mesh, name, chunks, MICRO, False)
            for _ in range(2):
                runner.forward_backward(data(B * MICRO), 1)
            found.append(runner.timeline())
        return found

    first, second = run_ranks(2, work)
    assert first == second
    for (name, chunks), spans in zip(SCHEDULES, first, strict=True):
        table = schedule_table(name, 2, chunks, MICRO)
        for rank, actions in enumerate(table):
            own = [Action(span.kind, span.stage, span.micro) for span in spans if span.rank == rank]  # type: ignore[arg-type]
            assert own == actions, (name, rank)
        ends = {(span.kind, span.stage, span.micro): span.end for span in spans}
        for span in spans:
            if span.kind == "forward" and span.stage:
                assert span.end > ends["forward", span.stage - 1, span.micro], "after the stage before"
        events = chrome_trace(spans)["traceEvents"]
        assert sum(event["ph"] == "X" for event in events) == sum(map(len, table))


@pytest.mark.parametrize("pipeline", [{"degree": 2}, {"degree": 2, "chunks": 2, "schedule": "zbv-zero-bubble"}])
def test_parts_over_tensor_ranks_in_a_whole_training(pipeline: dict[str, Any]) -> None:
    layout = {"pipeline": pipeline, "tensor": {"degree": 2, "sequence": False}}
    found = parity(recipe(parallel=layout), 4)
    assert found.loss_difference < 1e-9 and found.gradient_difference < 1e-9, found
