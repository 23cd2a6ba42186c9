"""One rank's place in its tensor group: what enters and leaves the region in which each works on its own channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from headway.core.errors import ModelError
from headway.parallel.tensor.collectives import Copy, Gather, Join, Sum, SumScatter, take
from headway.parallel.tensor.regather import Gathered

TOKENS = -2
"""The dimension of tokens in [B, T, D]."""


class Place:
    """A rank in a group of ``size``, and whether it holds its share of the tokens outside of attention and MLP.

    Args:
        mesh: one dimension, the tensor group.
        sequence: Korthikanti et al.'s sequence parallelism: outside, each rank works on T / size tokens.
        regather: between the passes keep none of the tokens gathered for a region, and gather them again.
    """

    def __init__(self, mesh: DeviceMesh, sequence: bool, regather: bool = False) -> None:
        self.mesh, self.size, self.rank = mesh, mesh.size(), mesh.get_local_rank()
        self.group: str = mesh.get_group().group_name
        self.sequence, self.regather = sequence, regather
        self._gathered: Gathered | None = None
        self._whole = False

    def begin(self, tokens: int) -> None:
        """Sequences of so many tokens come in.

        Without gradients, a number that cannot be shared, such as the one token of a decoding step, is worked on by all
        ranks alike. With gradients it cannot: a block that is recomputed must find what it found in its first pass.

        Raises:
            ModelError: gradients are wanted, and the tokens cannot be shared among the ranks.
        """
        self._whole = self.sequence and tokens % self.size != 0
        if self._whole and torch.is_grad_enabled():
            below = tokens // self.size * self.size
            near = " or ".join(str(n) for n in (below, below + self.size) if n)
            raise ModelError("parallel.tensor.sequence", f"{tokens} tokens cannot be shared by {self.size} ranks",
                             hint=f"take sequences of {near} tokens, or sequence: false")  # fmt: skip

    @property
    def divided(self) -> bool:
        """Whether each rank holds its share of the tokens outside."""
        return self.sequence and not (self._whole and not torch.is_grad_enabled())

    def enter(self, x: Tensor) -> Tensor:
        """Into the region: all tokens, to be worked on in each rank's own way."""
        if self.divided:
            whole: Tensor = Gather.apply(x, TOKENS, self.size, self.group)
            if self.regather and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self._gathered = Gathered(x, whole, TOKENS, self.size, self.group)
            return whole
        return Copy.apply(x, self.group)  # type: ignore[no-any-return]

    def leave(self, x: Tensor) -> Tensor:
        """Out of the region: the sum of the ranks' contributions."""
        if self._gathered is not None:
            self._gathered.mine = None
            self._gathered = None
        if self.divided:
            return SumScatter.apply(x, TOKENS, self.size, self.group)  # type: ignore[no-any-return]
        return Sum.apply(x, self.group)  # type: ignore[no-any-return]

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``F.linear`` at the beginning of a region."""
        if self._gathered is not None and self._gathered.is_whole(x):
            return self._gathered.product(x, weight, bias)
        return F.linear(x, weight, bias)

    def copy(self, x: Tensor) -> Tensor:
        """What all have, to be worked on in each rank's own way."""
        return Copy.apply(x, self.group)  # type: ignore[no-any-return]

    def for_all(self, x: Tensor) -> Tensor:
        """The tokens outside, for all ranks alike."""
        return self.join(x, TOKENS) if self.divided else x

    def join(self, x: Tensor, dim: int) -> Tensor:
        """Everyone's part, to be worked on by all alike."""
        return Join.apply(x, dim, self.size, self.rank, self.group)  # type: ignore[no-any-return]

    def mine(self, x: Tensor, dim: int) -> Tensor:
        """This rank's tokens of what all have; no derivative over the group."""
        return take(x, dim, self.size, self.rank) if self.divided else x

    def outside(self, parameter: Tensor) -> Tensor:
        """A parameter that every rank has, for use on the tokens outside."""
        value = local(parameter)
        return self.copy(value) if self.divided else value

    def inside(self, parameter: Tensor) -> Tensor:
        """A parameter that every rank has, for use in its own part of the region."""
        return self.copy(local(parameter))

    def bounds(self, total: int) -> tuple[int, int]:
        """This rank's part of ``total`` rows, as DTensor divides them: all have as many, but the last."""
        each = -(-total // self.size)
        return min(self.rank * each, total), min((self.rank + 1) * each, total)

    def parameter(self, parameter: nn.Parameter, dim: int | None) -> nn.Parameter:
        """The same parameter as a DTensor, divided along ``dim`` or whole on every rank; nothing is sent."""
        value, placement = parameter.detach(), Replicate() if dim is None else Shard(dim)
        if dim is not None:
            start, end = self.bounds(value.shape[dim])
            value = value.narrow(dim, start, end - start).clone(memory_format=torch.contiguous_format)
        divided = DTensor.from_local(
            value, self.mesh, [placement], run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
        return nn.Parameter(divided, requires_grad=parameter.requires_grad)


def local(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter; its gradient becomes a DTensor again."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
