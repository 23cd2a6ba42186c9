"""How many tokens' activations to swap: the closed form, on measured numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Binding = Literal["bandwidth", "host", "none"]


@dataclass(frozen=True)
class Sizes:
    """Bytes that one block saves for its backward pass."""

    input: float
    """Its input, from which all recomputation starts: always swapped."""
    attention: float
    """The output of attention, and what attention itself saved beside its inputs: always swapped."""
    others: float
    """All the rest, which the operators that work token by token can make again."""

    @property
    def total(self) -> float:
        """Their sum."""
        return self.input + self.attention + self.others

    def swapped(self, alpha: float) -> float:
        """Bytes that leave."""
        return self.input + self.attention + alpha * self.others


@dataclass(frozen=True)
class AlphaPlan:
    """The share of tokens to swap, and what sets it."""

    alpha: float
    """0 to 1."""
    binding: Binding
    """What keeps it from being larger: the link's ``bandwidth``, the ``host``'s memory, or ``none`` (it is 1)."""
    unclipped: float
    """Before it is clipped; below 0 not even what must be swapped hides behind the computation, or fits."""
    stall_seconds: float
    """Time per block that the link needs beyond the block's forward pass; 0 where all traffic hides."""
    shortfall: float
    """Bytes that are missing on the host even for what must be swapped."""


def choose_alpha(
    sizes: Sizes, t_layer: float, bandwidth: float, host_bytes: float, n_layers: int, kept: int = 2
) -> AlphaPlan:
    """The largest share of tokens whose traffic hides behind the computation and fits the host.

    ``(S_i + S_a + alpha S_o) / B <= T`` and ``(n - kept) (S_i + S_a + alpha S_o) <= M``.

    Args:
        sizes: of one block, bytes.
        t_layer: seconds of one block's forward pass. Its backward pass takes about twice as long, so that what leaves
            in time is back in time.
        bandwidth: bytes per second to the host.
        host_bytes: that the host may hold.
        n_layers: blocks of the model.
        kept: of them, from the last, that are never swapped.

    Raises:
        ValueError: a number is negative, or no block is swapped.

    Source: MEMO, arXiv 2407.12117, section 4.2.
    """
    if min(sizes.input, sizes.attention, sizes.others, t_layer, bandwidth, host_bytes, kept) < 0:
        raise ValueError("sizes, time, bandwidth and memory must not be negative")
    if n_layers <= kept:
        raise ValueError(f"{n_layers} blocks of which {kept} are kept leave none to swap")
    must = sizes.input + sizes.attention
    budget = host_bytes / (n_layers - kept)  # for one block
    carried = bandwidth * t_layer

    def share(room: float) -> float:
        return (room - must) / sizes.others if sizes.others else math.copysign(math.inf, room - must)

    by_link, by_host = share(carried), share(budget)
    unclipped = min(by_link, by_host)
    alpha = min(1.0, max(0.0, unclipped))
    binding: Binding = "none" if unclipped >= 1 else "bandwidth" if by_link <= by_host else "host"
    stall = max(0.0, sizes.swapped(alpha) - carried) / bandwidth if bandwidth else math.inf
    return AlphaPlan(alpha, binding, unclipped, stall, max(0.0, (must - budget) * (n_layers - kept)))


def gpt_layer(tokens: float, hidden: float, element: float = 2, devices: float = 1) -> tuple[Sizes, float]:
    """Bytes per device that a GPT block saves, and the floating-point operations of its forward pass on all devices.

    Sixteen numbers per token and channel are saved, one each of them for the input and for the output of attention; of
    the scores, the causal half is computed.

    Args:
        tokens: length of the sequence.
        hidden: width.
        element: bytes of a number.
        devices: that share tokens or channels.

    Source: MEMO, sections 2 and 4.2.
    """
    unit = tokens * hidden * element / devices
    return Sizes(unit, unit, 14 * unit), 24 * tokens * hidden**2 + 2 * tokens**2 * hidden


def predicted_utilization(tokens: float, hidden: float, plan: AlphaPlan, t_layer: float, efficiency: float) -> float:
    """Model FLOPs utilisation of the blocks under a plan, as a share of the device's peak.

    A block's forward pass takes ``t_layer``, its backward pass twice as long, the tokens that are not swapped go once
    more through the projections of queries, keys, values and output and the first of the feed-forward part (16 of its
    24 products), and stalls add up in both passes.

    Args:
        efficiency: that the kernels reach, as a share of the peak; ``t_layer`` was computed with it.
    """
    products = 24 * tokens * hidden**2
    recomputed = (1 - plan.alpha) * 16 / 24 * products / (products + 2 * tokens**2 * hidden) * t_layer
    return efficiency * 3 * t_layer / (3 * t_layer + recomputed + plan.stall_seconds)
