"""What a method is: wrappers around parts of a run, a card of facts, and an honest list of what it changed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from headway.core import registry
from headway.core.errors import MethodError
from headway.core.options import Options

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import nn

    from headway.core.checkpointer import Checkpointer
    from headway.core.recipe import Recipe
    from headway.core.workload import StepBatch

# The points in the order in which a run is assembled; `core/trainer.py` shows where each acts.
POINTS = ("model_config", "model", "optimizer", "loss", "stream", "schedule", "forward_backward", "gradients",
          "update", "weights", "checkpointer")  # fmt: skip

Loss = Callable[["nn.Module", dict[str, "torch.Tensor"]], tuple["torch.Tensor", "torch.Tensor"]]
ForwardBackward = Callable[[dict[str, "torch.Tensor"], int], "torch.Tensor"]
Gradients = Callable[[], "torch.Tensor"]
Update = Callable[[], None]
Schedule = Callable[[int, float], float]
Weights = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Card:
    """A method's facts, kept beside its code; the catalogue and the documentation are made from it.

    ``before`` and ``after`` name methods: a method wraps first, and so ends up inside, those it stands before.
    ``needs`` and ``refuses`` map a method's name to the sentence that a user reads.
    """

    name: str
    title: str
    paper: str
    summary: str
    exact: bool
    """True: same losses as the plain run, to floating-point tolerance. False: `approximates` says what."""
    approximates: str
    buys: str
    costs: str
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    needs: dict[str, str] = field(default_factory=dict)
    refuses: dict[str, str] = field(default_factory=dict)
    deviations: str = ""
    """Where this differs from the paper, and why."""
    parallel: tuple[str, ...] = ()
    """The dimensions of the recipe's ``parallel`` section with which it gives what it gives one process; every other
    is refused."""
    status: Literal["stable", "trial"] = "stable"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for ``--json``."""
        return asdict(self)


@dataclass(frozen=True)
class Change:
    """One thing that a method really changed: ``6 of 6 blocks chunked``."""

    what: str
    count: int
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.what} ({self.count})" + (f": {self.detail}" if self.detail else "")


class Method:
    """Base of every method. Override the points it needs; each takes a part of the run and returns one of the same
    kind.

    A point that is not overridden leaves its part alone. Call ``self.changed(...)`` wherever something was really
    changed: a method without changes stops the run, since a switch that does nothing is a mistake.
    """

    card: ClassVar[Card]
    Options: ClassVar[Any] = Options

    def __init__(self, options: Any, recipe: Recipe) -> None:
        self.options, self.recipe = options, recipe
        self._changes: list[Change] = []

    @property
    def where(self) -> str:
        """The recipe path of this method, for errors."""
        return f"methods.{self.card.name}"

    def check(self, recipe: Recipe) -> None:
        """Refuse, before anything is built, a recipe that this method cannot serve.

        Raises:
            MethodError: with the recipe path, the reason and the remedy.
        """

    # The points, in the order of assembly.

    def model_config(self, config: Options) -> Options:
        """The model's configuration, before the model is built."""
        return config

    def model(self, model: nn.Module) -> nn.Module:
        """The model, built or loaded, in fp32, on its device, before it is cast, compiled or sharded."""
        return model

    def optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimizer over the fp32 (master) weights, whose ``.grad`` hold the step's gradients."""
        return optimizer

    def loss(self, loss: Loss) -> Loss:
        """``(model, batch) -> (sum of the losses of the targets, number of targets)``."""
        return loss

    def stream(self, stream: Iterator[StepBatch]) -> Iterator[StepBatch]:
        """The batches: an iterator, one item an optimizer step, with ``state_dict`` and ``load_state_dict``."""
        return stream

    def schedule(self, schedule: Schedule) -> Schedule:
        """``(step, progress in [0, 1]) -> factor`` on the base learning rate."""
        return schedule

    def forward_backward(self, forward_backward: ForwardBackward) -> ForwardBackward:
        """``(micro-batch, targets in the whole step) -> sum of losses``, adding to the gradients."""
        return forward_backward

    def gradients(self, gradients: Gradients) -> Gradients:
        """``() -> gradient norm``: what is done to the gradients of a step before the update, such as clipping."""
        return gradients

    def update(self, update: Update) -> Update:
        """``() -> None``: the optimizer's step and the clearing of gradients."""
        return update

    def weights(self, weights: Weights) -> Weights:
        """``() -> context`` inside which the model holds the weights to evaluate."""
        return weights

    def checkpointer(self, checkpointer: Checkpointer) -> Checkpointer:
        """Saves and loads the run's state. A method that changes weights in place outside the update calls its
        ``fence`` before."""
        return checkpointer

    # What it did, and what it remembers.

    def changed(self, what: str, count: int = 1, detail: str = "") -> None:
        """Note that ``count`` things were really changed; nothing is noted for a count of 0."""
        if count > 0:
            self._changes.append(Change(what, count, detail))

    def changes(self) -> list[Change]:
        """Everything noted by ``changed``."""
        return list(self._changes)

    def report(self) -> dict[str, Any]:
        """What it did, in numbers, for the run's summary: plain data, under ``reports`` and the method's name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart: tensors and plain data. Empty: the method is stateless."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""

    @classmethod
    def points(cls) -> tuple[str, ...]:
        """The points that this method wraps."""
        return tuple(p for p in POINTS if getattr(cls, p) is not getattr(Method, p))


def resolve(recipe: Recipe) -> list[Method]:
    """The recipe's methods, made, checked against one another and in the order in which they wrap.

    The order depends on the cards and names alone, never on the order in the recipe.

    Raises:
        MethodError: two methods exclude each other, one needs another, one cannot serve this recipe, or the order is
        circular.
    """
    methods: dict[str, Method] = {}
    for key in sorted(recipe.methods):
        cls = registry.find("methods", key, f"methods.{key}")
        if not (isinstance(cls, type) and issubclass(cls, Method) and isinstance(getattr(cls, "card", None), Card)):
            raise MethodError(f"methods.{key}", "is not a headway.Method with a card")
        if cls.card.name in methods:
            raise MethodError(f"methods.{key}", f"is the method {cls.card.name!r} a second time")
        methods[cls.card.name] = cls(recipe.methods[key], recipe)
    for method in methods.values():
        for other, sentence in method.card.needs.items():
            if other not in methods:
                raise MethodError(method.where, f"needs {other}: {sentence}", hint=f"add methods.{other}")
        for other, sentence in method.card.refuses.items():
            if other in methods:
                raise MethodError(method.where, f"cannot be combined with {other}: {sentence}")
        method.check(recipe)
    graph: dict[str, set[str]] = {name: set() for name in methods}
    for name, method in methods.items():
        graph[name] |= set(method.card.after) & methods.keys()
        for later in set(method.card.before) & methods.keys():
            graph[later].add(name)
    sorter = TopologicalSorter(graph)
    try:
        sorter.prepare()
    except CycleError as error:
        cycle = " -> ".join(error.args[1])
        raise MethodError("methods", f"have no possible order: {cycle} each want to stand before the next") from None
    ordered: list[Method] = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready())
        ordered += [methods[name] for name in ready]
        sorter.done(*ready)
    return ordered


def wrap(methods: list[Method], point: str, part: Any) -> Any:
    """``part`` wrapped by every method in turn.

    Raises:
        MethodError: a method returned nothing.
    """
    for method in methods:
        wrapped = getattr(method, point)(part)
        if wrapped is None and part is not None:
            raise MethodError(
                method.where, f"returned nothing at the point {point!r}", hint="return the part it was given"
            )
        part = wrapped
    return part


def check_changes(methods: list[Method]) -> dict[str, list[str]]:
    """What each method changed, as sentences.

    Raises:
        MethodError: a method changed nothing.
    """
    changed = {method.card.name: [str(change) for change in method.changes()] for method in methods}
    for method in methods:
        if not changed[method.card.name]:
            raise MethodError(
                method.where, "changed nothing in this run", hint="remove it, or give it something to act on"
            )
    return changed
