"""Dropout where each rank of a tensor group has other tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.parallel.tensor.place import Place


class TokenDropout:
    """``F.dropout`` for tokens that may be shared among the ranks.

    What all ranks hold alike gets the same mask on all, from the common random numbers. What each holds for itself
    gets masks of its own: seeded by one common random number and the rank, so that the common numbers stay common, and
    whoever puts them back, to recompute a block or to resume a run, finds the same masks.
    """

    def __init__(self, place: Place) -> None:
        self.place = place

    def __call__(self, x: Tensor, p: float, training: bool) -> Tensor:
        """Zero elements with probability ``p`` and scale the others by 1 / (1 - p)."""
        if not training or p == 0.0:
            return x
        return self._own(x, p) if self.place.divided else F.dropout(x, p, True)

    @torch.compiler.disable
    def _own(self, x: Tensor, p: float) -> Tensor:
        common = int(torch.randint(2**48, ()))
        generator = torch.Generator(x.device).manual_seed(common * self.place.size + self.place.rank)
        return x * torch.empty_like(x).bernoulli_(1 - p, generator=generator).div_(1 - p)
