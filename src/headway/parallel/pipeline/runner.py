"""Micro-batches through the stages of many ranks, by one of torch's schedules; the gradients are those of one process.

Source: Narayanan et al. 2021 (arXiv 2104.04473), section 2.2, for 1F1B and its interleaved form; Qi et al. 2024 (arXiv
2401.10241) for the zero-bubble ones. The schedules themselves are torch.distributed.pipelining's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining.schedules import get_schedule_class

from headway.core.errors import HeadwayError
from headway.parallel.pipeline.boundary import BoundaryStage, check_parts, lost_neighbour
from headway.parallel.pipeline.cuts import Cuts
from headway.parallel.pipeline.room import Room
from headway.parallel.pipeline.stages import Stage
from headway.parallel.pipeline.trace import Span

SCHEDULES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved-1f1b": "Interleaved1F1B",
    "interleaved-zero-bubble": "InterleavedZeroBubble",
    "zbv-zero-bubble": "ZBVZeroBubble",
}
"""Our name -> torch's."""
SINGLE = ("gpipe", "1f1b")


class PipelineRunner:
    """Runs a rank's stages.

    Args:
        stages: the rank's own, from ``make_stages``; wrapped by ``fully_shard`` before, if at all.
        cuts: of the whole model.
        mesh: of the pipeline's ranks, one-dimensional.
        schedule: one of ``SCHEDULES``.
        micro_batches: how many a batch is divided into.
        width: channels of the residual stream.
        tokens: of a sequence that are between two stages on this rank: fewer than it has where sequence or tensor ranks
            share them.
        dtype: of the residual stream.
        device: of this rank.
        tensor: the ranks that hold the same residual stream, each of which then sends its part of it; None: all of it.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        cuts: Cuts,
        mesh: DeviceMesh,
        *,
        schedule: str,
        micro_batches: int,
        width: int,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        tensor: DeviceMesh | None = None,
    ) -> None:
        self.stages, self.cuts, self.name, self.micro_batches = list(stages), cuts, schedule, micro_batches
        self.group, self.rank = mesh.get_group(), mesh.get_local_rank()
        self.width, self.tokens, self.dtype, self.device = width, tokens, dtype, device
        self._tensor = tensor
        self._wrapped: list[BoundaryStage] = []
        self._schedule: Any = None
        self._rows = 0
        self._targets = 1

    def forward_backward(self, batch: dict[str, Tensor], targets: int) -> Tensor:
        """All micro-batches of a batch, forward and backward: the sum of its losses, the same on every rank.

        Args:
            batch: ``tokens`` and ``targets`` [m * b, T], and what else blocks get, the same on all of the pipeline's
                ranks; m micro-batches.
            targets: of the whole step; the gradient is that of the summed loss divided by it.

        Raises:
            HeadwayError: the rows cannot be divided, or are others than in the step before; or a neighbour is gone or
                later than the group's timeout: its rank, the stage, the pass and the micro-batch are named.
        """
        rows = batch["tokens"].shape[0]
        if self._schedule is None:
            self._prepare(rows)
        if rows != self._rows:
            raise HeadwayError("train.batch", f"gives a pipeline {rows} sequences, and it is made for {self._rows}")
        self._targets = targets
        losses: list[Tensor] = []
        # Everything is divided by rows, positions that all rows have in common too.
        given = {key: value.expand(rows, -1) if value.dim() == 1 else value
                 for key, value in batch.items() if key != "tokens"}  # fmt: skip
        inputs = (batch["tokens"],) if 0 in (stage.index for stage in self.stages) else ()
        at_end = self.stages[-1].last
        for stage in self._wrapped:
            stage.begin()
        target, kept = (batch["targets"], losses) if at_end else (None, None)
        try:
            self._schedule.step(*inputs, **given, target=target, losses=kept)
        except RuntimeError as error:  # torch's, for a neighbour that is late or gone
            lost = lost_neighbour(self._wrapped, self.rank, error)
            if lost is None:
                raise
            raise lost from error
        total = torch.stack(losses).sum().detach() * targets if at_end else torch.zeros((), device=self.device)
        return self._from_last(total)

    def events(self) -> list[Span]:
        """This rank's passes of the last step, for ``chrome_trace``: host times on the machine's own clock."""
        return sorted((span for stage in self._wrapped for span in stage.spans), key=lambda span: span.start)

    def timeline(self) -> list[Span]:
        """The passes of the last step on all of the pipeline's ranks, in the order of time; all of them ask.

        The times of ranks can be compared where they share a clock: on one machine.
        """
        everywhere: list[Any] = [None] * self.cuts.ranks
        dist.all_gather_object(everywhere, [tuple(span) for span in self.events()], group=self.group)
        spans = [Span(*span) for own in everywhere for span in own]
        return sorted(spans, key=lambda span: (span.start, span.rank))

    @property
    def sent_bytes(self) -> int:
        """What this rank has sent to other stages so far, forward and backward."""
        return sum(stage.sent_bytes for stage in self._wrapped)

    @torch.no_grad()
    def evaluate(self, batch: dict[str, Tensor]) -> float:
        """The sum of the losses of a batch of any number of rows, without gradients; the same on every rank."""
        given = {key: value for key, value in batch.items() if key != "tokens"}
        x: Any = batch["tokens"]
        shape = (x.shape[0], self.tokens, self.width)
        mine = {stage.index: stage for stage in self.stages}
        for index in range(self.cuts.stages):
            if index in mine:
                if index > 0 and (index - 1) not in mine:
                    x = torch.empty(shape, dtype=self.dtype, device=self.device)
                    dist.recv(x, group=self.group, group_src=self.cuts.rank_of(index - 1))
                x = mine[index](x, **given)
                if index + 1 < self.cuts.stages and (index + 1) not in mine:
                    dist.send(x.contiguous(), group=self.group, group_dst=self.cuts.rank_of(index + 1))
        last = self.stages[-1].last
        return float(self._from_last(x.sum() if last else torch.zeros((), device=self.device)))

    def _from_last(self, value: Tensor) -> Tensor:
        value = value.double()
        dist.broadcast(value, group=self.group, group_src=self.cuts.rank_of(self.cuts.stages - 1))
        return value

    def _prepare(self, rows: int) -> None:
        micro, left = divmod(rows, self.micro_batches)
        if left:
            raise HeadwayError("train.micro_batch", f"makes {self.micro_batches} micro-batches, which cannot share the "
                               f"{rows} sequences of a rank")  # fmt: skip
        self._rows = rows
        between = torch.empty(micro, self.tokens, self.width, dtype=self.dtype, device="meta", requires_grad=True)
        tokens = torch.empty(micro, 1, dtype=torch.int64, device="meta")
        loss = torch.empty(1, dtype=torch.promote_types(self.dtype, torch.float32), device="meta", requires_grad=True)
        check_parts(between.shape, self._tensor)
        self._wrapped = wrapped = [
            BoundaryStage(
                stage,
                stage.index,
                self.cuts.stages,
                self.device,
                input_args=tokens if stage.first else between,
                output_args=loss if stage.last else between,
                group=self.group,
                tensor=self._tensor,
            )
            for stage in self.stages
        ]
        room = Room(wrapped)
        for stage in wrapped:
            stage.room = room
        kind: Any = get_schedule_class(SCHEDULES[self.name])
        options = {"loss_fn": lambda loss, _: loss.sum() / self._targets, "scale_grads": False}
        self._schedule = kind(wrapped[0] if self.name in SINGLE else wrapped, self.micro_batches, **options)
