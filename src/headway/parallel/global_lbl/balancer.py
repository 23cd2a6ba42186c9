"""What balances the routers of a model while it trains, without any change of its layers.

Each router hands its routing to the balancer, which counts, and returns it with an identity function in its graph. When
the forward pass is over, the counts of all layers go to the other ranks in one message; when the backward pass comes to
a layer, the identity function adds the balancing loss's gradient. The frequencies are needed no earlier than that, so
that nothing waits for a message in the middle of a forward pass, and the loss that is logged stays what it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.layers.experts import MoE
from headway.layers.router import Routing
from headway.parallel.global_lbl.losses import Group, expert_counts, frequencies, sum_over
from headway.parallel.tensor.place import Place


class Balancer:
    """Adds ``weight * sum over layers of E sum_i f_i P_i`` to the mean loss of a step, by gradient alone.

    For each micro-batch: ``begin``, the forward pass inside ``forward``, the backward pass. After the last one of a
    step, ``end_step``. Gradients of ranks and micro-batches are to be summed; P is divided by the ``tokens`` of the
    whole step, so that the effective weight depends on neither their number.

    Args:
        layers: the layers of experts, all of the same number E.
        weight: of the balancing loss.
        group: ranks that hold different tokens of one step; None: the default group, if there is one.
        alone: count this rank's choices only (the usual, per-micro-batch loss).
        buffer: also count the earlier micro-batches of the step.
        micro_ratio: weight of the loss of the micro-batch alone, as a multiple of ``weight``.
        z_weight: of the z-loss.
        shuffle: the ablation: frequencies of as many tokens as the micro-batch has, drawn at random from all that would
            be counted.
        bias_rate: how far a step moves the biases of the routers towards balance; 0: they stay.
        whole: ranks over which load and bias are judged; None: the default group.
    """

    def __init__(
        self,
        layers: Sequence[MoE],
        *,
        weight: float = 0.01,
        group: Group | None = None,
        alone: bool = False,
        buffer: bool = True,
        micro_ratio: float = 0.0,
        z_weight: float = 0.0,
        shuffle: bool = False,
        bias_rate: float = 0.0,
        whole: Group | None = None,
    ) -> None:
        self.layers, self.experts = list(layers), layers[0].router.experts
        self.weight, self.micro_ratio, self.z_weight, self.bias_rate = weight, micro_ratio, z_weight, bias_rate
        self.group, self.alone, self.buffer, self.shuffle, self.whole = group, alone, buffer, shuffle, whole
        device = layers[0].router.weight.device
        shape = len(self.layers), self.experts
        self.window = torch.zeros(shape, dtype=torch.int64, device=device)
        """[L, E]: the choices that this step's earlier micro-batches have put into the frequencies."""
        self.idle = torch.zeros(shape, dtype=torch.int64, device=device)
        """[L, E]: steps since each expert last had a token."""
        self.load = torch.zeros(shape, dtype=torch.float64, device=device)
        """[L, E]: the frequencies of the last step, over all ranks."""
        self.lbl = torch.zeros(len(self.layers), dtype=torch.float64, device=device)
        """[L]: the loss of the last step as one batch over all ranks, exact whatever frequencies the gradient had."""
        self._own = torch.zeros_like(self.window)  # of this rank, in this step
        self._probs = torch.zeros_like(self.load)  # sums of probabilities, of this rank, in this step
        self._pool: list[list[Tensor]] = [[] for _ in self.layers]
        self._micro: _MicroBatch | None = None
        for index, layer in enumerate(self.layers):
            layer.router.balance = partial(self._route, index)
            if bias_rate and layer.router.bias is None:
                layer.router.use_bias()

    def detach(self) -> None:
        """Let go of the routers."""
        for layer in self.layers:
            layer.router.balance = None

    def begin(self, tokens: float) -> None:
        """A micro-batch of a step that has ``tokens`` tokens over all ranks and micro-batches."""
        self._micro = _MicroBatch(tokens, len(self.layers), self.experts, self.window.device)

    def forward(self, mask: Tensor | None = None) -> _Forward:
        """The context for the forward pass of the micro-batch that has begun.

        Args:
            mask: bool [B, T], the tokens that count; None: all.
        """
        return _Forward(self, mask)

    @torch.compiler.disable
    def _route(self, index: int, routing: Routing) -> Routing:
        micro = self._micro
        if micro is None or not self.layers[index].training:
            return routing
        mask = self._mask(index, micro.mask)  # [n]
        if mask is not None and len(mask) != len(routing.indices):
            raise RuntimeError(f"a router sees {len(routing.indices)} tokens, and the mask has {len(mask)}")
        if index not in micro.counted and not micro.reduced:
            micro.counted.add(index)
            micro.own[index] = expert_counts(routing.indices, self.experts, mask)
            probs = routing.probs.detach()
            self._probs[index] += (probs if mask is None else probs[mask]).sum(0, dtype=torch.float64)
            if self.shuffle:
                micro.choices[index] = routing.indices if mask is None else routing.indices[mask]
        if not torch.is_grad_enabled():
            return routing
        weights = _Inject.apply(routing.weights, routing.probs, routing.logits, index, micro, mask, self.z_weight)
        return dataclasses.replace(routing, weights=weights)

    def _mask(self, index: int, mask: Tensor | None) -> Tensor | None:
        """[n]: which of the tokens that a router sees count; tensor parallelism gives it a share of each sequence."""
        place: Place | None = getattr(self.layers[index].router, "place", None)
        if mask is None:
            return None
        return (mask if place is None else place.mine(mask, -1)).flatten()

    def _reduce(self) -> None:
        """Find the frequencies for the backward pass; once per micro-batch, however often it is run forward."""
        micro = self._micro
        assert micro is not None
        if micro.reduced:
            return
        micro.reduced = True
        self._own += micro.own
        if self.shuffle:
            shares = torch.stack([self._drawn(i, micro) for i in range(len(self.layers))])
        else:
            counts = micro.own if self.alone else sum_over(micro.own, self.group)
            if self.buffer:
                counts = self.window = self.window + counts
            shares = frequencies(counts)
        if self.micro_ratio:
            shares = shares + self.micro_ratio * frequencies(micro.own)
        # [L, E]: the gradient of the loss by the probabilities of any one token that counts.
        micro.slopes = self.weight * self.experts / micro.tokens * shares

    def _drawn(self, index: int, micro: _MicroBatch) -> Tensor:
        """[E]: the frequencies of random tokens, as many as this micro-batch has."""
        own = micro.choices.get(index)
        assert own is not None
        gathered = [own]
        if not self.alone and dist.is_available() and dist.is_initialized():
            everybody: list[Any] = [None] * dist.get_world_size(self.group)
            dist.all_gather_object(everybody, own.cpu(), group=self.group)
            gathered = [choices.to(own.device) for choices in everybody]
        pool = torch.cat([*self._pool[index], *gathered])  # [N, k]
        if self.buffer:
            self._pool[index] = [pool]
        chosen = torch.randperm(len(pool))[: len(own)].to(pool.device)
        return frequencies(expert_counts(pool[chosen], self.experts))

    def end_step(self) -> None:
        """The step's gradients are complete: judge its load, move the biases, count anew.

        Whether the optimizer then steps or not: a step that is skipped leaves nothing behind. One message, of counts
        and probabilities.
        """
        both = sum_over(torch.stack([self._own.double(), self._probs]), self.whole)  # [2, L, E]
        self.reset()
        counts, probs = both
        if not counts.any():
            return
        self.load = frequencies(counts)
        self.idle = torch.where(counts > 0, 0, self.idle + 1)
        self.lbl = self.experts * (self.load * frequencies_of(probs)).sum(-1)

    def move_biases(self) -> None:
        """Raise the bias of experts with less than the mean load of the last step, lower the others'.

        Source: Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing", algorithm 1, with global counts.
        """
        for layer, load in zip(self.layers, self.load, strict=True):
            if self.bias_rate and load.any() and layer.router.bias is not None:
                direction = torch.sign(1 / self.experts - load).to(layer.router.bias)
                layer.router.bias += self.bias_rate * direction

    def reset(self) -> None:
        """Forget the step that is under way."""
        self.window, self._own = torch.zeros_like(self.window), torch.zeros_like(self._own)
        self._probs, self._micro = torch.zeros_like(self._probs), None
        self._pool = [[] for _ in self.layers]

    def dead(self, steps: int) -> list[tuple[int, int]]:
        """Layer and number of the experts that had no token in the last ``steps`` steps."""
        return [(int(layer), int(expert)) for layer, expert in (self.idle >= steps).nonzero()]

    def state_dict(self) -> dict[str, Any]:
        """Between two micro-batches: what is counted so far, and for how long experts have been idle."""
        state = {"window": self.window, "own": self._own, "probs": self._probs, "idle": self.idle}
        pool = [torch.cat(choices) for choices in self._pool if choices]
        return {**{key: value.clone() for key, value in state.items()}, "pool": pool}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in the middle of that step."""
        device = self.window.device
        self.reset()
        self.window, self._own, self._probs, self.idle = (
            state[key].to(device).clone() for key in ("window", "own", "probs", "idle")
        )
        for kept, choices in zip(self._pool, state["pool"]):
            kept.append(choices.to(device))


def frequencies_of(sums: Tensor) -> Tensor:
    """[L, E] of sums of probabilities -> rows that sum to one."""
    return sums / sums.sum(-1, keepdim=True).clamp_min(1e-300)


class _MicroBatch:
    """What the routers of one micro-batch decided, and the gradients that follow from it."""

    def __init__(self, tokens: float, layers: int, experts: int, device: torch.device) -> None:
        self.tokens = max(tokens, 1.0)
        self.mask: Tensor | None = None
        self.counted: set[int] = set()
        self.reduced = False
        self.own = torch.zeros(layers, experts, dtype=torch.int64, device=device)
        self.choices: dict[int, Tensor] = {}
        self.slopes = torch.zeros(layers, experts, dtype=torch.float64, device=device)


class _Forward:
    def __init__(self, balancer: Balancer, mask: Tensor | None) -> None:
        self.balancer, self.mask = balancer, mask

    def __enter__(self) -> None:
        if self.balancer._micro is None:
            raise RuntimeError("call begin() before the forward pass of a micro-batch")
        self.balancer._micro.mask = self.mask

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.balancer._reduce()


class _Inject(torch.autograd.Function):
    """``weights`` as they are; in the backward pass, probabilities and logits get the gradients of the losses."""

    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor,
        probs: Tensor,
        logits: Tensor,
        index: int,
        micro: _MicroBatch,
        mask: Tensor | None,
        z_weight: float,
    ) -> Tensor:
        ctx.index, ctx.micro, ctx.z_weight, ctx.mask, ctx.dtype = index, micro, z_weight, mask, probs.dtype
        ctx.tokens = len(probs)
        ctx.save_for_backward(*([logits] if z_weight else []))
        return weights.view_as(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        micro = ctx.micro
        slope = micro.slopes[ctx.index].to(ctx.dtype)  # [E]
        of_probs = slope.expand(ctx.tokens, -1) if ctx.mask is None else ctx.mask[:, None] * slope  # [n, E]
        of_logits = None
        if ctx.z_weight:
            (logits,) = ctx.saved_tensors
            size = 2 * ctx.z_weight / micro.tokens * logits.logsumexp(-1, keepdim=True)  # [n, 1]
            size = size if ctx.mask is None else size * ctx.mask[:, None]
            of_logits = size * logits.softmax(-1)
        return grad, of_probs, of_logits, None, None, None, None
