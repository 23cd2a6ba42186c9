"""One way of laying a training out: ranks by dimension, schedule, micro-batch, recomputation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headway.parallel.mesh import Layout


@dataclass(frozen=True)
class Choice:
    """A layout and everything else that decides a step's time and memory."""

    layout: Layout
    micro_batch: int = 1
    """Sequences."""
    schedule: str = "1f1b"
    chunks: int = 1
    """Stages per pipeline rank."""
    recompute: bool = False
    """Blocks keep their input alone and run their forward pass twice."""
    divided_stream: bool = True
    """``tensor.sequence``: the residual stream is divided among the tensor ranks too."""
    gather: bool = True
    """Boundaries between stages are sent in parts by the tensor ranks."""
    overlap: bool = True
    """Messages between stages travel while their sender computes."""

    reduce_once: bool | None = None
    """Gradients are summed over the data ranks after the last micro-batch; by default where there is a pipeline."""
    fused_attention: bool = True
    """Attention never writes its scores to memory."""

    @property
    def reductions_once(self) -> bool:
        """``reduce_once``, or its default."""
        return self.layout.pipeline > 1 if self.reduce_once is None else self.reduce_once

    def gathers(self, micro_batches: int) -> int:
        """How often divided weights are gathered in a step: for both passes of every micro-batch, but by a pipeline's
        stages, which keep them, once."""
        return 1 if self.layout.pipeline > 1 else 2 * micro_batches

    @property
    def stages(self) -> int:
        """Pieces into which the blocks are cut."""
        return self.layout.pipeline * self.chunks

    def micro_batches(self, batch: int) -> int:
        """Micro-batches of a step of ``batch`` sequences that pass through one pipeline."""
        return batch // (self.layout.data * self.micro_batch)

    def stage(self, rank: int, chunk: int) -> int:
        """Which stage a pipeline rank's chunk is: in rounds, or there and back for ``zbv-zero-bubble``."""
        if self.schedule == "zbv-zero-bubble" and chunk == 1:
            return 2 * self.layout.pipeline - 1 - rank
        return chunk * self.layout.pipeline + rank

    def rank_of(self, stage: int) -> int:
        """The pipeline rank that has a stage."""
        p = self.layout.pipeline
        return 2 * p - 1 - stage if self.schedule == "zbv-zero-bubble" and stage >= p else stage % p

    def parallel(self) -> dict[str, Any]:
        """The recipe's ``parallel`` section."""
        layout = self.layout
        section: dict[str, Any] = {"replicate": layout.replicate, "shard": layout.shard}
        if layout.sequence > 1:
            section["sequence"] = {"degree": layout.sequence}
        if layout.tensor > 1:
            section["tensor"] = {"degree": layout.tensor, "sequence": self.divided_stream}
        if layout.pipeline > 1:
            section["pipeline"] = {"degree": layout.pipeline, "schedule": self.schedule, "chunks": self.chunks}
            if not self.divided_stream and layout.tensor > 1:
                section["pipeline"]["gather"] = self.gather
        return section

    def recipe(self) -> dict[str, Any]:
        """What a recipe has to say to be run so: `parallel`, `train.micro_batch`, and recomputation if it is on."""
        section: dict[str, Any] = {"parallel": self.parallel(), "train": {"micro_batch": self.micro_batch}}
        return section | ({"methods": {"recompute": {}}} if self.recompute else {})

    def __str__(self) -> str:
        schedule = ""
        if self.layout.pipeline > 1:
            schedule = f", {self.schedule}" + (f" of {self.chunks} chunks" if self.chunks > 1 else "")
        return f"{self.layout}, micro-batch {self.micro_batch}{schedule}{', recompute' if self.recompute else ''}"
