"""One update of all subgroups, played over the lanes.

    host       Adam on the host's subgroups, one after the other
    cast       rounds what the host has updated to the training type
    to device  subgroups to stage, and the rounded results
    device     Adam on what is staged, and rounds it into the weights
    to host    staged subgroups on their way back

Every lane does one thing at a time; what follows is asked for when something ends. `plan.simulate` plays the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from headway.core.errors import HeadwayError
from headway.memory.backends import side_stream
from headway.memory.deep_optimizer_states.kernel import adam_
from headway.memory.lanes import Lane, Lanes
from headway.memory.subgroups import Piece, Subgroup

QUEUE = 1 << 26
"""Bytes of gradients that may wait for the link before the backward pass does; they take memory of the device."""


class Workers:
    """The lanes of a machine: its link, and who computes at each end.

    Args:
        lanes: the link; shared with whoever else moves data.
        host_rate: parameters per second that the host's update pretends to be limited to.
        device_rate: the same for the device's.
    """

    def __init__(
        self, lanes: Lanes | None = None, host_rate: float | None = None, device_rate: float | None = None
    ) -> None:
        self.lanes = lanes or Lanes(queue_bytes=QUEUE)
        self.owns = lanes is None
        self.to_device, self.to_host = self.lanes["host_to_device"], self.lanes["device_to_host"]
        self.host, self.cast, self.device = Lane("host_update", rate=host_rate), Lane("cast"), Lane(
            "device_update", rate=device_rate
        )  # fmt: skip

    @property
    def all(self) -> dict[str, Lane]:
        """The five by name, as in `plan.Timeline`."""
        return {"host": self.host, "cast": self.cast, "to_device": self.to_device, "to_host": self.to_host,
                "device": self.device}  # fmt: skip

    def busy(self) -> dict[str, float]:
        """Seconds each has worked."""
        return {name: lane.report.busy_seconds for name, lane in self.all.items()}

    def report(self) -> dict[str, dict[str, Any]]:
        """What each has done; of those that compute, ``bytes`` counts parameters."""
        return {name: {**asdict(lane.report), "rate": lane.report.rate} for name, lane in self.all.items()}

    def drain(self) -> None:
        """Wait until nothing is queued or running."""
        for lane in self.all.values():
            lane.drain()

    def close(self) -> None:
        """End the threads that are ours."""
        for lane in (self.host, self.cast, self.device):
            lane.close(cancel=True)
        if self.owns:
            self.lanes.close(cancel=True)


class Parts(Protocol):
    """What an update needs to know of an optimizer's tensors; a list has one entry for each piece that takes part."""

    device: torch.device

    def hyper(self, subgroup: Subgroup) -> dict[str, Any]:
        """The parameter group's options."""

    def active(self, subgroup: Subgroup) -> list[int]:
        """The pieces that have a gradient."""

    def counts(self, subgroup: Subgroup) -> list[Tensor]:
        """Each piece's number of steps."""

    def grads(self, subgroup: Subgroup) -> list[Tensor | None]:
        """Flat fp32 gradient of each piece, wherever it is."""

    def on_host(self, piece: Piece) -> bool:
        """Whether the gradient of a piece is in host memory."""

    def weights(self, subgroup: Subgroup) -> list[Tensor]:
        """Flat views of the training weights."""

    def state(self, subgroup: Subgroup) -> tuple[Tensor, Tensor, Tensor]:
        """Flat fp32 masters and both moments, in host memory."""


@dataclass
class Slot:
    """Room on the device for one staged subgroup."""

    state: tuple[Tensor, Tensor, Tensor]
    grad: Tensor

    @classmethod
    def make(cls, numel: int, device: torch.device) -> Slot:
        """Uninitialised; whatever is used is copied into first."""
        p, m, v, g = (torch.empty(numel, dtype=torch.float32, device=device) for _ in range(4))
        return cls((p, m, v), g)


class Update:
    """One step.

    Args:
        parts: the tensors.
        workers: the lanes.
        slots: staging buffers, made by the caller.
        ring: buffers for rounded results, each as large as the largest subgroup.
    """

    def __init__(self, parts: Parts, workers: Workers, slots: Sequence[Slot], ring: Sequence[Tensor]) -> None:
        self.parts, self.workers = parts, workers
        self._slots = list(slots)
        self._ring = list(ring)
        self._halted = False
        self._own: list[Subgroup] = []
        self._staged: list[Subgroup] = []
        self._changed = threading.Condition()
        self._left = 0
        self._error: BaseException | None = None

    def run(
        self,
        own: Sequence[Subgroup],
        staged: Sequence[Subgroup],
        resident: Sequence[tuple[int, Callable[[], None]]] = (),
    ) -> KeyboardInterrupt | None:
        """Update all subgroups and return when everything is back in its place.

        Args:
            own: subgroups of the host, in order.
            staged: subgroups of the device, in order.
            resident: updates of what never moves, and their numbers of parameters.

        Returns:
            An interrupt that came meanwhile, for the caller to raise: it never leaves half a step.

        Raises:
            HeadwayError: a lane's work failed; some subgroups are updated and others are not.
        """
        self._own, self._staged = list(own)[::-1], list(staged)[::-1]
        self._left = len(own) + len(staged) + len(resident)
        if self.parts.device.type == "cuda":
            torch.cuda.current_stream(self.parts.device).synchronize()  # gradients and buffers are ours from here
        for numel, work in resident:
            self._do(self.workers.device, work, numel, self._finished)
        for slot in self._slots:
            self._stage(slot)
        self._host()
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                with self._changed:
                    self._changed.wait_for(lambda: self._left == 0 or self._error is not None)
                self.workers.drain()
                break
            except KeyboardInterrupt as error:
                interrupt = error
        self._slots, self._ring = [], []
        if self._error is not None:
            raise HeadwayError("optimizer step", f"failed halfway: {self._error or type(self._error).__name__}",
                               hint="go on from the last checkpoint") from self._error  # fmt: skip
        return interrupt

    def _do(self, lane: Lane, work: Callable[[], Any], amount: int, then: Callable[[], None]) -> None:
        if self._error is not None:
            return

        def synchronous() -> None:
            with torch.no_grad(), side_stream(self.parts.device) as stream:
                work()
                if stream is not None:
                    stream.synchronize()

        try:
            job = lane.submit(synchronous, amount, then=lambda _: then(), wait=False)
            job.future.add_done_callback(self._look)
        except Exception as error:  # the lane is closed
            self._fail(error)

    def _look(self, future: Future[Any]) -> None:
        if future.cancelled():
            self._fail(CancelledError("its work was cancelled"))
        elif (error := future.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _finished(self) -> None:
        with self._changed:
            self._left -= 1
            self._changed.notify_all()

    # The device's subgroups: staged, updated, flushed.

    def _stage(self, slot: Slot) -> None:
        with self._changed:
            if not self._staged:
                return
            subgroup = self._staged.pop()
        grads = self.parts.grads(subgroup)
        away = [(piece, grad) for piece, grad in zip(subgroup.pieces, grads, strict=True)
                if grad is not None and self.parts.on_host(piece)]  # fmt: skip
        numel = subgroup.numel

        def work() -> None:
            for here, there in zip(slot.state, self.parts.state(subgroup), strict=True):
                here[:numel].copy_(there, non_blocking=True)
            for piece, grad in away:
                slot.grad[piece.offset : piece.offset + piece.numel].copy_(grad, non_blocking=True)

        moved = 12 * numel + 4 * sum(piece.numel for piece, _ in away)
        self._do(self.workers.to_device, work, moved, lambda: self._on_device(slot, subgroup, {p for p, _ in away}))

    def _on_device(self, slot: Slot, subgroup: Subgroup, away: set[Piece]) -> None:
        def work() -> None:
            rooms, grads = subgroup.views(slot.grad), self.parts.grads(subgroup)
            grads = [room if p in away else g for p, room, g in zip(subgroup.pieces, rooms, grads, strict=True)]
            state = tuple(subgroup.views(flat) for flat in slot.state)
            self._adam(subgroup, state, grads)
            for weight, master in zip(self.parts.weights(subgroup), state[0], strict=True):
                weight.copy_(master)

        self._do(self.workers.device, work, subgroup.numel, lambda: self._flush(slot, subgroup))

    def _flush(self, slot: Slot, subgroup: Subgroup) -> None:
        def work() -> None:
            for here, there in zip(slot.state, self.parts.state(subgroup), strict=True):
                there.copy_(here[: subgroup.numel], non_blocking=True)

        def flushed() -> None:
            self._finished()
            self._stage(slot)

        self._do(self.workers.to_host, work, 12 * subgroup.numel, flushed)

    # The host's: updated, rounded, pushed.

    def _host(self) -> None:
        with self._changed:
            if not self._own:
                return
            dtype = self.parts.weights(self._own[-1])[0].dtype  # the training type: fp16 is not bf16
            rounded = dtype != torch.float32
            if rounded and not self._ring:
                self._halted = True
                return
            subgroup = self._own.pop()
            room = self._ring.pop().view(dtype) if rounded else None

        def work() -> None:
            state = tuple(subgroup.views(flat) for flat in self.parts.state(subgroup))
            self._adam(subgroup, state, self.parts.grads(subgroup))

        def updated() -> None:
            if room is None:
                self._push(subgroup, self.parts.state(subgroup)[0], None)
            else:
                self._do(self.workers.cast, cast, subgroup.numel, lambda: self._push(subgroup, room, room))
            self._host()

        def cast() -> None:
            room[: subgroup.numel].copy_(self.parts.state(subgroup)[0])  # type: ignore[index]

        self._do(self.workers.host, work, subgroup.numel, updated)

    def _push(self, subgroup: Subgroup, source: Tensor, room: Tensor | None) -> None:
        def work() -> None:
            for weight, value in zip(self.parts.weights(subgroup), subgroup.views(source), strict=True):
                weight.copy_(value, non_blocking=True)

        def pushed() -> None:
            again = False
            if room is not None:
                with self._changed:
                    self._ring.append(room)
                    again, self._halted = self._halted, False
            self._finished()
            if again:
                self._host()

        self._do(self.workers.to_device, work, source.element_size() * subgroup.numel, pushed)

    def _adam(self, subgroup: Subgroup, state: tuple[list[Tensor], ...], grads: Sequence[Tensor | None]) -> None:
        active = self.parts.active(subgroup)
        counts = self.parts.counts(subgroup)
        params, firsts, seconds = ([views[i] for i in active] for views in state)
        given = [grad for i in active if (grad := grads[i]) is not None]
        adam_(params, given, firsts, seconds, [counts[i] for i in active], self.parts.hyper(subgroup))
