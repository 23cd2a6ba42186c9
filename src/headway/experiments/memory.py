"""Every way to save memory side by side: peak live bytes against time per token, and the planner's word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headway.core.errors import HeadwayError
from headway.core.recipe import Recipe
from headway.core.units import human
from headway.experiments.base import Arm, Expectation, Experiment, Measurement, Quick, at_least, at_most, between
from headway.experiments.context import Context
from headway.experiments.evidence import Figure, Series
from headway.experiments.interleave import LiveArm
from headway.experiments.statistics import Estimate, bootstrap
from headway.plan.memory.planner import plan_memory

RECIPE: Mapping[str, Any] = {
    "model": {"hidden": 192, "layers": 8, "heads": 4, "context": 4096},
    "data": {"source": "python-stdlib", "tokenizer": "bpe", "vocab": 4096, "sequence": 1024},
    "train": {"batch": 4, "steps": 1000, "precision": "fp32"},
    "optimizer": {"lr": 0.001},
    "schedule": {"name": "constant"},
}
PEERS = "headway.experiments.memory_peers"


@dataclass(frozen=True)
class Way:
    """One way to train: a name, its methods, and whether they are Headway's."""

    name: str
    methods: Mapping[str, Mapping[str, Any]]
    ours: bool = True


WAYS = (
    Way("keep everything", {}, ours=False),
    Way("torch.utils.checkpoint", {"recompute": {}}, ours=False),
    Way("torch save_on_cpu", {f"{PEERS}:SaveOnCPU": {}}, ours=False),
    Way("TRL offloading", {f"{PEERS}:TRLOffload": {}}, ours=False),
    Way("torchao optimizer", {f"{PEERS}:TorchaoOffload": {}}, ours=False),
    Way("recompute, keep products", {"recompute": {"keep": "products"}}),
    Way("recompute, keep attention", {"recompute": {"keep": "attention"}}),
    Way("streambp", {"streambp": {}}),
    Way("ssdtrain, disk", {"ssdtrain": {"policy": "all"}}),
    Way("ssdtrain, host", {"ssdtrain": {"policy": "all", "backend": "host"}}),
    Way("memo", {"memo": {}}),
    Way("deep-optimizer-states, stride 2", {"deep-optimizer-states": {"stride": 2}}),
    Way("fuyou, states", {"fuyou": {"params": "memory", "activations": "none"}}),
    Way("fuyou and streambp", {"fuyou": {"activations": "none"}, "streambp": {}}),
)


@dataclass(frozen=True)
class Point:
    """What one way came to."""

    way: Way
    peak: int
    ratios: list[float]
    """Its time per token over that of keeping everything, block by block."""
    loss_error: float
    """Largest relative difference of a loss from that of keeping everything."""

    @property
    def time(self) -> Estimate:
        """Median ratio of time per token, with its interval."""
        return bootstrap(self.ratios)


def _recipe(context: Context, way: Way, **extra: Any) -> Recipe:
    methods = {name: dict(options) for name, options in way.methods.items()}
    return Recipe.load({**context.recipe(Arm("plain")).to_dict(), "methods": methods, **extra})


def _side_by_side(context: Context) -> dict[str, Any]:
    """All ways in one process, taking turns; each one's peak is what it alone holds."""
    arms: dict[str, LiveArm] = {}
    refused: dict[str, str] = {}
    for way in WAYS:
        try:
            arms[way.name] = LiveArm(way.name, _recipe(context, way))
        except HeadwayError as error:
            if way.ours:
                raise
            refused[way.name] = str(error)
            context.say(f"{way.name}: not here: {error}")
            continue
        context.say(f"{way.name}: {human(arms[way.name].live_peak_bytes, 'B')}")
    blocks, order = 3 if context.quick else 7, list(arms)
    for index in range(blocks + 1):
        target = max(arm.tokens for arm in arms.values()) + arms[order[0]].tokens_per_step
        turn = order[index % len(order) :] + order[: index % len(order)]
        for name in turn:
            block = arms[name].advance(target, lambda: None)
            if index:
                arms[name].blocks.append(block)
    plain = arms["keep everything"]
    points = {}
    for name, arm in arms.items():
        pairs = zip(arm.blocks, plain.blocks, strict=True)
        points[name] = {
            "peak": arm.live_peak_bytes,
            "ratios": [(a.seconds / a.tokens) / (b.seconds / b.tokens) for a, b in pairs],
            "loss_error": max(abs(x - y) / abs(y) for (_, x), (_, y) in zip(arm.losses, plain.losses)),
        }
    return {"points": points, "refused": refused}


def _prediction(context: Context, peak: int) -> dict[str, float]:
    """The planner's prediction for half of ``peak``, and what the planned run measured."""
    budget = peak // 2
    recipe = _recipe(context, WAYS[0], memory={"budget": budget})
    plan = plan_memory(recipe, context.say)
    context.say(plan.explain())
    arm = LiveArm("planned", plan.apply(recipe))
    return {"budget": budget, "predicted": plan.predicted_bytes, "measured": arm.live_peak_bytes}


def measure(context: Context) -> dict[str, Measurement]:
    """Peaks, times, losses; then the planner."""
    found = context.keep("side by side", lambda: _side_by_side(context))
    ways = {way.name: way for way in WAYS}
    points = [Point(ways[name], **values) for name, values in found["points"].items()]
    plain = next(p for p in points if p.way.name == "keep everything")
    _show(context, points, found["refused"])

    ours, peers = [p for p in points if p.way.ours], [p for p in points if not p.way.ours]
    checkpoint = next(p for p in peers if p.way.name == "torch.utils.checkpoint")
    results = {
        "loss_error": Measurement(max(p.loss_error for p in points)),
        "least_peak": Measurement(min(p.peak for p in ours) / checkpoint.peak,
                                  note=min(ours, key=lambda p: p.peak).way.name),
        "peers_matched": Measurement(sum(any(_matches(p, peer) for p in ours) for peer in peers) / len(peers),
                                     note=f"of {', '.join(p.way.name for p in peers)}"),
    }  # fmt: skip
    for point in points:
        key = point.way.name.replace(" ", "_").replace(",", "").replace(".", "_")
        results[f"peak {key}"] = Measurement(point.peak / plain.peak, note="of keeping everything")
        results[f"time {key}"] = Measurement.of(point.time, note="of keeping everything")
    planned = context.keep("prediction", lambda: _prediction(context, plain.peak))
    results["prediction"] = Measurement(planned["predicted"] / planned["measured"])
    results["within_budget"] = Measurement(planned["measured"] / planned["budget"])
    return results


def _matches(ours: Point, peer: Point) -> bool:
    return ours.peak <= 1.02 * peer.peak and ours.time.value <= 1.05 * peer.time.value


def _show(context: Context, points: list[Point], refused: dict[str, str]) -> None:
    series = []
    for point in points:
        low, high = point.time.interval or (point.time.value, point.time.value)
        series.append(Series(name=point.way.name, x=[point.peak / 2**20], y=[point.time.value], low=[low], high=[high],
                             kind="points"))  # fmt: skip
    missing = "".join(f" {name}: {why}." for name, why in refused.items())
    context.show(
        Figure(
            title="Peak live bytes against time per token",
            x="peak live bytes of a step, MiB",
            y="time per token, keeping everything = 1",
            series=series,
            caption=f"All in one process, taking turns.{' Not here:' if missing else ''}{missing}",
        )
    )


experiment = Experiment(
    name="memory",
    title="Ways to save memory, side by side",
    paper="The methods of Headway's memory folder beside torch, TRL and torchao",
    claim="For each of the common ways to save memory there is one of Headway's that needs no more of it, nor of time; "
    "and the planner's prediction of a budgeted run is right.",
    recipe=RECIPE,
    measure=measure,
    expectations=(
        Expectation("loss_error", "all of these methods are exact", at_most(1e-4),
                    title="largest relative difference of a loss from keeping everything"),
        Expectation("least_peak", "streaming and offloading go below recomputation", at_most(0.8),
                    title="least peak of Headway's / torch.utils.checkpoint's"),
        Expectation("peers_matched", "none of the others is the better choice", at_least(1.0), only="full",
                    title="share of the others matched in peak (to 2 %) and time (to 5 %)"),
        Expectation("prediction", "within 10 %", between(0.9, 1.1),
                    title="predicted / measured peak at half of the plain run's memory"),
        Expectation("within_budget", "the budget is kept", at_most(1.0), title="measured peak / budget"),
    ),
    minutes=8,
    quick=Quick(overrides=("model.layers=6", "data.sequence=256", "model.hidden=96"), minutes=2),
    notes=(
        "On a CPU the device is the memory that torch allocates, and the host what is mapped beside it; torch's "
        "save_on_cpu has nothing to move there, and TRL's and torchao's offloading need a GPU: with one, they are "
        "points of the same figure."
    ),
)  # fmt: skip
