"""Experts balanced over the global batch specialise by domain, at the same balance; over micro-batches they cannot.

A byte-level model with 16 experts learns four domains. Every micro-batch holds one domain, as on a rank that reads one
file; 16 of them make a step. Whose choices the balancing loss counts is all that differs between the arms.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headway.data.paths import locate
from headway.experiments.base import Expectation, Experiment, Measurement, Quick, at_least, at_most, between
from headway.experiments.context import Context
from headway.experiments.evidence import Figure, Series
from headway.experiments.statistics import bootstrap
from headway.models.build import build_model
from headway.models.config import MoEConfig
from headway.models.moe import moe_layers
from headway.parallel.global_lbl import Balancer, routing_report

LENGTH, STEP = 128, 32
"""Bytes per sequence; sequences per step."""
STEPS, STEPS_QUICK = 150, 60
WEIGHT, RATE = 0.01, 3e-3
BYTES = 400_000
"""Of each domain, the last tenth held out."""

ARMS: dict[str, tuple[int, bool, dict[str, Any]]] = {
    "micro": (2, False, {"alone": True, "buffer": False}),
    "buffer": (2, False, {}),
    "shuffle": (2, False, {"shuffle": True}),
    "global": (STEP, False, {"buffer": False}),
    "micro, mixed": (4, True, {"alone": True, "buffer": False}),
    "buffer, mixed": (4, True, {}),
}
"""Name -> sequences per micro-batch, whether each holds all domains, options of the balancer. ``global`` has the whole
step in one micro-batch: what ranks without accumulation would count."""


def _first(paths: Any, size: int) -> bytes:
    text = b""
    for path in paths:
        text += path.read_bytes()
        if len(text) >= size:
            break
    return text[:size]


def _english() -> bytes:
    found = locate("text/wikitext2.valid.txt")
    if found is not None:
        return found.read_bytes()[:BYTES]
    from pydoc_data.topics import topics  # the language reference, 700 kB of prose in every Python

    return "\n".join(topics[name] for name in sorted(topics)).encode()[:BYTES]


def _digits() -> bytes:
    rng = random.Random(0)
    lines: list[str] = []
    while sum(map(len, lines)) < BYTES:
        start, stride = rng.randrange(10**6), rng.randrange(1, 50)
        lines.append(", ".join(str(start + i * stride) for i in range(rng.randrange(5, 30))) + "\n")
    return "".join(lines).encode()[:BYTES]


@cache
def domains() -> dict[str, Tensor]:
    """Name -> uint8 [BYTES]: Python and English from what every Python has, C++ from torch, lists of numbers."""
    python = sorted(Path(os.__file__).parent.glob("*.py"))
    headers = sorted((Path(torch.__file__).parent / "include" / "ATen").glob("*.h"))
    texts = {
        "Python": _first(python, BYTES), "English": _english(), "numbers": _digits(), "C++": _first(headers, BYTES),
    }  # fmt: skip
    return {name: torch.frombuffer(bytearray(text), dtype=torch.uint8) for name, text in texts.items()}


def sequences(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """int64 [count, LENGTH + 1] from random places."""
    starts = torch.randint(0, len(text) - LENGTH - 1, (count,), generator=generator)
    return torch.stack([text[s : s + LENGTH + 1] for s in starts.tolist()]).long()


def step_batch(seed: int, step: int, size: int, mixed: bool) -> list[Tensor]:
    """The micro-batches of a step: the same sequences in every arm, divided differently."""
    generator = torch.Generator().manual_seed(seed * 100_003 + step)
    each = STEP // len(domains())
    train = [text[: len(text) * 9 // 10] for text in domains().values()]
    rows = torch.stack([sequences(text, each, generator) for text in train])  # [M, each, T + 1]
    if mixed or size == STEP:
        return list(rows.transpose(0, 1).flatten(0, 1).split(size))
    # One domain a micro-batch, the domains in turn.
    return list(rows.unflatten(1, (-1, size)).transpose(0, 1).flatten(0, 1))


def train_arm(arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Train one arm and look at it: loss and metrics of specialisation on held-out text."""
    torch.set_num_threads(1)
    size, mixed, options = ARMS[arm]
    config = MoEConfig(hidden=64, layers=2, heads=4, vocab=256, context=LENGTH, experts=16, top_k=2, expert_width=64)
    model = build_model(config, seed=seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    balancer = Balancer(moe_layers(model), weight=WEIGHT, **options)
    targets, trained, loads = STEP * LENGTH, [], []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 20)
        total = 0.0
        for micro in step_batch(seed, step, size, mixed):
            balancer.begin(targets)
            with balancer.forward():
                loss = _loss(model, micro)
            (loss / targets).backward()
            total += float(loss.detach())
        balancer.end_step()
        optimizer.step()
        optimizer.zero_grad()
        trained.append(total / targets)
        loads.append(float(balancer.load.amax(1).mean()) * balancer.experts)
    late = loads[-(steps // 5) :]
    return {"train": trained, "load": sum(late) / len(late), **_held_out(model)}


def _loss(model: Any, rows: Tensor) -> Tensor:
    total, _ = model.head_loss(model.hidden(rows[:, :-1]).flatten(0, 1), model.head_weight, rows[:, 1:].flatten())
    return total  # type: ignore[no-any-return]


@torch.no_grad()
def _held_out(model: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    held = {name: sequences(text[len(text) * 9 // 10 :], 64, generator) for name, text in domains().items()}
    model.eval()
    losses = [float(_loss(model, rows)) / rows[:, 1:].numel() for rows in held.values()]
    report = routing_report(model, {name: [r[:, :-1] for r in rows.split(2)] for name, rows in held.items()})
    names = ("mutual_information", "max_frequency", "score", "micro_load", "frequent", "overlap")
    return {
        "loss": sum(losses) / len(losses),
        **{name: report.mean(name) for name in names},
        "held_out_load": report.mean("load"),
        "frequencies": report.layers[-1].frequencies,
    }


def _train_arms(arms: list[str], seed: int, steps: int) -> dict[str, Any]:
    """All arms of a seed, as many at a time as there are processors."""
    workers = min(len(arms), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return dict(zip(arms, pool.map(train_arm, arms, [seed] * len(arms), [steps] * len(arms))))


def measure(context: Context) -> dict[str, Measurement]:
    """Every arm and seed, then ratios between arms of one seed."""
    steps = STEPS_QUICK if context.quick else STEPS
    found: list[dict[str, Any]] = []
    for seed in context.seeds:
        arms = context.keep(f"seed {seed}, {steps} steps", partial(_train_arms, list(ARMS), seed, steps))
        found.append(arms)
        for name, arm in arms.items():
            context.say(f"seed {seed}, {name}: information {arm['mutual_information']:.3f}, "
                        f"largest frequency {arm['max_frequency']:.3f}, score {arm['score']:.3f}, "
                        f"load {arm['load']:.2f} ({arm['micro_load']:.2f} in a micro-batch), "
                        f"loss {arm['loss']:.4f}")  # fmt: skip

    def ratio(of: str, to: str, what: str, change: Callable[[float], float] = lambda r: r) -> Measurement:
        ratios = [change(arms[of][what] / arms[to][what]) for arms in found]
        values = ", ".join(f"{sum(arms[name][what] for arms in found) / len(found):.4g}" for name in (of, to))
        return Measurement.of(bootstrap(ratios), note=f"{values}")

    _show(context, found)
    return {
        "information_buffer": ratio("buffer", "micro", "mutual_information"),
        "information_global": ratio("global", "micro", "mutual_information"),
        "information_shuffle": ratio("shuffle", "buffer", "mutual_information"),
        "information_mixed": ratio("buffer, mixed", "micro, mixed", "mutual_information"),
        "load": ratio("buffer", "micro", "load"),
        "held_out_load": ratio("buffer", "micro", "held_out_load"),
        "loss": ratio("buffer", "micro", "loss", lambda r: 100 * (r - 1)),
        "frequency": ratio("buffer", "micro", "max_frequency"),
        "score": ratio("buffer", "micro", "score"),
        "micro_load": ratio("buffer", "micro", "micro_load"),
    }


def _show(context: Context, found: list[dict[str, Any]]) -> None:
    mean = {name: sum(arms[name]["mutual_information"] for arms in found) / len(found) for name in ARMS}
    context.show(
        Figure(
            title="Mutual information of domain and expert, by whose choices are balanced",
            x="arm",
            y="nats",
            series=[Series(name="mean over layers and seeds", x=list(ARMS), y=list(mean.values()), kind="bars")],
        )
    )
    for arm in ("micro", "buffer"):
        table = found[0][arm]["frequencies"]
        context.show(
            Figure(
                title=f"Last layer, {arm}: share of each domain's choices by expert (1/16 where all are alike)",
                x="expert",
                y="share",
                series=[Series(name=d, x=list(range(len(row))), y=row) for d, row in table.items()],
            )
        )


experiment = Experiment(
    name="global-lbl",
    title="Load balancing over the global batch",
    paper="Qiu et al., Demons in the Detail: On Implementing Load Balancing Loss for Training Specialized "
    "Mixture-of-Expert Models, arXiv 2501.11873",
    claim="Balanced over the global batch, experts specialise by domain, at equal balance and no higher loss.",
    measure=measure,
    seeds=(0, 1, 2),
    expectations=(
        Expectation("information_buffer", "experts specialise by domain only with the global batch (figures)",
                    at_least(1.5), quick=at_least(1.2),
                    title="mutual information of domain and expert, buffer / micro"),
        Expectation("information_global", "as the row above, without accumulation", at_least(1.5), quick=at_least(1.2),
                    title="the same, whole step at once / micro"),
        Expectation("information_shuffle", "random tokens of the global batch do as well: 8.041 against 8.038 "
                    "perplexity", between(0.75, 1.25), quick=between(0.6, 1.5),
                    title="the same, random tokens of the buffer / buffer"),
        Expectation("information_mixed", "the cause is that a micro-batch has few domains", between(0.75, 1.25),
                    quick=between(0.6, 1.5), title="the same where each micro-batch has all domains, buffer / micro"),
        Expectation("load", "equal balance over the global batch", at_most(1.15), quick=at_most(1.25),
                    title="largest over mean load of a step, last fifth of training, buffer / micro"),
        Expectation("loss", "perplexity 8.167 to 8.038 at 3.4B parameters, nothing at this size", at_most(0.5),
                    title="held-out loss, buffer against micro, %"),
    ),
    minutes=4,
    quick=Quick(seeds=1, minutes=1),
    notes=(
        "A byte-level model of 2 layers, width 64, 16 experts of which 2 answer, balancing weight 0.01, 150 steps of "
        "32 sequences of 128 bytes: Python (its standard library), English (WikiText-2 where HEADWAY_DATA has it, else "
        "Python's language reference), lists of numbers, C++ (torch's headers). The paper's gain in loss needs far "
        "larger models; what is looked for here is specialisation, and a loss that is no worse."
    ),
)  # fmt: skip
