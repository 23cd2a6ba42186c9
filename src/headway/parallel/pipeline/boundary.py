"""What passes between two stages: in parts over the tensor ranks, on record, and with a name when it does not arrive.

Tensor ranks without sequence parallelism all hold the same residual stream, so that each would send all of it. With
scatter and gather each sends its part over the slow link and the receivers put the parts together over their fast one.

Source: Narayanan et al. 2021 (arXiv 2104.04473), section 4.1.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage

from headway.core.errors import HeadwayError
from headway.parallel.pipeline.room import Room
from headway.parallel.pipeline.trace import Span

_ops = torch.ops._c10d_functional


class BoundaryStage(PipelineStage):
    """A stage that counts, times and, over ``tensor`` ranks, divides what it sends.

    Args:
        tensor: the ranks that hold the same residual stream, one-dimensional; None where each has its own.
    """

    def __init__(self, *args: Any, tensor: DeviceMesh | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sent_bytes = 0
        """To other pipeline ranks, since the stage was made."""
        self.spans: list[Span] = []
        """The passes so far, as the host saw them."""
        self.awaited: dict[tuple[str, int], int] = {}
        """(pass, micro-batch) -> the pipeline rank it comes from, in the order of asking."""
        self.sent: tuple[str, int, int] | None = None
        """Pass, micro-batch and the pipeline rank it went to, last."""
        self.running: tuple[str, int] | None = None
        """The pass that this rank is in the middle of."""
        self.room = Room([self])
        """Of its rank: the runner has all of a rank's stages share one."""
        self._parts: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}
        self._group = "" if tensor is None else tensor.get_group().group_name
        self._degree = 1 if tensor is None else tensor.size()
        self._part = 0 if tensor is None else tensor.get_local_rank()

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """This rank's part of the output."""
        return self._send(super().get_fwd_send_ops(fwd_chunk_id), "forward", fwd_chunk_id, self.stage_index + 1)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """This rank's part of the gradient of the input."""
        return self._send(super().get_bwd_send_ops(bwd_chunk_id), "backward", bwd_chunk_id, self.stage_index - 1)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """This rank's part of the input."""
        self.room.empty()
        return self._receive(super().get_fwd_recv_ops(fwd_chunk_id), "forward", fwd_chunk_id, self.stage_index - 1)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """This rank's part of the gradient of the output."""
        self.room.empty()
        return self._receive(super().get_bwd_recv_ops(bwd_chunk_id), "backward", bwd_chunk_id, self.stage_index + 1)

    def _send(self, ops: list[dist.P2POp], kind: str, micro: int, target: int) -> list[dist.P2POp]:
        for op in ops:
            self.sent = kind, micro, self.stage_index_to_group_rank[target]
            flat = op.tensor.reshape(-1)  # [b T D]
            size = flat.numel() // self._degree
            op.tensor = flat if self._degree == 1 else flat.narrow(0, self._part * size, size)
            self.sent_bytes += size * flat.element_size()
        return ops

    def _receive(self, ops: list[dist.P2POp], kind: str, micro: int, source: int) -> list[dist.P2POp]:
        if not ops:
            return ops
        self.awaited[kind, micro] = self.stage_index_to_group_rank[source]
        if self._degree > 1:
            parts = []
            for op in ops:
                part = op.tensor.new_empty(op.tensor.numel() // self._degree)
                parts.append((part, op.tensor))
                op.tensor = part
            self._parts[kind, micro] = parts
        else:
            for op in ops:
                self.room.make(op.tensor)
        return ops

    def _arrived(self, kind: str, micro: int) -> None:
        self.awaited.pop((kind, micro), None)
        for part, whole in self._parts.pop((kind, micro), []):
            self.room.make(whole)
            gathered = _ops.all_gather_into_tensor_out(part, self._degree, self._group, out=whole.detach().view(-1))
            _ops.wait_tensor(gathered)

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> Any:
        self._arrived("forward", fwd_chunk_id)
        return super()._retrieve_recv_activations(fwd_chunk_id)

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> Any:
        self._arrived("backward", bwd_chunk_id)
        return super()._retrieve_recv_grads(bwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """As torch's, on record."""
        self.room.empty()
        with self._on_record("forward", fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True,
                           last_backward: bool = False) -> None:  # fmt: skip
        """As torch's, on record."""
        with self._on_record("backward" if full_backward else "input", bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        if full_backward:
            self.room.give_back(self, bwd_chunk_id)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """As torch's, on record."""
        with self._on_record("weight", bwd_chunk_id):
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward=last_backward)
        self.room.give_back(self, bwd_chunk_id)

    @contextmanager
    def _on_record(self, kind: str, micro: int) -> Iterator[None]:
        self.running, start = (kind, micro), time.perf_counter()
        yield  # what fails stays the pass that is running
        self.spans.append(Span(self.group_rank, kind, self.stage_index, micro, start, time.perf_counter()))
        self.running = None

    def begin(self) -> None:
        """Forget the step before."""
        self.spans.clear()
        self.awaited.clear()
        self._parts.clear()
        self.sent = self.running = None


def check_parts(between: torch.Size, tensor: DeviceMesh | None) -> None:
    """Refuse a boundary that the tensor ranks cannot share evenly.

    Raises:
        HeadwayError: with its numbers.
    """
    if tensor is not None and between.numel() % tensor.size():
        raise HeadwayError("parallel.pipeline.gather", f"cannot divide {between.numel()} numbers between two stages "
                           f"{tuple(between)} over {tensor.size()} tensor ranks", hint="set it to false")  # fmt: skip


def lost_neighbour(stages: list[BoundaryStage], rank: int, error: Exception) -> HeadwayError | None:
    """What did not pass between stages when the pipeline broke: the pass, micro-batch, stage and neighbour.

    Args:
        rank: within the pipeline.

    Returns:
        An error that says so; None where this rank failed at its own work.
    """
    if any(stage.running for stage in stages):
        return None
    where, reason = f"pipeline rank {rank}", str(error).partition("\n")[0]
    for stage in stages:
        for (kind, micro), source in stage.awaited.items():  # the first that was asked for is waited for first
            return HeadwayError(where, f"got no {kind} pass of micro-batch {micro} for stage {stage.stage_index} from "
                                f"pipeline rank {source}: {reason}")  # fmt: skip
    for stage in stages:
        if stage.sent is not None:
            kind, micro, target = stage.sent
            return HeadwayError(where, f"could not send the {kind} pass of micro-batch {micro} from stage "
                                f"{stage.stage_index} to pipeline rank {target}: {reason}")  # fmt: skip
    return None
