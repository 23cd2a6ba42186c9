"""Gated linear attention: a state of one matrix per head that decays by channel, in chunks of matrix products.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t

Decays per channel (GLA), per token (RetNet, Lightning, Mamba-2) or none at all. Documents packed into one row begin
with a state of zero each. A state may come in and goes out, so that a sequence can be cut anywhere: between the steps
of generation, or between ranks (`parallel.sequence.linear`).

Shapes: B batch, H heads, T tokens, N chunks, C tokens of a chunk, dk channels of queries and keys, dv of values.

Source: Yang et al., Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv 2312.06635, section 4
and the appendix on its gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.layers.chunk_scores import chunk_scores, chunk_scores_backward
from headway.layers.chunks import Chunks, check_shapes, cut, document_starts, join, pad_cut, scan, scan_back

__all__ = ["CHUNK", "Carry", "linear_attention", "linear_attention_reference"]

CHUNK = 64
"""Tokens of a chunk, by default."""


class Carry(Protocol):
    """How the state comes from the part of the sequence to the left, and its gradient from the part to the right.

    Both are asked for as soon as this part's own share is known and waited for as late as possible.
    """

    def forward(self, state: Tensor, decay: Tensor) -> Callable[[], Tensor]:
        """Start to fetch the state before the first token.

        Args:
            state: [B, H, dk, dv], what this part alone adds up to.
            decay: [B, H, dk], what it leaves of the state before it.

        Returns:
            A function that waits for it, [B, H, dk, dv].
        """

    def backward(self, grad: Tensor, decay: Tensor) -> Callable[[], Tensor]:
        """Start to fetch the gradient of the state after the last token; ``grad`` is this part's own share of the
        gradient of the state before the first. Other arguments and result as for ``forward``."""


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    segments: Tensor | None = None,
    before: Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = CHUNK,
    carry: Carry | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal linear attention with a decaying state; queries are not scaled.

    Args:
        q: [B, H, T, dk].
        k: [B, H, T, dk].
        v: [B, H, T, dv].
        log_decay: logarithms of the decays, at most 0: [B, H, T, dk] or [B, H, T]; ``None`` for no decay. They are not
            checked (see ``check_log_decay``): a positive one makes a state that grows.
        segments: integer [B, T], the document of each token; each document begins with a state of zero.
        before: integer [B], with ``segments``: the document of the token before the first, if there is one.
        state: [B, H, dk, dv], from the tokens before; zero by default.
        chunk: tokens per chunk, a power of two: longer ones do more work within chunks and keep fewer states.
        carry: brings ``state`` while the chunks are worked on, instead of that argument.

    Returns:
        [B, H, T, dv] in the dtype of ``q``, and the state after the last token [B, H, dk, dv]. States and all sums are
        fp32 (fp64 for fp64 input). First derivatives only.

    Raises:
        ValueError: shapes do not fit, or ``chunk`` is no power of two.
    """
    check_shapes(q, k, v, log_decay, chunk)
    if carry is not None and state is not None:
        raise ValueError("a carry brings the state itself: give one of the two")
    starts = None if segments is None else document_starts(segments, before)
    chunk = min(chunk, 1 << (q.shape[2] - 1).bit_length())  # one token needs no chunk of 64
    if log_decay is not None and log_decay.ndim == 3:
        log_decay = log_decay.unsqueeze(-1)
    with _exact(q.device.type):
        y, last = _LinearAttention.apply(q, k, v, log_decay, state, starts, chunk, carry)
    return y, last


def linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    segments: Tensor | None = None,
    before: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The two equations token by token, in fp32 or better; see ``linear_attention``."""
    wide = torch.promote_types(q.dtype, torch.float32)
    B, H, T, dk = q.shape
    S = q.new_zeros(B, H, dk, v.shape[-1], dtype=wide) if state is None else state.to(wide)
    starts = None if segments is None else document_starts(segments, before)
    outputs = []
    for t in range(T):
        if log_decay is not None:
            decay = log_decay[:, :, t].to(wide).exp()  # [B, H, dk] or [B, H]
            S = S * (decay.unsqueeze(-1) if decay.ndim == 3 else decay[..., None, None])
        if starts is not None:
            S = S.masked_fill(starts[:, t, None, None, None], 0.0)
        S = S + k[:, :, t, :, None].to(wide) * v[:, :, t, None, :].to(wide)
        outputs.append((q[:, :, t, None, :].to(wide) @ S).squeeze(-2))
    return torch.stack(outputs, 2).to(q.dtype), S


class _LinearAttention(torch.autograd.Function):
    """Saved are the inputs, the scores within chunks and the state that came in; the states of the chunks are made
    again. What a state from outside adds comes last in both directions, so that there is time to fetch it."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        state: Tensor | None,
        starts: Tensor | None,
        chunk: int,
        carry: Carry | None,
    ) -> tuple[Tensor, Tensor]:
        parts = cut(q, k, v, log_decay, starts, chunk)
        states, last = _states(parts)
        wait = carry.forward(last, parts.total) if carry is not None else None
        scores = chunk_scores(parts.q, parts.k, parts.logs, parts.same)
        y = scores @ parts.v
        y += (parts.q * parts.to_start) @ states
        incoming = wait() if wait is not None else state
        if incoming is not None:
            incoming = incoming.to(last.dtype)
            y += (parts.q * parts.to_start * parts.before) @ incoming.unsqueeze(2)
            last = torch.addcmul(last, parts.total.unsqueeze(-1), incoming)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, log_decay, incoming, starts, scores)
        ctx.chunk, ctx.carry = chunk, carry
        ctx.needs_state = state is not None
        ctx.kept = incoming if carry is not None else None  # out of the reach of recomputation: see `parallel.sequence`
        return join(y, q.shape[2]).to(q.dtype), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_last: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, incoming, starts, scores = ctx.saved_tensors
        parts = cut(q, k, v, log_decay, starts, ctx.chunk)
        g = torch.zeros_like(parts.v) if grad is None else pad_cut(grad, parts.v.shape[2], ctx.chunk, parts.v.dtype)
        queries, keys = parts.q * parts.to_start, parts.k * parts.to_end
        # Gradient of the state at the end of each chunk, as far as this part of the sequence is concerned.
        ends, grad_state = scan_back(queries.mT @ g, parts.decay)
        wait = ctx.carry.backward(grad_state, parts.total) if ctx.carry is not None else None

        states, last = _states(parts)
        if incoming is not None:
            states += parts.before.mT * incoming.unsqueeze(2)
            last = torch.addcmul(last, parts.total.unsqueeze(-1), incoming)
        grad_v = scores.mT @ g
        grad_v += keys @ ends
        grad_q, grad_k = chunk_scores_backward(g @ parts.v.mT, parts.q, parts.k, parts.logs, parts.same)
        grad_q += (g @ states.mT).mul_(parts.to_start)
        grad_k += (parts.v @ ends.mT).mul_(parts.to_end)

        outgoing = wait() if wait is not None else grad_last
        if outgoing is not None:
            outgoing = outgoing.to(last.dtype)
            keys *= parts.after
            grad_v += keys @ outgoing.unsqueeze(2)
            grad_k += (parts.v @ outgoing.unsqueeze(2).mT).mul_(parts.to_end).mul_(parts.after)
            grad_state = torch.addcmul(grad_state, parts.total.unsqueeze(-1), outgoing)
        grad_decay = None
        if log_decay is not None and ctx.needs_input_grad[3]:
            grad_decay = _decay_gradient(parts, grad_q, grad_k, last, outgoing, log_decay, starts)
        T = q.shape[2]
        return (
            join(grad_q, T).to(q.dtype),
            join(grad_k, T).to(k.dtype),
            join(grad_v, T).to(v.dtype),
            grad_decay,
            grad_state if ctx.needs_state else None,
            None,
            None,
            None,
        )


def _exact(device: str) -> AbstractContextManager[Any]:
    """No autocast: it would form products of states in half precision."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _states(parts: Chunks) -> tuple[Tensor, Tensor]:
    """The states before each chunk [B, H, N, dk, dv] and after the last, from zero."""
    return scan((parts.k * parts.to_end).mT @ parts.v, parts.decay)


def _decay_gradient(
    parts: Chunks,
    grad_q: Tensor,
    grad_k: Tensor,
    last: Tensor,
    outgoing: Tensor | None,
    log_decay: Tensor,
    starts: Tensor | None,
) -> Tensor:
    """Of the logarithmic decays [B, H, T, dk or 1].

    With G the running sum of the logarithms, queries enter as ``q exp(G)`` and keys as ``k exp(-G)``; the last state
    has ``exp(G_T)`` in all its terms. A decay acts on all the sums from its token on.
    """
    sums = (parts.q * grad_q).sub_(parts.k * grad_k).flatten(2, 3)  # [B, H, N C, dk]
    if outgoing is not None:
        sums[:, :, -1] += (last * outgoing).sum(-1)
    if log_decay.shape[-1] == 1:
        sums = sums.sum(-1, keepdim=True)
    grads = sums.flip(2).cumsum(2).flip(2)[:, :, : log_decay.shape[2]]
    if starts is not None:  # a document's first decay acts on nothing: without this, what rounding leaves of zero
        grads = grads.masked_fill(starts[:, None, :, None], 0.0)
    return grads.to(log_decay.dtype)
