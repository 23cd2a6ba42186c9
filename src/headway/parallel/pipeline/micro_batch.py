"""How many sequences should pass through a pipeline together: plain numbers."""

from __future__ import annotations

from collections.abc import Mapping

from headway.core.errors import HeadwayError


def step_time(pass_seconds: float, share: int, micro_batch: int, ranks: int, chunks: int = 1) -> float:
    """Seconds of a step: ``(b' / b + (p - 1) / v) (t_f + t_b)``.

    Args:
        pass_seconds: ``t_f + t_b`` of a micro-batch through all that one rank has.
        share: b', sequences of a step for one pipeline.
        micro_batch: b, sequences.
        ranks: p.
        chunks: v, stages per rank.

    Source: Narayanan et al. 2021 (arXiv 2104.04473), section 3.4, with the bubble of section 2.2.2.
    """
    return (share / micro_batch + (ranks - 1) / chunks) * pass_seconds


def choose_micro_batch(
    times: Mapping[int, float], batch: int, data: int, ranks: int, chunks: int = 1
) -> tuple[int, dict[int, float]]:
    """The micro-batch with the shortest step, of those that were measured; of equals, the smallest.

    Args:
        times: micro-batch, sequences -> measured seconds forward and backward of what one rank has.
        batch: sequences of a step over all ranks.
        data: pipelines side by side.
        ranks: of a pipeline.
        chunks: stages per rank.

    Returns:
        The micro-batch, and for each one that is possible the predicted seconds of a step.

    Raises:
        HeadwayError: ``data`` does not divide the batch, or no measured micro-batch divides a pipeline's share.
    """
    share, left = divmod(batch, data)
    if left or not share:
        near = sorted({max(share, 1) * data, (share + 1) * data})
        raise HeadwayError("train.batch", f"of {batch} cannot be shared by {data} pipelines",
                           hint=f"take {' or '.join(map(str, near))}")  # fmt: skip
    steps = {b: step_time(seconds, share, b, ranks, chunks) for b, seconds in sorted(times.items()) if share % b == 0}
    if not steps:
        divisors = ", ".join(str(b) for b in range(1, share + 1) if share % b == 0)
        raise HeadwayError("train.micro_batch", f"was measured at {', '.join(map(str, sorted(times)))}, none of which "
                           f"divides a pipeline's {share} sequences", hint=f"measure one of {divisors}")  # fmt: skip
    return min(steps, key=lambda b: (steps[b], b)), steps
