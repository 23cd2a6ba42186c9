"""Deep Optimizer States: some subgroups of the optimizer visit the device while the host updates the others."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from headway.core.allocator import keep_freed_memory
from headway.core.meters import live_bytes, live_peak
from headway.experiments.base import Arm, Expectation, Experiment, Measurement, Quick, at_least, at_most, between
from headway.experiments.context import Context
from headway.experiments.evidence import Figure, Series
from headway.experiments.statistics import bootstrap
from headway.memory.deep_optimizer_states import InterleavedOffload, Lanes, Rates, Workers, calibrate, predict, stride
from headway.optim.adamw import build_adamw, param_groups
from headway.optim.master import MasterOptimizer, lower_precision

CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
SUBGROUP, COUNT = 4_000_000, 8
STRIDES: tuple[int | None, ...] = (1, 2, 3, 4, 5, 6, None)
HOST_RATE, DEVICE_RATE = 5e7, 2.5e8
"""Parameters per second that host and device pretend to: 80 and 16 ms for a subgroup. Real Adam runs inside of both."""
LINKS = {"fast": 3e9, "middle": 8.6e8, "slow": 1.2e8}
"""Bytes per second and direction: to stage a subgroup takes 1/5, 2/3 and 5 times the host's update of one."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Two cores for two lanes that compute: one thread each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _stack(width: int, layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))


def _optimizer(model: nn.Module, dtype: torch.dtype, **options: Any) -> Any:
    """Plain AdamW over fp32 masters without options, else an offloaded one with them."""
    masters = lower_precision(model, dtype) if dtype != torch.float32 else {}
    groups = param_groups(model, 0.1)
    if options:
        return InterleavedOffload(groups, masters=masters, **OPTIONS, **options)

    def inner(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return build_adamw(groups, **OPTIONS)

    return MasterOptimizer(groups, inner, masters) if masters else inner(groups)


# 1. The same bits.


def _trained(dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Weights and moments after 20 steps of four micro-batches, clipped."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(61, 130), nn.Linear(130, 77), nn.Tanh(), nn.LayerNorm(77), nn.Linear(77, 61))
    optimizer = _optimizer(model, dtype, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        for _ in range(4):
            x, y = (torch.randint(61, (16,), generator=generator) for _ in range(2))
            nn.functional.cross_entropy(model(x).float(), y).backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 0.5)
        optimizer.step()
        optimizer.zero_grad()
    weights = [p.detach().clone() for p in model.parameters()]
    masters = [getattr(optimizer, "masters", {}).get(p, p) for p in model.parameters()]
    state = getattr(optimizer, "inner", optimizer).state
    return weights + [state[m][key].clone() for m in masters for key in ("exp_avg", "exp_avg_sq")]


def _different() -> int:
    """In how many arms a bit of weights or moments is not that of plain AdamW."""
    wrong = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = _trained(dtype)
        for k in (1, 2, 3, 5, None):
            for subgroup in (1024, 5000):
                got = _trained(dtype, stride=k, subgroup=subgroup)
                wrong += not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    return wrong


# 2. The stride, on an emulated device.


class Setting:
    """Eight bf16 parameters of 4M, a gradient for each, and lanes of given rates."""

    def __init__(self) -> None:
        self.model = _stack(2000, COUNT).bfloat16()
        self.grad = torch.full((2000, 2000), 1e-3)

    def workers(self, link: float) -> tuple[Workers, Lanes]:
        """Lanes of that rate in either direction."""
        lanes = Lanes(rates={"host_to_device": link, "device_to_host": link})
        return Workers(lanes, host_rate=HOST_RATE, device_rate=DEVICE_RATE), lanes

    def rates(self, link: float) -> Rates:
        """As a run would measure them at its start."""
        workers, lanes = self.workers(link)
        try:
            return calibrate(workers, CPU, torch.bfloat16)
        finally:
            workers.close()
            lanes.close()

    def seconds(self, link: float, k: int | None) -> float:
        """One update; the step before it, which touches every page for the first time, is not counted and not held
        to any rate."""
        workers, lanes = self.workers(link)
        rates = {lane.name: lane.rate for lane in workers.all.values()}
        optimizer = InterleavedOffload(self.model.parameters(), stride=k, subgroup=SUBGROUP, workers=workers, **OPTIONS)
        try:
            for target in optimizer.gathered.values():
                target.grad = self.grad.clone()
            for step in range(2):
                for lane in workers.all.values():
                    lane.rate = rates[lane.name] if step else None
                optimizer.note_norm(torch.ones(()))
                optimizer.step()
            return optimizer.update_seconds[-1]
        finally:
            optimizer.close()
            workers.close()
            lanes.close()


def _name(k: int | None) -> str:
    return "none" if k is None else str(k)


def _sweep(repeats: int, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Per link: measured seconds of every stride, interleaved, and those that the model predicts."""
    keep_freed_memory()  # staging buffers are made anew each step, as on a GPU, whose allocator keeps them
    found: dict[str, dict[str, Any]] = {}
    with one_thread():
        setting = Setting()
        for name, link in LINKS.items():
            rates = setting.rates(link)
            times: dict[str, list[float]] = {_name(k): [] for k in STRIDES}
            for _ in range(repeats):
                for k in STRIDES:
                    times[_name(k)].append(setting.seconds(link, k))
            predicted = {_name(k): predict([SUBGROUP] * COUNT, k, rates).seconds for k in STRIDES}
            found[name] = {
                "measured": times,
                "predicted": predicted,
                "closed_form": _name(stride(rates.to_device, rates.host, rates.device, rates.cast)),
            }
            say(f"{name}: " + ", ".join(f"{k} {statistics.median(t):.3f} s ({predicted[k]:.3f})"
                                        for k, t in times.items()))  # fmt: skip
    return found


def _judge_sweep(found: dict[str, dict[str, Any]], context: Context) -> dict[str, Measurement]:
    agree, errors, regrets, best = 0, [], [], []
    for name, link in found.items():
        measured = {k: statistics.median(t) for k, t in link["measured"].items()}
        predicted = link["predicted"]
        chosen, fastest = min(predicted, key=predicted.__getitem__), min(measured, key=measured.__getitem__)
        agree += chosen == fastest
        best.append(f"{name}: {fastest} (predicted {chosen}, closed form {link['closed_form']})")
        regrets.append(measured[chosen] / measured[fastest])
        errors += [abs(predicted[k] / measured[k] - 1) for k in measured]
        strides = [COUNT + 1.0 if k == "none" else float(k) for k in measured]
        context.show(
            Figure(
                title=f"Update time by stride, {name} link",
                x="stride (9: none)",
                y="seconds",
                series=[Series(name="measured", x=strides, y=list(measured.values())),
                        Series(name="predicted", x=strides, y=[predicted[k] for k in measured])],
            )
        )  # fmt: skip
    fast = found["fast"]["measured"]
    return {
        "agree": Measurement(agree, note="; ".join(best)),
        "error": Measurement(max(errors), note=f"median {statistics.median(errors):.3f} of {len(errors)}"),
        "regret": Measurement(max(regrets)),
        "fast_two": Measurement.of(bootstrap([a / b for a, b in zip(fast["2"], fast["none"], strict=True)])),
        "fast_one": Measurement(statistics.median(fast["1"]) / statistics.median(fast["none"])),
    }


# 3. Gradients that cross during the backward pass.


def _backward(repeats: int) -> list[float]:
    """Time of the backward pass and the wait after it, asynchronous over blocking, on a link as slow as the pass."""
    with one_thread():
        model, x = _stack(1024, 8), torch.randn(1024, 1024)
        for _ in range(2):  # the time of the pass itself
            start = time.perf_counter()
            model(x).sum().backward()
            took = (time.perf_counter() - start) * 2 / 3
            model.zero_grad()
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(repeats):
            for asynchronous in (True, False):
                lanes = Lanes(rates={"device_to_host": 4 * 8 * 1024**2 / took})
                optimizer = _optimizer(model, torch.float32, stride=None, async_grads=asynchronous,
                                       workers=Workers(lanes))  # fmt: skip
                loss = model(x).sum()
                start = time.perf_counter()
                loss.backward()
                optimizer.wait()
                times[asynchronous].append(time.perf_counter() - start)
                optimizer.close()
                lanes.close()
    return [a / b for a, b in zip(times[True], times[False], strict=True)]


# 4. Bytes of the device.


def _device_bytes(**options: Any) -> float:
    """Peak live bytes of a bf16 step, for each parameter."""
    gc.collect()
    before = live_bytes(CPU)
    model, x = _stack(512, 16), torch.randn(2, 512).bfloat16()
    if options:
        options["workers"] = Workers(Lanes(queue_bytes=1 << 20))
    optimizer = _optimizer(model, torch.bfloat16, **options)

    def step() -> None:
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    gc.collect()
    return (live_peak(step)[1] - before) / sum(p.numel() for p in model.parameters())


# 5. The paper's grid of models, simulated.

GRID = {"3B": 3e9, "7B": 6.74e9, "8.3B": 8.3e9, "10B": 10e9, "13B": 13e9, "20B": 20e9, "30B": 30e9, "40B": 40e9,
        "70B": 70e9}  # fmt: skip
PAPER = Rates(to_device=25e9 / 4, to_host=25e9 / 4, host=6.74e9 / 3.98, device=6e10, cast=1e10)
"""Of one process on a node with H100s: 25 GB/s each way; the host's from the published log's plain update of 6.74e9
parameters in 3.98 s; the others from the bytes that they touch."""
PUBLISHED_TWO = 4.22
"""Seconds of the interleaved update in the published log, Llama-2-7B on one GPU."""


def _grid(context: Context) -> dict[str, Measurement]:
    gains: list[float] = []
    for ranks in (1, 2, 4):
        rates = Rates(PAPER.to_device, PAPER.to_host, PAPER.host / ranks, PAPER.device, PAPER.cast / ranks)
        series, keys = [], [*range(1, 9), None]
        for name, parameters in GRID.items():
            sizes = [10**8] * max(1, round(parameters / ranks / 1e8))
            times = [predict(sizes, k, rates).seconds for k in keys]
            series.append(Series(name=name, x=[9.0 if k is None else float(k) for k in keys], y=times))
            gains.append(times[-1] / min(times))
        context.show(
            Figure(title=f"Simulated update, {ranks} ranks on a node", x="stride (9: none)", y="seconds", series=series,
                   log_y=True, caption="Subgroups of 1e8; link 25 GB/s; the ranks share the host's cores.")
        )  # fmt: skip
    two = predict([10**7] * 674, 2, PAPER).seconds
    return {
        "grid_gain": Measurement(max(gains), note=f"{min(gains):.2f} to {max(gains):.2f} over {len(gains)} cases"),
        "log_two": Measurement(two / PUBLISHED_TWO, note=f"{two:.2f} s simulated, 4.22 s published: in that run the "
                               "gain was the backward pass alone, 4.75 to 1.55 s"),
    }  # fmt: skip


# 6. A GPU.


def _gpu(context: Context) -> dict[str, Measurement]:
    """Peak and time of a step at some 1.3e9 parameters: all on the GPU, torchao's offloading, ours at some strides."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    width = 4096

    def arm(name: str) -> dict[str, float]:
        with torch.device(device):
            model = _stack(width, 80 if not context.quick else 16)
        x = torch.randn(2048, width, device=device, dtype=torch.bfloat16)
        if name == "torchao":
            from torchao.optim import CPUOffloadOptimizer  # type: ignore[import-not-found,unused-ignore]

            optimizer = CPUOffloadOptimizer(model.bfloat16().parameters(), torch.optim.AdamW, lr=1e-3, fused=True)
        elif name == "gpu":
            optimizer = _optimizer(model, torch.bfloat16)
        else:
            optimizer = _optimizer(model, torch.bfloat16, stride=None if name == "none" else int(name))
        times: dict[str, list[float]] = {"iteration": [], "update": []}
        torch.cuda.reset_peak_memory_stats()
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            model(x).float().square().mean().backward()
            torch.cuda.synchronize()
            middle = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            times["update"].append(time.perf_counter() - middle)
            times["iteration"].append(time.perf_counter() - start)
        if hasattr(optimizer, "close"):
            optimizer.close()
        return {key: statistics.median(t[2:]) for key, t in times.items()} | {
            "peak": float(torch.cuda.max_memory_allocated())
        }

    names = ["gpu", "none", "2", "3", "4", "6"]
    try:
        import torchao  # type: ignore[import-not-found,import-untyped,unused-ignore]  # noqa: F401

        names.append("torchao")
    except ImportError:
        context.say("torchao is not installed; its arm is left out")
    found = {name: context.keep(f"gpu {name}", partial(arm, name)) for name in names}
    results = {f"gpu_{name}_{key}": Measurement(value) for name, arms in found.items() for key, value in arms.items()}
    best = min(found[k]["update"] for k in ("2", "3", "4", "6"))
    results["gpu_gain"] = Measurement(best / found["none"]["update"])
    results["gpu_peak"] = Measurement(found["2"]["peak"] / found["gpu"]["peak"])
    return results


def measure(context: Context) -> dict[str, Measurement]:
    """Bits, losses of a real model, strides, gradients, bytes, the simulated grid; a GPU where there is one."""
    keep = context.keep
    results = {"different": Measurement(keep("different", _different), note="of 30")}
    plain, offloaded = context.train("plain"), context.train("offloaded")
    losses = [[record["loss"] for record in run.metrics()] for run in (plain, offloaded)]
    unequal = sum(a != b for a, b in zip(*losses, strict=True))
    unequal += plain.summary["eval_loss"] != offloaded.summary["eval_loss"]
    results["losses"] = Measurement(unequal, note=f"of {len(losses[0])} steps; at the end {losses[0][-1]:.3f}")
    results["run_peak"] = Measurement(
        offloaded.summary["peak_memory_bytes"] / plain.summary["peak_memory_bytes"], note="activations included"
    )
    results |= _judge_sweep(keep("sweep", partial(_sweep, 1 if context.quick else 3, context.say)), context)
    results["backward"] = Measurement.of(bootstrap(keep("backward", partial(_backward, 2 if context.quick else 6))))
    arms: dict[str, dict[str, Any]] = {"plain": {}, "none": {"stride": None}, "two": {"stride": 2},
                                       "four": {"stride": 4}}  # fmt: skip
    each = {name: keep(f"bytes {name}", partial(_device_bytes, **options)) for name, options in arms.items()}
    for name in ("none", "two", "four"):
        results[f"bytes_{name}"] = Measurement(
            each[name] / each["plain"], note=f"{each[name]:.1f} of {each['plain']:.1f} bytes a parameter"
        )
    results |= _grid(context)
    if torch.cuda.is_available():
        results |= _gpu(context)
    else:
        context.say("no GPU: its arm is left out")
    return results


experiment = Experiment(
    name="deep-optimizer-states",
    title="Interleaved optimizer offloading",
    paper="Maurya et al., Deep Optimizer States, Middleware 2024, arXiv 2410.21316",
    claim="Updating every k-th subgroup on the device shortens the update of an offloaded optimizer, and a model of "
    "the lanes finds k.",
    measure=measure,
    recipe={
        "model": {"hidden": 128, "layers": 2, "heads": 4, "context": 128},
        "data": {"source": "python-stdlib", "tokenizer": "byte", "sequence": 128},
        "train": {"steps": 200, "batch": 8, "micro_batch": 4, "precision": "bf16"},
        "optimizer": {"lr": 2e-3},
        "eval": {"batches": 4},
        "log": {"every": 1},
    },
    arms=(Arm("plain"), Arm("offloaded", ("methods.deep-optimizer-states={stride: 2, subgroup: 32k}",))),
    expectations=(
        Expectation("different", "results unchanged", at_most(0),
                    title="arms with other bits than plain AdamW: 5 strides, 3 types, 2 sizes, accumulation, clipping"),
        Expectation("losses", "", at_most(0), title="losses of a small Llama that are not those without offloading"),
        Expectation("agree", "k = 2 is best on their machines", at_least(3), quick=at_least(2),
                    title="of three link rates, those at which the predicted stride is the fastest"),
        Expectation("regret", "", at_most(1.05), quick=at_most(1.15),
                    title="update time at the predicted stride / at the fastest, worst link"),
        Expectation("error", "", at_most(0.2), quick=at_most(0.35),
                    title="error of the predicted update time, worst of 21"),
        Expectation("fast_two", "up to 2.5x faster iterations (abstract)", between(0.45, 0.7), quick=between(0.4, 0.8),
                    title="update time, stride 2 / none, fast link; 0.5 is the bound"),
        Expectation("backward", "4.75 s to 1.55 s (sample logs)", at_most(0.8), quick=at_most(0.95),
                    title="backward pass and wait for gradients, asynchronous / blocking"),
        Expectation("bytes_none", "optimizer state leaves the device", at_most(0.25),
                    title="peak bytes of the device in a step, stride none / plain AdamW, bf16"),
        Expectation("bytes_two", "12.28 GB to 22.36 GB at k = 2 (sample logs)", at_most(0.5),
                    title="the same, stride 2, 8 subgroups"),
        Expectation("gpu_gain", "", at_most(1.0), only="cuda",
                    title="update time on a GPU, best stride / none"),
        Expectation("gpu_peak", "", at_most(0.7), only="cuda",
                    title="peak memory of a GPU, stride 2 / all on the GPU"),
    ),
    minutes=4,
    quick=Quick(overrides=("train.steps=60",), minutes=1.5),
    notes=(
        "Link and device are emulated: the device is torch's CPU allocator and a thread of its own, the link's two "
        "directions, the device's update and the host's pretend rates, and real Adam and real copies run inside of "
        "them, with one thread for each lane on two shared cores. The host is held to 5e7 parameters per second so "
        "that the copies of the emulated link, which a GPU's engines would make, do not take its core. The "
        "grid is the simulator's, at assumed rates of one process on a node with H100s; the host's is that of the "
        "published log. The published interleaved update (4.22 s) is "
        "slower than its own baseline and twice what the model gives: that run gained in the backward pass only. Times "
        "and peaks of a GPU, and torchao's offloading, need one."
    ),
)  # fmt: skip
