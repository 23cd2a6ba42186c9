"""Other libraries' ways to save memory as methods, so that the experiment `memory` can set them beside Headway's."""

from __future__ import annotations

from typing import Any

import torch

from headway.core.errors import MethodError, require
from headway.core.method import Card, ForwardBackward, Method
from headway.core.recipe import Recipe


def _card(name: str, title: str, summary: str) -> Card:
    return Card(
        name=name, title=title, paper=title, summary=summary, exact=True, approximates="", buys="memory", costs="time"
    )


class SaveOnCPU(Method):
    """``torch.autograd.graph.save_on_cpu``: every saved tensor in the memory of the host."""

    card = _card("save-on-cpu", "torch.autograd.graph.save_on_cpu", "Copies each saved tensor to the host and back.")

    def forward_backward(self, forward_backward: ForwardBackward) -> ForwardBackward:
        """Both passes inside the hooks."""
        pinned = torch.cuda.is_available()

        def offloaded(micro: dict[str, torch.Tensor], targets: int) -> torch.Tensor:
            with torch.autograd.graph.save_on_cpu(pin_memory=pinned):
                return forward_backward(micro, targets)

        self.changed("passes inside torch's hooks")
        return offloaded


class NeedsGPU(Method):
    """A method of a library that works on accelerators alone."""

    def check(self, recipe: Recipe) -> None:
        """Refuse a CPU.

        Raises:
            MethodError: there is no GPU.
        """
        if not torch.cuda.is_available():
            raise MethodError(self.where, f"needs a GPU: {self.card.title} moves tensors off one and back")


class TRLOffload(NeedsGPU):
    """TRL's activation offloading, with its defaults."""

    card = _card("trl-offload", "TRL's OffloadActivations", "Copies saved tensors to pinned memory on a side stream.")

    def forward_backward(self, forward_backward: ForwardBackward) -> ForwardBackward:
        """Both passes inside its context, as in its trainers."""
        require("trl", "peers", "TRL's activation offloading")
        from trl.models.activation_offloading import OffloadActivations

        def offloaded(micro: dict[str, torch.Tensor], targets: int) -> torch.Tensor:
            with OffloadActivations():
                return forward_backward(micro, targets)

        self.changed("passes inside TRL's context")
        return offloaded


class TorchaoOffload(NeedsGPU):
    """torchao's CPU-offloaded optimizer, with its defaults."""

    card = _card("torchao-offload", "torchao's CPUOffloadOptimizer", "Keeps the optimizer's state on the CPU.")

    def optimizer(self, optimizer: torch.optim.Optimizer) -> Any:
        """The same groups under torchao's optimizer."""
        require("torchao", "peers", "torchao's offloaded optimizer")
        from torchao.optim import CPUOffloadOptimizer

        self.changed("optimizer states moved", sum(len(group["params"]) for group in optimizer.param_groups))
        return CPUOffloadOptimizer(optimizer.param_groups, torch.optim.AdamW, fused=True)
