"""Load balancing over the global batch: the loss, what keeps its frequencies, how specialised the experts are."""

from headway.parallel.global_lbl.balancer import Balancer
from headway.parallel.global_lbl.losses import (
    LoadBalancingLoss,
    expert_counts,
    frequencies,
    load_balancing_loss,
    z_loss,
)
from headway.parallel.global_lbl.specialisation import LayerRouting, RoutingReport, routing_report

__all__ = [
    "Balancer",
    "LayerRouting",
    "LoadBalancingLoss",
    "RoutingReport",
    "expert_counts",
    "frequencies",
    "load_balancing_loss",
    "routing_report",
    "z_loss",
]
