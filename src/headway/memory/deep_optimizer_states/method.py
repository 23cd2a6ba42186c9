"""The method `deep-optimizer-states` of a recipe."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from headway.core.errors import CheckpointError, HeadwayError, MethodError
from headway.core.method import Card, ForwardBackward, Gradients, Method
from headway.core.options import Options
from headway.core.recipe import Recipe
from headway.core.units import Bytes, Count, human
from headway.memory.deep_optimizer_states.kernel import check_elementwise
from headway.memory.deep_optimizer_states.offload import InterleavedOffload
from headway.memory.subgroups import CUT


class DeepOptimizerStatesOptions(Options):
    """Options of `deep-optimizer-states`."""

    stride: int | Literal["auto"] | None = "auto"
    """Every how many subgroups one is updated on the device: 1 all, `null` none; `auto` measures and chooses."""
    subgroup: Count = Field(100_000_000, ge=CUT)
    """Parameters of a subgroup at most; fewer where the model would be less than 8 subgroups, or the device is short of
    memory."""
    resident_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of the parameters whose optimizer state stays on the device and is updated there."""
    async_grads: bool = True
    """Gradients cross to the host while the backward pass goes on."""
    max_device_extra: Bytes = Field(8 << 30, ge=1)
    """Bytes of the device that staged subgroups and the gradients kept for them may take."""


class DeepOptimizerStates(Method):
    """Optimizer state in host memory, updated by host and device in turn."""

    card = Card(
        name="deep-optimizer-states",
        title="Interleaved optimizer offloading",
        paper="Maurya et al., Deep Optimizer States, Middleware 2024, arXiv 2410.21316",
        summary="Keeps fp32 masters and Adam's moments in host memory; every k-th subgroup of them is staged to the "
        "device, updated there and brought back while the host updates the others.",
        exact=True,
        approximates="",
        buys="12 of the 16 to 18 bytes that AdamW takes on the device for every parameter, and a shorter update than "
        "the host's alone",
        costs="traffic of gradients and weights on the link, host memory, and the host's time for the update",
        before=("sam",),
        refuses={"fuyou": "both decide where masters and moments live: in host memory here, on disk there"},
        deviations="a subgroup is staged as soon as a buffer is free instead of at a fixed place in the order; kept "
        "gradients are fp32, so that accumulation and clipping stay exact",
    )
    Options = DeepOptimizerStatesOptions

    def __init__(self, options: Any, recipe: Recipe) -> None:
        super().__init__(options, recipe)
        self.offload: InterleavedOffload | None = None
        self._names: dict[Tensor, str] = {}

    def check(self, recipe: Recipe) -> None:
        """A stride is 1 or more.

        Raises:
            MethodError: it is less.
        """
        if isinstance(self.options.stride, int) and self.options.stride < 1:
            raise MethodError(f"{self.where}.stride", got=self.options.stride, expected="1 or more, auto or null")

    def model(self, model: torch.nn.Module) -> torch.nn.Module:
        """Remember names, for messages and the state."""
        self._names = {p: name for name, p in model.named_parameters()}
        return model

    def optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Take over its groups, masters and options; it has no state yet."""
        o = self.options
        inner: torch.optim.Optimizer = getattr(optimizer, "inner", optimizer)
        masters: dict[Tensor, Tensor] = getattr(optimizer, "masters", {})
        own = {master: p for p, master in masters.items()}
        groups = [{**group, "params": [own.get(p, p) for p in group["params"]]} for group in inner.param_groups]
        try:
            check_elementwise(inner, self.where)
            if hasattr(optimizer, "close"):
                optimizer.close()  # its hooks would take the gradients
            offload = InterleavedOffload(
                groups,
                type(inner),
                stride=o.stride,
                subgroup=o.subgroup,
                resident_fraction=o.resident_fraction,
                async_grads=o.async_grads,
                max_device_extra=o.max_device_extra,
                masters=masters,
            )
        except HeadwayError as error:
            where = error.where if error.where.startswith(self.where) else f"{self.where}: {error.where}"
            raise MethodError(where, error.what, expected=error.expected, hint=error.hint) from error
        self.offload = offload
        layout = offload.arrangement.layout
        self.changed("parameters with their state in host memory", layout.numel, human(12 * layout.numel, "B"))
        return offload

    def forward_backward(self, forward_backward: ForwardBackward) -> ForwardBackward:
        """A micro-batch ends when its gradients are where they are gathered: others may read them there."""
        offload = self.offload
        if offload is None:
            return forward_backward

        def gathered(micro: dict[str, Tensor], targets: int) -> Tensor:
            loss = forward_backward(micro, targets)
            offload.wait()
            return loss

        return gathered

    def gradients(self, gradients: Gradients) -> Gradients:
        """Hand the norm on, so that the optimizer need not look for numbers that are not finite."""
        offload = self.offload
        if offload is None:
            return gradients

        def noted() -> Tensor:
            norm = gradients()
            offload.note_norm(norm)
            return norm

        return noted

    def report(self) -> dict[str, Any]:
        """Stride, prediction and measurement, phases, and what the lanes have carried."""
        return self.offload.report() if self.offload is not None else {}

    def state_dict(self) -> dict[str, Any]:
        """How many steps every parameter has had, to check the optimizer's state against."""
        if self.offload is None:
            return {}
        return {"updates": self.offload.updates, "steps": self._steps()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the state that was loaded is of one step.

        Raises:
            CheckpointError: it mixes two.
        """
        if self.offload is None:
            return
        found, expected = self._steps(), state["steps"]
        for name, step in expected.items():
            if found.get(name) != step:
                what = f"has the optimizer state of step {found.get(name)} where its subgroup was at step {step}"
                raise CheckpointError(name, what, hint="the checkpoint mixes two; load another")
        self.offload.updates = state["updates"]

    def _steps(self) -> dict[str, int]:
        assert self.offload is not None
        return {self._names[p]: step for p, step in self.offload.steps_of().items()}
