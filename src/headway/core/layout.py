"""The recipe's ``parallel`` section: all that changes between one process and many."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from headway.core.options import Options

SequenceKind = Literal["auto", "ulysses", "ring", "usp", "all-scan", "lasp1", "lasp2"]
PipelineSchedule = Literal["gpipe", "1f1b", "interleaved-1f1b", "interleaved-zero-bubble", "zbv-zero-bubble"]


class SequenceOptions(Options):
    """Every sample cut along its sequence."""

    degree: int = Field(1, ge=1)
    """Ranks that share each sequence."""
    kind: SequenceKind = "auto"
    """How attention sees what other ranks hold: `ulysses` exchanges heads for tokens, `ring` passes keys and values on,
    `usp` does both; for linear attention, `all-scan` (ZeCO), `lasp1` and `lasp2` pass its state. `auto` takes `ulysses`
    or `all-scan`, as fits the model."""
    ring: int = Field(1, ge=1)
    """With `usp`: ranks in each ring; the others exchange heads."""
    layout: Literal["zigzag", "contiguous"] = "zigzag"
    """With `ring` and `usp`: `zigzag` gives each rank a piece from the front and one from the back, so that causal
    attention costs all the same."""
    blocks: int = Field(4, ge=1)
    """With `all-scan`: pieces in which the state is passed on."""


class TensorOptions(Options):
    """Every matrix cut by heads or channels."""

    degree: int = Field(1, ge=1)
    """Ranks that share each matrix."""
    sequence: bool = True
    """Also cut norms and the residual stream between the matrices, along the sequence: same messages, less memory."""


class PipelineOptions(Options):
    """The blocks cut into stages."""

    degree: int = Field(1, ge=1)
    """Ranks in a row, each with its blocks; micro-batches (`train.micro_batch`) pass through them."""
    schedule: PipelineSchedule = "1f1b"
    """The order of forward and backward passes."""
    chunks: int = Field(1, ge=1)
    """Stages per rank: more than one with the interleaved schedules, two with `zbv-zero-bubble`."""
    gather: bool = True
    """With `tensor` but without `tensor.sequence`: send each boundary once, in parts, not once per tensor rank."""


class ExpertOptions(Options):
    """The experts of a mixture-of-experts model, spread over the ranks that share data, sequences or matrices."""

    degree: int = Field(1, ge=1)
    """Ranks that share the experts of a block."""
    tensor: int = Field(1, ge=1)
    """Ranks that share each expert's matrices."""
    dispatcher: Literal["all-to-all", "all-gather"] = "all-to-all"
    """How tokens come to their experts: only to where they are needed, or to every rank."""


class ParallelOptions(Options):
    """How a run is spread over ranks. ``shard`` takes what the others leave over; a number alone is a ``degree``."""

    replicate: int = Field(1, ge=1)
    """Groups of ranks that hold the whole model each; `shard` ranks share it within a group."""
    shard: int | Literal["auto"] = "auto"
    """Ranks that share weights, gradients and optimizer state and train on different samples (FSDP2)."""
    sequence: SequenceOptions = Field(default_factory=SequenceOptions)
    """Ranks that share each sequence."""
    tensor: TensorOptions = Field(default_factory=TensorOptions)
    """Ranks that share each matrix."""
    pipeline: PipelineOptions = Field(default_factory=PipelineOptions)
    """Ranks that hold the blocks one after the other."""
    experts: ExpertOptions = Field(default_factory=ExpertOptions)
    """Ranks that share the experts of a mixture-of-experts model."""

    @field_validator("sequence", "tensor", "pipeline", "experts", mode="before")
    @classmethod
    def _degree_alone(cls, value: Any) -> Any:
        return {"degree": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("shard")
    @classmethod
    def _at_least_one(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("a number of ranks, at least 1, or auto")
        return value
