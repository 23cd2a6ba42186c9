"""Swap or recompute: each block keeps its input and, of its matrix products, the outputs that the plan has chosen.

A block runs under ``torch.utils.checkpoint`` with a pair of contexts, as torch's own selective checkpointing makes
them: in the forward pass the chosen outputs go to the store, and in the recomputation they come from there instead of
being computed. Block inputs leave through saved-tensor hooks. What is in neither is recomputed.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from headway.core.surgery import Shell
from headway.memory.fuyou.plan import Plan, Profile, Tiers, Unit, in_order, plan_tiers
from headway.memory.saved import Entry, Saved, SavedTensors
from headway.memory.store import TieredStore

Mode = Literal["auto", "swap", "recompute"]
PRODUCTS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default,
                      torch.ops.aten.linear.default})  # fmt: skip


class PlannedBlock(Shell):
    """A block whose activations follow the plan."""

    def __init__(self, original: nn.Module, activations: Activations, layer: int) -> None:
        super().__init__(original)
        self._plan = (activations, layer)

    def forward(self, *args: Any, **shared: Any) -> Any:
        """As the block."""
        if not torch.is_grad_enabled() or shared.get("cache") is not None:
            return self.original(*args, **shared)
        activations, layer = self._plan
        return activations.run(layer, self.original, args, shared)


class _Pass:
    """One run of one block: what it has put into the store."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.kept: dict[str, Saved] = {}
        self.entries: list[weakref.ref[Entry]] = []


class _Keep(TorchDispatchMode):
    """Forward: the chosen products' outputs go to the store."""

    def __init__(self, activations: Activations, run: _Pass) -> None:
        super().__init__()
        self.activations, self.run = activations, run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        kind = self.activations.running
        if kind is not None and func in PRODUCTS:
            self.activations.produced(self.run, kind, args, out)
        return out


class _Reuse(TorchDispatchMode):
    """Recomputation: what was stored is not computed."""

    def __init__(self, activations: Activations, run: _Pass) -> None:
        super().__init__()
        self.activations, self.run = activations, run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = self.activations.running
        if kind is not None and func in PRODUCTS:
            self.activations.asked.add((self.run.layer, kind))
            if kind in self.run.kept:
                self.activations.reused += 1
                return self.run.kept[kind].restore()
            self.activations.recomputed += 1
        return func(*args, **(kwargs or {}))


class Activations:
    """What blocks keep, swap and recompute; gradients are bit for bit those of the plain run.

    Args:
        blocks: of the model, before they are replaced; see ``shell``.
        store: where swapped tensors go; None only recomputes.
        mode: ``swap`` swaps block inputs and every product's output; ``recompute`` keeps block inputs in memory and
            nothing else; ``auto`` begins like ``swap`` and does what `decide` finds best.
    """

    def __init__(self, blocks: Sequence[nn.Module], store: TieredStore | None, mode: Mode) -> None:
        self.mode, self.store = mode, store if mode != "recompute" else None
        self.saved = SavedTensors(self.store) if self.store is not None else None
        self.units: dict[tuple[int, str], Unit] = {}
        """Every product seen, by block and name."""
        self.chosen: set[tuple[int, str]] | None = None if self.store is not None else set()
        """Which outputs are swapped; None: all."""
        self.asked: set[tuple[int, str]] = set()
        """Products that a recomputation came to: torch stops before what nobody needs, such as a block's last one."""
        self.reused = self.recomputed = 0
        self.plan: Plan | None = None
        self.running: str | None = None
        self.checkpoint_bytes: dict[int, int] = {}
        self.forward_seconds = 0.0
        self._began = 0.0
        self._waited = 0.0
        self._last = len(blocks) - 1
        # Autograd's graph holds them: what a graph that is gone had stored is dropped.
        self._passes: weakref.WeakValueDictionary[int, _Pass] = weakref.WeakValueDictionary()
        self._hooks: list[Any] = []
        for block in blocks:
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear):
                    self._hooks.append(module.register_forward_pre_hook(partial(self._enter, name)))
                    self._hooks.append(module.register_forward_hook(self._leave))

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        self.running = name

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running = None

    def shell(self, block: nn.Module, layer: int) -> PlannedBlock:
        """The block that takes this one's place."""
        return PlannedBlock(block, self, layer)

    def run(self, layer: int, block: nn.Module, args: tuple[Any, ...], shared: dict[str, Any]) -> Any:
        """Run a block in the forward pass."""
        run = self._passes[layer] = _Pass(layer)
        if layer == 0:
            self._began, self._waited = time.perf_counter(), self._waits()
        inside = partial(block, **shared)

        def contexts() -> tuple[Any, Any]:
            return _Keep(self, run), _Reuse(self, run)

        if self.saved is None:
            return checkpoint(inside, *args, use_reentrant=False, context_fn=contexts)
        inputs = {id(a) for a in args if isinstance(a, Tensor)}
        with torch.autograd.graph.saved_tensors_hooks(partial(self._pack, run, inputs), partial(self._unpack, run)):
            out = checkpoint(inside, *args, use_reentrant=False, context_fn=contexts)
        if layer == self._last:
            self.forward_seconds = time.perf_counter() - self._began - (self._waits() - self._waited)
        return out

    def _waits(self) -> float:
        return self.store.report.wait_seconds if self.store is not None else 0.0

    def _pack(self, run: _Pass, inputs: set[int], tensor: Tensor) -> Any:
        if id(tensor) not in inputs or not tensor.requires_grad or not tensor.numel():
            return tensor
        self.checkpoint_bytes[run.layer] = tensor.nbytes
        return self._save(run, tensor, f"input of block {run.layer}")

    def _save(self, run: _Pass, tensor: Tensor, label: str) -> Saved:
        assert self.saved is not None
        saved = self.saved.find(tensor) or self.saved.save(tensor, label)
        run.entries.append(weakref.ref(saved.entry))
        return saved

    def produced(self, run: _Pass, kind: str, args: Sequence[Any], out: Tensor) -> None:
        """A product's output, in the forward pass."""
        key = (run.layer, kind)
        if key not in self.units or self.units[key].nbytes != out.nbytes:
            inner = next(a for a in reversed(args) if isinstance(a, Tensor) and a.ndim >= 2).numel() // out.shape[-1]
            self.units[key] = Unit(kind, run.layer, out.nbytes, 2.0 * out.numel() * inner, out.shape[-1])
        if self.saved is not None and (self.chosen is None or key in self.chosen):
            run.kept[kind] = self._save(run, out, f"{kind} of block {run.layer}")

    def _unpack(self, run: _Pass, packed: Any) -> Any:
        if not isinstance(packed, Saved):
            return packed
        assert self.store is not None
        for layer in (run.layer, run.layer - 1):  # this block's, then what the backward pass comes to next
            following = self._passes.get(layer)
            for entry in [ref() for ref in following.entries] if following is not None else ():
                if entry is not None:
                    self.store.prefetch(entry.handle)
        return packed.restore()

    def choose(self, count: int) -> list[Unit]:
        """Swap the ``count`` best of the products that are recomputed at all, in the order of `in_order`."""
        units = self.recomputable()[:count]
        self.chosen = {(unit.layer, unit.kind) for unit in units}
        return units

    def recomputable(self) -> list[Unit]:
        """The units that a recomputation comes to, the best first; known after a step."""
        return in_order([unit for key, unit in self.units.items() if key in self.asked])

    def profile(self, parameters: float, forward_flops: float, **more: Any) -> Profile:
        """What `plan_tiers` wants to know, after a step."""
        units = tuple(self.recomputable())
        return Profile(parameters, forward_flops, units, float(sum(self.checkpoint_bytes.values())),
                       recomputed_flops=sum(unit.flops for unit in units), **more)  # fmt: skip

    def decide(self, profile: Profile, tiers: Tiers) -> Plan:
        """Choose by the cost model, once, after a step in which everything was swapped."""
        self.plan = plan_tiers(profile, tiers)
        self.choose(len(self.plan.swapped))
        return self.plan

    def report(self) -> dict[str, Any]:
        """What was swapped and recomputed."""
        found: dict[str, Any] = {"products_reused": self.reused, "products_recomputed": self.recomputed}
        if self.store is not None:
            report = self.store.report
            found |= {"stored_bytes": report.stored_bytes, "fetched_bytes": report.fetched_bytes,
                      "forwarded": report.forwarded, "stall_seconds": report.stall_seconds,
                      "wait_seconds": report.wait_seconds}  # fmt: skip
        if self.plan is not None:
            found |= {"plan": self.plan.explain(), "planned_swapped_bytes": self.plan.swapped_bytes,
                      "planned_units": len(self.plan.swapped), "units": len(self.plan.units)}  # fmt: skip
        return found

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self.store is not None:
            self.store.close()
