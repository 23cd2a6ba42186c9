"""The method `memo` of a recipe."""

from __future__ import annotations

import shutil
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from headway.core.errors import MethodError
from headway.core.method import Card, ForwardBackward, Method
from headway.core.options import Options
from headway.core.recipe import Recipe
from headway.core.units import Bytes
from headway.memory.backends import Backend, FileBackend, HostBackend, offload_folder
from headway.memory.lanes import LaneName, Lanes
from headway.memory.memo.plan_report import report_of
from headway.memory.memo.runtime import Memo
from headway.memory.memo.trace import Allocation, record_trace
from headway.models.structure import structure


class MemoOptions(Options):
    """Options of `memo`."""

    alpha: Literal["auto"] | float = "auto"
    """Share of the tokens whose saved tensors are swapped, 0 to 1; those of the others are recomputed. `auto`: as many
    as hide behind the computation and fit the budget, by what the second micro-batch of every shape measured."""
    host_budget: Bytes | None = Field(None, ge=1)
    """Bytes that may be swapped out at a time; default: half of the host's free memory, or of the drive's."""
    buffers: int = Field(2, ge=1)
    """Blocks whose saved tensors may be on the device at a time; so many of the last blocks are never swapped."""
    backend: Literal["host", "disk"] = "host"
    """Where to: host memory, or files."""
    path: str | None = None
    """Folder for the files, on a fast local drive; default: the system's temporary folder."""
    rate: Bytes | None = Field(None, ge=1)
    """Bytes per second that each direction of the link pretends to be limited to, to try out a slower one."""
    memory_plan: bool = False
    """Trace the allocations of a micro-batch and report what fragmentation costs and planned addresses would need."""
    verify: bool = False
    """Check a checksum of all that comes back, from the moment it left: for debugging. Files have one anyway."""


class MemoMethod(Method):
    """Swap the activations of the first tokens, recompute those of the others, never attention."""

    card = Card(
        name="memo",
        title="Token-wise swapping and recomputation",
        paper="MEMO: Fine-grained Tensor Management for Ultra-long Context LLM Training, SIGMOD 2025, arXiv 2407.12117",
        summary="Swaps each block's input, attention output and the activations of a share of the tokens to the host; "
        "recomputes those of the other tokens without attention.",
        exact=True,
        approximates="",
        buys="the activations of two blocks instead of all; at long sequences faster than recomputing whole blocks",
        costs="traffic to the host, and the projections of the tokens that are not swapped once more; stalls where the "
        "link cannot carry even inputs and attention outputs in time",
        refuses={
            "recompute": "both decide how a block's backward pass gets its activations",
            "streambp": "both decide how a block's backward pass gets its activations",
            "ssdtrain": "both take what autograd saves in a block away to another tier",
        },
        deviations="sizes and layouts are found by running a block on two tokens, not from a table of names; the plan "
        "of addresses is a report, as torch's allocator takes none",
    )
    Options = MemoOptions

    def __init__(self, options: Any, recipe: Recipe) -> None:
        super().__init__(options, recipe)
        self.memo: Memo | None = None
        self.trace: list[Allocation] | None = None

    def check(self, recipe: Recipe) -> None:
        """Compiled blocks cannot be taken apart.

        Raises:
            MethodError: the recipe compiles, or an option does not fit.
        """
        o = self.options
        if recipe.train.compile:
            raise MethodError(self.where, "cannot take apart blocks that train.compile turns into one graph each",
                              hint="switch one of the two off")  # fmt: skip
        if o.alpha != "auto" and not 0 <= o.alpha <= 1:
            raise MethodError(f"{self.where}.alpha", got=o.alpha, expected="auto, or a share from 0 to 1")
        if o.path is not None and o.backend != "disk":
            raise MethodError(f"{self.where}.path", f"is of no use with backend {o.backend!r}",
                              hint="leave it out, or set backend: disk")  # fmt: skip

    def model(self, model: nn.Module) -> nn.Module:
        """Take every block but the last few apart."""
        o = self.options
        backend: Backend = HostBackend()
        budget = o.host_budget
        if o.backend == "disk":
            folder = offload_folder(o.path)
            backend = FileBackend(folder)
            budget = budget or shutil.disk_usage(folder).free // 2
        names: tuple[LaneName, LaneName] = (backend.write_lane, backend.read_lane)
        lanes = Lanes(rates={name: float(o.rate) for name in names} if o.rate else None)
        self.memo = Memo(
            structure(model).blocks,
            o.alpha,
            backend,
            host_budget=budget,
            buffers=o.buffers,
            lanes=lanes,
            verify=o.verify,
        )
        share = "as many tokens as hide" if o.alpha == "auto" else f"{o.alpha:.0%} of the tokens"
        self.changed("blocks swapped", self.memo.swapped, f"{share}, to {o.backend}; the last {o.buffers} stay")
        return model

    def forward_backward(self, forward_backward: ForwardBackward) -> ForwardBackward:
        """Trace one micro-batch, where that is asked for."""
        if self.memo is None or not self.options.memory_plan:
            return forward_backward
        memo = self.memo

        def traced(micro: dict[str, Tensor], targets: int) -> Tensor:
            # The first steps allocate what stays, and are metered by the trainer.
            if self.trace is not None or memo.counts.passes < 2 or torch.autograd._profiler_enabled():
                return forward_backward(micro, targets)
            losses: list[Tensor] = []
            device = next(iter(memo.blocks.parameters())).device
            self.trace = record_trace(
                lambda: losses.append(forward_backward(micro, targets)), list(memo.blocks), device
            )
            return losses[0]

        return traced

    def report(self) -> dict[str, Any]:
        """What was swapped, recomputed and waited for, and the plans."""
        if self.memo is None:
            return {}
        report = self.memo.report()
        if self.trace is not None:
            report["memory_plan"] = report_of(self.trace)
        elif self.options.memory_plan:
            report["memory_plan"] = "none: it takes a third step"
        return report

    def state_dict(self) -> dict[str, Any]:
        """The plans."""
        return self.memo.state_dict() if self.memo is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the plans back."""
        if self.memo is not None:
            self.memo.load_state_dict(state)
