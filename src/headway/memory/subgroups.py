"""Equal subgroups of a model's parameters, for whoever moves optimizer state in pieces.

Parameters are laid end to end, group by group, and the line is cut every so many elements. A subgroup is one flat run
of elements and belongs to one parameter group, so that one learning rate and one weight decay hold for all of it. Its
pieces say which part of which parameter lies where.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CUT = 64
"""A parameter is cut at multiples of this many elements, so that a kernel's vectors and their remainder fall on the
same elements as in the whole parameter: the same bits come out."""


@dataclass(frozen=True)
class Piece:
    """Elements ``start:stop`` of the flattened parameter ``param``, at ``offset`` of its subgroup."""

    param: int
    start: int
    stop: int
    offset: int

    @property
    def numel(self) -> int:
        """Elements."""
        return self.stop - self.start


@dataclass(frozen=True)
class Subgroup:
    """``numel`` neighbouring elements of parameter group ``group``, from ``start`` of the whole line on."""

    index: int
    group: int
    start: int
    numel: int
    pieces: tuple[Piece, ...]

    def views(self, flat: Tensor) -> list[Tensor]:
        """The pieces of a buffer of this subgroup, [numel] or longer: a flat view each."""
        return [flat[piece.offset : piece.offset + piece.numel] for piece in self.pieces]

    def parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same pieces as flat views of the parameters (or their gradients) themselves, which are contiguous.

        Args:
            tensors: of all parameters, in the order of `Subgroups.params`.
        """
        return [tensors[piece.param].view(-1)[piece.start : piece.stop] for piece in self.pieces]


class Subgroups:
    """The layout of parameter groups in subgroups; it holds no memory.

    Args:
        groups: the parameters of each group, in the order in which they are laid.
        numel: elements of a subgroup at most; the last one of a group may be short, and one ends up to 63 elements
            early where a parameter is cut.

    Raises:
        ValueError: ``numel`` is less than 64.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]], numel: int) -> None:
        if numel < CUT:
            raise ValueError(f"a subgroup of {numel} elements, expected {CUT} or more")
        self.params: list[Tensor] = [p for group in groups for p in group]
        self.starts: list[int] = []
        """Where on the line each parameter begins."""
        self.subgroups: list[Subgroup] = []
        self.numel = 0
        """Elements of all."""
        self._pieces: list[Piece] = []
        index = 0
        for number, group in enumerate(groups):
            for param in group:
                self.starts.append(self.numel + self._filled)
                self._lay(number, index, param.numel(), numel)
                index += 1
            self._close(number)

    @property
    def _filled(self) -> int:
        return self._pieces[-1].offset + self._pieces[-1].numel if self._pieces else 0

    def _lay(self, group: int, index: int, size: int, numel: int) -> None:
        done = 0
        while done < size:
            room, rest = numel - self._filled, size - done
            take = rest if rest <= room else room // CUT * CUT
            if take == 0:
                self._close(group)
                continue
            self._pieces.append(Piece(index, done, done + take, self._filled))
            done += take

    def _close(self, group: int) -> None:
        if self._pieces:
            filled = self._filled
            self.subgroups.append(Subgroup(len(self.subgroups), group, self.numel, filled, tuple(self._pieces)))
            self.numel += filled
            self._pieces = []

    def __len__(self) -> int:
        return len(self.subgroups)

    def __iter__(self) -> Iterator[Subgroup]:
        return iter(self.subgroups)

    def __getitem__(self, index: int) -> Subgroup:
        return self.subgroups[index]

    @property
    def largest(self) -> int:
        """Elements of the largest subgroup; 0 without any."""
        return max((subgroup.numel for subgroup in self.subgroups), default=0)

    def slice(self, flat: Tensor, subgroup: Subgroup) -> Tensor:
        """A subgroup's part of a buffer of the whole line, [numel of all] -> [numel of the subgroup]."""
        return flat[subgroup.start : subgroup.start + subgroup.numel]

    def views(self, flat: Tensor) -> list[Tensor]:
        """Each parameter's part of a buffer of the whole line, in the parameter's shape."""
        return [
            flat[start : start + param.numel()].view(param.shape)
            for start, param in zip(self.starts, self.params, strict=True)
        ]

    @torch.no_grad()
    def gather(self, subgroup: Subgroup, tensors: Sequence[Tensor], flat: Tensor) -> None:
        """Copy a subgroup's pieces of per-parameter tensors into its flat buffer, and cast them to its type."""
        for view, part in zip(subgroup.views(flat), subgroup.parts(tensors), strict=True):
            view.copy_(part)

    @torch.no_grad()
    def scatter(self, subgroup: Subgroup, flat: Tensor, tensors: Sequence[Tensor]) -> None:
        """The inverse of `gather`."""
        for view, part in zip(subgroup.views(flat), subgroup.parts(tensors), strict=True):
            part.copy_(view)
