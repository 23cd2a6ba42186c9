"""The one Adam kernel that host and device lanes run: torch's own fused one, on lists of flat pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headway.core.errors import HeadwayError


def adam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    group: dict[str, Any],
) -> None:
    """One step of Adam or AdamW in place, bit for bit what ``torch.optim.AdamW(fused=True)`` does on that device.

    Args:
        params: fp32, all on one device, of any shapes.
        grads: fp32, of the same shapes.
        exp_avgs: first moments.
        exp_avg_sqs: second moments.
        steps: scalars fp32 on the CPU, one for each parameter; each is raised by one.
        group: a torch Adam's parameter group.

    Source: Loshchilov and Hutter 2019, algorithm 2, as fused in torch.
    """
    if not params:
        return
    torch._foreach_add_(list(steps), 1)
    counts = list(steps)
    if params[0].is_cuda:
        counts = list(torch.stack(counts).to(params[0].device).unbind())
    kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    beta1, beta2 = group["betas"]
    kernel(
        list(params),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        [],
        counts,
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=group["maximize"],
    )


def check_elementwise(optimizer: torch.optim.Optimizer, where: str) -> None:
    """Refuse an optimizer of which the parts of a parameter cannot be updated apart, or not by ``adam_``.

    Raises:
        HeadwayError: it is not torch's Adam or AdamW, or keeps more than two moments.
    """
    kind = type(optimizer)
    if kind not in (torch.optim.Adam, torch.optim.AdamW):
        why = "subgroups cut through parameters, so that only what is element by element comes out the same"
        raise HeadwayError(where, f"cannot split {kind.__name__}: {why}", expected="Adam or AdamW")
    for group in optimizer.param_groups:
        for key in ("amsgrad", "differentiable", "capturable"):
            if group.get(key):
                raise HeadwayError(where, f"cannot offload an Adam with {key}: only the parameter and two moments are "
                                   "staged", hint=f"leave {key} out")  # fmt: skip


def check_params(optimizer: torch.optim.Optimizer, where: str) -> None:
    """Refuse parameters that cannot be laid end to end with fp32 masters.

    Raises:
        HeadwayError: they are on several devices, not contiguous, or of a type that fp32 cannot hold.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if len({p.device for p in params}) > 1:
        raise HeadwayError(where, "needs all parameters on one device")
    for p in params:
        if p.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise HeadwayError(where, f"cannot hold a parameter of {p.dtype}: masters are fp32",
                               expected="float32, bfloat16 or float16")  # fmt: skip
        if not p.is_contiguous() or p.layout != torch.strided:
            raise HeadwayError(where, f"needs contiguous parameters, got one of shape {list(p.shape)} with strides "
                               f"{list(p.stride())}", hint="call .contiguous() on it")  # fmt: skip
