"""Rates of single operations: the sizes are the model's, rates follow from amounts and times, ranks really communicate.

Needs torch with gloo: pytest tests/plan/test_dissect_opbench.py
"""

import pytest
import torch
import torch.distributed as dist
from dissect_models import Decoder

from headway.models.build import build_model
from headway.models.config import LlamaConfig
from headway.plan.dissect.collectives import bench_collectives, on_ranks
from headway.plan.dissect.counting import count
from headway.plan.dissect.opbench import (
    Product,
    bench_copies,
    bench_layers,
    bench_products,
    misaligned,
    products_of,
)


def test_products_are_those_of_a_step():
    model = Decoder(dim=32, layers=2, vocab=96)
    products = products_of(model, tokens=40)
    sizes = {(p.M, p.N, p.K) for p in products}
    assert {(40, 96, 32), (32, 96, 40), (40, 32, 96)} <= sizes, "up or qkv, forward and backward"
    assert (96, 32, 40) in sizes and (32, 32, 40) in sizes
    assert len(sizes) == len(products), "equal sizes once"

    def step():
        model(torch.randint(0, 96, (1, 40))).sum().backward()

    # Every size occurs in a real step, and the weights' products are the only ones beside attention.
    counted = {key[1] for key in count(step)._exact if key[0] == "aten::mm"}
    for p in products:
        assert ((p.M, p.K), (p.K, p.N)) in counted


def test_a_tied_head_is_a_product_too():
    model = build_model(LlamaConfig(hidden=32, layers=1, heads=2, vocab=100, context=16), seed=0)
    names = {p.name: (p.M, p.N, p.K) for p in products_of(model, 8, backward=False)}
    assert names["head"] == (8, 100, 32)
    assert names["blocks.attention.q"] == (8, 32, 32)


def test_rates_follow_from_amounts_and_times():
    product = Product("x", 64, 32, 128)
    assert product.flops == 2 * 64 * 32 * 128
    assert misaligned(product).N == 33
    [rate] = bench_products([product], torch.float32, seconds=0.01)
    assert rate.rate == pytest.approx(product.flops / rate.milliseconds * 1e3)
    assert rate.unit == "FLOP/s" and rate.share > 0
    [copy] = bench_copies([1 << 16], seconds=0.01)
    assert copy.rate == pytest.approx(2 * (1 << 16) / copy.milliseconds * 1e3)


def test_layers_have_the_bytes_that_they_must_move():
    rates = {r.name: r for r in bench_layers(64, 32, 2, 16, 48, torch.bfloat16, seconds=0.01)}
    assert rates.keys() == {"rms norm", "rope", "softmax", "swiglu", "attention", "attention, plain"}
    assert rates["rms norm"].rate == pytest.approx(2 * 64 * 32 * 2 / rates["rms norm"].milliseconds * 1e3)
    assert rates["softmax"].rate == pytest.approx(2 * 2 * 2 * 32 * 32 * 2 / rates["softmax"].milliseconds * 1e3)


def test_collectives_move_their_share_over_the_bus():
    rates = bench_collectives([1 << 12], seconds=0.01)
    share = {"all-reduce": 1.0, "all-gather": 0.5, "reduce-scatter": 0.5}
    assert [r.name for r in rates] == list(share)
    for r in rates:
        assert r.sizes == {"bytes": 1 << 12, "ranks": 2}
        assert r.rate == pytest.approx(share[r.name] * (1 << 12) / r.milliseconds * 1e3)


def rank_and_sum(rank, value):
    total = torch.tensor(float(rank + value))
    dist.all_reduce(total)
    return {"rank": rank, "sum": total.item()}


def fails_on_one(rank):
    if rank == 1:
        raise RuntimeError("rank 1 is broken")


def test_ranks_return_what_they_computed_together():
    assert on_ranks(rank_and_sum, 2, 10) == [{"rank": 0, "sum": 21.0}, {"rank": 1, "sum": 21.0}]


def test_a_rank_that_fails_ends_all():
    with pytest.raises(Exception, match="rank 1 is broken"):
        on_ranks(fails_on_one, 2)
