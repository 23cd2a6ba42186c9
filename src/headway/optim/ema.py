"""Exponential moving average of the weights, used for evaluation and kept with the run.

Source: Polyak and Juditsky 1992; in this form Izmailov et al. (arXiv 1803.05407) section 3 and the weight averages
of Transformer training since Vaswani et al. (arXiv 1706.03762), section 6.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from headway.core.clip import local
from headway.core.method import Card, Method, Update, Weights
from headway.core.options import Options
from headway.core.state import master_weights


@torch.no_grad()
def ema_(averages: Iterable[Tensor], weights: Iterable[Tensor], decay: float) -> None:
    """``average = decay * average + (1 - decay) * weight``, in place, tensor by tensor."""
    torch._foreach_lerp_([local(a) for a in averages], [local(w) for w in weights], 1.0 - decay)


def warmed_decay(decay: float, updates: int) -> float:
    """The decay after n updates: (1 + n) / (10 + n) at first, so that the first weights are soon forgotten."""
    return min(decay, (1 + updates) / (10 + updates))


class EMAOptions(Options):
    """Options of `ema`."""

    decay: float = Field(0.999, gt=0, lt=1)
    """Share of the average kept per step; 1 / (1 - decay) steps are remembered."""


class EMA(Method):
    """Evaluate an average of the weights instead of the weights."""

    card = Card(
        name="ema",
        title="Exponential moving average of the weights",
        paper="Polyak and Juditsky 1992; Izmailov et al. 2018, arXiv 1803.05407",
        summary="Evaluates a running average of the fp32 weights; training itself is untouched.",
        exact=True,
        approximates="",
        buys="lower evaluation loss at a high learning rate, without waiting for its decay",
        costs="one fp32 copy of the weights and one pass over them per step",
        parallel=("replicate", "shard", "sequence", "tensor", "pipeline", "experts"),
    )
    Options = EMAOptions

    def model(self, model: nn.Module) -> nn.Module:
        """Remember the model whose weights are averaged."""
        self._model = model
        return model

    def optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Start the averages at the (master) weights."""
        self._optimizer, self._updates = optimizer, 0
        trained = {name for name, p in self._model.named_parameters() if p.requires_grad}
        self._averages = {k: v.detach().clone() for k, v in self._weights().items() if k in trained}
        self.changed("weights averaged", len(self._averages), f"decay {self.options.decay}")
        return optimizer

    def _weights(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in master_weights(self._model, self._optimizer).items()}

    def update(self, update: Update) -> Update:
        """After each update, move the averages."""

        def averaging() -> None:
            update()
            weights = self._weights()
            decay = warmed_decay(self.options.decay, self._updates)
            ema_(self._averages.values(), [weights[name] for name in self._averages], decay)
            self._updates += 1

        return averaging

    def weights(self, weights: Weights) -> Weights:
        """Put the averages into the model for the time of an evaluation."""

        @contextmanager
        def averaged() -> Iterator[None]:
            with weights():
                parameters = dict(self._model.named_parameters())
                saved = {name: parameters[name].detach().clone() for name in self._averages}
                self._put(parameters, self._averages)
                try:
                    yield
                finally:
                    self._put(parameters, saved)

        return averaged

    @torch.no_grad()
    def _put(self, parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            parameters[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The averages and how many updates they have seen."""
        return {"averages": self._averages, "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the averages back."""
        self._updates = state["updates"]
        for name, average in self._averages.items():
            average.copy_(state["averages"][name])


__all__ = ["EMA", "EMAOptions", "ema_", "warmed_decay"]
