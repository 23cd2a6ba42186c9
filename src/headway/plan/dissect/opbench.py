"""Single operations at a model's own sizes: matrix products, elementwise layers, copies and collectives, as rates."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from headway.core.meters import matmul_peak, synchronize
from headway.layers.attention import attention, attention_reference
from headway.layers.norm import rms_norm
from headway.layers.rope import apply_rope
from headway.layers.swiglu import swiglu
from headway.plan.machine import memory_rate


@dataclass(frozen=True)
class Product:
    """A matrix product ``[M, K] x [K, N]``, ``2 M N K`` operations."""

    name: str
    M: int
    N: int
    K: int

    @property
    def flops(self) -> int:
        """Floating-point operations."""
        return 2 * self.M * self.N * self.K


@dataclass(frozen=True)
class Rate:
    """A measured operation."""

    name: str
    sizes: dict[str, int]
    milliseconds: float
    """Median of the runs."""
    rate: float
    """FLOP/s of a product, bytes/s of anything else."""
    unit: str
    share: float | None
    """Of the measured peak: matrix products of the same data type, or copying memory; None where there is none."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def products_of(model: nn.Module, tokens: int, backward: bool = True) -> list[Product]:
    """The matrix products of one step over ``tokens`` tokens, those of equal sizes once.

    Args:
        model: every ``nn.Linear`` in it, and its head where it has ``head_weight``.
        backward: the two products of each layer's backward pass too.
    """
    layers = [(name, m.weight.shape) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    head = getattr(model, "head_weight", None)
    if head is not None and not any(shape == head.shape for _, shape in layers):
        layers.append(("head", head.shape))
    found: dict[tuple[int, int, int], Product] = {}
    for name, (out, inner) in layers:
        short = ".".join(part for part in name.split(".") if not part.isdigit())
        sizes = [(f"{short}", tokens, out, inner)]
        if backward:
            sizes += [(f"{short}, input's gradient", tokens, inner, out), (f"{short}, weight's", out, inner, tokens)]
        for label, m, n, k in sizes:
            found.setdefault((m, n, k), Product(label, m, n, k))
    return list(found.values())


def bench_products(
    products: list[Product], dtype: torch.dtype, device: torch.device | str = "cpu", seconds: float = 0.3
) -> list[Rate]:
    """Rates of matrix products, and their share of the machine's peak.

    Args:
        seconds: time spent on each.
    """
    device = torch.device(device)
    peak = matmul_peak(dtype, device)
    rates = []
    for product in products:
        a = torch.randn(product.M, product.K, device=device).to(dtype)
        b = torch.randn(product.K, product.N, device=device).to(dtype)
        took = _time(lambda a=a, b=b: a @ b, device, seconds)  # type: ignore[misc]
        sizes = {"M": product.M, "N": product.N, "K": product.K}
        rates.append(_rate(product.name, sizes, took, product.flops, "FLOP/s", peak))
    return rates


def misaligned(product: Product) -> Product:
    """The same product one column wider, as a vocabulary of 32001 instead of 32000."""
    return Product(f"{product.name}, N + 1", product.M, product.N + 1, product.K)


def bench_layers(
    tokens: int,
    sequence: int,
    heads: int,
    head_dim: int,
    intermediate: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seconds: float = 0.3,
) -> list[Rate]:
    """Elementwise layers of a decoder, forward, against the measured bandwidth of memory.

    The bytes are those that the layer must read and write, each once; what an implementation moves beyond that
    shows as a lower rate. Attention is given with them, in bytes of its inputs and output, for the fused kernel and
    the plain one.
    """
    device = torch.device(device)
    batch, dim = max(1, tokens // sequence), heads * head_dim
    x = torch.randn(batch, sequence, dim, device=device).to(dtype)
    q, k, v = (torch.randn(batch, heads, sequence, head_dim, device=device).to(dtype) for _ in range(3))
    cos, sin = (torch.randn(sequence, head_dim // 2, device=device).to(dtype) for _ in range(2))
    gate, up = (torch.randn(batch, sequence, intermediate, device=device).to(dtype) for _ in range(2))
    scores = torch.randn(batch, heads, sequence, sequence, device=device).to(dtype)
    weight = torch.ones(dim, device=device, dtype=dtype)
    cases: list[tuple[str, Callable[[], Any], list[Tensor]]] = [
        ("rms norm", lambda: rms_norm(x, weight, 1e-5), [x, x]),
        ("rope", lambda: apply_rope(q, k, cos, sin), [q, k, q, k]),
        ("softmax", lambda: scores.softmax(-1), [scores, scores]),
        ("swiglu", lambda: swiglu(gate, up), [gate, up, gate]),
        ("attention", lambda: attention(q, k, v), [q, k, v, q]),
        ("attention, plain", lambda: attention_reference(q, k, v), [q, k, v, q]),
    ]
    peak = memory_rate(device)
    sizes = {"tokens": batch * sequence, "sequence": sequence, "heads": heads, "head_dim": head_dim}
    rates = []
    with torch.no_grad():
        for name, call, moved in cases:
            took = _time(call, device, seconds)
            rates.append(_rate(name, sizes, took, sum(t.nbytes for t in moved), "bytes/s", peak))
    return rates


def bench_copies(sizes: list[int], device: torch.device | str = "cpu", seconds: float = 0.3) -> list[Rate]:
    """Copies of so many bytes: from host to device and back where there is one, within the host otherwise.

    What offloading can move. A copy within the host reads and writes, so that its bytes count twice.
    """
    device = torch.device(device)
    peak = memory_rate(device) if device.type == "cpu" else None
    rates = []
    for size in sizes:
        host = torch.ones(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        there = torch.empty(size, dtype=torch.uint8, device=device)
        directions = [("copy", there, host)]
        if device.type == "cuda":
            directions = [("host to device", there, host), ("device to host", host, there)]
        for name, to, source in directions:
            took = _time(lambda to=to, source=source: to.copy_(source, non_blocking=True), device, seconds)  # type: ignore[misc]
            moved = 2 * size if device.type == "cpu" else size
            rates.append(_rate(name, {"bytes": size}, took, moved, "bytes/s", peak))
    return rates


def _time(call: Callable[[], Any], device: torch.device, seconds: float) -> list[float]:
    """Durations of repeated calls after one that warms up; at least three."""
    call()
    synchronize(device)
    took: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(took) < 3 or time.perf_counter() < deadline:
        start = time.perf_counter()
        call()
        synchronize(device)
        took.append(time.perf_counter() - start)
    return took


def _rate(name: str, sizes: dict[str, int], took: list[float], amount: float, unit: str, peak: float | None) -> Rate:
    rate = amount / median(took)
    return Rate(name, sizes, median(took) * 1e3, rate, unit, rate / peak if peak else None)
