"""The method `fuyou` of a recipe."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from headway.core.errors import MethodError
from headway.core.meters import matmul_peak
from headway.core.method import Card, ForwardBackward, Gradients, Method
from headway.core.options import Options
from headway.core.recipe import Recipe
from headway.core.surgery import replace_blocks
from headway.core.units import Bytes, human, human_seconds
from headway.core.workload import StepBatch
from headway.memory.backends import offload_folder
from headway.memory.fuyou.activations import Activations
from headway.memory.fuyou.files import GroupFiles
from headway.memory.fuyou.groups import Layout, block_groups
from headway.memory.fuyou.optimizer import TieredOptimizer
from headway.memory.fuyou.plan import Profile, Tiers, break_even, step_times
from headway.memory.fuyou.weights import WeightsOnDisk
from headway.memory.gpudirect import disk_backend
from headway.memory.lanes import LaneName, Lanes
from headway.memory.store import TieredStore
from headway.models.structure import structure

DISK: tuple[LaneName, LaneName] = ("disk_read", "disk_write")
ACTIVATION_METHODS = ("memo", "recompute", "ssdtrain", "streambp")


class FuyouOptions(Options):
    """Options of `fuyou`."""

    path: str | None = None
    """Folder for the files, on a fast local drive; default: the system's temporary folder."""
    params: Literal["disk", "memory"] = "disk"
    """Where the blocks' working weights are when their block does not run; embedding, norm and head stay in memory."""
    overlap: Literal["auto"] | bool = "auto"
    """Update each group of parameters while the backward pass goes on: `true`, `false`, or `auto`, wherever that does
    not make the clipping that `train.clip` asks for inexact."""
    clip: Literal["exact", "group", "previous"] = "exact"
    """How `train.clip` is met: `exact`, by the norm of the whole gradient, so that updates wait for the end of the
    backward pass; `group`, each group by its own norm, to an equal share of the bound; `previous`, all by the norm of
    the step before. The last two are approximations, and go with overlap."""
    writeback_delay: int = Field(1, ge=0)
    """Groups that are updated before the write-back of one begins, so that reads are not queued behind writes."""
    buffers: int = Field(3, ge=1)
    """Host buffers for states, each as large as the largest group; at least one more than the delay."""
    host: Bytes | None = Field(None, ge=1)
    """Most host memory that these buffers may take; there are fewer then."""
    blocks: int = Field(2, ge=1)
    """Blocks whose working weights are in memory at the same time, with `params: disk`."""
    activations: Literal["none", "auto", "swap", "recompute"] = "none"
    """What blocks do about their activations: nothing; `swap` block inputs and the outputs of matrix products to disk;
    `recompute` all but block inputs; or `auto`, what the cost model finds best after a first step of swapping."""
    queue: Bytes = Field(1 << 30, ge=1)
    """Bytes of activations that may wait to be written before the forward pass waits for the drive."""
    rate: Bytes | None = Field(None, ge=1)
    """Bytes per second that each direction of the drive pretends to be limited to, to try out a slower one."""
    verify: bool = True
    """Keep a checksum of everything that goes to disk, and check it on the way back."""


class Fuyou(Method):
    """Parameters and optimizer states on disk, updates under the backward pass."""

    card = Card(
        name="fuyou",
        title="Training from disk",
        paper="Liao et al., Adding NVMe SSDs to Enable and Accelerate 100B Model Fine-tuning on a Single GPU, 2024, "
        "arXiv 2403.06504",
        summary="Keeps optimizer states and working weights on disk and updates each block while the backward pass of "
        "the blocks before it runs.",
        exact=True,
        approximates="",
        buys="the memory of optimizer states, fp32 masters and weights: 12 to 16 bytes per parameter",
        costs="26 to 30 bytes of disk traffic per parameter and step, wear of the drive, which holds the states twice",
        after=("length-warmup", "token-accumulation"),
        refuses={
            "deep-optimizer-states": "each moves the optimizer's states to a place of its own",
            "ema": "its average reads every fp32 weight after each step, and these are on disk",
            "sam": "it moves all weights between two backward passes, and these are on disk",
        },
        deviations="updates run in a thread, not in a process; one checkpoint a block, not two; with exact clipping, "
        "which is the default, updates wait for the end of the backward pass",
    )
    Options = FuyouOptions

    def __init__(self, options: Any, recipe: Recipe) -> None:
        super().__init__(options, recipe)
        self.tiered: TieredOptimizer | None = None
        self.weights_: WeightsOnDisk | None = None
        self.activations: Activations | None = None
        self.lanes = Lanes(rates=dict.fromkeys(DISK, float(options.rate)) if options.rate else None,
                           queue_bytes=options.queue)  # fmt: skip
        self._stream: CountedStream | None = None
        self._forecast = ""
        self._previous: float | None = None  # gradient norm of the step before
        self._loss: Tensor | float = 0.0  # sum over the micro-batches of the step at hand

    @property
    def overlaps(self) -> bool:
        """Whether updates run under the backward pass."""
        if self.options.overlap == "auto":
            return self.recipe.train.clip is None or self.options.clip != "exact"
        return bool(self.options.overlap)

    def check(self, recipe: Recipe) -> None:
        """Exact clipping excludes overlap; compiled blocks hide what happens inside; one method plans activations.

        Raises:
            MethodError: with the remedy.
        """
        o, clip = self.options, recipe.train.clip
        if recipe.train.compile:
            raise MethodError(self.where, "cannot follow train.compile: weights come and go, and a compiled block does "
                              "not tell when it runs", hint="switch one of the two off")  # fmt: skip
        if o.overlap is True and o.clip == "exact" and clip is not None:
            raise MethodError(f"{self.where}.overlap", "cannot be met with exact clipping: the norm of the whole "
                              "gradient is known only after the backward pass", hint="set train.clip: null, "
                              "clip: group or previous (approximate), or overlap: auto")  # fmt: skip
        if o.clip != "exact" and (clip is None or not self.overlaps):
            why = "train.clip is null" if clip is None else "without overlap clipping is exact"
            raise MethodError(f"{self.where}.clip", f"is of no use: {why}", hint="leave it out")
        if o.activations != "none":
            for other in ACTIVATION_METHODS:
                if other in recipe.methods:
                    raise MethodError(f"{self.where}.activations", f"cannot be combined with {other}: both "
                                      "decide what a block keeps for its backward pass",
                                      hint="set activations: none")  # fmt: skip
        if o.buffers < o.writeback_delay + 1:
            raise MethodError(f"{self.where}.buffers", got=o.buffers, expected=f"at least {o.writeback_delay + 1}, one "
                              f"more than writeback_delay")  # fmt: skip

    def model(self, model: nn.Module) -> nn.Module:
        """Let blocks swap or recompute their activations."""
        self._model, o = model, self.options
        if o.activations != "none":
            blocks = structure(model).blocks
            store = None
            if o.activations != "recompute":
                store = TieredStore(disk_backend(self._path, o.verify), self.lanes)
            self.activations = activations = Activations(list(blocks), store, o.activations)
            layers = {id(block): layer for layer, block in enumerate(blocks)}
            replace_blocks(blocks, lambda block: activations.shell(block, layers[id(block)]), self.where)
            self.changed(f"blocks with activations {o.activations}", len(blocks))
        return model

    @property
    def _path(self) -> Path:
        return offload_folder(self.options.path)

    def optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Move states, masters and weights to disk."""
        o, groups = self.options, block_groups(self._model)
        in_blocks = frozenset(i for i, group in enumerate(groups) if group.block is not None)
        on_disk = in_blocks if o.params == "disk" else frozenset()
        buffers = self._affordable(max(Layout.of(group, i in on_disk).nbytes for i, group in enumerate(groups)))
        self.tiered = TieredOptimizer(
            optimizer,
            groups,
            GroupFiles(self._path, verify=o.verify),
            lanes=self.lanes,
            buffers=buffers,
            delay=o.writeback_delay,
            weights_on_disk=on_disk,
            where=self.where,
        )
        when = "during the backward pass" if self.overlaps else "after the backward pass"
        if o.overlap == "auto" and not self.overlaps:
            when += ", since train.clip needs the whole gradient's norm"
        self.changed("groups of optimizer states on disk", len(groups), f"updated {when}")
        if o.params == "disk":
            self.weights_ = WeightsOnDisk(list(structure(self._model).blocks), self.tiered, o.blocks)
            self.changed("blocks with weights on disk", len(in_blocks), f"{min(o.blocks, len(in_blocks))} in memory")
        self._foretell()
        return self.tiered  # type: ignore[return-value]

    def _affordable(self, largest: int) -> int:
        """How many buffers of ``largest`` bytes there may be.

        Raises:
            MethodError: fewer than are needed.
        """
        o = self.options
        if o.host is None:
            return o.buffers
        least = (o.writeback_delay + 1) * largest
        if o.host < least:
            raise MethodError(f"{self.where}.host", f"is {human(o.host, 'B')}", expected=f"at least {human(least, 'B')}"
                              f": {o.writeback_delay + 1} buffers as large as the largest group",
                              hint="raise it, or lower writeback_delay")  # fmt: skip
        return min(o.buffers, o.host // largest)

    def _profile(self) -> tuple[Profile, Tiers]:
        """What a step computes and moves, and what there is to do it with, as known before the first step."""
        assert self.tiered is not None
        parameters = sum(p.numel() for group in self.tiered.groups for p in group.params)
        train, bf16 = self.recipe.train, self.recipe.train.precision == "bf16"
        tokens = float(train.batch * getattr(self.recipe.data, "sequence", 1))
        flops = getattr(self._model, "flops_per_token", lambda sequence: 6.0 * parameters)(int(tokens / train.batch))
        weights = (2.0 if bf16 else 4.0) if self.options.params == "disk" else 0.0
        wide = 14.0 if bf16 and self.options.params == "disk" else 12.0
        profile = Profile(
            parameters, flops / 3 * tokens, recomputed_flops=0.0, weight_bytes=weights, state_written=wide
        )
        device = self.tiered._device
        peak = matmul_peak(torch.bfloat16 if bf16 else torch.float32, device)
        rate = self.lanes["disk_write"].report.rate or math.inf  # of the first generation of all states
        return profile, Tiers(peak, math.inf, math.inf, rate, rate)

    def _foretell(self) -> None:
        """Say, before training, what the disk allows."""
        profile, tiers = self._profile()
        forward, backward = step_times(profile, tiers)
        seconds = forward.seconds + backward.seconds
        self._forecast = (
            f"a step takes {human_seconds(seconds)} at best, {human(3 * profile.forward_flops / seconds)}FLOP/s; "
            f"forward is bound by {forward.binding}, backward by {backward.binding}"
        )
        if "disk" in (forward.binding, backward.binding):
            need = break_even(profile, tiers)
            print(f"headway: fuyou: the drive takes {human(tiers.write, 'B')}/s and {human(need, 'B')}/s would keep "
                  f"up with the computation; {self._forecast}", file=sys.stderr)  # fmt: skip

    def stream(self, stream: Iterator[StepBatch]) -> Iterator[StepBatch]:
        """Count a step's micro-batches: gradients are complete in the last."""
        self._stream = CountedStream(stream)
        return self._stream

    def forward_backward(self, forward_backward: ForwardBackward) -> ForwardBackward:
        """Let the last micro-batch's backward pass update."""

        def tiered(micro: dict[str, Tensor], targets: int) -> Tensor:
            optimizer, stream = self.tiered, self._stream
            assert optimizer is not None and stream is not None
            optimizer.check()
            stream.done += 1
            if stream.done == stream.micro_batches and self.overlaps and self._known():
                optimizer.arm(self._scale())
            loss = forward_backward(micro, targets)
            self._loss = loss if stream.done == 1 else self._loss + loss
            if self.activations is not None and self.options.activations == "auto" and self.activations.plan is None:
                self._decide(micro)
            return loss

        return tiered

    def _known(self) -> bool:
        """Whether clipping by the step before has a step before; the first step is clipped exactly."""
        return self.recipe.train.clip is None or self.options.clip != "previous" or self._previous is not None

    def _scale(self) -> Any:
        clip, previous = self.recipe.train.clip, self._previous
        if clip is None or self.options.clip == "exact":
            return None
        assert self.tiered is not None
        if self.options.clip == "previous":
            assert previous is not None
            return (lambda norm: clip / (previous + 1e-6)) if previous > clip else None
        share = clip / math.sqrt(len(self.tiered.groups))  # then the whole is within the bound

        def by_group(norm: Tensor) -> float | None:
            value = float(norm)
            return share / (value + 1e-6) if math.isfinite(value) and value > share else None

        return by_group

    def _decide(self, micro: dict[str, Tensor]) -> None:
        """After a micro-batch in which everything was swapped: what the cost model finds best."""
        assert self.activations is not None
        before, tiers = self._profile()
        tokens = next(iter(micro.values())).numel()
        share = tokens / float(self.recipe.train.batch * getattr(self.recipe.data, "sequence", 1))
        flops = before.forward_flops * share
        read, write = (self.lanes[name].report.rate or math.inf for name in DISK)
        reached = flops / self.activations.forward_seconds if self.activations.forward_seconds else tiers.flops
        # States move once in a step, weights in every micro-batch.
        profile = self.activations.profile(before.parameters, flops, weight_bytes=before.weight_bytes,
                                           state_read=before.state_read * share,
                                           state_written=before.state_written * share)  # fmt: skip
        self.activations.decide(profile, Tiers(reached, math.inf, math.inf, read, write))

    def gradients(self, gradients: Gradients) -> Gradients:
        """The norm of gradients that are used already; and no update where they or the loss are not finite."""

        def measured() -> Tensor:
            optimizer = self.tiered
            assert optimizer is not None
            norm = optimizer.grad_norm if optimizer.is_updating else gradients()
            if not (math.isfinite(value := float(norm)) and math.isfinite(float(self._loss))):
                optimizer.rollback()  # the trainer stops here, and says that no weight has changed
            self._previous = value
            return norm

        return measured

    def report(self) -> dict[str, Any]:
        """What was moved, waited for and foretold."""
        if self.tiered is None:
            return {}
        found = {"forecast": self._forecast, "overlap": self.overlaps, **self.tiered.report()}
        if self.weights_ is not None:
            found |= {"weight_fetches": self.weights_.fetches, "weight_stall_seconds": self.weights_.stall_seconds}
        if self.activations is not None:
            found["activations"] = self.activations.report()
        return found

    def state_dict(self) -> dict[str, Any]:
        """The norm that the next step may be clipped by."""
        return {"previous": self._previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._previous = state["previous"]


class CountedStream:
    """A stream that tells how many micro-batches the step at hand has."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.micro_batches = 0
        self.done = 0

    def __iter__(self) -> CountedStream:
        return self

    def __next__(self) -> StepBatch:
        """One step's batch."""
        batch = next(self.stream)
        self.micro_batches, self.done = len(batch.micro), 0
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The inner stream's state."""
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there."""
        self.stream.load_state_dict(state)
