"""Ulysses: softmax attention over many ranks, exactly, with messages that stay the same as sequence and ranks grow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._dynamo  # the ranks are forked: what they import has to be here already
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from headway.core.meters import live_peak
from headway.data.sources import StdlibSource
from headway.experiments.base import Expectation, Experiment, Measurement, at_least, at_most, between
from headway.experiments.context import Context
from headway.experiments.evidence import Figure, Series
from headway.layers.attention import attention_reference
from headway.models.build import build_model
from headway.models.config import LlamaConfig
from headway.parallel.local import run_ranks
from headway.parallel.sequence import sequence_parallel, shard_batch
from headway.parallel.sequence.apply import bytes_sent
from headway.parallel.sequence.batch import own_positions
from headway.parallel.sequence.bytes import Machines, SpKind, estimate_sp_bytes, estimate_sp_time
from headway.parallel.sequence.ring import ring_attention
from headway.parallel.sequence.ulysses import ulysses_attention
from headway.parallel.sequence.usp import usp_attention, usp_links

KINDS: tuple[SpKind, ...] = ("ulysses", "ring", "usp")
HEADS = ((8, 8), (8, 2), (8, 1), (5, 5), (12, 3))
"""Query and key heads: all their own, grouped, one for all, and two that four ranks cannot divide."""
TOKENS = 48


# Exactness


def _masks() -> list[dict[str, Any]]:
    documents = (torch.arange(TOKENS) // 11).expand(2, -1)
    return [{}, {"causal": False}, {"window": 7}, {"segments": documents}, {"segments": documents, "window": 20}]


def _attend(kind: str, world: int) -> Callable[..., Tensor]:
    if kind == "usp":
        rows, columns = usp_links(None, 2)
        return partial(usp_attention, rows=rows, columns=columns)
    return ulysses_attention if kind == "ulysses" else ring_attention


def _errors(rank: int, world: int) -> dict[str, float]:
    """Largest error of outputs and gradients on this rank, fp64, by kind and heads, over masks."""
    worst: dict[str, float] = {}
    for kind in KINDS:
        attend, own = _attend(kind, world), own_positions(TOKENS, rank, world, kind, 2)
        for heads, kv_heads in HEADS:
            generator = torch.Generator().manual_seed(heads)
            shapes = ((2, h, TOKENS, 8) for h in (heads, kv_heads, kv_heads, heads))
            *inputs, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
            for mask in _masks():
                results = []
                for function, here in ((attention_reference, slice(None)), (attend, own)):
                    leaves = [x[:, :, here].clone().requires_grad_() for x in inputs]
                    y = function(*leaves, **mask)
                    results.append([y.detach(), *torch.autograd.grad((y * grad[:, :, here]).sum(), leaves)])
                error = max(float((a[:, :, own] - b).abs().max()) for a, b in zip(*results, strict=True))
                key = f"{kind} {heads}/{kv_heads} on {world}"
                worst[key] = max(worst.get(key, 0.0), error)
    return worst


def _exactness() -> dict[str, float]:
    found: dict[str, float] = {}
    for world in (2, 4):
        ranks = run_ranks(world, _errors, world)
        found |= {key: max(part[key] for part in ranks) for key in ranks[0]}
    return found


# Bytes, memory and learning of a small Llama


def _config(length: int, width: int = 64, layers: int = 4) -> LlamaConfig:
    return LlamaConfig(hidden=width, layers=layers, heads=8, kv_heads=4, vocab=256, context=length)


def _divided(rank: int, world: int, kind: str, config: LlamaConfig) -> tuple[Any, Callable[..., dict[str, Tensor]]]:
    model = build_model(config, seed=0)
    if world == 1:
        return model, dict
    sequence_parallel(model, init_device_mesh("cpu", (world,)), kind=kind, ring=2)
    return model, partial(shard_batch, rank=rank, degree=world, kind=kind, ring=2)


def _loss(model: Any, batch: dict[str, Tensor], chunk: int = 128) -> Tensor:
    """The sum over this rank's targets."""
    given = {key: batch[key] for key in ("positions", "segments") if key in batch}
    hidden = model.hidden(batch["tokens"], **given).flatten(0, 1)
    loss: Tensor = model.head_loss(hidden, model.head_weight, batch["targets"].flatten(), chunk=chunk)[0]
    return loss


def _row(length: int, seed: int = 0) -> dict[str, Tensor]:
    text = torch.randint(256, (1, length + 1), generator=torch.Generator().manual_seed(seed))
    return {"tokens": text[:, :-1].contiguous(), "targets": text[:, 1:].contiguous()}


def _sent(rank: int, world: int, kind: str, length: int) -> dict[str, int]:
    """Bytes of one layer's forward and backward pass."""
    config = _config(length, layers=1)
    model, cut = _divided(rank, world, kind, config)
    _loss(model, cut(_row(length))).backward()
    return dict(+Counter(bytes_sent(model)))


def _bytes(per_rank: int) -> dict[str, list[float]]:
    """By kind: bytes of rank 0 over the formula's, and their number, for P = 2 and 4 with N/P the same."""
    found: dict[str, list[float]] = {}
    for kind in KINDS:
        for world in (2, 4):
            counted = [sum(sent.values()) for sent in run_ranks(world, _sent, world, kind, per_rank * world)]
            formula = [
                estimate_sp_bytes(kind, tokens=per_rank * world, degree=world, heads=8, kv_heads=4, head_dim=8,
                                  itemsize=4, ring=2, rank=rank).total
                for rank in range(world)
            ]  # fmt: skip
            found.setdefault(f"{kind} ratio", []).extend(a / b for a, b in zip(counted, formula, strict=True))
            found.setdefault(kind, []).append(max(counted))
    return found


def _peak(rank: int, world: int, kind: str, length: int) -> int:
    """Peak live bytes of a step above those of weights and gradients."""
    model, cut = _divided(rank, world, kind, _config(length, width=128, layers=2))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    batch = cut(_row(length))
    _loss(model, batch).backward()  # what is made once is there
    fixed = sum(2 * p.numel() * p.element_size() for p in model.parameters())
    return live_peak(lambda: _loss(model, batch).backward())[1] - fixed


def _peaks(kind: str, length: int) -> list[int]:
    """The most of any of 1, 2 and 4 ranks."""
    return [max(run_ranks(world, _peak, world, kind, length)) for world in (1, 2, 4)]


def _train(rank: int, world: int, kind: str, steps: int, length: int, text: Tensor) -> list[float]:
    """Losses per target of a 4-layer Llama in fp32, one sequence a step."""
    model, cut = _divided(rank, world, kind, _config(length))
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    parameters = list(model.parameters())
    for step in range(steps):
        row = text[step * length : (step + 1) * length + 1]
        loss = _loss(model, cut({"tokens": row[None, :-1], "targets": row[None, 1:]})) / length
        optimizer.zero_grad()
        loss.backward()
        flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None] + [loss.detach().view(1)])
        if world > 1:
            dist.all_reduce(flat)
        for p, grad in zip(parameters, flat[:-1].split([p.numel() for p in parameters]), strict=True):
            p.grad = grad.view_as(p).clone()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(flat[-1]))
    return losses


ARMS = {"one process": (1, "ulysses"), "ulysses on 2": (2, "ulysses"), "ulysses on 4": (4, "ulysses"),
        "ring on 4": (4, "ring"), "usp on 4": (4, "usp")}  # fmt: skip


def _curves(steps: int, length: int) -> dict[str, list[float]]:
    found, needed = bytearray(), steps * length + 1
    for document in StdlibSource().documents():
        found += document.text.encode()
        if len(found) >= needed:
            break
    text = torch.frombuffer(found[:needed], dtype=torch.uint8).long()
    return {name: run_ranks(world, _train, world, kind, steps, length, text)[0]
            for name, (world, kind) in ARMS.items()}  # fmt: skip


# The model of time


def _times(kind: SpKind, tokens: int, ranks: int) -> float:
    shape = {"heads": 32, "kv_heads": 8, "head_dim": 128, "ring": max(2, ranks // 8)}
    return estimate_sp_time(kind, Machines(), tokens=tokens, degree=ranks, **shape)


def _crossover(ranks: int) -> int:
    """The shortest sequence, doubled each time from 1024 tokens, for which a ring is faster than Ulysses."""
    sizes = (2**n for n in range(10, 30))
    return next(N for N in sizes if _times("ring", N, ranks) < _times("ulysses", N, ranks))


def _simulate(context: Context) -> dict[str, Measurement]:
    sizes = [2**n for n in range(13, 22)]
    ranks = [2, 4, 8, 16, 32, 64, 128]
    kinds: tuple[SpKind, ...] = ("ulysses", "ring", "usp", "megatron")
    for P in (8, 64):
        series = [Series(name=kind, x=list(sizes), y=[1e3 * _times(kind, N, P) for N in sizes]) for kind in kinds]
        context.show(Figure(title=f"Predicted time of a layer's attention on {P} ranks, 8 to a machine", x="tokens",
                            y="ms", series=series, log_x=True, log_y=True))  # fmt: skip
    crossing = Series(name="crossover", x=list(ranks), y=[float(_crossover(P)) for P in ranks])
    context.show(Figure(title="Sequence from which a ring is faster than Ulysses", x="ranks", y="tokens",
                        series=[crossing], log_x=True, log_y=True))  # fmt: skip
    slower = sum(_times("megatron", N, P) < _times("ulysses", N, P) for N in sizes for P in ranks if P <= 8)
    sent = [estimate_sp_bytes(kind, tokens=2**20, degree=64, heads=64, kv_heads=64, head_dim=128).total
            for kind in ("megatron", "ulysses")]  # fmt: skip
    return {
        "crossover_8": Measurement(float(_crossover(8)), unit="tokens", note="one machine; 32 heads, 8 key heads"),
        "crossover_64": Measurement(float(_crossover(64)), unit="tokens", note="8 machines; the same heads"),
        "slower_than_megatron": Measurement(float(slower), note="sizes up to 2M tokens, 2 to 8 ranks"),
        "bytes_megatron": Measurement(sent[0] / sent[1], note="64 ranks, all heads their own"),
    }


def measure(context: Context) -> dict[str, Measurement]:
    """Exactness, bytes, memory, learning, the model of time."""
    quick = context.quick
    errors = context.keep("errors", _exactness)
    worst = max(errors, key=lambda key: errors[key])
    results = {"error": Measurement(errors[worst], note=f"{len(errors)} combinations; the largest: {worst}")}
    context.say(f"largest error in fp64: {errors[worst]:.1e} ({worst})")

    sent = context.keep("bytes", partial(_bytes, 64))
    ratios = [ratio for kind in KINDS for ratio in sent[f"{kind} ratio"]]
    results["bytes"] = Measurement(max(ratios, key=lambda r: abs(r - 1)), note=f"{len(ratios)} ranks and layouts")
    # A rank keeps 1/P for itself: of the rest, (P-1)/P, the bytes are 1.5 times as many on 4 as on 2.
    results["constant"] = Measurement(sent["ulysses"][1] / sent["ulysses"][0] / 1.5, note="P from 2 to 4, N/P = 64")
    results["ring_grows"] = Measurement(sent["ring"][1] / sent["ring"][0], note="P from 2 to 4, N/P = 64")

    length = 1024 if quick else 4096
    for kind in ("ulysses", "ring"):
        peaks = context.keep(f"peaks {kind} {length}", partial(_peaks, kind, length))
        context.say(f"{kind}: {', '.join(f'{p / 2**20:.1f} MiB on {P}' for p, P in zip(peaks, (1, 2, 4)))}")
        results[f"memory_2_{kind}"] = Measurement(peaks[0] / peaks[1], note=f"{length} tokens")
        results[f"memory_4_{kind}"] = Measurement(peaks[0] / peaks[2], note=f"{length} tokens")

    steps, length = (20, 512) if quick else (200, 1024)
    curves = context.keep(f"curves {steps} {length}", partial(_curves, steps, length))
    one = curves["one process"]
    apart = {name: max(abs(a - b) / b for a, b in zip(curve, one)) for name, curve in curves.items()}
    results["curve"] = Measurement(max(apart.values()), note=", ".join(f"{n} {v:.1e}" for n, v in apart.items()))
    context.say(f"loss from {one[0]:.3f} to {one[-1]:.3f}; curves differ by {max(apart.values()):.1e}")
    series = [Series(name=name, x=[float(i) for i in range(steps)], y=curve) for name, curve in curves.items()]
    context.show(Figure(title="Loss on bytes of Python", x="step", y="nats per byte", series=series))
    results |= _simulate(context)
    context.say("speed on GPUs and their links is not measured here: two cores stand for all ranks")
    return results


experiment = Experiment(
    name="ulysses",
    title="Sequences shared by an exchange of heads",
    paper="Jacobs et al., DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme Long Sequence "
    "Transformer Models, arXiv 2309.14509",
    claim="Exchanging heads for tokens trains longer sequences on more ranks, exactly, at the same bytes per rank.",
    measure=measure,
    expectations=(
        Expectation("error", "the same attention", at_most(1e-10),
                    title="largest error of outputs and gradients, fp64: Ulysses, ring, USP on 2 and 4 ranks"),
        Expectation("curve", "identical loss curves (section 4)", at_most(1e-5),
                    title="largest relative difference of a loss to one process, fp32"),
        Expectation("bytes", "4 N h / P a layer (section 3.2)", between(1.0, 1.0),
                    title="bytes that a rank sends, over the formula's, in both passes"),
        Expectation("constant", "constant as N and P grow together", between(1.0, 1.0),
                    title="bytes of Ulysses per part sent away as N and P double"),
        Expectation("ring_grows", "a ring's grow with N", between(3.0, 3.0),
                    title="bytes of a ring as N and P double"),
        Expectation("bytes_megatron", "more than 10 times less (abstract)", at_least(10.0),
                    title="bytes by the formulas, Megatron's sequence parallelism / Ulysses; it is P"),
        Expectation("memory_2_ulysses", "about 1/P", at_least(1.7), quick=at_least(1.5),
                    title="peak above weights and gradients, one process / two ranks, Ulysses"),
        Expectation("memory_4_ulysses", "about 1/P", at_least(2.8), quick=at_least(2.0),
                    title="the same, four ranks"),
        Expectation("memory_2_ring", "about 1/P", at_least(1.7), quick=at_least(1.4),
                    title="the same, two ranks, a ring"),
        Expectation("slower_than_megatron", "always faster", at_most(0),
                    title="sizes at which the model of time has Megatron's ahead of Ulysses, within a machine"),
        Expectation("crossover_64", "no claim of the paper: a regression check", between(2**16, 2**20),
                    title="model of time: the shortest sequence for which a ring is ahead, 64 ranks"),
        Expectation("crossover_8", "no claim of the paper: a regression check", at_most(2**14),
                    title="the same, 8 ranks of one machine, from 1024 tokens on"),
    ),
    minutes=4,
    notes=(
        "Ranks are processes on one machine: bytes and memory are counted, learning is real, and speed is a model of "
        "latency and rate of links (8 ranks to a machine, 300 GB/s inside, 40 GB/s between, 400 TFLOP/s), not a claim. "
        "The two rows of crossing points are regression checks of it: their bounds were set around what it gave. "
        "The bytes of Megatron's are a formula, and were not counted. "
        "Curves are of plain SGD: with momentum at a rate on the edge of stability, rounding alone drives runs apart."
    ),
)  # fmt: skip
