"""AdamW, fused, with the usual parameter groups."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from headway.optim.master import MasterOptimizer, lower_precision
from headway.optim.options import OptimizerOptions

_FUSED_ON = {"cpu", "cuda"}


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters by whether they decay: matrices do, vectors and scalars do not.

    Args:
        model: parameters that occur twice in it (a tied head) are taken once.
        weight_decay: of parameters with two dimensions or more; norms and biases get 0.

    Returns:
        Groups for a torch optimizer, without empty ones.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_adamw(
    params: Iterable[Any],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW with decoupled weight decay in torch's fused implementation where the device has one.

    Args:
        params: parameters or groups (see ``param_groups``).
        lr: step size; schedules overwrite it in the groups.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.

    Source: Loshchilov and Hutter 2019, algorithm 2.
    """
    groups: list[Any] = list(params)
    if groups and not isinstance(groups[0], dict):
        groups = [{"params": groups, "weight_decay": 0.0}]
    devices = {p.device.type for group in groups for p in group["params"]}
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=devices <= _FUSED_ON)


class AdamW:
    """The registry's entry: AdamW on a model, over fp32 masters where the model trains in lower precision."""

    Options = OptimizerOptions

    @staticmethod
    def build(
        model: nn.Module, options: OptimizerOptions, dtype: torch.dtype
    ) -> torch.optim.Optimizer | MasterOptimizer:
        """Round the model to ``dtype`` if that is not fp32, and make its optimizer."""

        def inner(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
            return build_adamw(groups, options.lr, options.betas, options.eps)

        if dtype in (torch.float32, torch.float64):
            return inner(param_groups(model, options.weight_decay))
        masters = lower_precision(model, dtype)
        return MasterOptimizer(param_groups(model, options.weight_decay), inner, masters)
