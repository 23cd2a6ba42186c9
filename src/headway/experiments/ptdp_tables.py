"""PTD-P's Tables 1 and 2 and Figure 12, as rows, and what the cost model says of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from scipy.optimize import least_squares

from headway.models.config import GPT2Config
from headway.parallel.mesh import Layout
from headway.plan.cluster.choice import Choice
from headway.plan.cluster.estimate import Estimate, estimate, simulated
from headway.plan.cluster.formulas import bubble
from headway.plan.cluster.hardware import Cluster, Reach, cluster
from headway.plan.cluster.shape import Shape, shape_of

SEQUENCE, VOCAB = 2048, 51_200
GRADIENT_BYTES = 2
"""Of an element that Megatron's data ranks summed at the time."""


@dataclass(frozen=True)
class Row:
    """A row of Table 1; micro-batch and chunks are from the authors' run scripts (examples/sc21)."""

    billions: float
    heads: int
    hidden: int
    layers: int
    tensor: int
    pipeline: int
    devices: int
    batch: int
    micro: int
    chunks: int
    rate: float
    """TFLOP/s per GPU, as reported."""

    @property
    def shape(self) -> Shape:
        """Of the model."""
        config = GPT2Config(hidden=self.hidden, layers=self.layers, heads=self.heads, vocab=VOCAB, context=SEQUENCE)
        return shape_of(config, SEQUENCE)

    @property
    def data(self) -> int:
        """Data ranks."""
        return self.devices // self.tensor // self.pipeline

    @property
    def idle(self) -> float:
        """The schedule's bubble."""
        return bubble(self.pipeline, self.batch // self.data // self.micro, self.chunks)

    @property
    def choice(self) -> Choice:
        """As Megatron ran it: whole copies, whole recomputation, one reduction, attention not fused, no overlap."""
        layout = Layout(pipeline=self.pipeline, replicate=self.data, tensor=self.tensor)
        schedule = "interleaved-1f1b" if self.chunks > 1 else "1f1b"
        return Choice(layout, self.micro, schedule, self.chunks, recompute=True, divided_stream=False, overlap=False,
                      reduce_once=True, fused_attention=False)  # fmt: skip

    @property
    def blocks(self) -> list[int]:
        """Megatron gives every stage as many."""
        stages = self.pipeline * self.chunks
        return [self.layers // stages] * stages

    def predict(self, reach: Reach, simulate: bool = False) -> Estimate:
        """By the formulas, or by simulating the schedule's table."""
        on = cluster(f"a100x{self.devices}").model_copy(update={"reach": reach})
        given = {"blocks": self.blocks, "reduce_bytes": GRADIENT_BYTES}
        if simulate:
            return simulated(self.shape, self.choice, on, self.batch, **given)[0]  # type: ignore[arg-type]
        return estimate(self.shape, self.choice, on, self.batch, **given)  # type: ignore[arg-type]


TABLE_1 = [
    Row(1.7, 24, 2304, 24, 1, 1, 32, 512, 16, 1, 137), Row(3.6, 32, 3072, 30, 2, 1, 64, 512, 16, 1, 138),
    Row(7.5, 32, 4096, 36, 4, 1, 128, 512, 16, 1, 142), Row(18.4, 48, 6144, 40, 8, 1, 256, 1024, 8, 1, 135),
    Row(39.1, 64, 8192, 48, 8, 2, 512, 1536, 4, 1, 138), Row(76.1, 80, 10240, 60, 8, 4, 1024, 1792, 2, 3, 140),
    Row(145.6, 96, 12288, 80, 8, 8, 1536, 2304, 2, 2, 148), Row(310.1, 128, 16384, 96, 8, 16, 1920, 2160, 1, 2, 155),
    Row(529.6, 128, 20480, 105, 8, 35, 2520, 2520, 1, 3, 163),
    Row(1008.0, 160, 25600, 128, 8, 64, 3072, 3072, 1, 1, 163),
]  # fmt: skip
WITHIN_A_NODE = [row for row in TABLE_1 if row.tensor == 8]

Predict = Callable[[Row], float]
Fit = Callable[[Sequence[Row]], Predict]


def fit_width(rows: Sequence[Row]) -> Predict:
    """``X(x) = a x / (x + k)`` for the busy rate, x = h/t, with the schedule's bubble taken out."""
    busy = [(row.hidden / row.tensor, row.rate * (1 + row.idle)) for row in rows]

    def misses(z: Sequence[float]) -> list[float]:
        return [math.log(z[0] * x / (x + z[1]) / rate) for x, rate in busy]

    a, k = least_squares(misses, [190.0, 350.0], x_scale=[100.0, 100.0]).x

    def predict(row: Row) -> float:
        x = row.hidden / row.tensor
        return float(a * x / (x + k) / (1 + row.idle))

    return predict


def fit_model(rows: Sequence[Row]) -> Predict:
    """The share of the peak that products reach; memory traffic, links, bubble and uneven stages are the model's."""
    reach = fitted_reach(rows)
    return lambda row: row.predict(reach).hardware_rate / 1e12


def fitted_reach(rows: Sequence[Row]) -> Reach:
    """The ``reach.most`` with the least error; no width is needed beside what the model knows."""

    def misses(z: Sequence[float]) -> list[float]:
        return [math.log(row.predict(Reach(most=z[0])).hardware_rate / 1e12 / row.rate) for row in rows]

    return Reach(most=float(least_squares(misses, [0.6], bounds=(0.2, 1.0)).x[0]))


def left_out(fit: Fit, rows: Sequence[Row]) -> dict[float, float]:
    """Billions of parameters -> relative error of the row's rate, predicted from the other rows."""
    errors = {}
    for row in rows:
        predicted = fit([other for other in rows if other is not row])(row)
        errors[row.billions] = predicted / row.rate - 1
    return errors


def constant_misses() -> float:
    """Relative error of the largest model's rate where the rate of the rows without a pipeline serves for all."""
    alone = [row.rate for row in TABLE_1 if row.pipeline == 1]
    last = TABLE_1[-1]
    return sum(alone) / len(alone) / (1 + last.idle) / last.rate - 1


@dataclass(frozen=True)
class Scaling:
    """A model of Table 2 on ever more GPUs at one batch: the reported and the predicted rates, TFLOP/s per GPU."""

    devices: tuple[int, ...]
    reported: tuple[float, ...]
    predicted: tuple[float, ...]

    def fall(self, rates: Sequence[float]) -> float:
        """How much is lost from the fewest to the most GPUs."""
        return 1 - rates[-1] / rates[0]


GPT3 = Row(174.6, 96, 12288, 96, 8, 12, 384, 1536, 1, 1, 153)


def scaling(reach: Reach) -> tuple[Scaling, Scaling]:
    """(PTD-P, ZeRO-3) for the model of 174.6 billion parameters: 384, 768 and 1536 GPUs, 1536 sequences."""
    devices = (384, 768, 1536)
    ptdp, zero = [], []
    for n in devices:
        ptdp.append(replace(GPT3, devices=n).predict(reach).hardware_rate / 1e12)
        # Without model parallelism every rank has its own 4, 2 or 1 sequences, and gathers all weights for them.
        choice = replace(GPT3.choice, layout=Layout(shard=n), micro_batch=1536 // n, schedule="1f1b", reduce_once=False)
        found = estimate(GPT3.shape, choice, on(n, reach), 1536, reduce_bytes=GRADIENT_BYTES, blocks=[96])
        zero.append(found.hardware_rate / 1e12)
    return (Scaling(devices, (153, 149, 141), tuple(ptdp)), Scaling(devices, (144, 88, 44), tuple(zero)))


def on(devices: int, reach: Reach) -> Cluster:
    """So many A100."""
    return cluster(f"a100x{devices}").model_copy(update={"reach": reach})


def figure_12(batch: int, chunks: int, gather: bool, reach: Reach) -> float:
    """Seconds of a step in Figure 12's setting (96 GPUs, t 8, p 12), simulated; interleaved with 4 chunks."""
    row = replace(GPT3, devices=96, batch=batch, chunks=chunks)
    choice = replace(row.choice, gather=gather)
    found, _ = simulated(row.shape, choice, on(96, reach), batch, blocks=row.blocks, reduce_bytes=GRADIENT_BYTES)
    return found.seconds


def interleaving(batch: int, gather: bool, reach: Reach) -> float:
    """How much faster the interleaved schedule is there."""
    return figure_12(batch, 1, gather, reach) / figure_12(batch, 4, gather, reach) - 1


def gathering(batch: int, reach: Reach) -> float:
    """How much faster the interleaved schedule is with its boundaries sent in parts."""
    return figure_12(batch, 4, False, reach) / figure_12(batch, 4, True, reach) - 1
