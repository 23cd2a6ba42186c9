"""Adam with its state in host memory, some subgroups of which the device updates in turn."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from headway.core.clip import clip_
from headway.core.errors import HeadwayError
from headway.core.fallback import fallback
from headway.core.units import human
from headway.memory.deep_optimizer_states.arrange import arrange, free_bytes, residents
from headway.memory.deep_optimizer_states.calibrate import calibrate
from headway.memory.deep_optimizer_states.gradients import Gradients
from headway.memory.deep_optimizer_states.kernel import check_elementwise, check_params
from headway.memory.deep_optimizer_states.plan import Placement, Rates, Stride, device_extra, slots, staging_bytes
from headway.memory.deep_optimizer_states.tensors import State, Tensors
from headway.memory.deep_optimizer_states.update import Slot, Update, Workers
from headway.memory.subgroups import Subgroup


class InterleavedOffload(torch.optim.Optimizer):
    """Adam or AdamW whose fp32 masters and moments live in host memory.

    The host updates most subgroups; every ``stride``-th is staged to the device, updated there and brought back
    meanwhile. The results are those of the same optimizer without offloading, bit for bit where host and device run the
    same kernel.

    Args:
        params: the model's parameters, parameter groups, or ``named_parameters()``; of any floating type up to fp32.
        optimizer: ``torch.optim.AdamW`` or ``torch.optim.Adam``.
        stride: every how many subgroups one is updated on the device; 1: all are, None: none is; ``auto``: measured.
        subgroup: parameters of a subgroup at most; fewer where the model would be less than 8 subgroups, or where
            staging would exceed ``max_device_extra``.
        resident_fraction: share of the parameters whose state stays on the device, and is updated there.
        async_grads: gradients cross to the host while the backward pass goes on.
        max_device_extra: bytes that staging and kept gradients may take on the device; no more than it has free now.
        masters: parameter -> its exact fp32 values, where the parameter itself is rounded already.
        workers: the lanes, to share them or to pretend rates.
        rates: of the lanes, if they are known; else ``auto`` measures them.
        **options: of the optimizer: ``lr``, ``betas``, ``eps``, ``weight_decay``.

    The tensors in ``param_groups`` are not the parameters but where their gradients are gathered, in fp32: read them
    with `clip_grad_norm_`, a ``GradScaler`` or any function of ``.grad``.

    Raises:
        HeadwayError: the optimizer is not element by element, there is no such host memory, or nothing can be staged
            within ``max_device_extra``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
        *,
        stride: Stride | Literal["auto"] = "auto",
        subgroup: int = 100_000_000,
        resident_fraction: float = 0.0,
        async_grads: bool = True,
        max_device_extra: int = 8 << 30,
        masters: dict[Tensor, Tensor] | None = None,
        workers: Workers | None = None,
        rates: Rates | None = None,
        **options: Any,
    ) -> None:
        where = "InterleavedOffload"
        if not 0 <= resident_fraction < 1 or (isinstance(stride, int) and stride < 1):
            raise HeadwayError(where, f"got resident_fraction {resident_fraction} and stride {stride!r}",
                               expected="a share of at least 0 and below 1; a stride of 1 or more")  # fmt: skip
        plain = optimizer(params, **options)
        check_elementwise(plain, where)
        check_params(plain, where)
        self._mixed = ""
        self._ready = False
        self._norm: Tensor | None = None
        self.workers, self._owns = workers or Workers(), workers is None
        self.updates = self.skipped = 0
        self.update_seconds: deque[float] = deque(maxlen=256)
        self.grad_wait_seconds = 0.0
        everything = [p for group in plain.param_groups for p in group["params"]]
        device = everything[0].device

        def measured(dtype: torch.dtype, numel: int) -> Rates | None:
            if rates is None and stride == "auto":
                return calibrate(self.workers, device, dtype, min(numel, 1 << 22))
            return rates

        resident = residents(everything, resident_fraction)
        limit = int(min(max_device_extra, free_bytes(device)))
        self.arrangement = arrange(plain.param_groups, resident, stride, subgroup, limit, measured)
        self._tensors = Tensors(everything, self.arrangement, resident, masters or {})
        gathered = self._tensors.gathered
        self._gradients = Gradients(everything, [gathered[p] for p in everything],
                                    [self._tensors.on_host_of[p] for p in everything], self.workers.to_host,
                                    async_grads)  # fmt: skip
        self._resident_of = [[p for p in group["params"] if p in resident] for group in plain.param_groups]
        groups = [dict(group, params=[gathered[p] for p in group["params"]]) for group in plain.param_groups]
        super().__init__(groups, plain.defaults)
        self._tensors.groups = self._groups
        self._ready = True

    @property
    def k(self) -> Stride:
        """The stride: chosen, or as given."""
        return self.arrangement.k

    @property
    def plan(self) -> Placement | None:
        """The choice and its prediction, where rates are known."""
        return self.arrangement.plan

    # A step.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update all parameters that have a gradient; none at all if any gradient is not finite.

        Raises:
            HeadwayError: the update failed halfway. Its state is then of no use, and is given to nobody.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.wait()
        self._check_whole()
        norm, self._norm = self._norm, None
        if norm is None or self._gradients.fresh:
            norm = clip_(self._tensors.gathered.values(), None)
        if not math.isfinite(float(norm)):
            self.skipped += 1
            fallback("skipping an optimizer step", f"the gradient norm is {float(norm)}", "that step's gradients")
            return loss
        start = time.perf_counter()
        staged = [s for s in self.arrangement.staged if self._tensors.active(s)]
        buffers = self._buffers(staged)
        self._mixed = f"update {self.updates + 1} is under way"
        try:
            interrupt = self._update(staged, buffers)
        except BaseException:
            self._mixed = f"update {self.updates + 1} failed halfway"
            raise
        self._mixed = ""
        self.updates += 1
        self.update_seconds.append(time.perf_counter() - start)
        if interrupt is not None:
            raise interrupt
        return loss

    def _buffers(self, staged: list[Subgroup]) -> list[Slot]:
        """Made for each step, when activations are gone, and given back at its end."""
        numel, count = max((s.numel for s in staged), default=0), slots(self.k, len(staged))
        try:
            return [Slot.make(numel, self._tensors.device) for _ in range(count)]
        except torch.OutOfMemoryError as error:
            what = f"has no room to stage subgroups: {human(staging_bytes(numel, count), 'B')} are needed at once"
            hint = "nothing was updated; lower max_device_extra or subgroup"
            raise HeadwayError("optimizer step", what, hint=hint) from error

    def _update(self, staged: list[Subgroup], buffers: list[Slot]) -> KeyboardInterrupt | None:
        tensors = self._tensors
        own = [s for s in self.arrangement.own if tensors.active(s)]
        resident = [
            (sum(p.numel() for p in params), partial(tensors.update_resident, index, params))
            for index, params in enumerate(self._resident_of)
            if params
        ]
        return Update(tensors, self.workers, buffers, tensors.ring).run(own, staged, resident)

    def wait(self) -> None:
        """Return once all gradients are where they are gathered."""
        start = time.perf_counter()
        self._gradients.wait()
        self.grad_wait_seconds += time.perf_counter() - start

    def note_norm(self, norm: Tensor) -> None:
        """Take the norm of the gradients as they are from whoever has computed it, instead of computing it again."""
        self._norm, self._gradients.fresh = norm, False

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their joint 2-norm is at most ``max_norm``; the norm before."""
        self.wait()
        norm = clip_([p for group in self._groups for p in group["params"]], max_norm)
        self.note_norm(norm)
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients; they are never kept as zeros."""
        self._gradients.forget()
        self._norm = None

    # State.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Options, and the tensors in whose ``.grad`` the gradients are; waits for those on their way."""
        if self._ready:
            self.wait()
        return self._groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._groups = groups

    @property
    def state(self) -> Any:
        """Step and moments by master (``masters``), views of the memory that they are in."""
        self._check_whole()
        return State(self._tensors)

    @state.setter
    def state(self, state: Any) -> None:
        """torch's base class starts with an empty one; ours is where the moments are."""

    @property
    def masters(self) -> dict[Tensor, Tensor]:
        """Parameter -> its fp32 master, in host memory unless it is resident; fp32 residents are their own."""
        self._check_whole()
        return dict(self._tensors.masters)

    @property
    def gathered(self) -> dict[Tensor, Tensor]:
        """Parameter -> the tensor whose ``.grad`` gathers its gradient."""
        return dict(self._tensors.gathered)

    def _check_whole(self) -> None:
        if self._mixed:
            raise HeadwayError("optimizer state", f"is a mix of old and new subgroups: {self._mixed}",
                               hint="go on from the last checkpoint")  # fmt: skip

    def _names(self) -> list[str]:
        names: list[str] = []
        for group in self._groups:
            names += group.get("param_names") or [str(len(names) + i) for i in range(len(group["params"]))]
        return names

    def steps_of(self) -> dict[Tensor, int]:
        """Parameter -> the number of steps that it has had.

        Raises:
            HeadwayError: subgroups that share a parameter disagree.
        """
        result = {}
        for p, name in zip(self._tensors.params, self._names(), strict=True):
            counts = {int(c) for c in self._tensors.counts_of[p]}
            if len(counts) > 1:
                raise HeadwayError(name, f"lies in subgroups that have done {sorted(counts)} steps")
            result[p] = counts.pop()
        return result

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Masters, moments and steps by the parameter's name (or number); views, not copies."""
        self._check_whole()
        state = self.state
        masters = dict(zip(self._names(), map(self._tensors.master, self._tensors.params), strict=True))
        return {
            "masters": {name: master.detach() for name, master in masters.items()},
            "state": {name: state[master] for name, master in masters.items() if master in state},
            "steps": dict(zip(masters, self.steps_of().values(), strict=True)),
            "updates": self.updates,
            "param_groups": [{k: v for k, v in g.items() if k != "params"} for g in self._groups],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:  # type: ignore[override]
        """Take over what ``state_dict`` gave, at this or any other stride and size of subgroups.

        Raises:
            HeadwayError: it is that of other parameters, or mixes states of different steps.
        """
        names = self._names()
        if (other := state["masters"].keys() ^ set(names)) or len(state["param_groups"]) != len(self._groups):
            raise HeadwayError("optimizer state", f"is that of other parameters: {', '.join(sorted(other)[:4])} ...")
        for name, p in zip(names, self._tensors.params, strict=True):
            if state["masters"][name].shape != p.shape:
                raise HeadwayError(name, f"is {list(state['masters'][name].shape)} in the state, here {list(p.shape)}")
            State.check(state["state"].get(name))
            saved, known = int(state["state"].get(name, {}).get("step", 0)), state["steps"][name]
            if saved != known:
                raise HeadwayError(name, f"has the state of step {saved} where its subgroup was at step {known}",
                                   hint="the checkpoint mixes two; load another")  # fmt: skip
        own = State(self._tensors)
        for name, p in zip(names, self._tensors.params, strict=True):
            self._tensors.master(p).copy_(state["masters"][name])
            p.copy_(self._tensors.master(p))
            own.put(p, state["state"].get(name))
        for group, saved_group in zip(self._groups, state["param_groups"], strict=True):
            group.update(saved_group)
        self.updates, self._mixed = state["updates"], ""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only at the start: the layout is fixed then.

        Raises:
            HeadwayError: later.
        """
        if self._ready:
            raise HeadwayError("InterleavedOffload", "cannot take more parameters once it is made")
        super().add_param_group(param_group)

    def report(self) -> dict[str, Any]:
        """Placement and prediction, seconds of the phases, and what every lane has done."""
        layout = self.arrangement.layout
        seconds = statistics.median(self.update_seconds) if self.update_seconds else None
        predicted = self.plan.predicted_seconds if self.plan else None
        return {
            "stride": self.k,
            "subgroups": len(layout),
            "subgroup": layout.largest,
            "shrunk_from": self.arrangement.shrunk_from,
            "staged": len(self.arrangement.staged),
            "resident_parameters": sum(p.numel() for group in self._resident_of for p in group),
            "host_bytes": 12 * layout.numel,
            "device_extra_bytes": device_extra(layout.largest, layout.numel, self.k, len(layout)),
            "plan": self.plan.to_dict() if self.plan else None,
            "updates": self.updates,
            "skipped": self.skipped,
            "update_seconds": seconds,
            "predicted_over_measured": predicted / seconds if predicted and seconds else None,
            "grad_wait_seconds": self.grad_wait_seconds,
            "grad_bytes": self._gradients.shipped_bytes,
            "lanes": self.workers.report(),
        }

    def close(self) -> None:
        """Take the hooks off the parameters and end the lanes' threads; the model keeps its weights."""
        self._gradients.close()
        if self._owns:
            self.workers.close()
