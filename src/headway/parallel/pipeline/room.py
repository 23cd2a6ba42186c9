"""Room for what a rank's stages receive, only while it is in use.

torch makes room for what every micro-batch of a step will receive, inputs and gradients, and keeps it from step to
step: for a stage with neighbours on both sides 2 m boundaries, where 1F1B has at most p micro-batches at work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor


class Room:
    """The buffers that torch's stages receive messages in; an empty one keeps its shape and has no storage.

    Args:
        stages: all of a rank's; stages that belong to the same rank hand tensors on without a message, which are not
            touched.
    """

    def __init__(self, stages: Sequence[Any]) -> None:
        self._stages = stages
        self._own: dict[int, Tensor] = {}

    def empty(self) -> None:
        """Before a stage does anything: at the first time torch has just made all buffers."""
        if not self._own:
            self._own = {id(buffer): buffer for stage in self._stages for buffer in buffers(stage)}
            for buffer in self._own.values():
                buffer.untyped_storage().resize_(0)

    def make(self, buffer: Tensor) -> None:
        """Before a message is received in ``buffer``."""
        if id(buffer) in self._own:
            buffer.untyped_storage().resize_(buffer.numel() * buffer.element_size())

    def give_back(self, stage: Any, micro: int) -> None:
        """After a micro-batch's backward pass; not what the stage passes on to the one before as it came."""
        kept = {grad.untyped_storage().data_ptr() for grad in stage.bwd_cache.get(micro, ()) if grad is not None}
        for buffer in buffers(stage, micro):
            if id(buffer) in self._own and buffer.untyped_storage().data_ptr() not in kept:
                buffer.untyped_storage().resize_(0)

    @property
    def bytes(self) -> int:
        """That the buffers take at the moment."""
        return sum(buffer.untyped_storage().nbytes() for buffer in self._own.values())


def buffers(stage: Any, micro: int | None = None) -> Iterator[Tensor]:
    """Where a stage receives inputs and gradients, of one micro-batch or of all."""
    for received in (stage.args_recv_info, stage.grad_recv_info):
        infos: Iterable[Any] = received.values() if micro is None else [received.get(micro, ())]
        for info in (info for of_one in infos for info in of_one):
            if getattr(info, "buffer", None) is not None:
                yield info.buffer
