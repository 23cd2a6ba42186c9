"""What recomputation, compilation, the chunked head, checkpoints and dry runs cost, in one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from headway.core.meters import live_rise
from headway.core.recipe import Recipe
from headway.core.surgery import replace_blocks
from headway.experiments.datastates import Setting
from headway.experiments.savers import Watched
from headway.layers.linear_cross_entropy import linear_cross_entropy
from headway.memory.recompute import RecomputedBlock
from headway.models.build import build_model
from headway.models.config import LlamaConfig
from headway.parallel.mesh import Layout
from headway.plan.cluster.choice import Choice
from headway.plan.cluster.dryrun import dry_run
from headway.plan.cluster.estimate import simulated
from headway.plan.cluster.hardware import cluster
from headway.plan.cluster.shape import shape_of
from headway.resilience.checkpoint import PlainCheckpointer
from headway.resilience.lazy import LazyCheckpointer

LADDER = ("everything", "products", "attention", "nothing")
"""What of a block is kept for the backward pass."""
WIDTH, LAYERS, VOCAB = 256, 4, 512
LLAMA_405B: dict[str, Any] = {"family": "llama", "hidden": 16384, "layers": 126, "heads": 128, "kv_heads": 8,
                              "intermediate": 53248, "vocab": 128256, "context": 8192, "tied": False}  # fmt: skip
RANKS, SEQUENCES = 512, 32
"""Of the table of 405B: ranks, and sequences of a step for each data rank."""


def _model(keep: str, length: int, layers: int = LAYERS) -> Any:
    model: Any = build_model(LlamaConfig(hidden=WIDTH, layers=layers, heads=4, vocab=VOCAB, context=length), seed=0)
    if keep != "everything":
        replace_blocks(model.blocks, partial(RecomputedBlock, keep=keep), "experiment")  # type: ignore[arg-type]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def _step(model: Any, length: int, batch: int = 2) -> Callable[[], None]:
    tokens = torch.randint(VOCAB, (batch, length + 1), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        hidden = model.hidden(tokens[:, :-1]).flatten(0, 1)
        loss, count = linear_cross_entropy(hidden, model.head_weight, tokens[:, 1:].flatten())
        (loss / count).backward()

    return step


def activation_peaks(length: int) -> dict[str, int]:
    """By what is kept: the peak of live bytes in a step above those at its start."""
    return {keep: live_rise(_step(_model(keep, length), length), torch.device("cpu"))[1] for keep in LADDER}


class CountProducts(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, then run."""
        self.count += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return function(*args, **(kwargs or {}))


def products_run_again() -> dict[str, float]:
    """By what is kept: matrix products of a block that run a second time."""

    def products(keep: str) -> int:
        step = _step(_model(keep, 32, layers=2), 32)
        with CountProducts() as counter:
            step()
        return counter.count

    plain = products("everything")
    return {keep: (products(keep) - plain) / 2 for keep in ("nothing", "attention", "products")}


def _paired(steps: dict[str, Callable[[], None]], base: str, repeats: int) -> dict[str, list[float]]:
    """Ratios of step times to those of ``base``, in turns."""
    for step in steps.values():
        step()
    ratios: dict[str, list[float]] = {name: [] for name in steps if name != base}
    for repeat in range(repeats):
        seconds = {}
        for name in list(steps)[:: 1 if repeat % 2 == 0 else -1]:
            start = time.perf_counter()
            steps[name]()
            seconds[name] = time.perf_counter() - start
        for name, found in ratios.items():
            found.append(seconds[name] / seconds[base])
    return ratios


def time_ratios(length: int, repeats: int) -> dict[str, list[float]]:
    """By what is kept: times of a step over those where everything is."""
    return _paired({keep: _step(_model(keep, length), length) for keep in LADDER}, "everything", repeats)


def compile_ratios(length: int, repeats: int) -> list[float]:
    """Times of a step with compiled blocks over eager ones."""
    compiled = _model("everything", length)
    for block in compiled.blocks:
        block.compile()
    steps = {"eager": _step(_model("everything", length), length), "compiled": _step(compiled, length)}
    steps["compiled"]()
    return _paired(steps, "eager", repeats)["compiled"]


def head_peaks(tokens: int, vocab: int = 32_000, width: int = 128) -> tuple[int, int]:
    """Peaks of live bytes of head and loss above hidden state and weight: whole logits, chunked."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab, width, generator=generator).requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=generator)
    weight.grad = torch.zeros_like(weight)

    def peak(loss: Callable[[torch.Tensor], torch.Tensor]) -> int:
        hidden = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1)).requires_grad_()
        return live_rise(lambda: loss(hidden).backward(), torch.device("cpu"))[1]

    whole = peak(lambda hidden: F.cross_entropy(hidden @ weight.T, targets, reduction="sum"))
    return whole, peak(lambda hidden: linear_cross_entropy(hidden, weight, targets, chunk=max(64, tokens // 16))[0])


def checkpoint_stalls(folder: Path, saves: int) -> dict[str, float]:
    """Seconds for which ``saves`` checkpoints, one after each step, stop a training; the first one is not counted."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the other core is for those who copy and write
    try:
        setting = Setting(True, folder, batch=2)
        found = {}
        for name, saver in (("plain", PlainCheckpointer(PlainCheckpointer.Options(), folder / "plain")),
                            ("lazy", setting.lazy(LazyCheckpointer))):  # fmt: skip
            watched = Watched(saver)
            setting.steps(watched, 2, 1)
            watched.stalled = 0.0
            setting.steps(watched, saves + 1, 1)
            watched.wait()
            watched.close()
            found[name] = watched.stalled
        return found
    finally:
        torch.set_num_threads(threads)


def dry_run_seconds(layers: int = 126) -> tuple[float, float]:
    """Seconds in which Llama 405B is built on 512 ranks that do not exist, and the bytes that the fullest takes.

    Args:
        layers: of its 126 blocks.
    """
    recipe = Recipe.load({
        "model": {**LLAMA_405B, "layers": layers},
        "data": {"source": "python-stdlib", "tokenizer": "byte", "sequence": 8192},
        "train": {"steps": 1, "batch": 8 * SEQUENCES, "micro_batch": 4, "precision": "bf16"},
        "parallel": {"tensor": 8, "pipeline": 8}, "methods": {"recompute": {}},
    })  # fmt: skip
    start = time.perf_counter()
    built = dry_run(recipe, RANKS, LLAMA_405B["vocab"])
    return time.perf_counter() - start, max(rank.memory.total for rank in built.ranks)


def interleaving_gain() -> float:
    """Simulated time of a step of Llama 405B on 512 H100s with 1F1B over that with interleaved 1F1B."""
    shape = shape_of(LlamaConfig(**{k: v for k, v in LLAMA_405B.items() if k != "family"}), 8192)
    layout = Layout(pipeline=8, shard=8, tensor=8)
    seconds = [
        simulated(shape, Choice(layout, 4, schedule, chunks, recompute=True), cluster("h100x512"), 8 * SEQUENCES)[
            0
        ].seconds
        for schedule, chunks in (("1f1b", 1), ("interleaved-1f1b", 2))
    ]
    return seconds[0] / seconds[1]
