"""From a profile's events to a tree: every moment of a step belongs to one phase, one module and one operation.

Nothing is matched by the name of a kernel. Phases and modules are marked by scopes (``scopes.py``). The backward
pass is told by autograd's own events, and each of its nodes belongs to the module in which the operation of the
same sequence number ran forward. What runs inside a backward node with gradients enabled, or calls a module, is a
forward pass run again: recompute. (A backward pass with ``create_graph`` has gradients enabled too, and so looks
like recompute.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from headway.plan.dissect.counting import Costs
from headway.plan.dissect.events import Event, nest, walk
from headway.plan.dissect.scopes import COMPILED, MODULE, PHASE, STEP
from headway.plan.dissect.tree import Node

_ENGINE = "autograd::engine::"
_COMMUNICATION = (
    "c10d::",
    "_c10d_functional::",
    "c10d_functional::",
    "fsdp::",
    "FSDP::all_gather",
    "FSDP::post_backward_r",
)
"""Namespaces of torch's collectives, and the scopes in which its sharded data parallelism gathers and reduces."""


class _Scope(NamedTuple):
    path: tuple[str, ...]
    kind: str
    call: int
    """Tells one call of a module from the next."""


class _Where(NamedTuple):
    phase: str | None = None
    """None: told by what comes before and after."""
    scopes: tuple[_Scope, ...] = ()


@dataclass
class _Segment:
    """A stretch of a step's time in one place; ``event`` is the operation that ran, None where none did."""

    start: float
    end: float
    where: _Where
    event: Event | None
    key: tuple[int, int] | None = None
    """Thread and sequence number of a forward operation outside of all marks."""
    last: bool = False
    """The last operation of a recomputation."""


def build_tree(events: list[Event], costs: Costs, skip: int = 0) -> tuple[Node, list[float]]:
    """The tree of the marked steps in ``events``.

    On a CPU time is the host's. Where kernels ran on a device, an operation's time is that of its kernels, and the
    time in which the device had none is ``idle``.

    Args:
        costs: FLOPs and bytes by operation and shapes; their operations are the tree's leaves.
        skip: leave out so many steps at the beginning.

    Returns:
        The step's node, every figure the mean over steps; and the duration of each step in seconds.

    Raises:
        ValueError: no step is marked.
    """
    threads = nest(events)
    steps = [e for tops in threads.values() for e in walk(tops) if e.annotation and e.name == STEP]
    walker = _Walker(costs)
    on_device = any(event.device for event in events)
    segments = [walker.step(step, threads, on_device) for step in steps]  # skipped ones too: backward may refer to them
    ledger = _Ledger(costs, on_device, [s for found in segments[skip:] for s in found], len(steps) - skip)
    kept = steps[skip:]
    if not kept:
        raise ValueError("no step is marked in these events")
    seconds = [step.duration / 1e6 for step in kept]
    root = ledger.tree()
    if on_device:
        idle = sum(seconds) * 1e3 / len(seconds) - root.milliseconds
        other = root.child("other", "phase")
        other.child("idle", "idle").milliseconds = max(0.0, idle)
        other.milliseconds += max(0.0, idle)
        root.milliseconds += max(0.0, idle)
    return root, seconds


class _Walker:
    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.origin: dict[tuple[int, int], tuple[_Scope, ...]] = {}
        self.differentiated: set[tuple[int, int]] = set()
        self.last_node: tuple[_Scope, ...] = ()
        self.segments: list[_Segment] = []

    def step(self, step: Event, threads: dict[int, list[Event]], on_device: bool) -> list[_Segment]:
        """The segments of one step, in order of time; on a CPU they are exactly the step."""
        self.segments = []
        self._inside(step, _Where())
        self._settle()
        found = self.segments
        if on_device:  # autograd has a thread of its own for each device; on a CPU it uses the caller's
            for thread, tops in threads.items():
                within = [e for e in tops if step.start <= e.start < step.end]
                if thread != step.thread and any(e.forward_thread for e in walk(within)):
                    self.segments = []
                    for event in within:
                        self._visit(event, _Where())
                    self._settle()
                    found = found + self.segments
        return found

    def _inside(self, event: Event, where: _Where) -> None:
        """Visit what is inside ``event``; the time between belongs to ``event`` itself."""
        clock = event.start
        for child in event.children:
            if child.start > clock:
                self.segments.append(_Segment(clock, child.start, where, None))
            self._visit(child, where)
            clock = child.end
        if event.end > clock:
            self.segments.append(_Segment(clock, event.end, where, None))

    def _visit(self, event: Event, where: _Where) -> None:
        where, key = self._enter(event, where)
        if event.name in self.costs and not event.annotation:
            self._note_origins(event, where)
            self.segments.append(_Segment(event.start, event.end, where, event, key))
            return
        before = len(self.segments)
        if event.device:  # kernels that no operation started, such as compiled ones
            self.segments.append(_Segment(event.start, event.start, where, event))
        self._inside(event, where)
        if event.backward:
            again = [s for s in self.segments[before:] if s.event is not None and s.where.phase == "recompute"]
            if again:
                again[-1].last = True

    def _enter(self, event: Event, where: _Where) -> tuple[_Where, tuple[int, int] | None]:
        """Where the inside of ``event`` belongs, given where its outside does."""
        phase, scopes = where
        key = None
        if event.annotation and event.name.startswith(PHASE):
            phase = event.name.removeprefix(PHASE)
        elif event.annotation and event.name.startswith((MODULE, COMPILED)):
            if phase in ("backward", "recompute"):
                scopes = scopes if phase == "recompute" else ()
                phase = "recompute"
            elif phase is None:
                phase = "forward"
            scopes = (*scopes, _scope(event))
        elif event.name.startswith(_ENGINE) or event.backward:
            phase = "backward"
            scopes = self._node(event)
        elif event.sequence >= 0 and not event.annotation:
            if phase == "backward":
                phase, scopes = "recompute", ()
            scopes = self._function(event, scopes)
            self.origin[event.thread, event.sequence] = scopes
            key = (event.thread, event.sequence) if phase is None else None
        elif event.name in self.costs.opened:
            scopes = self._function(event, scopes)
        if event.name.startswith(_COMMUNICATION):
            phase = "communication"
        return _Where(phase, scopes), key

    def _function(self, event: Event, scopes: tuple[_Scope, ...]) -> tuple[_Scope, ...]:
        """Custom operators and custom autograd Functions are scopes; operations of torch have a namespace, these none.

        What autograd adds around a custom operator, and its own operator for backward, belong to it.
        """
        path, kind = (scopes[-1].path, scopes[-1].kind) if scopes else ((), "")
        if event.name in self.costs.opened:
            return scopes if kind == "operator" else (*scopes, _Scope((*path, event.name), "operator", id(event)))
        if "::" in event.name or kind in ("compiled", "operator"):
            return scopes
        return (*scopes, _Scope((*path, event.name), "function", id(event)))

    def _node(self, event: Event) -> tuple[_Scope, ...]:
        """Where the forward operation of a backward node ran.

        Nodes that add to a gradient have no such operation; they belong with the node that ran before and produced it.
        """
        if event.forward_thread:
            key = (event.forward_thread, event.sequence)
            self.differentiated.add(key)
            self.last_node = self.origin.get(key, ())
        return self.last_node

    def _note_origins(self, operation: Event, where: _Where) -> None:
        """What ran inside may have made nodes: the last to begin with a sequence number made its node."""
        for event in walk(operation.children):
            if event.sequence >= 0 and not event.forward_thread:
                self.origin[event.thread, event.sequence] = where.scopes

    def _settle(self) -> None:
        """Give a phase to what has none yet.

        An operation outside of all marks whose node ran backward was forward. For the rest the neighbours decide:
        between two moments of one phase it is that phase, between different ones it is ``other``.
        """
        for one in self.segments:
            if one.key in self.differentiated and one.where.phase is None:
                one.where = _Where("forward", one.where.scopes)
        known: str | None = None
        waiting: list[_Segment] = []
        ahead: list[_Segment | None] = [*self.segments, None]
        for segment in ahead:
            phase = segment.where.phase if segment else None
            if segment is not None and phase is None:
                waiting.append(segment)
                continue
            between = phase if phase == known and phase is not None else "other"
            for one in waiting:
                one.where = _Where(between, one.where.scopes)
            waiting, known = [], phase


def _scope(event: Event) -> _Scope:
    kind = "module" if event.name.startswith(MODULE) else "compiled"
    name = event.name.removeprefix(MODULE).removeprefix(COMPILED)
    return _Scope(tuple(name.split("/")) if name else (), kind, id(event))


class _Ledger:
    """Adds segments up to a tree."""

    def __init__(self, costs: Costs, on_device: bool, segments: list[_Segment], steps: int) -> None:
        self.costs, self.on_device, self.steps = costs, on_device, steps
        self.root = Node("step", "step")
        self.calls: dict[int, set[int]] = {}
        stopped = self._stopped(segments)
        for segment in segments:
            self._place(segment, free=id(segment) in stopped)

    def tree(self) -> Node:
        """The step's node, every figure a mean over steps."""
        self._finish(self.root)
        return self.root

    def _stopped(self, segments: list[_Segment]) -> set[int]:
        """Operations that were begun but not carried out.

        A checkpoint stops its recomputation as soon as it has all that backward needs, often in the middle of a
        last matrix product: the profile shows its beginning, the count does not.
        """
        surplus: dict[int, float] = {}
        for segment in segments:
            if segment.event is not None and (cost := self.costs.cost(segment.event.name, segment.event.shapes)):
                surplus[id(cost)] = surplus.get(id(cost), -cost.calls * self.steps) + 1
        found = set()
        for segment in segments:
            if segment.last and segment.event is not None:
                cost = self.costs.cost(segment.event.name, segment.event.shapes)
                if cost is not None and surplus[id(cost)] > 0:
                    surplus[id(cost)] -= 1
                    found.add(id(segment))
        return found

    def _place(self, segment: _Segment, free: bool) -> None:
        scopes, event = segment.where.scopes, segment.event
        node = self.root.child(segment.where.phase or "other", "phase")
        known = {scope.path: scope for scope in scopes}
        path = scopes[-1].path if scopes else ()
        for depth in range(1, len(path) + 1):
            scope = known.get(path[:depth])
            node = node.child(path[depth - 1], scope.kind if scope else "module")
            if scope:
                self.calls.setdefault(id(node), set()).add(scope.call)
        if event is None:
            if not self.on_device:
                kind = "fused" if scopes and scopes[-1].kind == "compiled" else "python"
                node.child(kind, kind).milliseconds += (segment.end - segment.start) / 1e3
            return
        is_operation = event.name in self.costs
        leaf = node.child(event.name, "op" if is_operation else "fused")
        leaf.calls += 1
        if self.on_device:
            leaf.milliseconds += (event.device_total if is_operation else event.device) / 1e3
        else:
            leaf.milliseconds += event.duration / 1e3
        if is_operation and not free:
            flops, moved = self.costs.of_call(event.name, event.shapes)
            leaf.bytes += moved
            for dtype, value in flops.items():
                leaf.flops[dtype] = leaf.flops.get(dtype, 0.0) + value

    def _finish(self, node: Node) -> None:
        """From sums at the leaves to means everywhere."""
        if not node.children:
            node.milliseconds, node.bytes = node.milliseconds / self.steps, node.bytes / self.steps
            node.calls = node.calls / self.steps
            node.flops = {dtype: value / self.steps for dtype, value in node.flops.items()}
            return
        for child in node.children.values():
            self._finish(child)
            node.milliseconds += child.milliseconds
            node.bytes += child.bytes
            for dtype, value in child.flops.items():
                node.flops[dtype] = node.flops.get(dtype, 0.0) + value
        if id(node) in self.calls:
            node.calls = len(self.calls[id(node)]) / self.steps
        else:  # a phase, or a container that nobody calls
            inside = [child.calls for child in node.children.values() if child.kind not in ("op", "python", "fused")]
            node.calls = 1.0 if node.kind in ("step", "phase") else max(inside, default=0.0)
