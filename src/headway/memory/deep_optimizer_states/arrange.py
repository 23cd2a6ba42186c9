"""How a model is cut into subgroups and which of them the device updates, within a limit of memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from headway.core.errors import HeadwayError
from headway.core.fallback import fallback
from headway.core.units import human
from headway.memory.deep_optimizer_states.plan import (
    MOST,
    Placement,
    Rates,
    Stride,
    choose,
    device_extra,
    fitting_numel,
    places,
)
from headway.memory.subgroups import CUT, Subgroup, Subgroups

FEWEST = 8
"""A model is cut into this many subgroups at least: with fewer there is little to overlap."""


@dataclass
class Arrangement:
    """Subgroups and their places."""

    layout: Subgroups
    group_of: list[int]
    """Parameter group of each group of the layout, which also parts the types of parameters."""
    k: Stride
    own: list[Subgroup]
    """Updated by the host."""
    staged: list[Subgroup]
    """Updated by the device."""
    plan: Placement | None
    """The prediction, where rates are known."""
    shrunk_from: int | None
    """The size that a subgroup would have had with more memory."""


def arrange(
    groups: Sequence[dict[str, Any]],
    resident: dict[Tensor, None],
    stride: Stride | Literal["auto"],
    numel: int,
    limit: int,
    rates: Callable[[torch.dtype, int], Rates | None],
) -> Arrangement:
    """Lay the parameters that are not resident.

    Args:
        groups: parameter groups.
        resident: parameters that never move.
        stride: as asked for.
        numel: of a subgroup, at most.
        limit: bytes of the device for staging and kept gradients.
        rates: of the lanes for a type of weights and a size of subgroups; None where nobody knows them.

    Raises:
        HeadwayError: the stride needs more than ``limit`` with the smallest subgroups.
    """
    runs: dict[tuple[int, torch.dtype], list[Tensor]] = {}
    for index, group in enumerate(groups):
        for p in group["params"]:
            if p not in resident:
                runs.setdefault((index, p.dtype), []).append(p)
    counts: Counter[torch.dtype] = Counter()
    for (_, dtype), run in runs.items():
        counts[dtype] += sum(p.numel() for p in run)
    total, dtype = counts.total(), counts.most_common(1)[0][0]
    numel = max(CUT, min(numel, -(-total // FEWEST)))
    strides: list[Stride] = _affordable(numel, total, limit) if stride == "auto" else [_checked(stride, total, limit)]
    fitting = min(fitting_numel(numel, total, k, limit) for k in strides)
    layout = Subgroups(list(runs.values()), fitting)
    sizes = [s.numel for s in layout]
    known = rates(dtype, fitting)
    plan = None
    if known is not None:
        allowed = [k for k in strides if stride != "auto" or k is None or k <= len(sizes)]
        plan = choose(sizes, known, dtype.itemsize / 4, resident=[sum(p.numel() for p in resident)], allowed=allowed)
    k = plan.k if plan is not None else strides[0]
    where = places(len(sizes), k)
    staged = [s for s, place in zip(layout, where, strict=True) if place == "device"]
    own = [s for s, place in zip(layout, where, strict=True) if place == "host"]
    if k is not None and not staged:
        why = f"stride {k} is more than the {len(sizes)} subgroups of {human(layout.largest)}"
        fallback("updating every subgroup on the host", why,
                 f"an idle device; with subgroups of up to {human(total // k)} it would have one")  # fmt: skip
    return Arrangement(layout, [i for i, _ in runs], k, own, staged, plan, numel if fitting < numel else None)


def residents(params: list[Tensor], fraction: float) -> dict[Tensor, None]:
    """Whole parameters, in order, as many as fit into that share of all."""
    room = fraction * sum(p.numel() for p in params)
    chosen: dict[Tensor, None] = {}
    for p in params:
        if p.numel() <= room:
            chosen[p] = None
            room -= p.numel()
    return chosen


def _affordable(numel: int, total: int, limit: int) -> list[Stride]:
    """Strides at which a subgroup need not shrink to less than a quarter."""
    least = max(CUT, numel // 4)
    return [*(k for k in range(1, MOST + 1) if fitting_numel(numel, total, k, limit) >= least), None]


def _checked(k: Any, total: int, limit: int) -> Stride:
    if k is not None and fitting_numel(CUT, total, k, limit) < CUT:
        need = device_extra(CUT, total, k, k)
        what = (f"{human(limit, 'B')} is too little for stride {k}: the gradients that stay on the device and the "
                f"smallest subgroups take {human(need, 'B')}, {human(max(need - limit, 1), 'B')} more")  # fmt: skip
        raise HeadwayError("max_device_extra", what, hint="give more, or a larger stride")
    return k  # type: ignore[no-any-return]


def free_bytes(device: torch.device) -> float:
    """Memory that the device has left; without bound where it is the host's own."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
