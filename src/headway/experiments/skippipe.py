"""SkipPipe: shorter iterations on slow links by partial, reordered pipelines, and models that lose stages unharmed."""

from __future__ import annotations

import math
import random
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headway.data.paths import locate
from headway.experiments.base import Expectation, Experiment, Measurement, at_least, at_most, between
from headway.experiments.context import Context
from headway.experiments.evidence import Figure, Series
from headway.layers.linear_cross_entropy import linear_cross_entropy
from headway.models.build import build_model
from headway.models.config import GPT2Config
from headway.parallel.skippipe import published
from headway.parallel.skippipe.links import regions_cluster
from headway.parallel.skippipe.orders import draw_orders
from headway.parallel.skippipe.placement import Placer
from headway.parallel.skippipe.scheduler import Arm, skip_paths
from headway.parallel.skippipe.search import Budget
from headway.parallel.skippipe.simulator import simulate
from headway.parallel.skippipe.stage_skip import StageSkip, evaluate_share, visit_scale

REPLICAS, LENGTH, MICRO_BATCHES = (5, 3, 3, 3, 3, 3), 4, 30
EQUAL = (3,) * 6
"""As many data nodes as the full pipeline uses: what is left is what skipping alone does."""
SKIPPING: tuple[Arm, ...] = ("random", "no-tc2", "cbs")
STEPS, MICRO, ROWS, TOKENS, RATE = 700, 4, 8, 48, 2e-3
LEARNING: dict[str, tuple[int, int, float]] = {
    "full": (6, 0, 1.0),
    "4 of 6": (4, 0, 1.0),
    "4 of 6, swapped": (4, 2, 1.0),
    "4 of 6, equal compute": (4, 0, 1.5),
}
"""Name -> stages of a path, swaps, times as many steps."""


def search(seed: int, homogeneous: bool, nodes: int, replicas: tuple[int, ...] = REPLICAS) -> dict[str, float]:
    """Simulated seconds of an iteration by arm: one placement, as many micro-batches in each."""
    regions = {"regions": ("Germany",)} if homogeneous else {}
    cluster = regions_cluster(sum(replicas), **regions)  # type: ignore[arg-type]
    stages = Placer(cluster, replicas, seed=seed).search()
    return {
        arm: skip_paths(cluster, replicas, LENGTH, micro_batches=_micro_batches(replicas), arm=arm, seed=seed,
                        stages=stages, budget=Budget(nodes, 20.0)).seconds
        for arm in ("full", *SKIPPING)
    }  # fmt: skip


def _micro_batches(replicas: tuple[int, ...]) -> int:
    return MICRO_BATCHES if replicas == REPLICAS else 36  # a whole number of rounds of either


def _search_published(nodes: int) -> float:
    """Our schedule on the published nodes and placement, as the authors' simulation releases micro-batches."""
    cluster = published.cluster()
    found = skip_paths(cluster, REPLICAS, LENGTH, micro_batches=MICRO_BATCHES, stages=published.STAGES,
                       budget=Budget(nodes, 60.0))  # fmt: skip
    return found.seconds


def text() -> tuple[Tensor, Tensor, int]:
    """Training and validation characters (int64) and how many there are: Shakespeare where HEADWAY_DATA has it."""
    found = locate("text/tinyshakespeare.txt")
    if found is not None:
        raw = found.read_text(encoding="utf-8")[:600_000]
    else:
        from pydoc_data.topics import topics  # the language reference, in every Python

        raw = "\n".join(topics[name] for name in sorted(topics))[:600_000]
    letters = {letter: index for index, letter in enumerate(sorted(set(raw)))}
    ids = torch.tensor([letters[letter] for letter in raw])
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:], len(letters)


def _rows(ids: Tensor, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    starts = torch.randint(len(ids) - TOKENS - 1, (count,), generator=generator)
    rows = torch.stack([ids[s : s + TOKENS + 1] for s in starts.tolist()])  # [B, T + 1]
    return {"tokens": rows[:, :-1], "targets": rows[:, 1:]}


def learn(arm: str, steps: int) -> dict[str, Any]:
    """Train one arm; validation loss by share of the blocks, and the curve of training losses."""
    torch.set_num_threads(1)
    length, swaps, longer = LEARNING[arm]
    train, validation, vocab = text()
    model = build_model(GPT2Config(hidden=64, layers=6, heads=4, vocab=vocab, context=TOKENS), seed=0)
    skip = StageSkip(model, 6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.999), weight_decay=0.0)
    generator, rng = torch.Generator().manual_seed(0), random.Random(0)
    curve, visited = [], 0
    total = round(steps * longer)
    for step in range(total):
        for group in optimizer.param_groups:  # the same shape of schedule for all lengths
            group["lr"] = RATE * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / total))
        orders = draw_orders(MICRO, 6, length, swaps, rng)
        scale = visit_scale(orders, [1] * MICRO, 6)
        losses = 0.0
        for order in orders:
            batch = _rows(train, ROWS, generator)
            hidden = skip.hidden(batch["tokens"], order=order, scale=scale).flatten(0, 1)
            loss, count = linear_cross_entropy(hidden, model.head_weight, batch["targets"].flatten())
            (loss / (count * MICRO)).backward()
            losses += float(loss.detach()) / int(count) / MICRO
            visited += len(order)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(losses)
    held_out = [_rows(validation, 64, torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    shares = {str(kept): evaluate_share(skip, held_out, kept / 6) for kept in (6, 4, 3)}
    return {"loss": shares, "curve": curve, "block_passes": visited}


def _times(context: Context, results: dict[str, Measurement]) -> None:
    """What takes how long: the published schedule, and our own search."""
    seconds = {arm: simulate(published.cluster(), published.jobs(arm)).seconds for arm in published.SECONDS}
    results["published_error"] = Measurement(max(abs(seconds[a] - published.SECONDS[a]) for a in seconds), unit="s")
    for arm in SKIPPING:
        results[f"published_{arm}"] = Measurement(seconds[arm] / seconds["full"], note=f"{seconds[arm]:.2f} s")
    nodes, seeds = (60, 3) if context.quick else (300, 10)
    ours = context.keep(f"published nodes {nodes}", partial(_search_published, nodes))
    results["own_over_published"] = Measurement(ours / published.SECONDS["cbs"], note=f"{ours:.2f} s")
    found = [context.keep(f"search {seed} {nodes}", partial(search, seed, False, nodes)) for seed in range(seeds)]
    for row in found:
        context.say(", ".join(f"{arm} {value:.1f} s" for arm, value in row.items()))
    ordered = sum(row["cbs"] <= row["no-tc2"] + 1e-9 and row["no-tc2"] <= row["random"] + 1e-9 for row in found)
    results["ordered"] = Measurement(ordered / len(found), note=f"{ordered} of {len(found)} seeds")
    ratios = sorted(row["cbs"] / row["full"] for row in found)
    results["ratio"] = Measurement(ratios[len(ratios) // 2], (ratios[0], ratios[-1]), note="median; least and most")
    gains = sorted(row["cbs"] / row["no-tc2"] for row in found)
    results["tc2_gain"] = Measurement(gains[len(gains) // 2], (gains[0], gains[-1]), note="median; least and most")
    controls = {"homogeneous": (True, REPLICAS), "homogeneous_equal": (True, EQUAL), "regions_equal": (False, EQUAL)}
    for name, (flat, replicas) in controls.items():
        row = context.keep(f"{name} {nodes}", partial(search, 0, flat, nodes, replicas))
        context.say(f"{name}: {row['full']:.1f} s in full, {row['cbs']:.1f} s on paths")
        results[name] = Measurement(row["cbs"] / row["full"], note=f"{row['full']:.1f} s in full")
    context.show(
        Figure(
            title="Iteration on measured links of twelve regions",
            x="seed",
            y="seconds",
            series=[
                Series(name=arm, x=list(range(len(found))), y=[row[arm] for row in found])
                for arm in ("full", *SKIPPING)
            ],
        )
    )


def measure(context: Context) -> dict[str, Measurement]:
    """Times by simulation, then learning."""
    results: dict[str, Measurement] = {}
    _times(context, results)
    steps = 120 if context.quick else STEPS
    arms = {arm: context.keep(f"learn {arm} {steps}", partial(learn, arm, steps)) for arm in LEARNING}
    for arm, found in arms.items():
        rows = ", ".join(f"{kept} of 6: {loss:.3f}" for kept, loss in found["loss"].items())
        context.say(f"{arm}: {rows} nats per character, {found['block_passes']} block passes")
    full = arms["full"]["loss"]
    compute = arms["full"]["block_passes"]
    for name, arm in (("skip", "4 of 6"), ("swap", "4 of 6, swapped"), ("equal_compute", "4 of 6, equal compute")):
        loss = arms[arm]["loss"]
        results[f"{name}_perplexity"] = Measurement(math.exp(loss["6"] - full["6"]), note=f"{loss['6']:.3f} nats")
        results[f"{name}_half"] = Measurement(math.exp(loss["3"] - loss["6"]), note=f"{loss['3']:.3f} nats")
        results[f"{name}_compute"] = Measurement(arms[arm]["block_passes"] / compute)
    results["full_half"] = Measurement(math.exp(full["3"] - full["6"]), note=f"{full['3']:.3f} nats")
    curves = [_smooth(found["curve"]) for found in arms.values()]
    context.show(
        Figure(
            title="Training loss of the paths taken",
            x="step",
            y="nats per character",
            series=[Series(name=arm, x=x, y=y) for arm, (x, y) in zip(arms, curves)],
        )
    )
    return results


def _smooth(curve: list[float], width: int = 20) -> tuple[list[float], list[float]]:
    starts = range(0, len(curve) - width + 1, width)
    return [float(s + width / 2) for s in starts], [sum(curve[s : s + width]) / width for s in starts]


experiment = Experiment(
    name="skippipe",
    title="Partial and reordered pipelines",
    paper="Blagoev, Chen and Ersoy, SkipPipe, arXiv 2502.19913",
    claim="On slow, uneven links micro-batches that skip stages halve an iteration, and the model loses little.",
    measure=measure,
    expectations=(
        Expectation("published_error", "79.94, 48.92, 35.43, 33.31 s (schedule.json)", at_most(0.005),
                    title="largest error of the simulated published schedules, s"),
        Expectation("published_random", "0.61", between(0.605, 0.615), title="random paths / full, published schedule"),
        Expectation("published_no-tc2", "0.44", between(0.435, 0.445), title="without TC2 / full, published schedule"),
        Expectation("published_cbs", "0.42: up to 55 % shorter (abstract)", between(0.412, 0.422),
                    title="with TC2 / full, published schedule"),
        Expectation("own_over_published", "33.31 s", at_most(1.1), title="own / published schedule, same placement"),
        Expectation("ordered", "TC2 <= without <= random", at_least(0.8), quick=at_least(0.6),
                    title="share of seeds in which TC2 <= without TC2 <= random, own search"),
        Expectation("ratio", "0.45 (abstract)", between(0.4, 0.7), title="own search / full pipeline, twelve regions"),
        Expectation("homogeneous_equal", "none; the skipped computation is 0.67", between(0.67, 0.9),
                    title="own search / full pipeline, one cluster, as many data nodes in both"),
        Expectation("regions_equal", "none", at_most(0.8),
                    title="own search / full pipeline, twelve regions, as many data nodes in both"),
        Expectation("skip_perplexity", "no loss of convergence", at_most(1.06), quick=at_most(1.2),
                    title="perplexity, trained on 4 of 6 / on all, equal steps"),
        Expectation("equal_compute_perplexity", "none", at_most(1.06), quick=at_most(1.2),
                    title="perplexity, trained on 4 of 6 / on all, equal compute"),
        Expectation("skip_half", "7 % at half of the nodes (abstract)", at_most(1.03), quick=at_most(1.15),
                    title="perplexity of half / whole model, trained on 4 of 6"),
        Expectation("full_half", "none", at_least(1.15), only="full",
                    title="perplexity of half / whole model, trained on all"),
    ),
    minutes=4,
    notes=(
        "Times are simulated: published delays, or the authors' table of twelve regions, one slip of unit put right. "
        "The full pipeline there runs 3 chains of 10 micro-batches, the skipped ones 5 data nodes of 6: equal samples, "
        "more data nodes in use, which is a good part of the gain; two rows give both 3 data nodes. "
        "Learning is a character GPT of 6 blocks of width 64, 700 steps of 4 micro-batches; at "
        "that depth a block contributes little, and training on all keeps the best loss per step."
    ),
)  # fmt: skip
