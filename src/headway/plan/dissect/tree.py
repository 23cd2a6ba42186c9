"""Where the time of a training step goes, as a tree: step, phase, module, operation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

PHASES = ("data", "forward", "backward", "recompute", "gradients", "optimizer", "communication", "other")
"""The parts of a step, in the order in which tables show them."""

PYTHON = "python"
"""Kind and name of the leaf that holds the time of a module or phase in which no operation ran."""


@dataclass
class Node:
    """One part of a step and the parts it is made of; every figure is per step."""

    name: str
    kind: str
    """``step``, ``phase``, ``module``, ``compiled`` (a module that is compiled as a whole), ``function`` (a custom
    autograd Function) or ``operator`` (a custom operator); a leaf is an ``op``, or one of these:

    ``python``: nothing of the others ran; Python, the dispatch of operations, the freeing of tensors.
    ``fused``: compiled code that is no operation. ``idle``: the device had nothing to do.
    """
    milliseconds: float = 0.0
    calls: float = 0.0
    flops: dict[str, float] = field(default_factory=dict)
    """Floating-point operations of matrix products, attention and convolutions, by data type."""
    bytes: float = 0.0
    """Bytes of tensors read and written; views move none."""
    children: dict[str, Node] = field(default_factory=dict)

    @property
    def total_flops(self) -> float:
        """Over all data types."""
        return sum(self.flops.values())

    @property
    def flops_rate(self) -> float | None:
        """Achieved FLOP/s; None where nothing is counted."""
        return self.total_flops / self.milliseconds * 1e3 if self.total_flops and self.milliseconds else None

    @property
    def bytes_rate(self) -> float | None:
        """Achieved bytes/s; None where nothing is counted."""
        return self.bytes / self.milliseconds * 1e3 if self.bytes and self.milliseconds else None

    def child(self, name: str, kind: str) -> Node:
        """The child of that name, made where there is none."""
        if name not in self.children:
            self.children[name] = Node(name, kind)
        return self.children[name]

    def leaves(self) -> Iterator[Node]:
        """The nodes below that have no children; the node itself if it has none."""
        if not self.children:
            yield self
        for child in self.children.values():
            yield from child.leaves()

    def walk(self, depth: int = 0) -> Iterator[tuple[int, Node]]:
        """Depth-first, the longest child first, with each node's depth."""
        yield depth, self
        for child in sorted(self.children.values(), key=lambda n: -n.milliseconds):
            yield from child.walk(depth + 1)


@dataclass
class Tree:
    """A dissected step."""

    root: Node
    steps: int
    """Steps that were dissected; every figure of a node is the mean over them."""
    dissected_seconds: list[float]
    """Duration of each dissected step."""
    plain_seconds: list[float]
    """Duration of each step measured before, without the profiler."""
    counted_flops: dict[str, float]
    """FLOPs of one step by data type, counted apart from the timing, as a check."""
    peaks: dict[str, float] = field(default_factory=dict)
    """Measured matrix-product peak of this machine in FLOP/s, by data type; a type that is missing is unknown."""

    @property
    def phases(self) -> dict[str, Node]:
        """Name -> phase, for the phases that took time, in the order of ``PHASES``."""
        return {name: self.root.children[name] for name in PHASES if name in self.root.children}

    @property
    def milliseconds(self) -> float:
        """Mean duration of the dissected steps."""
        return sum(self.dissected_seconds) / len(self.dissected_seconds) * 1e3

    @property
    def overhead(self) -> float:
        """How much longer the dissected steps took than the plain ones: 0.2 is 20 %."""
        middle = sorted(self.plain_seconds)[len(self.plain_seconds) // 2]
        return self.milliseconds / (middle * 1e3) - 1

    @property
    def precision(self) -> dict[str, float]:
        """Share of the step's FLOPs by data type."""
        total = self.root.total_flops
        return {name: value / total for name, value in self.root.flops.items()} if total else {}

    def share(self, node: Node) -> float:
        """Share of the step's time."""
        return node.milliseconds / self.milliseconds

    def utilization(self, node: Node) -> float | None:
        """Share of the matrix-product peak, each data type held against its own; None where a peak is unknown."""
        if not node.flops or not node.milliseconds or any(name not in self.peaks for name in node.flops):
            return None
        return sum(value / self.peaks[name] for name, value in node.flops.items()) / (node.milliseconds / 1e3)

    def coverage(self, phase: str | None = None) -> float:
        """Share of a phase in which operations ran, the rest being Python.

        Without ``phase``: the share of the step that is in another phase than ``other``.
        """
        if phase is None:
            other = self.root.children.get("other")
            return 1 - (other.milliseconds if other else 0.0) / self.milliseconds
        node = self.phases[phase]
        return sum(leaf.milliseconds for leaf in node.leaves() if leaf.kind != "python") / node.milliseconds

    def operations(self, phase: str | None = None) -> dict[str, Node]:
        """Operation -> its sum over all modules of one phase, or of the step."""
        found: dict[str, Node] = {}
        for leaf in (self.phases[phase] if phase else self.root).leaves():
            total = found.setdefault(leaf.name, Node(leaf.name, leaf.kind))
            _add(total, leaf)
        return dict(sorted(found.items(), key=lambda item: -item[1].milliseconds))

    def product_share(self, *phases: str) -> float:
        """Share of the time of ``phases`` (default: forward, backward, recompute) spent in matrix products.

        Fused attention kernels count apart; see ``attention_share``.
        """
        return self._share_of(phases, lambda leaf: bool(leaf.flops) and "attention" not in leaf.name)

    def attention_share(self, *phases: str) -> float:
        """Share of the time of ``phases`` spent in fused attention kernels."""
        return self._share_of(phases, lambda leaf: bool(leaf.flops) and "attention" in leaf.name)

    def _share_of(self, phases: tuple[str, ...], wanted: Any) -> float:
        names = [n for n in phases or ("forward", "backward", "recompute") if n in self.phases]
        total = sum(self.phases[name].milliseconds for name in names)
        found = sum(leaf.milliseconds for name in names for leaf in self.phases[name].leaves() if wanted(leaf))
        return found / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the tree, and how it was measured."""
        return {
            "tree": self._node(self.root),
            "steps": self.steps,
            "step_milliseconds": self.milliseconds,
            "dissected_seconds": self.dissected_seconds,
            "plain_seconds": self.plain_seconds,
            "overhead": self.overhead,
            "coverage": {"step": self.coverage(), **{name: self.coverage(name) for name in self.phases}},
            "flops": self.root.flops,
            "precision": self.precision,
            "peaks": self.peaks,
        }

    def _node(self, node: Node) -> dict[str, Any]:
        ordered = self.phases.values() if node is self.root else node.children.values()
        children = list(ordered) if node is self.root else sorted(ordered, key=lambda n: -n.milliseconds)
        return {
            "name": node.name,
            "kind": node.kind,
            "milliseconds": node.milliseconds,
            "share": self.share(node),
            "calls": node.calls,
            "flops": node.total_flops,
            "flops_rate": node.flops_rate,
            "utilization": self.utilization(node),
            "bytes": node.bytes,
            "bytes_rate": node.bytes_rate,
            "children": [self._node(child) for child in children],
        }


def _add(total: Node, leaf: Node) -> None:
    total.milliseconds += leaf.milliseconds
    total.calls += leaf.calls
    total.bytes += leaf.bytes
    for name, value in leaf.flops.items():
        total.flops[name] = total.flops.get(name, 0.0) + value
