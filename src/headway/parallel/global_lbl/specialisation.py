"""How specialised the experts of a model are: which domains they serve, and at what price in balance.

Source: Qiu et al. 2025 (arXiv 2501.11873), section 4 (frequencies by domain); the mutual information is ours, so that
one number can be compared between runs. Shapes: E experts, M domains.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from headway.core.errors import ModelError
from headway.layers.experts import MoE
from headway.layers.router import Router, Routing
from headway.parallel.global_lbl.losses import expert_counts, frequencies


@dataclass(frozen=True)
class LayerRouting:
    """One layer of experts."""

    frequencies: dict[str, list[float]]
    """Domain -> the share of its choices that went to each expert."""
    mutual_information: float
    """Of domain and expert, nats, domains taken as equally likely: ``mean_d KL(F_d || mean F)``."""
    max_frequency: float
    """The largest share of a domain's choices that one expert has, mean over domains; 1/E where all are alike."""
    frequent: float
    """Experts with more than twice their even share, mean over domains."""
    overlap: float
    """Of the frequent experts of two domains, the share that is frequent in both; NaN where there are none."""
    score: float
    """Sum of the probabilities of the chosen experts, mean over tokens: how decided the router is."""
    load: float
    """Largest load of an expert over the mean one, all domains together."""
    micro_load: float
    """The same within one batch, mean over batches: what uneven batches cost the ranks."""


@dataclass(frozen=True)
class RoutingReport:
    """All layers of experts of one model."""

    domains: list[str]
    layers: list[LayerRouting]

    def mean(self, name: str) -> float:
        """The mean over layers of one of `LayerRouting`'s numbers."""
        values: list[float] = [getattr(layer, name) for layer in self.layers]
        return sum(values) / len(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class _Tally:
    """What one router decided in one domain."""

    def __init__(self, experts: int) -> None:
        self.counts = torch.zeros(experts, dtype=torch.int64)
        self.score, self.tokens, self.micro_loads = 0.0, 0, []  # type: float, int, list[float]

    def add(self, routing: Routing, mask: Tensor | None) -> None:
        counts = expert_counts(routing.indices, len(self.counts), mask).cpu()
        chosen = routing.probs.gather(-1, routing.indices).sum(-1)  # [n]
        if mask is not None:
            chosen = chosen[mask]
        self.counts += counts
        self.score, self.tokens = self.score + float(chosen.sum()), self.tokens + len(chosen)
        if int(counts.sum()):
            self.micro_loads.append(float(frequencies(counts).max()) * len(counts))


@torch.no_grad()
def routing_report(model: nn.Module, domains: Mapping[str, Iterable[Any]]) -> RoutingReport:
    """Run a model over texts of several domains and see where its routers send them.

    Args:
        model: with layers of experts; left in the mode in which it was.
        domains: name -> batches: int64 tokens [B, T], or mappings with ``tokens`` and perhaps ``targets`` (-100 where a
            token is filling) and ``segments``. Each batch counts as one micro-batch.

    Raises:
        ModelError: the model has no experts, or a domain no tokens.
    """
    routers = [layer.router for layer in model.modules() if isinstance(layer, MoE)]
    if not routers:
        raise ModelError(type(model).__name__, "has no layer of experts", expected="a model of the family moe")
    tallies = {name: [_Tally(router.experts) for router in routers] for name in domains}
    training = model.training
    model.eval()
    try:
        for name, batches in domains.items():
            for batch in batches:
                _run(model, routers, tallies[name], batch if isinstance(batch, Mapping) else {"tokens": batch})
    finally:
        model.train(training)
    if empty := [name for name, tally in tallies.items() if tally[0].tokens == 0]:
        raise ModelError("routing_report", f"the domain {empty[0]!r} has no tokens")
    return RoutingReport(list(tallies), [_layer({d: t[i] for d, t in tallies.items()}) for i in range(len(routers))])


def _run(model: Any, routers: list[Router], tallies: list[_Tally], batch: Mapping[str, Tensor]) -> None:
    mask = (batch["targets"] != -100).flatten() if "targets" in batch else None
    given = {key: batch[key] for key in ("segments", "positions") if key in batch}
    with ExitStack() as stack:
        for router, tally in zip(routers, tallies, strict=True):
            stack.callback(router.register_forward_hook(partial(_see, tally, mask)).remove)
        model.hidden(batch["tokens"], **given)


def _see(tally: _Tally, mask: Tensor | None, module: nn.Module, given: Any, routing: Routing) -> None:
    tally.add(routing, mask)


def _layer(tallies: dict[str, _Tally]) -> LayerRouting:
    by_domain = torch.stack([frequencies(tally.counts) for tally in tallies.values()])  # [M, E]
    experts = by_domain.shape[1]
    high = [set((row > 2 / experts).nonzero().flatten().tolist()) for row in by_domain]
    pairs = [len(a & b) / len(a | b) for a, b in itertools.combinations(high, 2) if a | b]
    tokens = sum(tally.tokens for tally in tallies.values())
    loads = [load for tally in tallies.values() for load in tally.micro_loads]
    return LayerRouting(
        frequencies=dict(zip(tallies, by_domain.tolist(), strict=True)),
        mutual_information=mutual_information(by_domain),
        max_frequency=float(by_domain.amax(1).mean()),
        frequent=sum(map(len, high)) / len(high),
        overlap=sum(pairs) / len(pairs) if pairs else float("nan"),
        score=sum(tally.score for tally in tallies.values()) / tokens,
        load=float(by_domain.mean(0).max()) * experts,
        micro_load=sum(loads) / len(loads),
    )


def mutual_information(by_domain: Tensor) -> float:
    """[M, E] of frequencies -> nats: ``mean_d KL(F_d || mean F)``; 0 where all domains are alike."""
    mean = by_domain.mean(0)
    ratio = torch.where(by_domain > 0, by_domain / mean.clamp_min(1e-300), 1.0)
    return float((by_domain * ratio.log()).sum(1).mean())
