"""The tensors of an offloaded Adam: where masters, moments, counters and gradients are."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headway.core.errors import HeadwayError
from headway.memory.deep_optimizer_states.arrange import Arrangement
from headway.memory.deep_optimizer_states.kernel import adam_
from headway.memory.host import host_empty
from headway.memory.subgroups import Piece, Subgroup

RING = 4
"""Buffers for results that are rounded and not yet on the device."""
MOMENTS = ("exp_avg", "exp_avg_sq")


class Tensors:
    """State of all parameters: a long flat buffer of the host for each of master and moments, and what is resident.

    Args:
        params: all parameters, in order.
        arrangement: the subgroups and their places.
        resident: parameters whose state stays on the device.
        given: parameter -> its exact fp32 values, where it is rounded already.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        arrangement: Arrangement,
        resident: dict[Tensor, None],
        given: dict[Tensor, Tensor],
    ) -> None:
        self.params, self.arrangement, self.resident = list(params), arrangement, resident
        self.layout, self.device = arrangement.layout, self.params[0].device
        layout = self.layout
        self.groups: list[dict[str, Any]] = []
        """The optimizer's parameter groups; it sets them."""
        flats = [host_empty(layout.numel, torch.float32, self.device) for _ in range(3)]
        self.flats = (flats[0], flats[1], flats[2])
        self.masters: dict[Tensor, Tensor] = {}
        """Parameter -> fp32 master; fp32 residents are their own."""
        self.moments: dict[Tensor, tuple[Tensor, Tensor]] = {}
        for p, master, first, second in zip(layout.params, *(layout.views(f) for f in flats), strict=True):
            master.copy_(given.get(p, p).detach())
            self.masters[p], self.moments[p] = master, (first, second)
        for p in resident:
            if p.dtype != torch.float32:
                self.masters[p] = given.get(p, p).detach().float()
            self.moments[p] = (torch.zeros_like(p, dtype=torch.float32), torch.zeros_like(p, dtype=torch.float32))
        self._counts = [[torch.zeros(()) for _ in s.pieces] for s in layout]
        self.counts_of: dict[Tensor, list[Tensor]] = {}
        """Parameter -> number of steps, in every subgroup that has a piece of it."""
        for s in layout:
            for piece, count in zip(s.pieces, self._counts[s.index], strict=True):
                self.counts_of.setdefault(layout.params[piece.param], []).append(count)
        for p in self.params:
            self.counts_of.setdefault(p, [torch.zeros(())])
        rounded = [s.numel for s in arrangement.own if self._dtype(s) != torch.float32]
        self.ring = [host_empty(max(rounded), torch.float16, self.device) for _ in range(min(RING, len(rounded)))]
        """Room for rounded results, of any 16-bit type."""
        host = {layout.params[piece.param] for s in arrangement.own for piece in s.pieces}
        self.on_host_of = {p: p in host for p in self.params}
        """Parameter -> whether its gradient goes to the host: all of it does if any of it is updated there."""
        self.gathered = {p: self._anchor(p) for p in self.params}
        """Parameter -> the tensor whose ``.grad`` gathers its gradient."""

    def _anchor(self, p: Tensor) -> Tensor:
        if self.on_host_of[p]:
            return self.masters[p]
        if p in self.resident:
            return self.masters.get(p, p)
        return torch.zeros((), device=self.device).expand(p.shape)  # of the right form, and takes no memory

    def _dtype(self, subgroup: Subgroup) -> torch.dtype:
        return self.layout.params[subgroup.pieces[0].param].dtype

    def master(self, p: Tensor) -> Tensor:
        """The tensor by which a parameter's state is known, its fp32 values."""
        return self.masters.get(p, p)

    # What an update asks for.

    def hyper(self, subgroup: Subgroup) -> dict[str, Any]:
        """The parameter group's options."""
        return self.groups[self.arrangement.group_of[subgroup.group]]

    def active(self, subgroup: Subgroup) -> list[int]:
        """The pieces that have a gradient."""
        return [i for i, grad in enumerate(self.grads(subgroup)) if grad is not None]

    def counts(self, subgroup: Subgroup) -> list[Tensor]:
        """Each piece's number of steps."""
        return self._counts[subgroup.index]

    def grads(self, subgroup: Subgroup) -> list[Tensor | None]:
        """Flat fp32 gradient of each piece, wherever it is."""
        grads = ((self.gathered[self.layout.params[piece.param]].grad, piece) for piece in subgroup.pieces)
        return [None if grad is None else grad.view(-1)[piece.start : piece.stop] for grad, piece in grads]

    def on_host(self, piece: Piece) -> bool:
        """Whether a piece's gradient is in host memory."""
        return self.on_host_of[self.layout.params[piece.param]]

    def weights(self, subgroup: Subgroup) -> list[Tensor]:
        """Flat views of the training weights."""
        params = self.layout.params
        return [params[piece.param].data.view(-1)[piece.start : piece.stop] for piece in subgroup.pieces]

    def state(self, subgroup: Subgroup) -> tuple[Tensor, Tensor, Tensor]:
        """Flat fp32 masters and both moments, in host memory."""
        p, m, v = (self.layout.slice(flat, subgroup) for flat in self.flats)
        return p, m, v

    def update_resident(self, index: int, params: Sequence[Tensor]) -> None:
        """One step of those resident parameters of group ``index`` that have a gradient."""
        params = [p for p in params if self.gathered[p].grad is not None]
        grads: list[Tensor] = [self.gathered[p].grad for p in params]  # type: ignore[misc]
        first, second = ([self.moments[p][i] for p in params] for i in (0, 1))
        masters = [self.masters.get(p, p.data) for p in params]
        adam_(masters, grads, first, second, [self.counts_of[p][0] for p in params], self.groups[index])
        for p in params:
            if p in self.masters:
                p.data.copy_(self.masters[p])


class State(MutableMapping[Tensor, dict[str, Any]]):
    """The state by master, as other optimizers have it; writing copies into the memory that is there."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._params = {id(tensors.master(p)): p for p in tensors.params}

    def __contains__(self, master: object) -> bool:
        param = self._params.get(id(master))
        return param is not None and bool(self._tensors.counts_of[param][0])

    def __getitem__(self, master: Tensor) -> dict[str, Any]:
        if master not in self:
            raise KeyError(master)
        param = self._params[id(master)]
        first, second = self._tensors.moments[param]
        return {"step": self._tensors.counts_of[param][0].clone(), MOMENTS[0]: first, MOMENTS[1]: second}

    def __setitem__(self, master: Tensor, values: dict[str, Any]) -> None:
        self.put(self._params[id(master)], values)

    def __delitem__(self, master: Tensor) -> None:
        self.put(self._params[id(master)], None)

    def __iter__(self) -> Iterator[Tensor]:
        return (m for m in map(self._tensors.master, self._tensors.params) if m in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @staticmethod
    def check(values: dict[str, Any] | None) -> None:
        """Look at a parameter's state before anything of it is written.

        Raises:
            HeadwayError: it is another optimizer's.
        """
        if values is not None and values.keys() != {"step", *MOMENTS}:
            raise HeadwayError("optimizer state", f"is not Adam's: it has {', '.join(values)}",
                               expected=f"step, {', '.join(MOMENTS)}")  # fmt: skip

    @torch.no_grad()
    def put(self, param: Tensor, values: dict[str, Any] | None) -> None:
        """Write a parameter's state; None: it has had no step.

        Raises:
            HeadwayError: it is another optimizer's.
        """
        self.check(values)
        for own, key in zip(self._tensors.moments[param], MOMENTS, strict=True):
            if values is None:
                own.zero_()
            else:
                own.copy_(values[key])
        for count in self._tensors.counts_of[param]:
            count.fill_(0.0 if values is None else float(values["step"]))
