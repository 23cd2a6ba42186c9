"""A batch cut along its sequences, one part for each rank; and what ranks that share sequences have to agree on.

Shapes: B batch, T tokens, P ranks.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from headway.core.errors import DataError, RecipeError
from headway.models.gpt2 import positions_in_documents

Layout = Literal["contiguous", "zigzag"]
MASKED = -100


def ring_size(kind: str, degree: int, ring: int | None) -> int:
    """Ranks in each ring: all of them for ``ring``, none for kinds without.

    Raises:
        RecipeError: ``usp`` with rings that ``degree`` ranks do not make up.
    """
    if kind == "ring":
        return degree
    if kind != "usp":
        return 1
    ring = 2 if ring is None else ring
    if ring < 1 or degree % ring:
        fits = ", ".join(str(n) for n in range(1, degree + 1) if degree % n == 0)
        raise RecipeError("parallel.sequence.ring", f"of {ring} does not make rings of {degree} ranks",
                          hint=f"take one of {fits}")  # fmt: skip
    return ring


def pieces(degree: int, kind: str = "ulysses", ring: int | None = None, layout: Layout = "zigzag") -> int:
    """The number of which the tokens of a sequence must be a multiple."""
    zigzag = layout == "zigzag" and ring_size(kind, degree, ring) > 1
    return degree * 2 if zigzag else degree


def own_positions(
    tokens: int, rank: int, degree: int, kind: str = "ulysses", ring: int | None = None, layout: Layout = "zigzag"
) -> Tensor:
    """Where the tokens of a rank lie in the sequence.

    A ring cuts the sequence in as many stretches as it has ranks, or with ``zigzag`` in twice as many, of which place
    ``r`` of ``R`` has numbers ``r`` and ``2 R - 1 - r``; the ranks that exchange heads cut that once more.

    Args:
        tokens: T, a multiple of ``pieces(...)``.

    Returns:
        int64 [T/P].
    """
    rings = ring_size(kind, degree, ring)
    place, inner = divmod(rank, degree // rings)
    if layout == "zigzag" and rings > 1:
        size = tokens // (2 * rings)
        first, last = place * size, (2 * rings - 1 - place) * size
        whole = torch.cat([torch.arange(first, first + size), torch.arange(last, last + size)])
    else:
        size = tokens // rings
        whole = torch.arange(place * size, (place + 1) * size)
    return whole.chunk(degree // rings)[inner]


def shard_batch(
    batch: dict[str, Tensor],
    rank: int,
    degree: int,
    *,
    kind: str = "ulysses",
    ring: int | None = None,
    layout: Layout = "zigzag",
    restart: bool = False,
) -> dict[str, Tensor]:
    """A rank's part of a batch of whole sequences; take the same ``kind``, ``ring`` and ``layout`` as for the model.

    Sequences that cannot be cut evenly are padded at their end: token 0, target -100, a document of its own.

    Args:
        batch: ``tokens``, ``targets`` (the next tokens already, so that no target is lost at a cut) and, of packed
            documents, ``segments``; integer [B, T]. ``positions`` may be given, [T] or [B, T].
        rank: place among the ranks that share the sequence.
        degree: P.
        kind: ``ulysses``, ``ring``, ``usp``, or those of linear attention.
        ring: with ``usp``, ranks in each ring.
        layout: with ``ring`` and ``usp``.
        restart: positions begin anew with every document (models with learned positions: ``restarts_positions``).

    Returns:
        ``tokens``, ``targets``, ``positions`` of [B, T/P] ([T/P] where all sequences have the same). ``segments`` stay
        whole, [B, T], where attention sees the whole sequence, and are cut for linear attention.

    Raises:
        DataError: a tensor is not [B, T].
    """
    shape = batch["tokens"].shape
    for name, value in batch.items():
        if value.shape != shape and not (name == "positions" and value.shape == shape[-1:]):
            raise DataError(f"batch[{name!r}]", f"is of shape {tuple(value.shape)}, and tokens are {tuple(shape)}")
    tokens, unit = shape[1], pieces(degree, kind, ring, layout)
    short = -tokens % unit
    segments = batch.get("segments")
    positions = batch.get("positions")
    if positions is None:
        whole = torch.arange(tokens, device=batch["tokens"].device)
        positions = whole if segments is None or not restart else positions_in_documents(segments)
    padded = dict(batch)
    if short:  # positions of padding begin at 0: learned ones may end with the sequence
        tail = torch.arange(short, device=positions.device, dtype=positions.dtype)
        positions = torch.cat([positions, tail.expand(*positions.shape[:-1], short)], -1)
        for name, value in batch.items():
            padded[name] = F.pad(value, (0, short), value=MASKED if name == "targets" else 0)
        if segments is not None:
            padded["segments"][:, tokens:] = segments.amax(1, keepdim=True) + 1
    own = own_positions(tokens + short, rank, degree, kind, ring, layout).to(positions.device)
    whole_segments = kind in ("ulysses", "ring", "usp")
    part = {name: value if name == "segments" and whole_segments else value[:, own].contiguous()
            for name, value in padded.items() if name != "positions"}  # fmt: skip
    part["positions"] = positions[..., own]
    return part


def padding(tokens: int, degree: int, kind: str = "ulysses", ring: int | None = None, layout: Layout = "zigzag") -> int:
    """Masked tokens that ``shard_batch`` adds to each sequence."""
    return -tokens % pieces(degree, kind, ring, layout)


def check_same_batch(batch: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Refuse ranks that share sequences and have read different ones; call it with whole batches, at the first step.

    Args:
        batch: integer tensors.
        group: the ranks.

    Raises:
        DataError: on every rank, with the ranks that differ from the first.
    """
    sums = []
    for name in sorted(batch):
        flat = batch[name].reshape(-1).long()
        weights = torch.arange(1, flat.numel() + 1, device=flat.device) * 2_654_435_761 + 1  # the order counts, too
        sums += [((flat + 7) * weights).sum(), torch.tensor(flat.numel(), device=flat.device)]
    own = torch.stack(sums)
    parts: list[Tensor] = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    if odd := [rank for rank, part in enumerate(parts) if not torch.equal(part, parts[0])]:
        raise DataError("parallel.sequence", f"has ranks {', '.join(map(str, odd))} of {len(parts)} read other samples "
                        "than rank 0, and they share sequences",
                        hint="give all of them the same data rank and seed")  # fmt: skip


class _GroupSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        total = x.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def sp_token_mean(loss_sum: Tensor, tokens: Tensor | int, group: dist.ProcessGroup | None = None) -> Tensor:
    """The mean loss per target over the ranks that share the sequences, the same on each; 0 where nobody has targets.

    Its gradient is that of this rank's part alone: the gradients of a weight are to be summed over the ranks, never
    averaged.

    Args:
        loss_sum: scalar, the sum over this rank's targets.
        tokens: the number of them; may be 0.
    """
    count = torch.as_tensor(tokens, device=loss_sum.device).clone()
    dist.all_reduce(count, group=group)
    total: Tensor = _GroupSum.apply(loss_sum, group)
    return total / count.clamp(min=1)
