"""The training loop, and the points at which methods act on it.

assemble                                                 points, in this order (core/build.py)
    model configuration -> model -> optimizer            model_config, model, optimizer
    loss, batches, learning rate                         loss, stream, schedule
    one micro-batch, the gradients, the update           forward_backward, gradients, update
    weights to evaluate, saving                          weights, checkpointer
load the newest checkpoint
until the budget of steps, tokens or time is spent:
    batch = next(stream)                                 stream
    set the learning rate                                schedule
    for each micro-batch:
        forward_backward(micro-batch)                    forward_backward, which calls loss
    gradients()                                          gradients
    update()                                             update, which calls optimizer
    log
    evaluate, now and then, inside weights()             weights
    save, now and then                                   checkpointer
evaluate and save
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import nn

from headway.core import state as run_state
from headway.core.checkpointer import Checkpointer
from headway.core.engine import Engine
from headway.core.errors import CheckpointError, DivergedError, Interrupted
from headway.core.meters import live_peak, synchronize
from headway.core.method import ForwardBackward, Gradients, Loss, Method, Schedule, Update, Weights
from headway.core.metrics import Observer, Record
from headway.core.recipe import Recipe
from headway.core.workload import StepBatch, Workload


@dataclass
class Trainer:
    """A training, assembled by `core.build.build_trainer`; one step at a time, or whole with `fit`."""

    recipe: Recipe
    engine: Engine
    workload: Workload
    methods: list[Method]
    changes: dict[str, list[str]]
    device: torch.device
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Loss
    stream: Iterator[StepBatch]
    schedule: Schedule
    forward_backward: ForwardBackward
    gradients: Gradients
    update: Update
    weights: Weights
    checkpointer: Checkpointer
    observers: Sequence[Observer] = ()
    base_lrs: list[float] = field(default_factory=list)

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on."""
    seconds: float = 0.0
    """Time spent in training steps, over all restarts."""
    peak_memory_bytes: int = 0
    """Highest number of live storage bytes in a metered step."""
    evaluation: Record = field(default_factory=dict)
    """The newest evaluation."""

    @property
    def progress(self) -> float:
        """The share of the budget that is spent, 0 to 1: of steps, tokens or time, whichever is furthest."""
        train = self.recipe.train
        spent = ((self.step, train.steps), (self.tokens, train.tokens), (self.seconds, train.time))
        return min(1.0, max(done / total for done, total in spent if total))

    def train_step(self) -> Record:
        """One optimizer step.

        Raises:
            StopIteration: the data is exhausted.
            DivergedError: the loss or the gradient norm is not finite; the weights are untouched.
        """
        start = time.perf_counter()
        self.model.train()
        self.engine.begin_step(self.step)
        batch = next(self.stream)
        factor = self.schedule(self.step, self.progress)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor
        losses = [self.forward_backward(self._to_device(micro), batch.targets) for micro in batch.micro]
        grad_norm = self.gradients()
        loss = self.engine.total(float(sum(losses))) / batch.targets
        if not (math.isfinite(loss) and math.isfinite(norm := float(grad_norm))):
            raise DivergedError(f"step {self.step + 1}", f"the loss is {loss} and the gradient norm {float(grad_norm)}",
                                hint="lower optimizer.lr, lengthen schedule.warmup or set train.clip")  # fmt: skip
        self.checkpointer.fence()  # the newest checkpoint may still be reading what the update changes
        self.update()
        synchronize(self.device)
        elapsed = self.engine.highest(time.perf_counter() - start)
        self.step, self.tokens, self.seconds = self.step + 1, self.tokens + batch.tokens, self.seconds + elapsed
        return {"step": self.step, "tokens": self.tokens, "loss": loss, "lr": self.base_lrs[0] * factor,
                "grad_norm": norm, "step_seconds": elapsed}  # fmt: skip

    def metered_step(self) -> Record:
        """One optimizer step, with its peak of live storage bytes counted."""
        record, peak = live_peak(self.train_step, self.device)
        self.peak_memory_bytes = max(self.peak_memory_bytes, peak)
        return record

    def evaluate(self) -> Record:
        """Metrics on the validation split, with the weights that `weights` chooses."""
        self.model.eval()
        self.checkpointer.fence()  # `weights` may put others in the place of those being saved
        with self.weights(), torch.no_grad():
            metrics = self.workload.evaluate(self.model, self.device)
        return {"step": self.step, "tokens": self.tokens, **metrics}

    def fit(self) -> None:
        """Train until the budget is spent or the data exhausted; evaluate and save on the way and at the end.

        Raises:
            Interrupted: SIGINT or SIGTERM arrived; the step was finished and the run saved.
            DivergedError: a loss that is not finite; the last checkpoint stands.
        """
        recipe = self.recipe
        self._tell("on_start")
        started_at, window_tokens, window_seconds = self.step, self.tokens, self.seconds
        saved_at = self.step if self.step else None
        with _signals() as received:
            while self.progress < 1 and not self.engine.any(bool(received)):
                # The second step is metered: by then the optimizer's state exists. The first too, for runs of one step.
                step = self.metered_step if self.step - started_at < 2 else self.train_step
                try:
                    record = step()
                except StopIteration:
                    break
                self._tell("on_step", record)
                if self.step % recipe.log.every == 0 or self.progress >= 1:
                    rate = (self.tokens - window_tokens) / max(self.seconds - window_seconds, 1e-9)
                    window_tokens, window_seconds = self.tokens, self.seconds
                    memory = {"tokens_per_second": rate, "peak_memory_bytes": self.peak_memory_bytes}
                    self._tell("on_log", {**record, **memory})
                if recipe.eval.every and self.step % recipe.eval.every == 0 and self.progress < 1:
                    self._evaluate()
                if self.checkpointer.every and self.step % self.checkpointer.every == 0:
                    saved_at = self._save()
            stop = self.engine.any(bool(received))
            if self.step == 0 and not stop:
                raise DivergedError("data", "is exhausted before the first step", hint="lower train.batch or add data")
            if not stop and self.evaluation.get("step") != self.step:
                self._evaluate()
                saved_at = None  # a checkpoint without the last evaluation would have it made and logged twice
            if saved_at != self.step and self.step:
                self._save()
            self.checkpointer.wait()
        if stop:
            raise Interrupted(received[0] if received else signal.SIGTERM)

    def _evaluate(self) -> None:
        self.evaluation = self.evaluate()
        self._tell("on_eval", self.evaluation)

    def _save(self) -> int:
        path = self.checkpointer.save(self.step, self.engine.to_save(self.state_dict()))
        self._tell("on_checkpoint", path)
        return self.step

    def _tell(self, event: str, *arguments: Any) -> None:
        for observer in self.observers:
            getattr(observer, event)(self, *arguments)

    def _to_device(self, micro: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: value.to(self.device, non_blocking=True) for key, value in micro.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on: fp32 tensors by name and plain data."""
        return {
            "counters": {"step": self.step, "tokens": self.tokens, "seconds": self.seconds},
            "model": run_state.model_state(self.model, self.optimizer),
            "optimizer": run_state.optimizer_state(self.model, self.optimizer),
            "stream": self.stream.state_dict(),  # type: ignore[attr-defined]
            "methods": {method.card.name: method.state_dict() for method in self.methods},
            "changes": self.changes,
            "layout": self.engine.layout_name,
            "evaluation": self.evaluation,
            "rng": run_state.rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken.

        Raises:
            CheckpointError: the state belongs to another model, or other methods were on.
        """
        changes = self.engine.common(self.changes)  # rank 0's are kept: others may have other parts of the model,
        before, now = sorted(state["changes"]), sorted(changes)
        same_layout = state.get("layout", Engine.layout_name) == self.engine.layout_name  # as rank 0 of another layout
        if before != now or (same_layout and state["changes"] != changes):
            what = (
                f"was made with methods {before}, now {now}" if before != now else "methods changed other things then"
            )
            raise CheckpointError(
                "methods", f"the checkpoint {what}", hint="resume with the same recipe, or start a new run"
            )
        run_state.load_model_state(self.model, self.optimizer, state["model"])
        run_state.load_optimizer_state(self.model, self.optimizer, state["optimizer"])
        self.stream.load_state_dict(state["stream"])  # type: ignore[attr-defined]
        for method in self.methods:
            method.load_state_dict(state["methods"][method.card.name])
        counters = state["counters"]
        self.step, self.tokens, self.seconds = counters["step"], counters["tokens"], counters["seconds"]
        self.evaluation = state["evaluation"]
        run_state.load_rng_state(state["rng"])


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying from them; a second SIGINT acts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    old = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)
