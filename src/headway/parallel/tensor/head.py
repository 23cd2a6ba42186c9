"""The output head of a model whose vocabulary is divided: no rank ever has all logits of a token.

Source: Shoeybi et al. (arXiv 1909.08053), section 3, on the parallel cross-entropy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.layers.linear_cross_entropy import IGNORE, default_chunk
from headway.parallel.tensor.collectives import all_gather
from headway.parallel.tensor.place import Place, local


class VocabularyHead:
    """The products with a head weight [V, D] of which each rank has some rows.

    Args:
        place: of this rank.
        vocabulary: V, of all ranks together.
    """

    def __init__(self, place: Place, vocabulary: int) -> None:
        self.place, self.vocabulary = place, vocabulary

    def loss(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        chunk: int | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        logit_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """``linear_cross_entropy``, the same on every rank.

        The ranks exchange three numbers per token, and the gradient of ``hidden``, which comes out summed.
        """
        if chunk is None:
            chunk = default_chunk(-(-self.vocabulary // self.place.size), weight.device)
        grad = torch.is_grad_enabled()
        options = (chunk, label_smoothing, z_loss, logit_scale, grad)
        loss = _VocabularyCrossEntropy.apply(hidden, local(weight), targets, self, *options)
        return loss, (targets != IGNORE).sum()

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """[..., D] -> [..., V]: all logits, on every rank."""
        part = F.linear(self.place.copy(hidden), local(weight))
        missing = -(-self.vocabulary // self.place.size) - part.shape[-1]
        if missing:
            part = F.pad(part, (0, missing))
        return self.place.join(part, -1)[..., : self.vocabulary]


class _VocabularyCrossEntropy(torch.autograd.Function):
    """As `layers.linear_cross_entropy`, whose comments hold here, on the columns of the logits that this rank has."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        head: VocabularyHead,
        chunk: int,
        label_smoothing: float,
        z_loss: float,
        logit_scale: float,
        grad: bool,
    ) -> Tensor:
        place, vocabulary = head.place, head.vocabulary
        start, end = place.bounds(vocabulary)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        need_hidden, need_weight = (grad and need for need in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        under_way = []
        for first in range(0, hidden.shape[0], chunk):
            x, y = hidden[first : first + chunk], targets[first : first + chunk]  # [C, D], [C]
            kept, mine = y != IGNORE, (y >= start) & (y < end)
            y = torch.where(mine, y - start, 0)[:, None]  # [C, 1]
            p, stats = _own_columns((x @ weight.T).to(wide).mul_(logit_scale), y, mine)  # [C, V / t], [3, C]
            own = stats[0]
            of_all = all_gather(stats[None], 0, place.size, place.group)  # [t, 3, C]
            z, right, total = of_all[:, 0].logsumexp(0), of_all[:, 1].sum(0), of_all[:, 2].sum(0)  # [C]
            of_token = z - (1 - label_smoothing) * right - label_smoothing * total / vocabulary + z_loss * z.square()
            loss += torch.where(kept, of_token, 0.0).sum()
            if not (need_hidden or need_weight):
                continue
            p *= ((own - z).exp() * (1 + 2 * z_loss * z))[:, None]
            if end > start:
                p.scatter_add_(1, y, (mine.to(wide) * (label_smoothing - 1))[:, None])
            if label_smoothing:
                p -= label_smoothing / vocabulary
            g, factor = p.to(hidden.dtype), (kept.to(wide) * logit_scale)[:, None]
            if grad_weight is not None:
                grad_weight += g.T @ (x * factor).to(x.dtype)
            if grad_hidden is not None:
                part = grad_hidden[first : first + chunk]
                torch.mul(g @ weight, factor, out=part)
                under_way.append(dist.all_reduce(part, group=place.mesh.get_group(), async_op=True))
        for sending in under_way:
            sending.wait()
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_loss,
            None if grad_weight is None else grad_weight * grad_loss,
            *(None,) * 7,
        )


def _own_columns(logits: Tensor, y: Tensor, mine: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities among this rank's logits [C, V / t]; their log-partition, target's logit and sum, [3, C]."""
    if not logits.shape[1]:
        stats = logits.new_zeros(3, logits.shape[0])
        stats[0] = -torch.inf
        return logits, stats
    right = torch.where(mine, logits.gather(1, y)[:, 0], 0.0)
    p = torch.softmax(logits, -1)
    z = logits.amax(-1) - p.amax(-1).log()
    return p, torch.stack((z, right, logits.sum(-1)))
