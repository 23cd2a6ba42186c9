"""AdamW whose fp32 masters and moments live on disk, each group updated as soon as its gradients are complete.

One step of a group, in lanes:

    disk read          master and moments into a buffer, ahead of need while there are free buffers
    (device to host    its gradients, where they are on a GPU)
    compute            torch's own AdamW on the host
    host to device     the new working weights, where they stay in memory
    disk write         a new generation, `delay` groups later, so that reads are not queued behind writes

The backward pass goes on meanwhile. A step is committed when all its groups are written; until then `rollback` takes
it back.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adam import adam

from headway.core.errors import HeadwayError, MethodError
from headway.memory.backends import side_stream
from headway.memory.fuyou.files import Buffer, Generation, GroupFiles
from headway.memory.fuyou.groups import STATES, WEIGHTS, Group, Layout
from headway.memory.lanes import Job, Lane, Lanes
from headway.optim.master import MasterOptimizer

Clip = Literal["exact", "group", "previous"]


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


class TieredOptimizer:
    """AdamW over states on disk; results are bit for bit those of the optimizer it is made from.

        optimizer = TieredOptimizer(torch.optim.AdamW(model.parameters(), fused=True), block_groups(model), "/nvme")
        for batch in batches:
            loss = model(batch).mean()
            optimizer.arm()        # this backward pass completes the gradients: update while it runs
            loss.backward()
            optimizer.step()       # wait for the rest
            optimizer.zero_grad()

    Without ``arm`` the whole update happens in ``step``, so that gradients may be summed, clipped or looked at before.
    Gradients of a group updated during the backward pass are gone afterwards; ``grad_norm`` tells their joint norm.

    Args:
        optimizer: AdamW or Adam, or a `MasterOptimizer` of one; taken over: its masters and states move to disk.
        groups: see `block_groups`, `groups_of`; together they hold the optimizer's parameters.
        files: where to; a folder, or `GroupFiles`. With ``keep`` the newest committed step found there is taken up.
        lanes: shared with whatever else moves data.
        buffers: host buffers, each as large as the largest group; at least ``delay + 1``.
        delay: groups that are updated before the write-back of one begins.
        weights_on_disk: groups (by index) whose working weights live in the files too; see `WeightsOnDisk`.

    Raises:
        MethodError: the optimizer is of another kind, or there are too few buffers.
        HeadwayError: the disk is too small.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | MasterOptimizer,
        groups: Sequence[Group],
        files: GroupFiles | str | Path,
        *,
        lanes: Lanes | None = None,
        buffers: int = 3,
        delay: int = 1,
        weights_on_disk: frozenset[int] = frozenset(),
        where: str = "fuyou",
    ) -> None:
        self.where, self.delay, self.groups = where, delay, list(groups)
        self.inner: Any = optimizer.inner if isinstance(optimizer, MasterOptimizer) else optimizer
        check_elementwise(self.inner, where)
        if buffers < delay + 1:
            raise MethodError(f"{where}.buffers", f"are {buffers}", expected=f"at least {delay + 1} with a write-back "
                              f"that is delayed by {delay}")  # fmt: skip
        self.masters: dict[Tensor, Tensor] = optimizer.masters if isinstance(optimizer, MasterOptimizer) else {}
        self.options = {p: group for group in self.inner.param_groups for p in group["params"]}
        self._check_groups()
        self.files = files if isinstance(files, GroupFiles) else GroupFiles(files)
        self.lanes, self._owns_lanes = lanes or Lanes(), lanes is None
        self.compute = Lane("compute")
        self.on_disk = weights_on_disk
        self.layouts = [self._layout(i, group) for i, group in enumerate(self.groups)]
        self.buffer_bytes = max(layout.nbytes for layout in self.layouts)
        self.max_buffers = buffers
        self.state_bytes = sum(layout.nbytes for layout in self.layouts)
        self.files.require(2 * self.state_bytes, "two generations of the optimizer's states")

        self._device = self.groups[0].params[0].device
        self._lock = threading.Condition()
        self._buffers: list[Buffer] = []
        self._steps: list[list[Tensor | None]] = [[None] * len(g.params) for g in self.groups]
        self._current: list[Generation] = []
        """Newest committed generation of each group."""
        self._new: dict[int, Generation] = {}
        """Written in the step that is not committed yet."""
        self._works: dict[int, Work] = {}
        """Of the step at hand, or of the one before until it is committed."""
        self._ready: deque[int] = deque()  # complete, not read yet
        self._expected: deque[int] = deque()  # to be read ahead of need
        self._delayed: deque[Work] = deque()  # updated, not to be written yet
        self._writing = 0
        self._finished = True  # all updates of the newest step have been made; their writes may go on
        self._order = list(range(len(self.groups)))
        self._armed = False
        self._missing: list[int] = []
        self._scale: Callable[[Tensor], float | None] | None = None
        self._trash: deque[Any] = deque()
        self._failure: BaseException | None = None
        self.steps_done = self.files.step
        self.stall_seconds = 0.0
        """Time that `step` waited for updates, and whoever needs the files for writes."""
        self.updates_during_backward = 0
        self.before_update: Callable[[], None] = _nothing
        """Called once before a step's first update during a backward pass."""
        self.weights: Any = None
        """The `WeightsOnDisk` that follow this optimizer, where there are any."""
        self._hooks: list[Any] = []
        self._place = {p: (i, k) for i, group in enumerate(self.groups) for k, p in enumerate(group.params)}
        if isinstance(optimizer, MasterOptimizer):
            optimizer.close()
        self._begin()
        self._hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in self._place]

    # Building.

    def _check_groups(self) -> None:
        held = [p for group in self.groups for p in group.params]
        if {self.masters.get(p, p) for p in held} != set(self.options) or len(held) != len(self.options):
            raise MethodError(self.where, "finds groups that are not the optimizer's parameters")
        for p in held:
            if p.dtype != torch.float32 and p not in self.masters:
                raise MethodError(self.where, f"trains fp32 weights, or lower ones over fp32 masters, not {p.dtype}")

    def _layout(self, index: int, group: Group) -> Layout:
        dtype = group.params[0].dtype
        beside = index in self.on_disk and dtype != torch.float32
        return Layout([p.shape for p in group.params], dtype if beside else None)

    def _master(self, p: Tensor) -> Tensor:
        return self.masters.get(p, p)

    @torch.no_grad()
    def _begin(self) -> None:
        """The first generation: what is found on disk, or the weights as they are and no moments."""
        names = {group.name for group in self.groups}
        if self.files.found:
            if self.files.found.keys() != names:
                raise HeadwayError(str(self.files.folder), "holds the states of another model")
            self._current = [self.files.found[group.name] for group in self.groups]
            for i, group in enumerate(self.groups):
                steps = self.files.note["steps"][group.name]
                self._steps[i] = [None if s is None else torch.tensor(float(s)) for s in steps]
            self.reload(range(len(self.groups)))
        else:
            for i, group in enumerate(self.groups):
                state = [self.inner.state.get(self._master(p), {}) for p in group.params]
                self._steps[i] = [s["step"].detach().cpu().clone() if "step" in s else None for s in state]

                def fill(region: str, position: int, group: Group = group, state: Any = state) -> Tensor | None:
                    if region in (STATES[0], WEIGHTS):
                        return self._master(group.params[position]).detach()
                    return state[position].get(region)

                self._current.append(self._rewrite(i, fill, None))
            self._commit_files(self.files.step)
        for master in self.masters.values():
            master.untyped_storage().resize_(0)
        self.inner.state.clear()

    # Hooks and the step, in the caller's thread.

    def arm(self, scale: Callable[[Tensor], float | None] | None = None) -> None:
        """The next backward pass completes the step's gradients: update each group as soon as its own are.

        Args:
            scale: ``norm of a group's gradients -> factor on them`` or None for none.
        """
        self.check()
        self._scale = scale
        with self._lock:
            self._armed = True
            self._missing = [len(group.params) for group in self.groups]
            self._open()
            self._pump()

    def _open(self) -> None:
        """Under the lock: begin a step's works once those of the step before are gone."""
        if self._finished:
            self._drain()
            self._works, self._finished = {}, False
            self._expected = deque(self._order)
            self._order = []

    @torch.no_grad()
    def _arrived(self, p: Tensor) -> None:
        i, k = self._place[p]
        self._trash.clear()
        if p.grad is None:
            return
        with self._lock:
            work = self._works.get(i)
            if not self._finished and work is not None and work.positions is not None:
                raise HeadwayError(self.groups[i].names[k], "gets a gradient after its group was updated in this step",
                                   hint="arm only before the step's last backward pass")  # fmt: skip
        master = self._master(p)
        if master is not p:  # summed in fp32 over micro-batches, as MasterOptimizer does
            if master.grad is None:
                master.grad = p.grad.float()
            else:
                master.grad.add_(p.grad)
            p.grad = None
        if self._armed:
            self._missing[i] -= 1
            if self._missing[i] == 0:
                if not self.updates_during_backward or not any(w.positions is not None for w in self._works.values()):
                    self.before_update()
                self.updates_during_backward += 1
                self._complete(i)

    def _complete(self, i: int) -> None:
        """All gradients of a group are there: take them, and let the lanes do the rest."""
        masters = [self._master(p) for p in self.groups[i].params]
        with self._lock:
            work = self._works.setdefault(i, Work(i))
            work.positions = [k for k, master in enumerate(masters) if master.grad is not None]
            work.grads = [master.grad for master in masters if master.grad is not None]
            work.scale = self._scale
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

    def step(self) -> None:
        """Update what has not been updated, and wait until all working weights are new.

        Raises:
            HeadwayError: a lane's worker failed; its exception is the cause.
        """
        self.check()
        with self._lock:
            self._open()
        for i, group in enumerate(self.groups):
            work = self._works.get(i)
            if (work is None or work.positions is None) and any(self._master(p).grad is not None for p in group.params):
                self._complete(i)
        with self._lock:
            self._armed, self._scale = False, None
            self._expected.clear()
            for work in self._works.values():
                if work.positions is None:  # read ahead, and nothing came
                    self._abandon(work)
            self._works = {i: work for i, work in self._works.items() if work.positions is not None}
            self._pump()
            self._wait(lambda: all(work.updated for work in self._works.values()))
            self._order += [i for i in range(len(self.groups)) if i not in self._works]
            for i, work in self._works.items():
                for k, counter in zip(work.positions or (), work.steps, strict=True):
                    self._steps[i][k] = counter
            self.steps_done += 1
            self._finished = True
            self._flush()
        self._trash.clear()
        if self.weights is not None:
            self.weights.forget()

    @property
    def is_updating(self) -> bool:
        """Whether the step at hand has used gradients already, in its backward pass."""
        return not self._finished and any(work.positions is not None for work in self._works.values())

    @property
    def grad_norm(self) -> Tensor:
        """2-norm of all gradients of the step at hand, those used already included, as they were before any scaling."""
        found: dict[Tensor, Tensor] = {}
        with self._lock:
            taken = [work for work in self._works.values() if work.positions is not None and not self._finished]
            self._wait(lambda: all(work.updated for work in taken))
            for work in taken:
                for k, norm in zip(work.positions or (), work.norms, strict=True):
                    found[self._master(self.groups[work.group].params[k])] = norm
        late = {p: torch.linalg.vector_norm(p.grad).cpu() for p in self.options if p.grad is not None}
        norms = [{**late, **found}[p] for p in self.options if p in found or p in late]  # in the order of all others
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())

    def rollback(self) -> None:
        """Take back what the step at hand has updated: weights and states are as before it."""
        with self._lock:
            if self._finished:
                return
            self._armed = False
            self._expected.clear()
            self._ready.clear()
            for work in self._works.values():
                if work.positions is None:
                    self._abandon(work)
            self._works = {i: work for i, work in self._works.items() if work.positions is not None and work.read}
            self._wait(lambda: all(work.updated for work in self._works.values()))
            for work in self._delayed:
                self._release(work)
            self._delayed.clear()
            self._wait(lambda: not self._writing)
            for generation in self._new.values():
                self.files.delete(generation)
            self._new.clear()
            touched, self._works, self._finished = list(self._works), {}, True
            self._order = list(range(len(self.groups)))
        self.reload(touched)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        for p in self._place:
            p.grad = self._master(p).grad = None

    # The pipeline, under the lock; called from the caller's thread and from the lanes'.

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
            self._buffers.append(Buffer(self.buffer_bytes, self._device.type == "cuda"))
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
        for options in self.inner.param_groups:
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
                _copy(pairs, self._device)

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

    def _abandon(self, work: Work) -> None:
        """A group that was read for nothing gives its buffer back once the read is over."""
        if work.read is not None and not work.read.cancel():
            self._wait(lambda: work.here)
        self._release(work)

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
        self.files.commit(step, current, {"steps": steps})

    # Waiting.

    def _wait(self, over: Callable[[], bool]) -> None:
        start = time.perf_counter()
        self._lock.wait_for(lambda: self._failure is not None or over())
        self.stall_seconds += time.perf_counter() - start
        self.check()

    def _drain(self) -> None:
        self._flush()
        self._wait(lambda: not self._writing and not self._delayed)
        self._commit()

    def check(self) -> None:
        """Stop where a lane's worker has failed.

        Raises:
            HeadwayError: its exception is the cause; what was committed last is on disk untouched.
        """
        if self._failure is not None:
            error = self._failure
            said = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
            raise HeadwayError(str(self.files.root), f"the optimizer's states could not be moved or updated: {said}",
                               hint="go on from the last checkpoint") from error  # fmt: skip

    # Everything by name: for checkpoints, and to look at.

    def named_masters(self) -> dict[Tensor, Tensor]:
        """Parameter -> its fp32 master, read from the committed file when it is looked at, never changed by a step."""
        return {p: state["master"] for p, state in self._mapped().items()}

    def named_states(self) -> dict[Tensor, dict[str, Tensor]]:
        """Parameter -> ``step``, ``exp_avg``, ``exp_avg_sq`` as AdamW has them, of those ever updated; likewise."""
        return {
            p: {"step": self._steps[i][k].clone(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}  # type: ignore[union-attr]
            for p, state in self._mapped().items()
            for i, k in [self._place[p]]
            if self._steps[i][k] is not None
        }

    def _mapped(self) -> dict[Tensor, dict[str, Tensor]]:
        with self._lock:
            self.check()
            self._drain()
            current = list(self._current)
        found = {}
        for group, layout, generation in zip(self.groups, self.layouts, current, strict=True):
            regions = self.files.map(layout, generation)
            for k, p in enumerate(group.params):
                found[p] = {name: regions[name][k] for name in STATES}
        return found

    @torch.no_grad()
    def load_masters(self, values: dict[Tensor, Tensor]) -> None:
        """Take over masters (parameter -> values), and round them into the working weights."""
        self._load(lambda p, region: values.get(p) if region in (STATES[0], WEIGHTS) else None)

    @torch.no_grad()
    def load_states(self, values: dict[Tensor, dict[str, Tensor]]) -> None:
        """Take over what `named_states` gives."""
        for p, state in values.items():
            i, k = self._place[p]
            self._steps[i][k] = state["step"].detach().cpu().clone()
        self._load(lambda p, region: values.get(p, {}).get(region))

    def _load(self, value: Callable[[Tensor, str], Tensor | None]) -> None:
        with self._lock:
            self.check()
            self._drain()
        old = list(self._current)
        for i, group in enumerate(self.groups):
            self._current[i] = self._rewrite(i, lambda region, k, g=group: value(g.params[k], region), old[i])  # type: ignore[misc]
        self._commit_files(self.steps_done)
        for generation in old:
            self.files.delete(generation)
        self.reload(range(len(self.groups)))

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
            return write.result()
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
            masters = self.files.map(self.layouts[i], self._current[i])[STATES[0]]
            _copy([(p.data, m) for p, m in zip(self.groups[i].params, masters, strict=True)], self._device)

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
                    _copy([(into, buffer.tensor[first : first + into.numel()])], into.device, event)

                def over() -> None:
                    buffer.users -= 1
                    self._pump()

                return self._submit(self.lanes["host_to_device"], forward, into.numel(), name, over)
            generation = self._new.get(i, self._current[i])

            def read() -> None:
                pages = self.files.staging(nbytes)
                self.files.read(layout, generation, pages, (region,))
                _copy([(into, torch.frombuffer(pages, dtype=torch.uint8, count=into.numel()))], into.device, event)

            return self._submit(self.lanes[self.files.read_lane], read, nbytes, name)

    # What a torch optimizer has.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups; a schedule writes ``lr`` here, before the backward pass."""
        return self.inner.param_groups

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's default options."""
        return self.inner.defaults

    @property
    def host_bytes(self) -> int:
        """Host memory that states have taken, at its peak."""
        return len(self._buffers) * self.buffer_bytes

    def state_dict(self) -> dict[str, Any]:
        """Masters and states by the parameters' names in the groups, read when they are looked at."""
        masters, states = self.named_masters(), self.named_states()
        names = {p: f"{g.name}/{n}" for g in self.groups for n, p in zip(g.names, g.params, strict=True)}
        return {
            "masters": {names[p]: v for p, v in masters.items()},
            "states": {names[p]: v for p, v in states.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        params = {f"{g.name}/{n}": p for g in self.groups for n, p in zip(g.names, g.params, strict=True)}
        self.load_masters({params[name]: v for name, v in state["masters"].items()})
        self.load_states({params[name]: v for name, v in state["states"].items()})

    def report(self) -> dict[str, Any]:
        """What was moved and waited for; bytes that the drive took, per step and in all."""
        steps = max(1, self.steps_done - self.files.step)
        return {
            "steps": self.steps_done - self.files.step,
            "groups": len(self.groups),
            "state_bytes": self.state_bytes,
            "host_bytes": self.host_bytes,
            "bytes_written": self.files.bytes_written,
            "bytes_read": self.files.bytes_read,
            "written_per_step": self.files.bytes_written // steps,
            "updates_during_backward": self.updates_during_backward,
            "stall_seconds": self.stall_seconds,
            "compute_seconds": self.compute.report.busy_seconds,
            "lanes": self.lanes.report(),
        }

    def close(self) -> None:
        """Finish what is under way, take the hooks off and remove what is not to be kept."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self.weights is not None and self._failure is None:
            self.weights.close()
        if self._failure is None:
            with self._lock:
                self._drain() if self._finished else None
        if self._owns_lanes:
            self.lanes.close(cancel=self._failure is not None)
        self.compute.close(cancel=True)
        self.files.close()


def check_elementwise(optimizer: Any, where: str) -> None:
    """Only an update that looks at one element at a time can be made in groups, on a host, with the same result.

    Raises:
        MethodError: the optimizer is not torch's AdamW or Adam, or has options that are not kept here.
    """
    if type(optimizer) not in (torch.optim.AdamW, torch.optim.Adam):
        raise MethodError(where, f"keeps the states of AdamW and Adam, not of {type(optimizer).__name__}",
                          hint="set optimizer.name: adamw")  # fmt: skip
    for group in optimizer.param_groups:
        odd = [key for key in ("amsgrad", "capturable", "differentiable") if group.get(key)]
        if odd:
            raise MethodError(where, f"cannot serve an optimizer with {odd[0]}=True")


def _copy(pairs: Sequence[tuple[Tensor, Tensor]], device: torch.device, after: Any = None) -> None:
    if not pairs:
        return
    targets, sources = [a for a, _ in pairs], [b for _, b in pairs]
    with side_stream(device) as stream:
        if after is not None:
            stream.wait_event(after)
        torch._foreach_copy_(targets, sources, non_blocking=stream is not None)
        if stream is not None:
            stream.synchronize()


def _nothing() -> None:
    """Nothing to do before an update."""


__all__ = ["Clip", "TieredOptimizer", "check_elementwise"]
