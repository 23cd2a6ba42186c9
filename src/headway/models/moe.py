"""The family of mixtures of experts: a Llama in whose blocks the feed-forward network is many, of which each token
visits a few. Mixtral and Qwen3-MoE are settings of it.

Everything but the feed-forward blocks is Llama's own; a router scores every token, its best ``top_k`` experts answer,
and the answers are added up by weight (`headway.layers.experts`).
"""

from __future__ import annotations

from torch import nn

from headway.layers.capacity import Capacity
from headway.layers.experts import MoE
from headway.layers.router import Router
from headway.models.config import MoEConfig
from headway.models.llama import FeedForward, Llama

__all__ = ["MoETransformer", "moe_layers"]


class MoETransformer(Llama):
    """A causal language model with experts; ``build_model`` gives it its weights."""

    residual_projections = (*Llama.residual_projections, "experts.down", "shared.down.weight")
    config: MoEConfig

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        plan = dict(Llama.tensor_plan)
        for index in range(config.dense_layers, config.layers):
            self.blocks[index].mlp = _moe(config)
            # Each rank routes the tokens it has between the regions that tensor parallelism divides.
            name = f"blocks.{index}.mlp"
            plan = {f"{name}_norm": "tokens", f"{name}.router": "tokens", f"{name}.experts": "tokens",
                    f"{name}.shared": "tokens", **plan}  # fmt: skip
        if config.dense_layers == 0:
            plan = {key: role for key, role in plan.items() if not key.startswith("blocks.*.mlp")}
        self.tensor_plan = plan  # type: ignore[misc]

    def flops_per_token(self, sequence: int) -> float:
        """As `Llama.flops_per_token`; of the experts, only those that a token visits."""
        stacks = sum(p.numel() for layer in moe_layers(self) for p in layer.experts.parameters())
        return super().flops_per_token(sequence) + 6.0 * stacks * self.config.top_k / self.config.experts


def _moe(config: MoEConfig) -> MoE:
    router = Router(config.hidden, config.experts, config.top_k, score=config.router, normalize=config.normalize)
    if config.router_bias:
        router.use_bias()
    shared = None
    if config.shared_experts:
        width = config.shared_experts * config.expert_channels
        shared = FeedForward(config.model_copy(update={"intermediate": width}))
    capacity = None if config.capacity is None else Capacity(config.capacity, config.drop, config.pad)
    return MoE(config.hidden, config.expert_channels, config.experts, router, shared=shared, capacity=capacity)


def moe_layers(model: nn.Module) -> list[MoE]:
    """The layers of experts in ``model``, in the order in which they run; wrappers around blocks do not hide them."""
    return [module for module in model.modules() if isinstance(module, MoE)]
