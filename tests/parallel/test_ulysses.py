"""Attention over sequences shared by ranks: outputs and gradients of 2 and 4 forked ranks against one process, fp64.

Needs nothing. Run: pytest tests/parallel/test_ulysses.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from headway.layers.attention import attention_reference
from headway.parallel.local import run_ranks
from headway.parallel.sequence.batch import own_positions
from headway.parallel.sequence.exchange import Link, Split, exchange
from headway.parallel.sequence.ring import ring_attention
from headway.parallel.sequence.ulysses import share_heads, ulysses_attention
from headway.parallel.sequence.usp import usp_attention, usp_links

B, T, HD = 2, 24, 4
HEADS = [(8, 8), (8, 2), (8, 1), (4, 4), (6, 3), (5, 5), (12, 3), (9, 3), (3, 1)]
MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "whole": {"causal": False},
    "window": {"window": 5},
    "wide window": {"window": 13},
    "window both ways": {"window": 4, "causal": False},
    "scale": {"scale": 0.7},
    "packed": {"segments": True},
    "packed window": {"segments": True, "window": 6},
    "packed whole": {"segments": True, "causal": False},
}
SEGMENTS = torch.tensor([[0] * 5 + [1] * 11 + [2] * 8, [0] * 18 + [1] * 6])


def tensors(heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(heads * 100 + kv_heads)
    return tuple(torch.randn(B, h, T, HD, generator=generator, dtype=torch.float64)
                 for h in (heads, kv_heads, kv_heads, heads))  # fmt: skip


def errors(attend: Callable[..., Tensor], own: Tensor, heads: tuple[int, int], **options: Any) -> float:
    """Largest error of this rank's output and gradients of q, k and v."""
    *inputs, grad = tensors(*heads)
    if options.get("segments"):
        options["segments"] = SEGMENTS
    whole = [x.clone().requires_grad_() for x in inputs]
    y = attention_reference(*whole, **options)
    expected = [y.detach(), *torch.autograd.grad((y * grad).sum(), whole)]
    part = [x[:, :, own].clone().requires_grad_() for x in inputs]
    y = attend(*part, **options)
    assert y.shape == part[0].shape and y.dtype == part[0].dtype
    found = [y.detach(), *torch.autograd.grad((y * grad[:, :, own]).sum(), part)]
    return max(float((a - b[:, :, own]).abs().max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("world", [2, 4])
def test_ulysses_is_attention_for_any_heads_and_masks(world: int) -> None:
    def work(rank: int) -> dict[str, float]:
        own = own_positions(T, rank, world)
        return {f"{heads} {name}": errors(ulysses_attention, own, heads, **options)
                for heads in HEADS for name, options in MASKS.items()}  # fmt: skip

    for found in run_ranks(world, work):
        assert max(found.values()) < 1e-10, max(found, key=lambda key: found[key])


@pytest.mark.parametrize("world", [2, 4])
def test_ring_is_attention_in_either_layout(world: int) -> None:
    def work(rank: int) -> dict[str, float]:
        found = {}
        for layout in ("zigzag", "contiguous"):
            own = own_positions(T, rank, world, "ring", layout=layout)
            attend = partial(ring_attention, layout=layout)
            for heads in ((8, 8), (8, 2), (3, 1)):
                for name, options in MASKS.items():
                    found[f"{layout} {heads} {name}"] = errors(attend, own, heads, **options)
        return found

    for found in run_ranks(world, work):
        assert max(found.values()) < 1e-10, max(found, key=lambda key: found[key])


@pytest.mark.parametrize("ring", [1, 2, 4])
def test_usp_is_attention(ring: int) -> None:
    def work(rank: int) -> dict[str, float]:
        found = {}
        rows, columns = usp_links(None, ring)
        for layout in ("zigzag", "contiguous"):
            own = own_positions(T, rank, 4, "usp", ring, layout)
            attend = partial(usp_attention, rows=rows, columns=columns, layout=layout)
            for heads in ((8, 8), (8, 2), (3, 1)):
                for name, options in MASKS.items():
                    found[f"{layout} {heads} {name}"] = errors(attend, own, heads, **options)
        return found

    for found in run_ranks(4, work):
        assert max(found.values()) < 1e-10, max(found, key=lambda key: found[key])


def test_an_exchange_in_any_dimensions_is_undone_by_its_inverse_and_that_is_its_gradient() -> None:
    shape = (6, 5, 7, 8)

    def work(rank: int) -> list[bool]:
        held, right = torch.arange(1680.0).view(shape), []
        for scatter, gather in ((1, 2), (2, 1), (0, 3), (3, 0), (1, 3)):
            cuts = [[n // 3 + (r < n % 3) for r in range(3)] for n in (shape[scatter], shape[gather])]
            split = Split(*cuts)
            x = held.split(cuts[1], gather)[rank].clone().requires_grad_()
            (y,) = exchange([x], [split], scatter_dim=scatter, gather_dim=gather, link=Link())
            (back,) = exchange([y], [split.inverse()], scatter_dim=gather, gather_dim=scatter, link=Link())
            (grad,) = torch.autograd.grad(y, x, held.split(cuts[0], scatter)[rank])
            right.append(torch.equal(y, held.split(cuts[0], scatter)[rank]))
            right.append(torch.equal(back, x) and torch.equal(grad, x))
        return right

    assert all(all(right) for right in run_ranks(3, work))


def test_heads_are_shared_evenly_and_key_heads_follow_their_queries() -> None:
    assert share_heads(8, 4, 2).sent_keys() == [0, 1, 2, 3]
    assert share_heads(8, 2, 4).sent_keys() == [0, 0, 1, 1]
    uneven = share_heads(12, 3, 2)  # 6 and 6 heads, of which the second key head's are half here, half there
    assert uneven.keys == (range(0, 2), range(1, 3))
    assert uneven.expansion(0) == [0, 0, 1] and uneven.expansion(1) == [0, 1, 1]
    assert [len(of) for of in share_heads(3, 1, 4).queries] == [1, 1, 1, 0]
