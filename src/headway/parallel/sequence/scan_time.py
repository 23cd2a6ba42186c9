"""How long the state of linear attention is on its way, from a link's latency and rate: a model with a fit.

Source: Chou et al., ZeCO, arXiv 2507.01004, whose time of All-Scan counts one block more.
"""

from __future__ import annotations

import math

from headway.parallel.sequence.lasp import ScanMethod


def estimate_sp_time(
    P: int,
    dk: int,
    dv: int,
    heads: int,
    K: int,
    alpha: float,
    beta: float,
    method: ScanMethod,
    *,
    element: int = 4,
    update: float = 0.0,
) -> float:
    """Seconds from when all ranks know their own state until the last rank has what is before it.

    Args:
        P: ranks that share a sequence.
        dk: channels of keys per head.
        dv: channels of values per head.
        heads: of all sequences together.
        K: blocks of All-Scan.
        alpha: seconds per message.
        beta: seconds per byte.
        method: ``lasp1`` passes P - 1 whole states in a row; ``lasp2`` gathers P - 1 in a ring; ``zeco`` passes K
            blocks over P - 1 links, which all work at once but while the chain fills: P + K - 2 blocks in a row.
        element: bytes of a number of the state.
        update: seconds that a rank adds between receiving and sending a whole state.

    Raises:
        ValueError: there is less than one rank or block, or the method is unknown.
    """
    if P < 1 or K < 1:
        raise ValueError(f"{P} ranks and {K} blocks: there must be at least one of each")
    size = element * heads * dk * dv
    whole = alpha + beta * size
    if method == "lasp1":
        return (P - 1) * (whole + update)
    if method == "lasp2":
        return (P - 1) * whole
    if method == "zeco":
        return (P + K - 2) * (alpha + (beta * size + update) / K) if P > 1 else 0.0
    raise ValueError(f"{method!r} is none of zeco, lasp1, lasp2")


def best_blocks(P: int, size: float, alpha: float, beta: float, most: int = 64) -> int:
    """The number of blocks with which All-Scan of ``size`` bytes takes least: near ``sqrt((P - 2) beta size / alpha)``.

    Args:
        most: no more than these.
    """
    if P <= 2 or alpha <= 0:
        return 1 if P <= 2 else most
    ideal = math.sqrt((P - 2) * beta * size / alpha)
    nearby = {max(1, min(most, n)) for n in (math.floor(ideal), math.ceil(ideal))}
    return min(nearby, key=lambda K: (P + K - 2) * (alpha + beta * size / K))


def fit_link(P: int, K: int, size: float, scan: float, gather: float) -> tuple[float, float]:
    """``alpha`` and ``beta`` with which ``estimate_sp_time`` gives two measured times, of All-Scan and of a gather.

    Args:
        P: ranks of the measurement.
        K: blocks of All-Scan.
        size: bytes of a state.
        scan: seconds of All-Scan.
        gather: seconds of the gather.

    Raises:
        ValueError: no link that takes time for both messages and bytes gives these times.
    """
    whole, block = gather / (P - 1), scan / (P + K - 2)  # alpha + beta size, alpha + beta size / K
    beta = (whole - block) / (size * (1 - 1 / K)) if K > 1 else math.inf
    alpha = whole - beta * size
    if not (alpha >= 0 and 0 <= beta < math.inf):
        raise ValueError(f"no link takes {scan:g} s for a scan of {K} blocks and {gather:g} s for a gather, {P} ranks")
    return alpha, beta
