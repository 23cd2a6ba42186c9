"""What happens to groups of states in the lanes: read, update, write back, commit, and back again.

One step of a group:

    disk read          master and moments into a buffer, ahead of need while there are free buffers
    (device to host    its gradients, where they are on a GPU)
    compute            torch's own AdamW on the host
    host to device     the new working weights, where they stay in memory
    disk write         a new generation, `delay` groups later, so that reads are not queued behind writes

The backward pass goes on meanwhile. A step is committed when all its groups are written.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from headway.core.errors import HeadwayError, reason
from headway.memory.backends import side_stream
from headway.memory.fuyou.files import Buffer, Generation, GroupFiles
from headway.memory.fuyou.groups import STATES, WEIGHTS, Group, Layout
from headway.memory.lanes import Job, Lane, Lanes


class Work:
    """One group in one step."""

    def __init__(self, group: int) -> None:
        self.group = group
        self.buffer: Buffer | None = None
        self.read: Job | None = None
        self.here = False  # the read is over
        self.positions: list[int] | None = None  # in the group: which parameters have a gradient, once complete
        self.grads: list[Tensor] = []  # theirs, until used
        self.event: Any = None  # on a GPU: the gradients are there
        self.scale: Callable[[Tensor], float | None] | None = None
        self.norms: list[Tensor] = []
        self.steps: list[Tensor] = []
        self.updated = False


class Pipeline:
    """The lanes' side of `TieredOptimizer`. What is said to be under the lock is called from several threads.

    Args:
        groups: of parameters.
        options: master -> the optimizer's options for it.
        masters: parameter -> master, where it is not the parameter itself.
        files: where the states are.
        lanes: what moves them.
        buffers: host buffers, each as large as the largest group.
        delay: groups that are updated before the write-back of one begins.
        on_disk: groups whose working weights live in the files too.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        options: dict[Tensor, dict[str, Any]],
        masters: dict[Tensor, Tensor],
        files: GroupFiles,
        lanes: Lanes,
        buffers: int,
        delay: int,
        on_disk: frozenset[int],
    ) -> None:
        self.groups, self.options, self.masters, self.files, self.lanes = list(groups), options, masters, files, lanes
        self.delay, self.on_disk, self.max_buffers = delay, on_disk, buffers
        self.compute = Lane("compute")
        self.layouts = [Layout.of(group, i in on_disk) for i, group in enumerate(self.groups)]
        self.buffer_bytes = max(layout.nbytes for layout in self.layouts)
        self.state_bytes = sum(layout.nbytes for layout in self.layouts)
        self.files.require(2 * self.state_bytes, "two generations of the optimizer's states")
        self.steps_done = self.files.step
        self._rewritten = 0  # bytes written in no step: the first generation, and what was loaded
        self.stall_seconds = 0.0
        """Time that `step` waited for updates, and whoever needs the files for writes."""
        self.weights: Any = None
        """The `WeightsOnDisk` that follow this optimizer, where there are any."""
        self._device = self.groups[0].params[0].device
        self._lock = threading.Condition()
        self._buffers: list[Buffer] = []
        self._steps: list[list[Tensor | None]] = [[None] * len(g.params) for g in self.groups]
        self._current: list[Generation] = []  # the newest committed one of each group
        self._new: dict[int, Generation] = {}  # written in the step that is not committed yet
        self._works: dict[int, Work] = {}  # of the step at hand, or of the one before until the next begins
        self._ready: deque[int] = deque()  # complete, not read yet
        self._expected: deque[int] = deque()  # to be read ahead of need
        self._delayed: deque[Work] = deque()  # updated, not to be written yet
        self._writing = 0
        self._finished = True  # all updates of the newest step have been made; their writes may go on
        self._order = list(range(len(self.groups)))  # in which gradients became complete
        self._trash: deque[Any] = deque()  # what lanes are done with, for the caller's thread to free
        self._failure: BaseException | None = None

    def _master(self, p: Tensor) -> Tensor:
        return self.masters.get(p, p)

    def _open(self) -> None:
        """Under the lock: begin a step's works once those of the step before are gone."""
        if self._finished:
            self._drain()
            self._works, self._finished = {}, False
            self._expected = deque(self._order)
            self._order = []

    def _complete(self, i: int, scale: Callable[[Tensor], float | None] | None) -> None:
        """All gradients of a group are there: take them, and let the lanes do the rest."""
        masters = [self._master(p) for p in self.groups[i].params]
        with self._lock:
            work = self._works.setdefault(i, Work(i))
            work.positions = [k for k, master in enumerate(masters) if master.grad is not None]
            work.grads = [master.grad for master in masters if master.grad is not None]
            work.scale = scale
            for master in masters:
                master.grad = None
            if self._device.type == "cuda":
                work.event = torch.cuda.Event()
                work.event.record()
            self._order.append(i)
            if work.read is None:
                self._ready.append(i)
                self._pump()
            else:
                self._submit_update(work)

    def _pump(self) -> None:
        """Read as long as there are buffers: what waits for its update first, then what will come next."""
        while self._failure is None and (self._ready or self._expected):
            ahead = not self._ready
            i = (self._expected if ahead else self._ready)[0]
            if ahead and i in self._works:
                self._expected.popleft()
                continue
            buffer = self._free_buffer()
            if buffer is None:
                return
            (self._expected if ahead else self._ready).popleft()
            work = self._works.setdefault(i, Work(i))
            work.buffer = buffer
            layout, generation = self.layouts[i], self._current[i]

            def read(layout: Layout = layout, generation: Generation = generation, buffer: Buffer = buffer) -> None:
                self.files.read(layout, generation, buffer.memory, STATES)

            def over(work: Work = work) -> None:
                work.here = True

            nbytes = sum(layout.regions[name][1] for name in STATES)
            work.read = self._submit(self.lanes[self.files.read_lane], read, nbytes, self.groups[i].name, over)
            if work.positions is not None:
                self._submit_update(work)

    def _free_buffer(self) -> Buffer | None:
        for buffer in self._buffers:
            if not buffer.users:
                buffer.users = 1
                return buffer
        if len(self._buffers) < self.max_buffers:
            self._buffers.append(Buffer(self.buffer_bytes, self._device))
            self._buffers[-1].users = 1
            return self._buffers[-1]
        return None

    def _submit(self, lane: Lane, work: Callable[[], Any], nbytes: int, label: str,
                then: Callable[[], None] | None = None) -> Job:  # fmt: skip
        """A job whose failure stops everything."""

        def run() -> None:
            try:
                work()
            except BaseException as error:
                with self._lock:
                    self._failure = self._failure or error
                    self._lock.notify_all()
                raise

        def after(_: Any) -> None:
            with self._lock:
                try:
                    if then is not None:
                        then()
                except BaseException as error:
                    self._failure = self._failure or error
                    raise
                finally:
                    self._lock.notify_all()

        return lane.submit(run, nbytes, label, after, wait=False)

    def _submit_update(self, work: Work) -> None:
        def update() -> None:
            assert work.read is not None
            work.read.result()
            self._update(work)

        name, layout = self.groups[work.group].name, self.layouts[work.group]

        def compute() -> None:
            self._submit(self.compute, update, layout.nbytes, name, lambda: self._return(work))

        if work.event is not None:  # gradients on a GPU leave it first
            nbytes = sum(grad.nbytes for grad in work.grads)
            self._submit(self.lanes["device_to_host"], lambda: self._fetch_grads(work), nbytes, name, compute)
        else:
            compute()

    def _fetch_grads(self, work: Work) -> None:
        with side_stream(self._device) as stream:
            stream.wait_event(work.event)
            host = [torch.empty(grad.shape, dtype=grad.dtype, pin_memory=True) for grad in work.grads]
            torch._foreach_copy_(host, work.grads, non_blocking=True)
            stream.synchronize()
        self._trash.append(work.grads)
        work.grads = host

    @torch.no_grad()
    def _update(self, work: Work) -> None:
        """AdamW on a group, in the compute lane: the same call that the optimizer's own ``step`` makes."""
        i, layout = work.group, self.layouts[work.group]
        assert work.buffer is not None and work.positions is not None
        states = {name: layout.views(work.buffer.tensor, name) for name in STATES}
        grads = work.grads
        work.norms = list(torch._foreach_norm(grads)) if grads else []
        if work.scale is not None and grads:
            factor = work.scale(torch.linalg.vector_norm(torch.stack(work.norms)))
            if factor is not None:
                torch._foreach_mul_(grads, factor)
        counters = (self._steps[i][k] for k in work.positions)
        work.steps = [torch.zeros(()) if s is None else s.clone() for s in counters]
        for options in {id(options): options for options in self.options.values()}.values():
            members = [n for n, k in enumerate(work.positions)
                       if self.options[self._master(self.groups[i].params[k])] is options]  # fmt: skip
            if not members:
                continue
            chosen = [work.positions[n] for n in members]
            adam(
                [states["master"][k] for k in chosen],
                [grads[n] for n in members],
                [states["exp_avg"][k] for k in chosen],
                [states["exp_avg_sq"][k] for k in chosen],
                [],
                [work.steps[n] for n in members],
                foreach=options["foreach"],
                fused=options["fused"],
                decoupled_weight_decay=options["decoupled_weight_decay"],
                amsgrad=False,
                beta1=options["betas"][0],
                beta2=options["betas"][1],
                lr=float(options["lr"]),
                weight_decay=options["weight_decay"],
                eps=options["eps"],
                maximize=options["maximize"],
            )
        if WEIGHTS in layout.regions:
            torch._foreach_copy_(layout.views(work.buffer.tensor, WEIGHTS), states["master"])
        self._trash.append(grads)  # made by the caller's thread, and freed there
        work.grads = []

    def _return(self, work: Work) -> None:
        """Updated: the new working weights go where they belong, and later the states to disk."""
        if work.group in self.on_disk:
            self._updated(work)
            return
        group, layout = self.groups[work.group], self.layouts[work.group]
        nbytes = sum(p.nbytes for p in group.params)
        assert work.buffer is not None
        masters = layout.views(work.buffer.tensor, STATES[0])
        changed = set(work.positions or ())

        def put() -> None:
            with torch.no_grad():
                pairs = [
                    (p.data, m) for k, (p, m) in enumerate(zip(group.params, masters, strict=True)) if k in changed
                ]
                copy_all(pairs, self._device)

        self._submit(self.lanes["host_to_device"], put, nbytes, group.name, lambda: self._updated(work))

    def _updated(self, work: Work) -> None:
        work.updated = True
        self._delayed.append(work)
        if len(self._delayed) > self.delay:
            self._write(self._delayed.popleft())
        if self._finished:
            self._flush()

    def _flush(self) -> None:
        while self._delayed:
            self._write(self._delayed.popleft())
        if not self._writing:
            self._commit()

    def _write(self, work: Work) -> None:
        i, layout, buffer = work.group, self.layouts[work.group], work.buffer
        assert buffer is not None
        self._writing += 1
        written: list[Generation] = []

        def then() -> None:
            self._new[i] = written[0]
            self._writing -= 1
            self._release(work)
            if self._finished and not self._writing and not self._delayed:
                self._commit()
            self._pump()

        self._submit(self.lanes[self.files.write_lane], lambda: written.append(self.files.write(layout, buffer)),
                     layout.nbytes, self.groups[i].name, then)  # fmt: skip

    def _release(self, work: Work) -> None:
        if work.buffer is not None:
            work.buffer.users -= 1
            work.buffer = None

    def _stop_reading_ahead(self) -> None:
        """Under the lock: groups that were read ahead, and whose gradients have not come, give their buffers back."""
        self._expected.clear()
        for i, work in list(self._works.items()):
            if work.positions is None:
                if work.read is not None and not work.read.cancel():
                    self._wait(lambda work=work: work.here)  # type: ignore[misc]
                self._release(work)
                del self._works[i]
        self._pump()

    def _commit(self) -> None:
        """All that the step wrote is on disk: from now on it is the state."""
        if not self._new:
            return
        old = [self._current[i] for i in self._new]
        for i, generation in self._new.items():
            self._current[i] = generation
        self._new.clear()
        self._commit_files(self.steps_done)
        for generation in old:
            self.files.delete(generation)

    def _commit_files(self, step: int) -> None:
        current = {group.name: g for group, g in zip(self.groups, self._current, strict=True)}
        steps = {group.name: [None if s is None else float(s) for s in self._steps[i]]
                 for i, group in enumerate(self.groups)}  # fmt: skip
        self.files.commit(step, current, {"steps": steps, "parameters": self._described()})

    def _described(self) -> dict[str, Any]:
        """What lies in the files, as plain data: the order and shapes of each group's parameters."""
        return {
            group.name: [str(layout.weights), [[n, list(s)] for n, s in zip(group.names, layout.shapes, strict=True)]]
            for group, layout in zip(self.groups, self.layouts, strict=True)
        }

    def _wait(self, over: Callable[[], bool]) -> None:
        start = time.perf_counter()
        self._lock.wait_for(lambda: self._failure is not None or over())
        self.stall_seconds += time.perf_counter() - start
        self.check()

    def _drain(self) -> None:
        self._flush()
        self._wait(lambda: not self._writing and not self._delayed)
        self._commit()

    def drain(self) -> None:
        """Wait until the newest step is complete on disk."""
        with self._lock:
            self.check()
            if self._finished:
                self._drain()

    def check(self) -> None:
        """Stop where a lane's worker has failed.

        Raises:
            HeadwayError: its exception is the cause; what was committed last is on disk untouched.
        """
        if self._failure is not None:
            error = self._failure
            raise HeadwayError(str(self.files.root), "the optimizer's states could not be moved or updated: "
                               f"{reason(error)}", hint="go on from the last checkpoint") from error  # fmt: skip

    def _rewrite(self, i: int, fill: Callable[[str, int], Tensor | None], old: Generation | None) -> Generation:
        """A new generation of a group: the old one (or zeros) with what ``fill(region, position)`` gives laid over."""
        layout, name = self.layouts[i], self.groups[i].name
        with self._lock:
            taken: list[Buffer | None] = []
            self._lock.wait_for(lambda: taken.append(self._free_buffer()) or taken[-1] is not None)  # type: ignore[func-returns-value]
            buffer = taken[-1]
            assert buffer is not None
        try:
            if old is not None:
                self.lanes[self.files.read_lane].submit(
                    lambda: self.files.read(layout, old, buffer.memory), layout.nbytes, name
                ).result()
            else:
                buffer.tensor[: layout.nbytes].zero_()
            for region in layout.regions:
                for k, view in enumerate(layout.views(buffer.tensor, region)):
                    new = fill(region, k)
                    if new is not None:
                        view.copy_(new)
            write = self.lanes[self.files.write_lane].submit(
                lambda: self.files.write(layout, buffer), layout.nbytes, name
            )
            generation = write.result()
            self._rewritten += layout.nbytes
            return generation
        except OSError as error:
            raise HeadwayError(str(self.files.root), f"cannot hold the optimizer's states ({error.strerror})",
                               hint="make room, or give another path") from error  # fmt: skip
        finally:
            buffer.users = 0

    @torch.no_grad()
    def reload(self, groups: Sequence[int]) -> None:
        """Put the committed masters into the working weights that are in memory."""
        if self.weights is not None:
            self.weights.forget()
        for i in groups:
            if i in self.on_disk:
                continue
            masters = self.files.map(self.layouts[i], self._current[i], STATES[:1])[STATES[0]]
            copy_all([(p.data, m) for p, m in zip(self.groups[i].params, masters, strict=True)], self._device)

    def read_weights(self, i: int, into: Tensor) -> Job:
        """Begin to bring the newest working weights of a group on disk into ``into``, uint8 [their bytes].

        Where the group is still waiting to be written, from its buffer.
        """
        layout, name = self.layouts[i], self.groups[i].name
        region = layout.working
        first, nbytes = layout.regions[region]
        event = None
        if into.is_cuda:  # its memory may be in use until now
            event = torch.cuda.Event()
            event.record()
        with self._lock:
            work = self._works.get(i)
            if work is not None and work.buffer is not None and work.updated:
                buffer = work.buffer
                buffer.users += 1

                def forward() -> None:
                    copy_all([(into, buffer.tensor[first : first + into.numel()])], into.device, event)

                def over() -> None:
                    buffer.users -= 1
                    self._pump()

                return self._submit(self.lanes["host_to_device"], forward, into.numel(), name, over)
            generation = self._new.get(i, self._current[i])

            def read() -> None:
                pages = self.files.staging(nbytes)
                self.files.read(layout, generation, pages, (region,))
                copy_all([(into, torch.frombuffer(pages, dtype=torch.uint8, count=into.numel()))], into.device, event)

            return self._submit(self.lanes[self.files.read_lane], read, nbytes, name)


def copy_all(pairs: Sequence[tuple[Tensor, Tensor]], device: torch.device, after: Any = None) -> None:
    """Copy each second tensor into the first, and wait for it.

    Args:
        after: an event on the device to wait for before.
    """
    if not pairs:
        return
    targets, sources = [a for a, _ in pairs], [b for _, b in pairs]
    with side_stream(device) as stream:
        if after is not None:
            stream.wait_event(after)
        torch._foreach_copy_(targets, sources, non_blocking=stream is not None)
        if stream is not None:
            stream.synchronize()
