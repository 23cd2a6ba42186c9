"""Two trainings in one process that take turns, each as if it were alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from headway.core import fallback, meters
from headway.core.build import build_trainer, select_device
from headway.core.errors import DivergedError, HeadwayError
from headway.core.recipe import Recipe
from headway.core.state import load_rng_state, rng_state


@dataclass(frozen=True)
class Block:
    """A few steps of one arm in a row."""

    tokens: int
    seconds: float


class LiveArm:
    """A training that can be advanced at any time, with its own random state, fallback log and counts.

    Args:
        name: for messages.
        recipe: assembled at once; nothing is written.
    """

    def __init__(self, name: str, recipe: Recipe) -> None:
        self.name, self.recipe = name, recipe
        self.device = select_device(recipe)
        before = meters.live_bytes(self.device)
        outside = rng_state()
        self.trainer = build_trainer(recipe)
        self._log, self._rng = fallback.current(), rng_state()
        load_rng_state(outside)
        self.losses: list[tuple[int, float]] = []
        """Tokens seen and loss, after each step."""
        self.blocks: list[Block] = []
        """The counted ones."""
        self.overran = False
        """Trained beyond the recipe's own budget."""
        self.seen = 0
        """Tokens seen when the arm was evaluated."""
        self.evaluation: dict[str, float] = {}
        self._transient = 0
        # The second step is metered, as in a plain run: by then the optimizer's state exists.
        self._step()
        self.tokens_per_step = self.tokens
        self._step(metered=True)
        self._kept = meters.live_bytes(self.device) - before

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.trainer.tokens

    @property
    def rate(self) -> float:
        """Tokens per second of all steps so far."""
        return self.trainer.tokens / self.trainer.seconds

    @property
    def live_peak_bytes(self) -> int:
        """What the arm keeps between steps, and what its largest metered step held on top of that."""
        return self._kept + self._transient

    @property
    def fallbacks(self) -> list[dict[str, str]]:
        """The fallbacks of this arm alone."""
        return list(self._log.entries) if self._log else []

    def advance(self, tokens: int, each: Callable[[], None]) -> Block:
        """Train until ``tokens`` have been seen; nothing is done where they have been already.

        Args:
            each: called after each step, outside the time that is measured.
        """
        start, seconds = self.tokens, 0.0
        while self.tokens < tokens:
            self.overran |= self.trainer.progress >= 1
            seconds += self._step()
            each()
        return Block(self.tokens - start, seconds)

    def finish(self) -> None:
        """Evaluate, then meter one more step: memory may have grown since the first (longer sequences, more state)."""
        with self._alone():
            record = self.trainer.evaluate()
        self.seen = self.tokens
        self.evaluation = {key: float(value) for key, value in record.items() if key not in ("step", "tokens")}
        self._step(metered=True)
        self.losses.pop()  # that step is outside the tokens that are compared

    def _step(self, metered: bool = False) -> float:
        with self._alone():
            start = time.perf_counter()
            record = self._metered() if metered else self.trainer.train_step()
            seconds = time.perf_counter() - start
        self.losses.append((record["tokens"], record["loss"]))
        return seconds

    def _metered(self) -> dict[str, Any]:
        record, rise = meters.live_rise(self.trainer.train_step, self.device)
        self._transient = max(self._transient, rise)
        return record

    @contextmanager
    def _alone(self) -> Iterator[None]:
        outside, outside_log = rng_state(), fallback.current()
        load_rng_state(self._rng)
        if self._log is not None:
            fallback.use_log(self._log)
        try:
            yield
        except StopIteration:
            raise HeadwayError(self.name, f"ran out of data after {self.tokens:,} tokens",
                               hint="compare fewer blocks, or set data.on_exhausted=repeat") from None  # fmt: skip
        except DivergedError as error:
            raise DivergedError(self.name, f"diverged: {error}") from None
        finally:
            self._rng = rng_state()
            load_rng_state(outside)
            fallback.use_log(outside_log)


def interleave(a: LiveArm, b: LiveArm, blocks: int, block_tokens: int, each: Callable[[], None]) -> None:
    """Train both in turns, A B B A A B ..., ``block_tokens`` at a time; the first block of each is not counted.

    An arm whose steps do not divide ``block_tokens`` finishes its step; its next block is so much shorter.
    """
    start = max(a.tokens, b.tokens)
    for index in range(blocks + 1):
        target = start + (index + 1) * block_tokens
        done = [(arm, arm.advance(target, each)) for arm in ((a, b) if index % 2 == 0 else (b, a))]
        if index and all(block.tokens for _, block in done):
            for arm, block in done:
                arm.blocks.append(block)
