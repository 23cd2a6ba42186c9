"""A model whose blocks are grouped in stages that a forward pass may leave out or reorder: one process's reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.core.errors import ModelError
from headway.parallel.skippipe.orders import Order


class _Scaled(torch.autograd.Function):
    """The tensor itself; its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """``x``, with its gradient times ``factor`` on the way back."""
    return x if factor == 1.0 else _Scaled.apply(x, factor)  # type: ignore[no-any-return, no-untyped-call]


def cut_blocks(blocks: int, stages: int) -> tuple[tuple[int, ...], ...]:
    """The blocks of every stage: consecutive, as equal in number as can be, the first stages longer.

    Raises:
        ModelError: there are fewer blocks than stages.
    """
    if not 2 <= stages <= blocks:
        raise ModelError("stages", got=stages, expected=f"2 to {blocks}, the number of blocks")
    each, rest = divmod(blocks, stages)
    starts = [stage * each + min(stage, rest) for stage in range(stages + 1)]
    return tuple(tuple(range(a, b)) for a, b in pairwise(starts))


def check_skippable(model: nn.Module, where: str) -> None:
    """Refuse a model whose blocks cannot be left out.

    Raises:
        ModelError: with the reason.
    """
    if not (callable(getattr(model, "embed", None)) and callable(getattr(model, "hidden", None))):
        raise ModelError(where, f"cannot leave out blocks of {type(model).__name__}, which has no embed() and hidden()",
                         hint="take one of Headway's own families")  # fmt: skip
    if any(type(part).__name__ in ("MoE", "Router") for part in model.modules()):
        raise ModelError(where, "has no place for the balance loss of experts in a stage that is left out",
                         hint="take a model without experts")  # fmt: skip
    seen: dict[int, int] = {}
    for index, block in enumerate(model.blocks):  # type: ignore[arg-type]
        for parameter in block.parameters():
            if seen.setdefault(id(parameter), index) != index:
                raise ModelError(where, f"finds a weight shared by blocks {seen[id(parameter)]} and {index}",
                                 hint="blocks in different stages must not share weights")  # fmt: skip


class StageSkip:
    """Runs a model's stages in any order.

    Stage 0 is the embedding, its blocks, the final norm and the head; the others are consecutive blocks. Positions
    belong to tokens, and so a stage computes the same wherever it stands in an order.

    Args:
        model: one of Headway's families: ``embed``, ``blocks``, ``norm``, ``head_weight``.
        stages: how many.
        sampler: gives an order where ``forward`` is told none; default: all stages.

    Raises:
        ModelError: the model's blocks cannot be left out, or there are fewer than stages.
    """

    def __init__(self, model: Any, stages: int, sampler: Callable[[], Order] | None = None) -> None:
        check_skippable(model, "StageSkip")
        self.model, self.sampler = model, sampler
        self.stages = cut_blocks(len(model.blocks), stages)
        self.full: Order = tuple(range(stages))
        self.order: Order | None = None
        self.scale: Sequence[float] = (1.0,) * stages
        self._plain = type(model).hidden

    def hidden(
        self, tokens: Tensor, *, order: Order | None = None, scale: Sequence[float] | None = None, **shared: Any
    ) -> Tensor:
        """The residual stream [B, T, D] after the stages of ``order`` and the final norm.

        Args:
            tokens: int64 [B, T].
            order: stages, 0 first; default: what ``using`` says, else the sampler, else all.
            scale: factors on the gradients of every stage's own weights (`visit_scale`); those of the stages' inputs
                stay what they are. Stage 0's must be 1: it is never skipped.
            **shared: what ``model.hidden`` takes: positions, segments.

        Raises:
            ValueError: the order does not begin with stage 0.
        """
        order = order or self.order or (self.sampler() if self.sampler else self.full)
        if order[0] != 0:
            raise ValueError(f"an order begins with stage 0, not {order}")
        scale = scale or self.scale
        x, beside = self.model.embed(tokens, **shared)
        for stage in order:
            x = self.run_stage(stage, x, beside, scale[stage])
        return self.model.norm(x)  # type: ignore[no-any-return]

    def run_stage(self, stage: int, x: Tensor, beside: dict[str, Any], factor: float = 1.0) -> Tensor:
        """The blocks of one stage [B, T, D] -> [B, T, D]; the gradients of their weights are scaled by ``factor``."""
        x = scaled_gradient(x, 1 / factor)
        for index in self.stages[stage]:
            x = self.model.blocks[index](x, **beside)
        return scaled_gradient(x, factor)

    def forward(self, tokens: Tensor, order: Order | None = None, **shared: Any) -> Tensor:
        """Logits [B, T, V]; arguments as for ``hidden``."""
        return F.linear(self.hidden(tokens, order=order, **shared), self.model.head_weight)

    __call__ = forward

    @contextmanager
    def using(self, order: Order, scale: Sequence[float] | None = None) -> Iterator[None]:
        """Within it, passes that are told no order take this one."""
        before = self.order, self.scale
        self.order, self.scale = order, scale or self.scale
        try:
            yield
        finally:
            self.order, self.scale = before

    def install(self) -> None:
        """Let ``model.hidden`` run the stages of ``using``; for code that calls the model itself."""

        def hidden(tokens: Tensor, **shared: Any) -> Tensor:
            if self.order is None or shared.get("cache") is not None:
                return self._plain(self.model, tokens, **shared)  # type: ignore[no-any-return]
            return self.hidden(tokens, **shared)

        self.model.hidden = hidden

    def remove(self) -> None:
        """Give ``model.hidden`` back."""
        self.model.__dict__.pop("hidden", None)


def visit_scale(orders: Sequence[Order], targets: Sequence[int], stages: int) -> list[float]:
    """Factors that make each stage's gradient the mean over the targets that visited it (``per_visit``).

    The loss is divided by the targets of the whole step; a stage that only some of them visit has a gradient smaller
    by their share.

    Args:
        orders: of the step's micro-batches.
        targets: how many each has.
    """
    total = sum(targets)
    shares = [sum(n for order, n in zip(orders, targets) if stage in order) for stage in range(stages)]
    return [total / share if share else 1.0 for share in shares]


def share_orders(stages: int, share: float, length: int | None = None) -> list[Order]:
    """All orders that keep about ``share`` of the stages, stage 0 among them, in their places.

    Args:
        length: how many stages, instead of a share.
    """
    kept = max(1, length or round(share * stages))
    return [(0, *rest) for rest in combinations(range(1, stages), kept - 1)]


@torch.no_grad()
def evaluate_share(
    skip: StageSkip, batches: Sequence[dict[str, Tensor]], share: float, orders: int | None = None
) -> float:
    """Mean loss per target, in nats, of a model of which only a share of the stages is there.

    Args:
        skip: the model in stages.
        batches: with int64 ``tokens`` and ``targets`` [B, T]; targets below 0 do not count.
        share: of the stages, 0 to 1; averaged over all choices of so many that keep stage 0.
        orders: take so many of the choices, evenly spread; default: all.
    """
    choices = share_orders(len(skip.stages), share)
    if orders is not None and orders < len(choices):
        choices = [choices[i * len(choices) // orders] for i in range(orders)]
    loss = count = 0.0
    for order in choices:
        for batch in batches:
            logits = skip.forward(batch["tokens"], order=order).flatten(0, 1).float()
            targets = batch["targets"].flatten()
            loss += float(F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
            count += int((targets >= 0).sum())
    return loss / count
