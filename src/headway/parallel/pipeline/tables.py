"""The schedules as tables: what every rank does, in order. For simulators and drawings; nothing runs here."""

from __future__ import annotations

from typing import Literal, NamedTuple

from headway.core.errors import HeadwayError

Kind = Literal["forward", "backward", "input", "weight"]
KINDS: dict[str, Kind] = {"F": "forward", "B": "backward", "I": "input", "W": "weight"}
"""torch's letters -> ours."""


class Action(NamedTuple):
    """One pass of a micro-batch through a stage; ``backward`` is ``input`` and ``weight`` in one."""

    kind: Kind
    stage: int
    micro: int


def schedule_table(name: str, ranks: int, chunks: int, micro_batches: int) -> list[list[Action]]:
    """By rank, its actions in order.

    Args:
        name: of a schedule, as in ``parallel.pipeline.schedule``.
        chunks: stages per rank.

    Raises:
        HeadwayError: there is no such schedule, or it cannot be made of these numbers.

    Source: Narayanan et al. 2021 (arXiv 2104.04473), figures 3 and 4, for the first two, which torch runs but does not
    tell right; the others are read from torch's own schedules, the ones that run.
    """
    from headway.parallel.pipeline.runner import SCHEDULES, SINGLE

    if name not in SCHEDULES:
        raise HeadwayError("parallel.pipeline.schedule", got=name, expected=" or ".join(SCHEDULES))
    if name in SINGLE:
        if chunks != 1:
            raise HeadwayError("parallel.pipeline.chunks", f"of {chunks} does not fit {name}", expected="1")
        return [(_all_forward if name == "gpipe" else _one_forward_one_backward)(rank, ranks, micro_batches)
                for rank in range(ranks)]  # fmt: skip
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

    try:
        order = get_schedule_ops(SCHEDULES[name], ranks, micro_batches, chunks)
    except (ValueError, AssertionError) as error:
        raise HeadwayError("parallel.pipeline", f"{name} cannot be made of {ranks} ranks, {chunks} stages each and "
                           f"{micro_batches} micro-batches ({error})") from error  # fmt: skip
    return [
        [
            Action(KINDS[action.computation_type.value], action.stage_index, action.microbatch_index or 0)
            for action in actions
            if action is not None and action.computation_type.value in KINDS
        ]
        for actions in order
    ]


def _all_forward(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    return [Action(kind, rank, micro) for kind in ("forward", "backward") for micro in range(micro_batches)]


def _one_forward_one_backward(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    warm_up = min(ranks - rank - 1, micro_batches)
    actions = [Action("forward", rank, micro) for micro in range(warm_up)]
    for micro in range(micro_batches - warm_up):
        actions += [Action("forward", rank, warm_up + micro), Action("backward", rank, micro)]
    return actions + [Action("backward", rank, micro) for micro in range(micro_batches - warm_up, micro_batches)]
