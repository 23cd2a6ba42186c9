"""The sizes a model family comes in: parameters and cost of each, and those near a wanted number of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from headway.core.errors import ModelError
from headway.core.options import Options
from headway.models.config import GPT2Config, LlamaConfig, MoEConfig

__all__ = ["Size", "measure", "nearest_size", "resized"]

Family = LlamaConfig | GPT2Config
LARGEST_WIDTH, LARGEST_DEPTH = 32768, 256
ASPECT_SLACK = 2.0  # how far width / depth may be from the usual, either way


@dataclass(frozen=True)
class Size:
    """One size of a family."""

    width: int
    depth: int
    heads: int
    parameters: int
    """Without embeddings and output head: the P of tokens per parameter."""
    flops_per_token: float
    """Forward and backward: 6 per weight of a matrix product, output head included, and attention if asked for."""
    config: Family

    @property
    def aspect(self) -> float:
        """Width per block."""
        return self.width / self.depth


def measure(config: Options, sequence: int | None = None) -> Size:
    """The size of one configuration, counted from its shapes.

    Args:
        config: a Llama or GPT-2 configuration with its vocabulary.
        sequence: tokens per sequence; None leaves out attention's products of queries, keys and values, which have no
            weights (6 P T + 6 d V T remain).

    Raises:
        ModelError: another family, whose sizes are not known, or no vocabulary.
    """
    if not isinstance(config, LlamaConfig | GPT2Config) or isinstance(config, MoEConfig):
        raise ModelError(
            "model.family", got=getattr(config, "family", "?"), expected="llama or gpt2, whose sizes are known"
        )
    d, f = config.hidden, config.intermediate_width
    queries = config.heads * config.head_width
    if isinstance(config, LlamaConfig):
        keys = config.kv_head_count * config.head_width
        matrices = d * (2 * queries + 2 * keys) + 3 * d * f
        vectors = 2 * d + (queries + 2 * keys) * config.qkv_bias + 2 * config.head_width * config.qk_norm
        last = d
        seen = sum(min(sequence or 0, config.window_of(layer) or sequence or 0) for layer in range(config.layers))
    else:
        matrices = 4 * d * d + 2 * d * f
        vectors = 4 * d + 3 * d + d + f + d  # two norms; biases of qkv, output, and the feed-forward's two
        last = 2 * d
        seen = (sequence or 0) * config.layers
    weights = config.layers * matrices + config.vocabulary * d
    return Size(
        width=d,
        depth=config.layers,
        heads=config.heads,
        parameters=config.layers * (matrices + vectors) + last,
        flops_per_token=6.0 * weights + 12.0 * queries * seen,
        config=config,
    )


def resized(config: Family, width: int, depth: int) -> Family | None:
    """``config`` with another width and depth, and everything else in proportion; None where that does not come out.

    Heads are as wide as before, or the nearest power of two that divides the width; query groups, feed-forward ratio
    and everything that has no size stay.
    """
    head = _head_width(width, config.head_width)
    if head is None:
        return None
    changes: dict[str, Any] = {"hidden": width, "layers": depth, "heads": width // head}
    if config.intermediate is not None:
        changes["intermediate"] = max(8, 8 * round(width * config.intermediate / config.hidden / 8))
    if isinstance(config, LlamaConfig):
        if config.head_dim is not None:
            changes["head_dim"] = head
        if config.kv_heads is not None:
            wanted = max(1.0, changes["heads"] * config.kv_heads / config.heads)
            divisors = [n for n in range(1, changes["heads"] + 1) if changes["heads"] % n == 0]
            changes["kv_heads"] = min(divisors, key=lambda n: abs(math.log(n / wanted)))
        if config.window_layers is not None and depth != config.layers:
            return None  # which blocks have a window is a choice per block
    return type(config)(**{**config.model_dump(), **changes})


def _head_width(width: int, usual: int) -> int | None:
    widths = {usual, 16, 32, 64, 128}
    fitting = [w for w in widths if width % w == 0 and w % 2 == 0 and w <= 2 * usual]
    return min(fitting, key=lambda w: (abs(math.log(w / usual)), w), default=None)


def nearest_size(
    config: Options, excess: Callable[[Size], float], *, sequence: int | None = None, aspect: float | None = None
) -> Size:
    """The size of a family whose ``excess`` is nearest to 1, among those of about the usual width per block.

    Args:
        config: the family, with everything that has no size.
        excess: positive, and falling as the size grows: tokens per parameter over those wanted, for example.
        sequence: as for `measure`.
        aspect: usual width per block; None takes that of ``config``. Sizes within a factor of two of it count; among
            those within a few per cent of the wanted excess, the one nearest to it is taken.

    Raises:
        ModelError: as `measure`.
    """
    measure(config, sequence)
    assert isinstance(config, LlamaConfig | GPT2Config)
    usual = aspect or config.hidden / config.layers
    best: tuple[float, Size] | None = None
    for depth in range(1, LARGEST_DEPTH + 1):
        tried = list(_about_one(config, depth, _widths(usual, depth), excess, sequence))
        for size in tried:
            off = abs(math.log(excess(size))) + 0.05 * abs(math.log(size.aspect / usual))
            if best is None or off < best[0]:
                best = off, size
        if tried and max(map(excess, tried)) < 0.25:
            break  # the thinnest is far too big, and deeper ones are bigger
    if best is None:
        raise ModelError("model", "comes in no other size", hint="leave out window_layers, or plan without a ratio")
    return best[1]


def _widths(usual: float, depth: int) -> list[int]:
    low, high = usual * depth / ASPECT_SLACK, min(usual * depth * ASPECT_SLACK, LARGEST_WIDTH)
    step = 16 if high < 512 else 32 if high < 1024 else 64 if high < 4096 else 256
    return list(range(max(step, step * math.ceil(low / step)), int(high) + 1, step))


def _about_one(
    config: Family, depth: int, widths: list[int], excess: Callable[[Size], float], sequence: int | None
) -> Iterator[Size]:
    """Of the sizes of one depth, those that a bisection for an excess of 1 passes."""
    low, high = 0, len(widths)
    tried: dict[int, Size] = {}
    while low < high:
        middle = (low + high) // 2
        changed = resized(config, widths[middle], depth)
        if changed is None:
            return
        tried[middle] = measure(changed, sequence)
        if excess(tried[middle]) > 1:
            low = middle + 1
        else:
            high = middle
    yield from tried.values()
