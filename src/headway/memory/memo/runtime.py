"""The rounding buffers: which block's activations are on the device, which leave, which are on their way back.

At most ``buffers`` blocks' saved tensors are on the device. In the forward pass a block waits until those of the block
``buffers`` before it have left. In the backward pass those of a block are fetched when the block ``buffers`` after it
is done. The last ``buffers`` blocks are never swapped.

Source: MEMO, arXiv 2407.12117, section 4.1.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import psutil
import torch
from torch import Tensor, nn

from headway.core.errors import HeadwayError, MethodError
from headway.core.fallback import fallback
from headway.core.surgery import Shell, replace_blocks, restore_blocks
from headway.core.units import human
from headway.memory.backends import Backend, HostBackend
from headway.memory.lanes import Job, Lanes
from headway.memory.memo.alpha import AlphaPlan, Sizes, choose_alpha
from headway.memory.memo.parts import DecoderLayerParts, Parts, Span, parts_of
from headway.memory.memo.record import PROBE, Layout, Record
from headway.memory.store import TieredStore

Shape = tuple[int, int]
"""Sequences and their length."""
WARM_UP = 1
"""Passes of a shape before the one that is measured."""


@dataclass
class Counts:
    """What the blocks have done."""

    passes: int = 0
    """Forward passes that are followed by a backward pass, one for each micro-batch."""
    swapped_bytes: int = 0
    recomputed_tokens: int = 0
    """Tokens that went a second time through a block, summed over blocks."""
    most_sets: int = 0
    """Blocks whose saved tensors were on the device at a time, at most."""
    wait_seconds: float = 0.0
    """Time that the forward pass waited for a buffer."""


@dataclass(eq=False)
class Pass:
    """One forward pass, and the backward pass that goes with it."""

    shape: Shape
    alpha: float
    timed: bool = False
    last: int = -1
    """The block that ran last."""
    records: dict[int, weakref.ref[Record]] = field(default_factory=dict)
    marks: list[tuple[Any, Any]] = field(default_factory=list)
    """Beginning and end of each swapped block's forward pass."""
    leaving: deque[tuple[int, list[Job]]] = field(default_factory=deque)
    """Blocks whose tensors are on their way out."""
    on_device: set[int] = field(default_factory=set)
    """Blocks whose saved tensors are, or may be, on the device."""


class Memo:
    """Swaps and recomputes the activations of a model's blocks; see `memo_activations`.

    Args:
        blocks: the model's list of blocks, as `structure(model).blocks` gives it; all but the last ``buffers`` of them
            are swapped.
        alpha: share of the tokens of each sequence whose saved tensors are swapped, the others' are recomputed;
            ``auto``: as many as hide behind the computation, by the second pass of every shape, and none before.
        backend: `HostBackend` or `FileBackend`.
        host_budget: bytes that may be kept there; None: half of what is free.
        buffers: blocks whose saved tensors may be on the device at a time.
        lanes: shared with whatever else moves data.
        verify: check a checksum of all that comes back.

    Raises:
        MethodError: there are no more blocks than buffers, or one of them cannot be taken apart; nothing is replaced.
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        alpha: float | Literal["auto"] = "auto",
        backend: Backend | None = None,
        *,
        host_budget: int | None = None,
        buffers: int = 2,
        lanes: Lanes | None = None,
        verify: bool = False,
    ) -> None:
        if alpha != "auto" and not 0 <= alpha <= 1:
            raise MethodError("methods.memo.alpha", got=alpha, expected="auto, or a share from 0 to 1")
        if len(blocks) <= buffers:
            raise MethodError("methods.memo", f"has nothing to swap: the last {buffers} blocks keep their activations, "
                              f"and there are {len(blocks)}", hint="lower buffers, or remove it")  # fmt: skip
        self.blocks, self.alpha, self.buffers, self.verify = blocks, alpha, buffers, verify
        self.host_budget = host_budget or psutil.virtual_memory().available // 2
        self.swapped = len(blocks) - buffers
        """Blocks that are swapped."""
        self.store = TieredStore(backend or HostBackend(), lanes)
        self.lanes = self.store.lanes
        self.counts = Counts()
        self.plans: dict[Shape, AlphaPlan] = {}
        self.sizes: dict[Shape, Sizes] = {}
        self.measured: dict[str, float] = {}
        """Seconds of a block's forward pass and bytes per second of the link, when the newest plan was made."""
        self._seen: Counter[Shape] = Counter()
        self._pass: Pass | None = None
        self._said = False
        made = iter(range(len(blocks)))
        replace_blocks(blocks, lambda block: self._shell(block, next(made)), "methods.memo")

    def _shell(self, block: nn.Module, index: int) -> Shell:
        return SwappedBlock(block, self, index) if index < self.swapped else KeptBlock(block, self, index)

    def close(self) -> None:
        """Put the blocks back and remove all that is stored."""
        restore_blocks(self.blocks)
        self.store.close()

    def __deepcopy__(self, memo: Any) -> Memo:
        return self  # a copy of the model shares the buffers, as it shares the device

    def keeps_for_cache(self) -> None:
        """Say, once, that a block is trained while it fills a cache, and so keeps its activations."""
        if not self._said:
            self._said = True
            fallback("keeping activations that were to be swapped", "a cache is filled in training: pass "
                     "use_cache=False", "the memory that they take")  # fmt: skip

    # A pass, forward.

    def begin(self, shape: Shape) -> Pass:
        """A forward pass begins."""
        self.store.check()
        self._learn()
        self._seen[shape] += 1
        self.counts.passes += 1
        plan = self.plans.get(shape)
        if self.alpha == "auto":
            alpha = plan.alpha if plan else 0.0
        else:
            alpha = float(self.alpha)
        if self.store.capacity is not None and shape in self.sizes:  # the tier has proved to hold no more
            fits = choose_alpha(self.sizes[shape], 1.0, 1e30, self.store.capacity, len(self.blocks), self.buffers)
            alpha = min(alpha, fits.alpha)
        timed = self.alpha == "auto" and plan is None and self._seen[shape] > WARM_UP
        self._pass = Pass(shape, alpha, timed)
        return self._pass

    def current(self, index: int, shape: Shape) -> Pass:
        """The pass in which block ``index`` runs."""
        pass_ = self._pass
        if pass_ is None or pass_.shape != shape or index <= pass_.last:  # the first one may be frozen, and not ask
            pass_ = self.begin(shape)
        pass_.last = index
        return pass_

    def make_room(self, pass_: Pass, index: int) -> None:
        """Wait until block ``index`` may fill a buffer."""
        kept = max(0, index - self.swapped)  # before it, that stay
        start = time.perf_counter()
        waited = False
        while len(pass_.leaving) + kept >= self.buffers:
            number, jobs = pass_.leaving.popleft()
            for job in jobs:
                waited = waited or not job.done
                job.wait()
            pass_.on_device.discard(number)
        if waited:
            self.counts.wait_seconds += time.perf_counter() - start
        self.store.sweep()
        self._fills(pass_, index)

    def _fills(self, pass_: Pass, index: int) -> None:
        pass_.on_device.add(index)
        self.counts.most_sets = max(self.counts.most_sets, len(pass_.on_device))

    def gone(self, pass_: Pass, index: int, record: Record) -> None:
        """Block ``index`` has run and sent its tensors away."""
        pass_.records[index] = weakref.ref(record)
        pass_.leaving.append((index, [handle.job for handle in record.handles if handle.job is not None]))
        self.counts.swapped_bytes += record.swapped
        if len(pass_.records) == 1:
            self.sizes[pass_.shape] = sizes = Sizes(*record.sizes)
            self._check_budget(pass_, sizes, self.swapped - index)

    def _check_budget(self, pass_: Pass, sizes: Sizes, blocks: int) -> None:
        """What must be swapped fits the budget, with the share that was asked for."""
        needed = int(blocks * sizes.swapped(pass_.alpha))
        if needed <= self.host_budget:
            return
        must = int(blocks * sizes.swapped(0.0))
        what = (
            f"the inputs and attention outputs of {blocks} blocks"
            if must > self.host_budget
            else f"{blocks} blocks with alpha {pass_.alpha:g}"
        )
        missing = max(must, needed) - self.host_budget
        raise MethodError(
            "methods.memo.host_budget",
            f"is {human(self.host_budget, 'B')}; {what} take {human(max(must, needed), 'B')}, "
            f"which is {human(missing, 'B')} more",
            hint="raise it, take backend: disk or a smaller micro-batch, or use streambp, which keeps inputs alone"
            if must > self.host_budget
            else "lower alpha, or let it be auto",
        )

    # A pass, backward.

    def reached(self, pass_: Pass, index: int) -> None:
        """The backward pass comes to block ``index``: those after it are done, one before it may come back."""
        pass_.on_device -= {number for number in pass_.on_device if number > index}
        target = index - self.buffers + 1
        record = pass_.records.get(target, lambda: None)()
        if record is not None:
            self._fills(pass_, target)
            record.prefetch()
        self.store.sweep()

    # What was learnt.

    def _learn(self) -> None:
        """Make a plan from the pass that is over, if it was measured."""
        pass_, self._pass = self._pass, None
        if pass_ is None or not pass_.timed or not pass_.records or pass_.shape in self.plans:
            return
        seconds = statistics.median(_between(*marks) for marks in pass_.marks)
        bandwidth = self.bandwidth()
        host = min(self.host_budget, self.store.capacity if self.store.capacity is not None else self.host_budget)
        self.plans[pass_.shape] = choose_alpha(
            self.sizes[pass_.shape], seconds, bandwidth, host, len(self.blocks) - min(pass_.records), self.buffers
        )
        self.measured = {"layer_seconds": seconds, "bandwidth": bandwidth}

    def bandwidth(self) -> float:
        """Bytes per second: out, or twice what comes back, as the backward pass takes twice as long."""
        out = self.lanes[self.store.backend.write_lane].report
        back = self.lanes[self.store.backend.read_lane].report
        return min(out.rate, 2 * back.rate) if back.bytes else out.rate

    def report(self) -> dict[str, Any]:
        """Counts and bytes; seconds of stalls; rates; sizes and plans by shape."""
        store, lanes = self.store.report, self.lanes.report()
        backend = self.store.backend
        return {
            "tier": backend.name,
            "blocks_swapped": self.swapped,
            "blocks_kept": self.buffers,
            **asdict(self.counts),
            "swapped_bytes_per_pass": self.counts.swapped_bytes // max(1, self.counts.passes),
            "fetched_bytes": store.fetched_bytes,
            "forwarded": store.forwarded,
            "kept_on_failure": store.kept,
            "stall_seconds": self.counts.wait_seconds + store.wait_seconds + store.stall_seconds,
            "stall_seconds_forward": self.counts.wait_seconds + store.wait_seconds,
            "stall_seconds_backward": store.stall_seconds,
            "write_rate": lanes[backend.write_lane]["rate"],
            "read_rate": lanes[backend.read_lane]["rate"],
            "alpha": self.alpha,
            "sizes": {_name(shape): asdict(sizes) for shape, sizes in self.sizes.items()},
            "plans": {_name(shape): asdict(plan) for shape, plan in self.plans.items()},
            "measured": self.measured,
        }

    def state_dict(self) -> dict[str, Any]:
        """The plans, so that a resumed run goes on with the shares it had."""
        return {"plans": {_name(shape): asdict(plan) for shape, plan in self.plans.items()}} if self.plans else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the plans back."""
        for name, plan in state.get("plans", {}).items():
            batch, length = map(int, name.split("x"))
            self.plans[batch, length] = AlphaPlan(**plan)


class KeptBlock(Shell):
    """One of the last blocks: it keeps what autograd saves, and waits for its buffer."""

    def __init__(self, block: nn.Module, memo: Memo, index: int) -> None:
        super().__init__(block)
        self.memo, self.index = memo, index

    def forward(self, x: Tensor, *args: Any, **shared: Any) -> Any:
        """As the block."""
        if not _trained(self.memo, self.original, x, shared):
            return self.original(x, *args, **shared)
        memo, index = self.memo, self.index
        pass_ = memo.current(index, tuple(x.shape[:2]))  # type: ignore[arg-type]
        memo.make_room(pass_, index)
        out = self.original(x, *args, **shared)
        (out[0] if isinstance(out, tuple) else out).register_hook(lambda _: memo.reached(pass_, index))
        return out


class SwappedBlock(Shell):
    """A block whose saved tensors leave up to a token, and are made again from there on."""

    def __init__(self, block: nn.Module, memo: Memo, index: int) -> None:
        super().__init__(block)
        self.parts: Parts = parts_of(block)
        self.memo, self.index = memo, index
        self._layouts: dict[Any, Layout] = {}
        self._proved = not isinstance(self.parts, DecoderLayerParts)

    def forward(self, x: Tensor, *args: Any, **shared: Any) -> Any:
        """As the block; where no gradient is wanted, or a cache is filled, the block itself."""
        block, memo, index = self.original, self.memo, self.index
        if not _trained(memo, block, x, shared) or x.shape[1] < 2:
            return block(x, *args, **shared)
        if args:
            raise TypeError("a swapped block takes what it shares with others by keyword")
        if not self._proved:
            self._prove(x, shared)
        pass_ = memo.current(index, tuple(x.shape[:2]))  # type: ignore[arg-type]
        memo.make_room(pass_, index)
        # The record must not hold the blocks, nor what holds it.
        record = Record(self.parts, shared, memo.store, f"block {index}", memo.verify)
        start = _mark(x.device) if pass_.timed else None
        out = record.run(x)
        if pass_.timed:
            pass_.marks.append((start, _mark(x.device)))
        trained = (x.requires_grad, *(p.requires_grad for p in block.parameters()))
        key = (x.shape, x.dtype, block.training, trained, record.autocast)
        if key not in self._layouts:
            self._layouts[key] = record.layout()
        length = x.shape[1]
        split = round(pass_.alpha * length)
        # A single token lies in memory as more may not: a copy of it may be none.
        record.settle(self._layouts[key], length if length - split < PROBE else split)
        memo.counts.recomputed_tokens += x.shape[0] * (length - record.split)
        memo.gone(pass_, index, record)
        out.register_hook(lambda _: memo.reached(pass_, index))
        return out

    @torch.no_grad()
    def _prove(self, x: Tensor, shared: dict[str, Any]) -> None:
        """Compare once with a block whose wiring was guessed from its parts.

        Raises:
            HeadwayError: the block computes something else.
        """
        block = self.original
        right = block(x, **shared)
        right = right[0] if isinstance(right, tuple) else right
        whole = Span(0, x.shape[1], x.shape[1])
        q, k, v = self.parts.project(x, whole, shared)
        ours = self.parts.finish(x, self.parts.attend(q, k, v, shared), whole, shared)
        tolerance = 1e-4 if x.dtype in (torch.float32, torch.float64) else 5e-2
        if not torch.allclose(ours, right, rtol=tolerance, atol=tolerance * float(right.abs().max())):
            raise HeadwayError(
                "methods.memo", f"a {type(block).__name__} does more than its parts tell: its output is another"
            )
        self._proved = True


@contextmanager
def memo_activations(
    blocks: nn.ModuleList,
    alpha: float | Literal["auto"] = "auto",
    backend: Backend | None = None,
    **options: Any,
) -> Iterator[Memo]:
    """Swap and recompute the activations of ``blocks`` inside; both passes must run there. Arguments as for `Memo`.

    with memo_activations(structure(model).blocks) as memo:
        for batch in batches:
            loss(model(batch)).backward()
    print(memo.report())
    """
    memo = Memo(blocks, alpha, backend, **options)
    try:
        yield memo
    finally:
        memo.close()


def _trained(memo: Memo, block: nn.Module, x: Tensor, shared: dict[str, Any]) -> bool:
    """Whether a backward pass will follow."""
    cached = shared.get("cache", shared.get("past_key_values")) is not None
    wanted = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in block.parameters()))
    if cached and wanted and block.training:
        memo.keeps_for_cache()
    return wanted and not cached


def _name(shape: Shape) -> str:
    return f"{shape[0]}x{shape[1]}"


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    """Seconds between two marks."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000
