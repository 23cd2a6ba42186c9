"""A real pipeline of two ranks whose blocks sleep: what a schedule does shows although the ranks share two cores."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from headway.core.surgery import Shell, replace_blocks
from headway.models.build import build_model
from headway.models.config import GPT2Config
from headway.parallel.local import run_ranks
from headway.parallel.pipeline.cuts import cut_blocks
from headway.parallel.pipeline.runner import PipelineRunner
from headway.parallel.pipeline.stages import keep_own_parts, make_stages
from headway.workloads.language import NextTokenLoss

RANKS, LAYERS, TOKENS, VOCAB = 2, 4, 16, 32


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.backward_seconds = backward
        time.sleep(forward)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.backward_seconds)
        return grad, None, None


class SleepingBlock(Shell):
    """A block that takes ``forward`` and ``backward`` seconds longer in either pass."""

    def __init__(self, original: Any, forward: float, backward: float) -> None:
        super().__init__(original)
        self._seconds = forward, backward

    def forward(self, x: Tensor, *args: Any, **shared: Any) -> Any:
        """As the block."""
        slept: Tensor = _Sleep.apply(x, *self._seconds)
        return self.original(slept, *args, **shared)


def step_seconds(
    schedules: Sequence[tuple[str, int]], counts: Sequence[int], forward: float, backward: float, repeats: int
) -> dict[tuple[int, int], list[float]]:
    """(chunks, micro-batches) -> seconds of steps on two ranks, repeated; each by the slower rank.

    Args:
        schedules: names and their chunks.
        counts: micro-batches.
        forward, backward: what each of four blocks sleeps, seconds.
    """
    config = GPT2Config(hidden=16, layers=LAYERS, heads=2, vocab=VOCAB, context=TOKENS)

    def work(rank: int) -> dict[tuple[int, int], list[float]]:
        mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("pipeline",))
        times: dict[tuple[int, int], list[float]] = {}
        for name, chunks in schedules:
            model = build_model(config, seed=0)
            cuts = cut_blocks(LAYERS, RANKS, chunks)
            keep_own_parts(model, cuts, rank)
            replace_blocks(model.blocks, partial(SleepingBlock, forward=forward, backward=backward), "padded")
            stages = make_stages(model, cuts, rank)
            stages[-1].loss = NextTokenLoss()
            for count in counts:
                runner = PipelineRunner(
                    stages, cuts, mesh, schedule=name, micro_batches=count, width=config.hidden, tokens=TOKENS,
                    dtype=torch.float32, device=torch.device("cpu"),
                )  # fmt: skip
                times[chunks, count] = [_timed(runner, count) for _ in range(repeats + 1)][1:]
        return times

    by_rank = run_ranks(RANKS, work)
    return {key: [max(pair) for pair in zip(*(times[key] for times in by_rank))] for key in by_rank[0]}


def _timed(runner: PipelineRunner, count: int) -> float:
    tokens = torch.zeros(count, TOKENS, dtype=torch.long)
    dist.barrier()
    start = time.perf_counter()
    runner.forward_backward({"tokens": tokens, "targets": tokens}, tokens.numel())
    return time.perf_counter() - start
