"""The classes that the modules of a divided model take on; names and global shapes of their parameters stay."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.layers.embedding import Embedding, embedding
from headway.parallel.tensor.place import Place, local


class ColumnLinear(nn.Linear):
    """Every rank has all inputs and gives some of the output channels."""

    place: Place

    def forward(self, input: Tensor) -> Tensor:
        """[B, T, in] -> [B, T, out / t]."""
        bias = None if self.bias is None else local(self.bias)
        return self.place.product(input, local(self.weight), bias)


class SharedColumnLinear(nn.Linear):
    """As `ColumnLinear`, where several ranks give the same channels: more ranks than key and value heads.

    Each has the whole weight, uses its head's rows, and the rows' gradients are summed.
    """

    place: Place
    kv_heads: int

    def forward(self, input: Tensor) -> Tensor:
        """[B, T, in] -> [B, T, hd]."""
        width = self.out_features // self.kv_heads
        start = self.place.rank * self.kv_heads // self.place.size * width
        weight = self.place.inside(self.weight).narrow(0, start, width)
        bias = None if self.bias is None else self.place.inside(self.bias).narrow(0, start, width)
        return self.place.product(input, weight, bias)


class RowLinear(nn.Linear):
    """Every rank has some of the inputs and contributes to all outputs."""

    place: Place

    def forward(self, input: Tensor) -> Tensor:
        """[B, T, in / t] -> [B, T, out], or [B, T / t, out] where tokens are shared."""
        y = self.place.leave(F.linear(input, local(self.weight)))
        return y if self.bias is None else y + self.place.outside(self.bias)


class VocabularyEmbedding(Embedding):
    """Every rank has some of the vocabulary."""

    place: Place

    def forward(self, input: Tensor) -> Tensor:
        """Integer [B, T] -> [B, T, D], or [B, T / t, D] where tokens are shared.

        Raises:
            IndexError: a token is not in the vocabulary (not looked at on a GPU, which would have to wait).
        """
        self.place.begin(input.shape[-1])
        total = self.num_embeddings
        if input.device.type == "cpu" and not torch.compiler.is_compiling() and input.numel():
            low, high = map(int, input.aminmax())
            if low < 0 or high >= total:
                raise IndexError(f"token {low if low < 0 else high} is not in a vocabulary of {total}")
        start, end = self.place.bounds(total)
        mine = (input >= start) & (input < end)
        weight = local(self.weight)
        if start == end:  # more ranks than the vocabulary has parts
            rows = weight.sum() + weight.new_zeros(*input.shape, self.embedding_dim)
        else:
            rows = embedding(torch.where(mine, input - start, 0), weight).masked_fill(~mine[..., None], 0.0)
        return self.place.leave(rows)


class PositionEmbedding(Embedding):
    """Positions of the tokens that this rank has outside."""

    place: Place

    def forward(self, input: Tensor) -> Tensor:
        """Integer [T] or [B, T] -> [.., T, D], or [.., T / t, D] where tokens are shared."""
        return embedding(self.place.mine(input, -1), self.place.outside(self.weight))


def use_whole(module: nn.Module, place: Place, role: str) -> None:
    """Have a module whose parameters every rank has whole work on this rank's share of the tokens or channels.

    Its class becomes one derived from its own, so that it stays what it is to ``isinstance``. While it runs, its
    parameters, and those of modules inside it, are plain tensors whose gradients are summed as the role needs.

    Args:
        module: changed in place.
        place: of this rank.
        role: ``tokens``, on the tokens outside; ``inside``, on this rank's channels or heads; ``enter``, on the tokens
            outside with its result going into the region; ``leave``, with its result for all ranks alike.
    """
    module.__dict__.update(place=place, role=role)
    kind: Any = type(module)
    if kind not in _DERIVED:
        _DERIVED[kind] = type(f"TensorParallel{kind.__name__}", (_UsesWhole, kind), {})
    module.__class__ = _DERIVED[kind]


_DERIVED: dict[Any, Any] = {}


class _UsesWhole(nn.Module):
    place: Place
    role: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the class it is derived from."""
        use = self.place.inside if self.role == "inside" else self.place.outside
        owners = [module._parameters for module in self.modules()]
        kept = [dict(parameters) for parameters in owners]
        for parameters in owners:
            for name, parameter in parameters.items():
                if parameter is not None:
                    parameters[name] = use(parameter)  # type: ignore[assignment]
        try:
            y = super().forward(*args, **kwargs)
        finally:
            for parameters, before in zip(owners, kept, strict=True):
                parameters.update(before)
        if self.role == "enter":
            return self.place.enter(y)
        return self.place.for_all(y) if self.role == "leave" else y
