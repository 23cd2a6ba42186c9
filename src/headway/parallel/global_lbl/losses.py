"""The load-balancing loss, and the frequencies that go into it.

The loss of one layer is ``E sum_i f_i P_i``: f_i is the share of all choices that went to expert i, P_i the mean
probability of expert i. Only P carries a gradient. Whose choices f counts is the point of the paper: those of one
micro-batch push every sequence over all experts; those of the global batch let experts have domains. As f carries no
gradient, the sum over ranks of losses with a common f and each rank's own P *is* the loss of the global batch.

Source: Qiu et al. 2025, "Demons in the Detail" (arXiv 2501.11873), equations 1 to 4 and algorithm 1; perfect balance
is 1. Shapes: n tokens, k choices per token, E experts, L layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any
"""A ``torch.distributed`` process group."""


def expert_counts(indices: Tensor, experts: int, mask: Tensor | None = None) -> Tensor:
    """How often each expert was chosen.

    Args:
        indices: int64 [n, k].
        experts: their number E.
        mask: bool [n], the tokens that count; None: all.

    Returns:
        int64 [E].
    """
    weights = None if mask is None else mask[:, None].expand_as(indices).flatten().to(torch.float64)
    counts = torch.bincount(indices.flatten(), weights, minlength=experts)
    return counts.to(torch.int64)  # a float64 counts exactly up to 2^53


def frequencies(counts: Tensor) -> Tensor:
    """[..., E] of counts -> fp64 [..., E] that sum to one; zeros where nothing was counted."""
    return counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)


def load_balancing_loss(
    probs: Tensor, shares: Tensor, mask: Tensor | None = None, tokens: float | None = None
) -> Tensor:
    """``E sum_i f_i P_i``; its gradient goes through ``probs`` alone.

    Args:
        probs: [n, E], what the router gave before it chose.
        shares: [E], the frequencies f.
        mask: bool [n], the tokens that count; None: all.
        tokens: what the sum of probabilities is divided by. None: the tokens of ``probs`` that count, for a loss whose
            ranks and micro-batches are averaged. The tokens of the whole step over all ranks, for one whose ranks and
            micro-batches are summed.

    Returns:
        A scalar; 0 where no token counts.
    """
    if mask is not None:
        probs = probs * mask[:, None]
    number = float(len(probs) if mask is None else mask.sum()) if tokens is None else tokens
    return probs.shape[1] * (probs.sum(0) * shares.to(probs.dtype)).sum() / max(number, 1.0)


def z_loss(logits: Tensor, mask: Tensor | None = None, tokens: float | None = None) -> Tensor:
    """The mean square of ``logsumexp``, which keeps logits small: [n, E] -> a scalar; arguments as above.

    Source: Zoph et al. 2022, "ST-MoE", equation 5.
    """
    squares = logits.logsumexp(-1).square()
    if mask is not None:
        squares = squares * mask
    number = float(len(logits) if mask is None else mask.sum()) if tokens is None else tokens
    return squares.sum() / max(number, 1.0)


def sum_over(tensor: Tensor, group: Group | None) -> Tensor:
    """The sum over the ranks of ``group``, of the default one if it is None; the tensor itself in a lone process."""
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return tensor
    total = tensor.clone()
    dist.all_reduce(total, group=group)
    return total


class LoadBalancingLoss:
    """The loss for somebody's own layers and loop: call it where a router has decided, ``step`` after the optimizer.

    Every call is one message of E numbers. `Balancer` needs no change of the layers and one message for all of them.

    Args:
        experts: their number E.
        scope: the process group whose ranks hold different tokens of one step (data, sequence and expert ranks); None:
            the default group, if there is one. ``False``: no others.
        buffer: also count the earlier micro-batches of the step (algorithm 1).
    """

    def __init__(self, experts: int, *, scope: Group | bool | None = None, buffer: bool = True) -> None:
        self.experts, self.scope, self.buffer = experts, scope, buffer
        self._counted: dict[int, Tensor] = {}
        self._shares: dict[tuple[int, Any], Tensor] = {}  # by layer and micro-batch, until the step is over

    def __call__(
        self,
        probs: Tensor,
        indices: Tensor,
        mask: Tensor | None = None,
        *,
        layer: int = 0,
        tokens: float | None = None,
        micro_batch: Any = None,
    ) -> Tensor:
        """The loss of one layer in one micro-batch, to be added to the others with a weight.

        Args:
            probs: [n, E].
            indices: int64 [n, k].
            mask: bool [n], the tokens that count.
            layer: which one; each has its own counts.
            tokens: as `load_balancing_loss` has it.
            micro_batch: its number or name. A second call with the same one counts nothing, whatever micro-batches came
                between them: recomputation of activations runs every router twice.

        Returns:
            A scalar.
        """
        shares = self._shares.get((layer, micro_batch))
        if shares is None:
            counts = expert_counts(indices, self.experts, mask)
            if self.scope is not False:
                counts = sum_over(counts, self.scope)
            if self.buffer:
                counts = self._counted[layer] = counts + self._counted.get(layer, 0)
            shares = frequencies(counts)
            if micro_batch is not None:
                self._shares[layer, micro_batch] = shares
        return load_balancing_loss(probs, shares, mask, tokens)

    def step(self) -> None:
        """The optimizer has stepped, or the step was skipped: count anew."""
        self._counted.clear()
        self._shares.clear()

    def state_dict(self) -> dict[str, Any]:
        """The counts of a step that is under way."""
        return {"counted": {layer: counts.clone() for layer, counts in self._counted.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in the middle of that step."""
        self._counted, self._shares = dict(state["counted"]), {}
