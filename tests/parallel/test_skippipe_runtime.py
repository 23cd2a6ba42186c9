"""SkipPipe across ranks: gradients against one process, a pipeline of all stages, replicas, a lost node.

Needs gloo. Run: pytest tests/parallel/test_skippipe_runtime.py
"""

from __future__ import annotations

import pytest
import torch

from headway.layers.linear_cross_entropy import linear_cross_entropy
from headway.models.build import build_model
from headway.models.config import GPT2Config, LlamaConfig
from headway.parallel.local import RankFailed, run_ranks
from headway.parallel.skippipe.cluster import Rules, Schedule, ScheduleError
from headway.parallel.skippipe.runtime import PartialPipeline
from headway.parallel.skippipe.stage_skip import StageSkip, visit_scale

SIZES = {"hidden": 16, "layers": 8, "heads": 2, "vocab": 20, "context": 16}


def model_of(family: type = LlamaConfig, **more: object) -> torch.nn.Module:
    return build_model(family(**{**SIZES, **more}), seed=0).double()


def batches_of(count: int, segments: bool = False) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for index in range(count):
        length = 7 + index % 3  # shapes differ, and so do the numbers of targets
        tokens = torch.randint(20, (2, length + 1), generator=generator)
        batch = {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].clone()}
        batch["targets"][0, : index % 4] = -100
        if segments:
            batch["segments"] = (torch.arange(length) > 3).long().expand(2, -1).contiguous()
        found.append(batch)
    return found


def reference(model, schedule: Schedule, batches: list, normalise: str) -> tuple[float, dict[str, torch.Tensor]]:
    """One process, every micro-batch along its order."""
    stages = len(schedule.stages)
    skip = StageSkip(model, stages)
    orders = [schedule.orders()[i % len(schedule.paths)] for i in range(len(batches))]
    counts = [int((b["targets"] >= 0).sum()) for b in batches]
    scale = visit_scale(orders, counts, stages) if normalise == "per_visit" else None
    total = 0.0
    for batch, order in zip(batches, orders):
        beside = {key: batch[key] for key in ("segments",) if key in batch}
        hidden = skip.hidden(batch["tokens"], order=order, scale=scale, **beside).flatten(0, 1)
        loss, _ = linear_cross_entropy(hidden, model.head_weight, batch["targets"].flatten())
        (loss / sum(counts)).backward()
        total += loss.item()
    return total, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def on_ranks(rank: int, schedule: Schedule, batches: list, family: type, more: dict, normalise: str, lost: int | None):
    model = model_of(family, **more)
    pipeline = PartialPipeline(model, schedule, rank, normalise=normalise, rules=Rules(len(schedule.paths[0])))
    if lost is not None:
        if rank == lost:
            return 0.0, {}, 0
        schedule = pipeline.lose(lost)
    own = {i: b for i, b in enumerate(batches) if schedule.paths[i % len(schedule.paths)][0] == rank}
    loss = pipeline.step(own, len(batches))
    keep = {id(p) for p in pipeline.parameters()}
    gradients = {n: p.grad for n, p in model.named_parameters() if id(p) in keep and p.grad is not None}
    return loss, gradients, pipeline.messages


FOUR = ((0,), (1,), (2,), (3,))
CASES = {
    "all stages": (Schedule(FOUR, ((0, 1, 2, 3),)), LlamaConfig, {}),
    "skipped": (Schedule(FOUR, ((0, 1, 3), (0, 2, 3), (0, 1, 2))), LlamaConfig, {}),
    "swapped, tied": (Schedule(FOUR, ((0, 2, 1), (0, 1, 3), (0, 3, 2))), GPT2Config, {"tied": True}),
    "replicas": (Schedule(((0,), (1, 2), (3,)), ((0, 1, 3), (0, 2, 3), (0, 3, 2))), LlamaConfig, {}),
    "two data nodes": (Schedule(((0, 1), (2,), (3,)), ((0, 2), (1, 3), (0, 3), (1, 2))), LlamaConfig, {"tied": True}),
}


@pytest.mark.parametrize("normalise", ["per_visit", "per_batch"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(case: str, normalise: str) -> None:
    schedule, family, more = CASES[case]
    batches = batches_of(6, segments=case in ("skipped", "swapped, tied"))
    model = model_of(family, **more)
    total, expected = reference(model, schedule, batches, normalise)
    results = run_ranks(4, on_ranks, schedule, batches, family, more, normalise, None)
    assert sum(loss for loss, _, _ in results) == pytest.approx(total, rel=1e-12)
    got: dict[str, torch.Tensor] = {}
    for _, gradients, _ in results:
        for name, gradient in gradients.items():
            if name in got:  # replicas agree
                torch.testing.assert_close(gradient, got[name], rtol=0, atol=0)
            got[name] = gradient
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-11, atol=1e-13)
    paths = [schedule.paths[i % len(schedule.paths)] for i in range(6)]
    assert sum(sent for _, _, sent in results) == sum(2 * len(path) for path in paths)  # there and back, and the loss


def test_all_stages_in_order_are_plain_training() -> None:
    schedule, family, more = CASES["all stages"]
    batches = batches_of(3)
    model = model_of(family, **more)
    count = sum(int((b["targets"] >= 0).sum()) for b in batches)
    for batch in batches:
        hidden = model.hidden(batch["tokens"]).flatten(0, 1)
        (linear_cross_entropy(hidden, model.head_weight, batch["targets"].flatten())[0] / count).backward()
    results = run_ranks(4, on_ranks, schedule, batches, family, more, "per_visit", None)
    got = {name: g for _, gradients, _ in results for name, g in gradients.items()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-12, atol=1e-14)


def test_a_lost_replica_is_gone_round() -> None:
    schedule, family, more = CASES["replicas"]
    batches = batches_of(3)
    model = model_of(family, **more)
    rerouted = Schedule(((0,), (1,), (3,)), ((0, 1, 3), (0, 1, 3), (0, 3, 1)))
    _, expected = reference(model, rerouted, batches, "per_visit")
    results = run_ranks(4, on_ranks, schedule, batches, family, more, "per_visit", 2)
    got = {name: g for _, gradients, _ in results for name, g in gradients.items()}
    assert results[2][1] == {} and got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-11, atol=1e-13)


def test_what_cannot_be_gone_round_stops_with_the_constraint() -> None:
    schedule, family, more = CASES["all stages"]
    with pytest.raises(RankFailed, match="CC3: the path"):
        run_ranks(4, on_ranks, schedule, batches_of(2), family, more, "per_visit", 2)


def test_a_missing_micro_batch_and_a_stranger_are_named() -> None:
    def work(rank: int) -> str:
        model = model_of()
        if rank == 3:
            with pytest.raises(ScheduleError, match="rank 3: is in no stage"):
                PartialPipeline(model, Schedule(((0,), (1,), (2,)), ((0, 1, 2),)), rank)
            return ""
        pipeline = PartialPipeline(model, Schedule(((0,), (1,), (2,)), ((0, 1, 2),)), rank)
        with pytest.raises(ScheduleError, match="micro-batch 1: was not given to node 0"):
            pipeline.step({0: batches_of(1)[0]} if rank == 0 else {}, 2)
        return "seen"

    assert run_ranks(4, work) == ["seen"] * 3 + [""]
