"""Sequences of linear attention cut into chunks: decays to and from the borders, states from chunk to chunk.

Shapes: B batch, H heads, T tokens, N chunks, C tokens of a chunk, dk channels of queries and keys, dv of values. Decays
are [.., dk], or [.., 1] where all channels of a head have the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.core.errors import ModelError


@dataclass(frozen=True)
class Chunks:
    """One part of a sequence in chunks, in fp32 or fp64. Where a document begins, the decay is zero."""

    q: Tensor
    """[B, H, N, C, dk]"""
    k: Tensor
    """[B, H, N, C, dk]"""
    v: Tensor
    """[B, H, N, C, dv]"""
    logs: Tensor
    """[.., N, C, dk or 1], running sums of the logarithmic decays within the chunk; beginnings of documents apart."""
    same: Tensor | None
    """bool [B, 1, N, C, C], pairs of one document; ``None`` where there is one only."""
    to_start: Tensor
    """[.., N, C, dk or 1], what a token sees of the state before its chunk."""
    to_end: Tensor
    """[.., N, C, dk or 1], what is left of a token in the state after its chunk."""
    decay: Tensor
    """[.., N, dk or 1], what a chunk leaves of the state before it."""
    before: Tensor
    """[.., N, 1, dk or 1], what the chunks before this one leave of the state before them all."""
    after: Tensor
    """[.., N, 1, dk or 1], what the chunks after this one leave of the state after it."""
    total: Tensor
    """[B, H, dk], what all chunks leave of the state before them."""


def cut(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, starts: Tensor | None, size: int) -> Chunks:
    """Cut [B, H, T, d] into chunks of ``size`` tokens; the last is filled up with tokens that change nothing.

    Args:
        log_decay: [B, H, T, dk or 1], or ``None``.
        starts: bool [B, T], first tokens of documents.
    """
    B, H, T, dk = q.shape
    N = -(-T // size)
    wide = torch.promote_types(q.dtype, torch.float32)
    if log_decay is None:
        logs = torch.zeros(1, 1, N, size, 1, dtype=wide, device=q.device)
    else:
        logs = pad_cut(log_decay, N, size, wide).cumsum(3)
    ends = logs[..., -1, :]  # [.., N, dk]
    to_start, to_end, decay = logs.exp(), (ends.unsqueeze(-2) - logs).exp_(), ends.exp()
    before = (ends.cumsum(2) - ends).exp_()
    after = (ends.flip(2).cumsum(2).flip(2) - ends).exp_()
    total = ends.sum(2).exp_()  # [.., dk]
    same = None
    if starts is not None:
        begun = F.pad(starts, (0, N * size - T)).view(B, 1, N, size).cumsum(-1)  # documents begun in the chunk so far
        same = begun.unsqueeze(-1) == begun.unsqueeze(-2)
        through = begun[..., -1:] == 0  # [B, 1, N, 1], chunks in which none begins
        to_start = to_start * (begun == 0).unsqueeze(-1)
        to_end = to_end * (begun == begun[..., -1:]).unsqueeze(-1)
        decay = decay * through
        broken = (~through).int()
        before = before * ((broken.cumsum(2) - broken) == 0)
        after = after * ((broken.flip(2).cumsum(2).flip(2) - broken) == 0)
        total = total * through.all(2)
    return Chunks(
        pad_cut(q, N, size, wide),
        pad_cut(k, N, size, wide),
        pad_cut(v, N, size, wide),
        logs,
        same,
        to_start,
        to_end,
        decay,
        before.unsqueeze(-2),
        after.unsqueeze(-2),
        total.expand(B, H, dk),
    )


def pad_cut(x: Tensor, chunks: int, size: int, dtype: torch.dtype) -> Tensor:
    """[B, H, T, d] -> [B, H, N, C, d], with zeros behind the end."""
    x = x.to(dtype)
    short = chunks * size - x.shape[2]
    x = F.pad(x, (0, 0, 0, short)) if short else x.contiguous()
    return x.unflatten(2, (chunks, size))


def join(x: Tensor, length: int) -> Tensor:
    """[B, H, N, C, d] -> [B, H, T, d]: the inverse of ``pad_cut``."""
    return x.flatten(2, 3)[:, :, :length]


def scan(adds: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """States before each chunk and after the last, from zero: ``S[n + 1] = decay[n] S[n] + adds[n]``.

    Args:
        adds: [B, H, N, dk, dv].
        decay: [.., N, dk or 1].

    Returns:
        [B, H, N, dk, dv] and [B, H, dk, dv].
    """
    states = torch.empty_like(adds)
    state, decay = torch.zeros_like(adds[:, :, 0]), decay.unsqueeze(-1)
    for n in range(adds.shape[2]):
        states[:, :, n] = state
        state = torch.addcmul(adds[:, :, n], decay[:, :, n], state)
    return states, state


def scan_back(adds: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """The same from right to left: what comes to each chunk's end from those after it, and to the first's beginning."""
    states = torch.empty_like(adds)
    state, decay = torch.zeros_like(adds[:, :, 0]), decay.unsqueeze(-1)
    for n in reversed(range(adds.shape[2])):
        states[:, :, n] = state
        state = torch.addcmul(adds[:, :, n], decay[:, :, n], state)
    return states, state


def document_starts(segments: Tensor, before: Tensor | None = None) -> Tensor:
    """bool [B, T]: tokens before which the document changes. The first begins none where ``before`` is not given: then
    either nothing is before it, or what is belongs to the same document.

    Args:
        segments: integer [B, T].
        before: integer [B], the document of the token before the first.
    """
    previous = segments[:, :1] if before is None else before[:, None].to(segments)
    return segments != torch.cat((previous, segments[:, :-1]), 1)


def check_shapes(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, chunk: int) -> None:
    """Refuse what does not fit.

    Raises:
        ValueError: with the shapes.
    """
    if q.ndim != 4 or q.shape != k.shape or q.shape[:3] != v.shape[:3] or not q.shape[2]:
        raise ValueError(
            f"q, k [B, H, T, dk] and v [B, H, T, dv] of {[*q.shape]}, {[*k.shape]}, {[*v.shape]} do not fit"
        )
    if log_decay is not None and log_decay.shape not in (q.shape, q.shape[:3], (*q.shape[:3], 1)):
        raise ValueError(f"log_decay {[*log_decay.shape]} is for q {[*q.shape]} neither [B, H, T] nor [B, H, T, dk]")
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"chunk is {chunk}, and must be a power of two")


def check_log_decay(log_decay: Tensor, where: str) -> None:
    """Refuse decays above one, which make a state that grows without bound.

    Raises:
        ModelError: with the place of the first.
    """
    wrong = ~((log_decay <= 0) & (log_decay > -torch.inf))  # NaN too
    if bool(wrong.any()):
        index = tuple(int(i) for i in wrong.nonzero()[0])
        raise ModelError(where, f"has a logarithmic decay of {float(log_decay[index]):g} at {list(index)}",
                         expected="a finite number of at most 0, for a decay of at most 1")  # fmt: skip
