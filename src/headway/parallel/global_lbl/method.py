"""The method `global-lbl` of a recipe."""

from __future__ import annotations

import os
from typing import Any, Literal

import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from headway.core.errors import MethodError
from headway.core.fallback import fallback
from headway.core.method import Card, ForwardBackward, Gradients, Loss, Method, Update
from headway.core.options import Options
from headway.core.recipe import Recipe
from headway.parallel.global_lbl.balancer import Balancer
from headway.parallel.global_lbl.losses import Group

_TOLERANCE = 1e-3


class GlobalLBLOptions(Options):
    """Options of `global-lbl`."""

    weight: float = Field(0.01, ge=0)
    """Weight of the balancing loss of each layer in the mean loss, whatever the number of ranks and micro-batches."""
    scope: Literal["world", "node", "micro"] = "world"
    """Whose choices are the frequencies: those of all ranks, of the ranks on one machine, or of each rank alone."""
    buffer: bool = True
    """Add the choices of the step's earlier micro-batches to the frequencies."""
    micro_ratio: float = Field(0.0, ge=0)
    """Also balance each micro-batch alone, with this multiple of `weight`; 0.01 makes micro-batches, and so the ranks'
    work, less uneven."""
    z_loss: float = Field(0.0, ge=0)
    """Weight of the mean square of the router's logsumexp, which keeps its logits small."""
    shuffle: bool = False
    """For experiments: frequencies of as many random tokens of the scope as the micro-batch has."""
    bias_rate: float = Field(0.0, ge=0)
    """Move a bias of each expert by so much per step towards an even load; with `weight: 0`, balance without a loss."""
    dead_after: int = Field(100, ge=1)
    """Raise an alarm over experts that had no token for so many steps."""


class GlobalLBL(Method):
    """Balance experts over the global batch instead of over every micro-batch."""

    card = Card(
        name="global-lbl",
        title="Load balancing over the global batch",
        paper="Qiu et al. 2025, Demons in the Detail, arXiv 2501.11873",
        summary="Balances experts by their frequencies over all ranks and micro-batches of a step, not over each one.",
        exact=False,
        approximates="the frequencies of the global batch: the first micro-batches of a step see fewer of its tokens "
        "than the last (algorithm 1); and it adds a loss",
        buys="experts that specialise by domain at the same balance, and a lower loss in large models",
        costs="one message of a few kilobytes per micro-batch; single micro-batches are less even",
        after=("label-smoothing", "sam"),
        refuses={
            "streambp": "it runs routers on pieces of a sequence, and cannot tell which tokens of these count",
            "memo": "it runs routers again on a part of the tokens, and cannot tell which tokens of these count",
        },
        deviations="the gradient is added in the backward pass, so that all layers share one message and the logged "
        "loss stays the plain one; targets that do not count are left out of the balance too",
        parallel=("replicate", "shard", "sequence", "tensor", "experts"),
    )
    Options = GlobalLBLOptions

    def check(self, recipe: Recipe) -> None:
        """Only a model with experts has something to balance.

        Raises:
            MethodError: the model has none, or the options ask for nothing.
        """
        family = getattr(recipe.model, "family", "?")
        if family != "moe":
            raise MethodError(self.where, f"balances experts, and a {family} model has none",
                              hint="take model.family=moe, or remove the method")  # fmt: skip
        o = self.options
        if not (o.weight or o.z_loss or o.bias_rate):
            raise MethodError(self.where, "has weight, z_loss and bias_rate 0, which changes nothing",
                              hint="set one of them")  # fmt: skip

    def model_config(self, config: Any) -> Any:
        """Have the bias that the method moves."""
        return config.model_copy(update={"router_bias": True}) if self.options.bias_rate else config

    def model(self, model: nn.Module) -> nn.Module:
        """Put the balancer into every router."""
        from headway.models.moe import moe_layers

        o, layers = self.options, moe_layers(model)
        self._balancer = Balancer(
            layers,
            weight=o.weight,
            group=_node(self.where) if o.scope == "node" else None,
            alone=o.scope == "micro",
            buffer=o.buffer,
            micro_ratio=o.micro_ratio,
            z_weight=o.z_loss,
            shuffle=o.shuffle,
            bias_rate=o.bias_rate,
        )
        self._alarms: set[str] = set()
        of = {"world": "all ranks", "node": "the ranks of a machine", "micro": "each rank alone"}[o.scope]
        of += ", micro-batches of a step together" if o.buffer else ", each micro-batch by itself"
        detail = f"effective weight {o.weight:g} in the mean loss of a step, frequencies of {of}"
        detail += f", random tokens of these: {o.shuffle}" if o.shuffle else ""
        detail += f", of the micro-batch alone {o.weight * o.micro_ratio:g}" if o.micro_ratio else ""
        self.changed("routers balanced", len(layers), detail)
        self.changed("routers with a z-loss", len(layers) * bool(o.z_loss), f"weight {o.z_loss:g}")
        self.changed("routers with a bias", len(layers) * bool(o.bias_rate), f"moved by {o.bias_rate:g} a step")
        return model

    def loss(self, loss: Loss) -> Loss:
        """Count in the forward pass, where the tokens that count are known."""
        balancer = self._balancer

        def balanced(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            with balancer.forward(batch["targets"] != -100):
                return loss(model, batch)

        return balanced

    def forward_backward(self, forward_backward: ForwardBackward) -> ForwardBackward:
        """Tell the balancer of each micro-batch, once, however often it is run."""
        balancer = self._balancer

        def balanced(micro: dict[str, Tensor], targets: int) -> Tensor:
            balancer.begin(targets)
            return forward_backward(micro, targets)

        return balanced

    def gradients(self, gradients: Gradients) -> Gradients:
        """The step's micro-batches are over, whether the optimizer will step or not."""

        def ended() -> Tensor:
            norm = gradients()
            self._balancer.end_step()
            self._watch()
            return norm

        return ended

    def update(self, update: Update) -> Update:
        """Move the biases with the weights."""

        def moved() -> None:
            update()
            self._balancer.move_biases()

        return moved

    def _watch(self) -> None:
        """Raise the alarms, each once."""
        balancer, o = self._balancer, self.options
        dead = balancer.dead(o.dead_after)
        if dead and "dead" not in self._alarms:
            self._alarms.add("dead")
            named = ", ".join(f"{expert} of layer {layer}" for layer, expert in dead[:4])
            named += f" and {len(dead) - 4} more" if len(dead) > 4 else ""
            fallback(
                "a model with dead experts",
                f"no token for {o.dead_after} steps came to expert {named}",
                f"what they could learn; a larger weight or bias_rate of {self.where} brings them back",
            )
        lowest = float(balancer.lbl.min())
        judged = o.weight > 0 and o.scope == "world" and bool(balancer.load.any())
        if judged and lowest < 1 - _TOLERANCE and "low" not in self._alarms:
            self._alarms.add("low")
            why = f"it is {lowest:.4f}, less than the 1 of perfect balance: probabilities and choices disagree"
            fallback("a balancing loss that no longer balances", why, "an even load")

    def report(self) -> dict[str, Any]:
        """By layer, of the last step: the loss as of one batch over all ranks, and largest over mean load."""
        balancer = self._balancer
        return {
            "load_balancing_loss": balancer.lbl.tolist(),
            "max_over_mean_load": (balancer.load.amax(1) * balancer.experts).tolist(),
            "dead_experts": len(balancer.dead(self.options.dead_after)),
            "alarms": sorted(self._alarms),
        }

    def state_dict(self) -> dict[str, Any]:
        """How long experts have been idle; between steps nothing else is counted."""
        return self._balancer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there."""
        self._balancer.load_state_dict(state)


def _node(where: str) -> Group | None:
    """The group of the ranks on this machine, as torchrun counts them; None in a lone process."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    here, world = int(os.environ.get("LOCAL_WORLD_SIZE", "0")), dist.get_world_size()
    if here < 1 or world % here:
        raise MethodError(f"{where}.scope", f"cannot tell which of {world} ranks share a machine",
                          hint="start the ranks with `headway train --ranks` or torchrun, as many on each")  # fmt: skip
    group, _ = dist.new_subgroups(group_size=here)
    return group
