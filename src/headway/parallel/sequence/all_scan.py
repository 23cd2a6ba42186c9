"""All-Scan: states handed from rank to rank in blocks, each sent on as soon as it is there.

Every rank receives one state and sends one, however many ranks there are; with K blocks the last of P ranks waits for
P + K - 2 blocks of a K-th each.

Source: Chou et al., ZeCO, arXiv 2507.01004 (All-Scan).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from headway.parallel.sequence.links import Links, links_of


class Pending:
    """Tensors that are being worked out beside this thread, or beside this stream of a GPU."""

    def __init__(self, work: Callable[[], tuple[Tensor, ...]], device: torch.device) -> None:
        self._result: Any = None
        self._work: Any = work  # what it reads was allocated for this stream, which must not use it again before `wait`
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":  # the GPU runs it beside what is queued after; no thread has to wait for messages
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self._stream):
                self._result = work()
        else:
            self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
            self._thread.start()

    def _run(self, work: Callable[[], tuple[Tensor, ...]]) -> None:
        try:
            with torch.no_grad():
                self._result = work()
        except BaseException as error:
            self._error = error

    def wait(self) -> Any:
        """The tensors.

        Raises:
            NeighbourLost: and whatever else the work raised.
        """
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            for tensor in self._result:  # allocated for the other stream, and used by this one from here on
                tensor.record_stream(current)
        self._work = None
        return self._result


@overload
def all_scan(
    state: Tensor,
    decay: Tensor,
    group: dist.ProcessGroup | Links | None = ...,
    blocks: int = ...,
    reverse: bool = ...,
    async_op: Literal[False] = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def all_scan(
    state: Tensor,
    decay: Tensor,
    group: dist.ProcessGroup | Links | None = ...,
    blocks: int = ...,
    reverse: bool = ...,
    *,
    async_op: Literal[True],
) -> Pending: ...


def all_scan(
    state: Tensor,
    decay: Tensor,
    group: dist.ProcessGroup | Links | None = None,
    blocks: int = 4,
    reverse: bool = False,
    async_op: bool = False,
) -> tuple[Tensor, Tensor] | Pending:
    """The scan ``out = decay in + state`` over the ranks, where ``in`` is the ``out`` of the rank before.

    No derivatives: the gradient is another scan, from right to left.

    Args:
        state: [.., dk, dv], what this rank adds; at least fp32 on the way.
        decay: [.., dk], what it leaves of what comes in.
        group: the ranks in the order of the sequence; by default all.
        blocks: pieces, along dk, that travel one by one; at most dk.
        reverse: from the last rank to the first.
        async_op: return at once; ``wait()`` of what is returned gives the result.

    Returns:
        ``in`` (zero on the first rank) and ``out``, [.., dk, dv].

    Raises:
        NeighbourLost: a rank beside this one did not answer.
    """
    links = links_of(group)
    state = state.to(torch.promote_types(state.dtype, torch.float32)).contiguous()
    factor = decay.to(state.dtype).unsqueeze(-1)

    def scan() -> tuple[Tensor, Tensor]:
        return _scan(links, state, factor, blocks, reverse)

    return Pending(scan, state.device) if async_op else scan()


def row_blocks(rows: int, blocks: int) -> list[slice]:
    """``rows`` in at most ``blocks`` pieces that differ by at most one.

    Raises:
        ValueError: ``blocks`` is not positive.
    """
    if blocks < 1:
        raise ValueError(f"blocks is {blocks}, and must be at least 1")
    blocks = min(blocks, rows)
    borders = [rows * i // blocks for i in range(blocks + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(borders)]


def _scan(links: Links, state: Tensor, decay: Tensor, blocks: int, reverse: bool) -> tuple[Tensor, Tensor]:
    source, target = (links.rank + 1, links.rank - 1) if reverse else (links.rank - 1, links.rank + 1)
    receives, sends = 0 <= source < links.size, 0 <= target < links.size
    incoming, outgoing = torch.zeros_like(state), torch.empty_like(state)
    rows = row_blocks(state.shape[-2], blocks)
    arriving = []
    if receives:  # all are awaited from the start, so that none has to be announced when it comes
        for block in rows:
            buffer = torch.empty_like(state[..., block, :], memory_format=torch.contiguous_format)
            arriving.append((buffer, links.receive(buffer, source)))
    sent, kept = [], []
    for index, block in enumerate(rows):
        piece = state[..., block, :]
        if receives:
            buffer, arrived = arriving[index]
            arrived()
            incoming[..., block, :] = buffer
            piece = torch.addcmul(piece, decay[..., block, :], buffer)
        outgoing[..., block, :] = piece
        if sends:
            kept.append(piece.contiguous())
            sent.append(links.send(kept[-1], target))
    for wait in sent:
        wait()
    return incoming, outgoing
