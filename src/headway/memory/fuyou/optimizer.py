"""AdamW whose fp32 masters and moments live on disk, each group updated as soon as its gradients are complete."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headway.core.errors import HeadwayError, MethodError
from headway.memory.fuyou.files import GroupFiles
from headway.memory.fuyou.groups import STATES, WEIGHTS, Group
from headway.memory.fuyou.pipeline import Pipeline
from headway.memory.lanes import Lanes
from headway.optim.master import MasterOptimizer


class TieredOptimizer(Pipeline):
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
        self.inner: Any = optimizer.inner if isinstance(optimizer, MasterOptimizer) else optimizer
        check_elementwise(self.inner, where)
        if buffers < delay + 1:
            raise MethodError(f"{where}.buffers", f"are {buffers}", expected=f"at least {delay + 1} with a write-back "
                              f"that is delayed by {delay}")  # fmt: skip
        masters = optimizer.masters if isinstance(optimizer, MasterOptimizer) else {}
        options = {p: group for group in self.inner.param_groups for p in group["params"]}
        check_groups(groups, masters, options, weights_on_disk, where)
        files = files if isinstance(files, GroupFiles) else GroupFiles(files)
        self._owns_lanes = lanes is None
        super().__init__(groups, options, masters, files, lanes or Lanes(), buffers, delay, weights_on_disk)
        self.where = where
        self.updates_during_backward = 0
        self._armed = False
        self._missing: list[int] = []
        self._scale: Callable[[Tensor], float | None] | None = None
        self._hooks: list[Any] = []
        self._place = {p: (i, k) for i, group in enumerate(self.groups) for k, p in enumerate(group.params)}
        if isinstance(optimizer, MasterOptimizer):
            optimizer.close()
        self._begin()
        self._hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in self._place]

    @torch.no_grad()
    def _begin(self) -> None:
        """The first generation: what is found on disk, or the weights as they are and no moments."""
        if self.files.found:
            if self.files.note.get("parameters") != self._described():
                raise HeadwayError(str(self.files.folder), "holds the states of another model, or in other groups",
                                   hint="give each model a folder of its own")  # fmt: skip
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
                self.updates_during_backward += 1
                self._complete(i, self._scale)

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
                self._complete(i, self._scale)
        with self._lock:
            self._armed, self._scale = False, None
            self._stop_reading_ahead()
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
            if self._ready:  # they wait for buffers, which groups may hold whose gradients do not come any more
                self._stop_reading_ahead()
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
            self._ready.clear()
            self._stop_reading_ahead()
            self._works = {i: work for i, work in self._works.items() if work.read}
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

    def named_masters(self) -> dict[Tensor, Tensor]:
        """Parameter -> its fp32 master: pages of the committed file, in memory once looked at, never changed by a step.

        What is written into them is lost; `load_masters` changes masters.
        """
        return {p: state["master"] for p, state in self._mapped(STATES[:1]).items()}

    def named_states(self) -> dict[Tensor, dict[str, Tensor]]:
        """Parameter -> ``step``, ``exp_avg``, ``exp_avg_sq`` as AdamW has them, of those ever updated; likewise."""
        return {
            p: {"step": self._steps[i][k].clone(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}  # type: ignore[union-attr]
            for p, state in self._mapped(STATES[1:]).items()
            for i, k in [self._place[p]]
            if self._steps[i][k] is not None
        }

    def _mapped(self, names: Sequence[str]) -> dict[Tensor, dict[str, Tensor]]:
        with self._lock:
            self.check()
            self._drain()
            current = list(self._current)
        found = {}
        for group, layout, generation in zip(self.groups, self.layouts, current, strict=True):
            regions = self.files.map(layout, generation, names)
            for k, p in enumerate(group.params):
                found[p] = {name: regions[name][k] for name in names}
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
        if self._failure is None:
            self.drain()
        steps = max(1, self.steps_done - self.files.step)
        return {
            "steps": self.steps_done - self.files.step,
            "groups": len(self.groups),
            "state_bytes": self.state_bytes,
            "host_bytes": self.host_bytes,
            "bytes_written": self.files.bytes_written,
            "bytes_read": self.files.bytes_read,
            "written_per_step": (self.files.bytes_written - self._rewritten) // steps,
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


def check_groups(
    groups: Sequence[Group],
    masters: dict[Tensor, Tensor],
    options: dict[Tensor, dict[str, Any]],
    on_disk: frozenset[int],
    where: str,
) -> None:
    """Groups must hold each of the optimizer's parameters once, in fp32 or over fp32 masters.

    Raises:
        MethodError: they do not.
    """
    held = [p for group in groups for p in group.params]
    if {masters.get(p, p) for p in held} != set(options) or len(held) != len(options):
        raise MethodError(where, "finds groups that are not the optimizer's parameters")
    for p in held:
        if p.dtype != torch.float32 and p not in masters:
            raise MethodError(where, f"trains fp32 weights, or lower ones over fp32 masters, not {p.dtype}")
    if any(len({p.dtype for p in groups[i].params}) > 1 for i in on_disk):
        raise MethodError(where, "keeps weights on disk in one precision a block", hint="set params: memory")


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
