"""The activation store: what autograd saves leaves for host or disk, and is back for the backward pass."""

from __future__ import annotations

import bisect
import fnmatch
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from headway.core.errors import HeadwayError
from headway.memory.backends import Backend
from headway.memory.lanes import Lanes
from headway.memory.saved import Saved, SavedTensors, in_backward, is_plain, stamp
from headway.memory.ssdtrain.plan import drive_life_days, plan_amount
from headway.memory.ssdtrain.scopes import OUTSIDE, Pass, Scopes, Segment, mark
from headway.memory.store import TieredStore, version

Policy = Literal["adaptive", "all", "none"]
KEEP = ("head", "lm_head", "*.lm_head", "rope", "*rotary_emb*")
"""Modules whose tensors stay: the backward pass begins with them, or every block holds them."""
CHANGED = 0.25  # a step that saves this much more or less than the planned one is measured anew


@dataclass
class Counts:
    """What an activation store has seen."""

    passes: int = 0
    """Forward passes, one for each micro-batch."""
    saved: int = 0
    """Tensors that autograd saved and that were large enough to leave."""
    saved_bytes: int = 0
    """Their bytes, each time: what storing every one of them would have moved."""
    deduplicated: int = 0
    """Those that had already left, as the same storage."""
    offloaded_bytes: int = 0
    kept_bytes: int = 0
    """Bytes of storages that stayed although they were large enough."""
    plans: int = 0


@dataclass(frozen=True)
class Plan:
    """What the adaptive policy decided."""

    segments: int
    """How many stretches of the forward pass are offloaded, from the first."""
    of: int
    bytes: int
    """That leave in a pass."""
    of_bytes: int
    bandwidth: float
    """Bytes per second."""
    forward_seconds: float


class _Kept:
    """A tensor that stays, with what is needed to notice a change in place (torch does not check under hooks)."""

    __slots__ = ("pass_", "segment", "tensor", "version")

    def __init__(self, tensor: Tensor, pass_: Pass, segment: Segment) -> None:
        self.tensor, self.version, self.pass_, self.segment = tensor, version(tensor), pass_, segment


class _Away:
    """A tensor that left."""

    __slots__ = ("pass_", "saved", "segment")

    def __init__(self, saved: Saved, pass_: Pass, segment: Segment) -> None:
        self.saved, self.pass_, self.segment = saved, pass_, segment


class ActivationStore:
    """Offloads what autograd saves inside its context, and closes at its end; losses and gradients stay bit-identical.

        with ActivationStore(model, backend=FileBackend("/nvme")) as store:
            for batch in batches:
                loss = model(batch).mean()
                loss.backward()
        print(store.report())

    The backward pass must run inside too. Never offloaded: parameters, buffers and their views; inputs; tensors on
    another device; small ones; what is saved outside of all modules or in those of ``keep``; what the last module
    saves; everything made during a backward pass.

    Args:
        model: its modules say who saves what, and in which order.
        backend: `FileBackend`, `HostBackend`, or `DryBackend`, which counts and brings back zeros.
        policy: ``all`` offloads all it may; ``adaptive`` does so for two passes, then as much as hides behind the
            computation; ``none`` nothing.
        min_bytes: smaller storages stay.
        prefetch: modules brought back at a time, ahead of the backward pass, and more as it frees memory; 0 waits
            until they are needed.
        keep: patterns of names of modules whose tensors stay.
        bandwidth: bytes per second to plan with; default: as measured.
        lanes: shared with whatever else moves data. The store's own have ``queue_bytes`` of room for writes.
        queue_bytes: bytes that may wait to be written before the forward pass waits.
        rated_bytes: what the drive is rated to take, for the estimate of its life; 0 where it is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        backend: Backend,
        policy: Policy = "adaptive",
        *,
        min_bytes: int = 1 << 20,
        prefetch: int = 2,
        keep: Sequence[str] = KEEP,
        bandwidth: float | None = None,
        lanes: Lanes | None = None,
        queue_bytes: int = 1 << 30,
        rated_bytes: float = 0.0,
    ) -> None:
        self.policy, self.min_bytes, self.prefetch, self.keep = policy, min_bytes, prefetch, tuple(keep)
        self.bandwidth, self.rated_bytes = bandwidth, rated_bytes
        self.lanes, self._owns_lanes = lanes or Lanes(queue_bytes=queue_bytes), lanes is None
        self.store = TieredStore(backend, self.lanes)
        self.saved = SavedTensors(self.store)
        self.counts = Counts()
        self.plan: Plan | None = None
        self.modules: Counter[str] = Counter()
        """Bytes that each module has offloaded."""
        self.largest = 0
        """Bytes of the largest storage seen that was not a parameter or an input."""
        self._model = weakref.ref(model)
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._kept_names: dict[str, bool] = {}
        self._pass: Pass | None = None
        self._last: int | None = None  # number of the last segment that saved anything, in the newest pass
        self._seconds = 0.0  # of finished contexts
        self._since: float | None = None  # when the present one began
        self.scopes = Scopes(model, self._entered, self._next_segment)

    # Use.

    @contextmanager
    def active(self) -> Iterator[None]:
        """Offload what is saved inside; may be entered again and again."""
        if self.policy == "none":
            yield
            return
        self.store.check()
        self._since = time.perf_counter()
        self.scopes.active = True
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self.scopes.active = False
            self.scopes.stack.clear()
            self._seconds, self._since = self.seconds, None

    def __enter__(self) -> ActivationStore:
        self._context = self.active()
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self._context.__exit__(*error)
        finally:
            self.close()

    def close(self) -> None:
        """Take the hooks off and remove all that is stored."""
        self.scopes.remove()
        self.store.close()
        if self._owns_lanes:
            self.lanes.close(cancel=True)

    def begin(self) -> Pass:
        """Begin a forward pass. Otherwise one begins with the root, or with the first module after a backward pass."""
        self._end_pass()
        self.counts.passes += 1
        self.scopes.stack.clear()
        pass_ = self._pass = Pass(timed=self.policy == "adaptive" and self.plan is None)
        model = self._model()
        if model is not None:
            self._device = next((p.device for p in model.parameters()), self._device)
            pass_.keep.update(_stamps((*model.parameters(), *model.buffers())))
        self._next_segment()
        return pass_

    # Following the forward pass.

    def _entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pass_ = self._pass
        top = not self.scopes.stack
        if pass_ is None or (top and (pass_.backward or module is self._model())):
            pass_ = self.begin()
        # Sharded training swaps in whole parameters just before a module runs.
        pass_.keep.update(_stamps(p for p in module._parameters.values() if p is not None))
        inputs = (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        # What needs no gradient was made outside: tokens, masks, rotary tables. Its maker holds it anyway.
        pass_.keep.update(_stamps(t for t in inputs if not t.requires_grad))

    def _next_segment(self) -> None:
        self.store.sweep()
        pass_ = self._pass
        if pass_ is not None:
            pass_.segments.append(Segment(len(pass_.segments), self.scopes.current))
            if pass_.timed:
                pass_.marks.append(mark(self._device))
                pass_.waited.append(self.store.report.wait_seconds)

    def _end_pass(self) -> None:
        """Learn from the pass that is over: its order, and what the adaptive policy needs."""
        pass_, self._pass = self._pass, None
        if pass_ is None:
            return
        saving = [segment for segment in pass_.segments if segment.volume]
        self._last = saving[-1].number if saving else None
        if self.policy != "adaptive":
            return
        total = sum(segment.volume for segment in saving)
        if self.plan is not None and abs(total - self.plan.of_bytes) > CHANGED * self.plan.of_bytes:
            self.plan = None  # measured anew in the pass that comes now
        elif self.plan is None and pass_.timed and pass_.backward and self.counts.passes > 1:
            volumes, times = zip(*((s.volume, s.seconds) for s in pass_.segments), strict=True)
            bandwidth = self.bandwidth or self._measured_bandwidth()
            count = plan_amount(volumes, times, bandwidth)
            self.plan = Plan(count, len(volumes), sum(volumes[:count]), total, bandwidth, sum(times))
            self.counts.plans += 1

    def _measured_bandwidth(self) -> float:
        """Bytes per second of busy time, both directions together."""
        backend = self.store.backend
        reports = [self.lanes[name].report for name in {backend.write_lane, backend.read_lane}]
        busy = sum(report.busy_seconds for report in reports)
        return sum(report.bytes for report in reports) / busy if busy else float("inf")

    # Autograd's hooks.

    def _pack(self, tensor: Tensor) -> Any:
        if in_backward():
            return tensor  # made again just now, for immediate use
        pass_ = self._pass
        if pass_ is None or (pass_.backward and not self.scopes.stack):
            pass_ = self.begin()
        segment = pass_.segments[-1]
        if not is_plain(tensor) or tensor.device != self._device or stamp(tensor) in pass_.keep:
            return _Kept(tensor, pass_, segment)
        nbytes, number = tensor.untyped_storage().nbytes(), stamp(tensor)
        self.largest = max(self.largest, nbytes)
        if nbytes < max(1, self.min_bytes):
            return _Kept(tensor, pass_, segment)
        saved = self.saved.find(tensor)
        first = number not in pass_.seen
        if first:
            pass_.seen.add(number)
        may_leave = self._may_leave(segment.module)
        leaves = may_leave and self._leaves(segment) and self.store.has_room(nbytes)
        if may_leave:
            self.counts.saved += 1
            self.counts.saved_bytes += tensor.nbytes
            segment.volume += nbytes if saved is None and (first or leaves) else 0
        if saved is not None:
            self.counts.deduplicated += 1
        elif leaves:
            saved = self.saved.save(tensor, segment.module)
            self.counts.offloaded_bytes += nbytes
            self.modules[segment.module] += nbytes
        else:
            self.counts.kept_bytes += nbytes if first else 0
            return _Kept(tensor, pass_, segment)
        segment.entries.append(weakref.ref(saved.entry))
        return _Away(saved, pass_, segment)

    def _may_leave(self, module: str) -> bool:
        if module not in self._kept_names:
            stays = module == OUTSIDE or any(fnmatch.fnmatch(module, pattern) for pattern in self.keep)
            self._kept_names[module] = not stays
        return self._kept_names[module]

    def _leaves(self, segment: Segment) -> bool:
        """Whether the policy wants the tensors of this segment to leave."""
        if self._last is not None and segment.number >= self._last:
            return False  # the backward pass wants them at once
        return self.plan is None or segment.number < self.plan.segments

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self._reached(packed.pass_, packed.segment)
        if isinstance(packed, _Away):
            return packed.saved.restore()
        if version(packed.tensor) != packed.version:
            raise HeadwayError(packed.segment.module or "the model", "needs a tensor that was changed in place since",
                               hint="do not modify tensors that the backward pass needs")  # fmt: skip
        return packed.tensor

    def _reached(self, pass_: Pass, segment: Segment) -> None:
        """The backward pass has come to ``segment``: ask for what it needs next."""
        if not pass_.backward:
            pass_.backward = True
            if pass_.timed:
                pass_.end(mark(self._device), self.store.report.wait_seconds)
            pass_.away = [s for s in reversed(pass_.segments) if s.entries]
            pass_.freed = [*accumulate((s.volume for s in reversed(pass_.segments)), initial=0)][::-1]
        if not self.prefetch or pass_.away is None:
            return
        passed = bisect.bisect_left(pass_.away, -segment.number, key=lambda s: -s.number)
        # Two chunks are here or on their way: the one being worked on, and the next. A slow link is also given as much
        # as the backward pass has freed so far: that does not raise the peak, which was at its beginning.
        wanted = (passed // self.prefetch + 2) * self.prefetch
        freed = pass_.freed[min(segment.number + 1, len(pass_.freed) - 1)]
        while pass_.asked < len(pass_.away):
            following = pass_.away[pass_.asked]
            if pass_.asked >= wanted and pass_.asked_bytes + following.volume > freed:
                break
            for entry in [ref() for ref in reversed(following.entries)]:
                if entry is not None:
                    self.store.prefetch(entry.handle)
            pass_.asked += 1
            pass_.asked_bytes += following.volume

    # What came of it.

    @property
    def seconds(self) -> float:
        """Time spent inside `active`."""
        return self._seconds + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def report(self) -> dict[str, Any]:
        """Counts and bytes; seconds of stalls; rates; the plan; bytes by module; the drive's life."""
        store = self.store.report
        lanes = self.lanes.report()
        backend = self.store.backend
        per_second = (store.stored_bytes - store.cancelled_bytes) / self.seconds if self.seconds else 0.0
        passes = max(1, self.counts.passes)
        return {
            "policy": self.policy,
            "tier": backend.name,
            **asdict(self.counts),
            "offloaded_bytes_per_pass": self.counts.offloaded_bytes // passes,
            "fetched_bytes": store.fetched_bytes,
            "forwarded": store.forwarded,
            "cancelled": store.cancelled,
            "kept_on_failure": store.kept,
            "stall_seconds": store.stall_seconds + store.wait_seconds,
            "stall_seconds_reading": store.stall_seconds,
            "stall_seconds_queue": store.wait_seconds,
            "seconds": self.seconds,
            "write_rate": lanes[backend.write_lane]["rate"],
            "read_rate": lanes[backend.read_lane]["rate"],
            "plan": asdict(self.plan) if self.plan else None,
            "modules": {name: total // passes for name, total in self.modules.items()},
            "written_bytes_per_day": per_second * 86400,
            "drive_life_days": drive_life_days(per_second, self.rated_bytes) if self.rated_bytes else None,
        }


def _stamps(tensors: Iterable[Tensor]) -> set[int]:
    return {stamp(t) for t in tensors if is_plain(t)}
