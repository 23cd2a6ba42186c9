"""Sharpness-aware minimisation: take the gradient at the worst point nearby.

Source: Foret et al. (arXiv 2010.01412), equation 2 and algorithm 1; per micro-batch ("m-SAM", section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from headway.core.checkpointer import Checkpointer
from headway.core.method import Card, ForwardBackward, Method
from headway.core.options import Options


@torch.no_grad()
def ascend(parameters: Sequence[Tensor], gradients: Sequence[Tensor], rho: float) -> list[Tensor]:
    """Move ``parameters`` in place by ``rho * g / ||g||`` (equation 2, p = 2) and return what they were.

    The saved copies, not a subtraction, bring the weights back: in bf16 a sum cannot be undone exactly.
    """
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([g.float() for g in gradients])))
    before = [p.detach().clone() for p in parameters]
    scale = rho / (norm + 1e-12)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.add_(gradient * scale.to(gradient.dtype))
    return before


class SAMOptions(Options):
    """Options of `sam`."""

    rho: float = Field(0.05, gt=0)
    """Radius of the neighbourhood, in the 2-norm over all weights."""


class SAM(Method):
    """Two passes per micro-batch: one to find the worst weights nearby, one for the gradient there."""

    card = Card(
        name="sam",
        title="Sharpness-aware minimisation",
        paper="Foret et al. 2021, arXiv 2010.01412",
        summary="Takes each micro-batch's gradient at weights moved by rho along its own gradient.",
        exact=False,
        approximates="the maximum of the loss within radius rho, by one ascent step",
        buys="flatter minima and better generalisation, mostly when data is repeated",
        costs="twice the forward and backward passes, and one copy of the weights",
    )
    Options = SAMOptions

    def model(self, model: nn.Module) -> nn.Module:
        """Remember the weights to move."""
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.changed("weights perturbed", len(self._parameters), f"rho {self.options.rho:g}")
        return model

    def optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Remember where the gradients are gathered: where the optimizer says, or at the masters if there are any."""
        gathered: dict[Tensor, Tensor] = getattr(optimizer, "gathered", None) or getattr(optimizer, "masters", {})
        self._gathered = [gathered.get(p, p) for p in self._parameters]
        return optimizer

    def checkpointer(self, checkpointer: Checkpointer) -> Checkpointer:
        """Remember whom to ask before weights are moved."""
        self._checkpointer = checkpointer
        return checkpointer

    def forward_backward(self, forward_backward: ForwardBackward) -> ForwardBackward:
        """Find the ascent direction, then let the wrapped pass add its gradient at the moved weights.

        The loss reported is that at the unmoved weights.
        """

        def sharpness_aware(micro: dict[str, Tensor], targets: int) -> Tensor:
            kept = [None if t.grad is None else t.grad.clone() for t in self._gathered]  # a buffer may be used again
            for tensor in self._gathered:
                tensor.grad = None
            with torch.random.fork_rng():  # both passes see the same dropout
                loss = forward_backward(micro, targets)
            moved = [
                (p, t.grad.to(p.device, p.dtype))
                for p, t in zip(self._parameters, self._gathered)
                if t.grad is not None
            ]
            self._checkpointer.fence()
            before = ascend([p for p, _ in moved], [g for _, g in moved], self.options.rho)
            for tensor, gradient in zip(self._gathered, kept):
                tensor.grad = gradient
            forward_backward(micro, targets)
            with torch.no_grad():
                for (parameter, _), value in zip(moved, before):
                    parameter.copy_(value)
            return loss

        return sharpness_aware
