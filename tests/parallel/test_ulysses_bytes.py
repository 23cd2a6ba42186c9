"""Bytes of sequence parallelism: what ranks send is what the formulas say, and Ulysses's share stays as N and P grow.

Needs nothing. Run: pytest tests/parallel/test_ulysses_bytes.py
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from headway.parallel.local import run_ranks
from headway.parallel.sequence.bytes import Machines, estimate_sp_bytes, estimate_sp_time
from headway.parallel.sequence.exchange import Link
from headway.parallel.sequence.ring import ring_attention
from headway.parallel.sequence.ulysses import ulysses_attention
from headway.parallel.sequence.usp import usp_attention, usp_links

HD = 4


def sent(kind: str, heads: int, kv_heads: int, tokens: int, dtype: torch.dtype, **options: Any) -> list[Counter[str]]:
    link, extra = Link(), {}
    if kind == "usp":
        rows, columns = usp_links(None, 2, link.sent)
        extra = {"rows": rows, "columns": columns}
    attend = {"ulysses": ulysses_attention, "ring": ring_attention, "usp": usp_attention}[kind]
    q, k, v = (torch.ones(2, h, tokens, HD, dtype=dtype, requires_grad=True) for h in (heads, kv_heads, kv_heads))
    y = attend(q, k, v, **(extra or {"group": link}), **options)
    forward = link.sent.copy()
    y.sum().backward()
    return [forward, link.sent - forward]


@pytest.mark.parametrize("world", [2, 4])
def test_bytes_are_those_of_the_formulas(world: int) -> None:
    cases = [(kind, *heads, dtype) for kind in ("ulysses", "ring", "usp")
             for heads in ((8, 8), (8, 2), (8, 1), (12, 3), (5, 5), (3, 1))
             for dtype in (torch.float32, torch.bfloat16)]  # fmt: skip

    def work(rank: int) -> list[list[Counter[str]]]:
        return [sent(kind, heads, kv, 8, dtype) for kind, heads, kv, dtype in cases]

    for rank, counted in enumerate(run_ranks(world, work)):
        for (kind, heads, kv, dtype), (forward, backward) in zip(cases, counted, strict=True):
            expected = estimate_sp_bytes(kind, tokens=8 * world, degree=world, heads=heads, kv_heads=kv, head_dim=HD,
                                         batch=2, itemsize=dtype.itemsize, ring=2, rank=rank)  # fmt: skip
            assert (dict(+forward), dict(+backward)) == (expected.forward, expected.backward), (kind, heads, kv)


def test_the_formulas_are_the_paper_s_and_ulysses_is_constant() -> None:
    for P in (2, 4, 8):
        given: dict[str, Any] = dict(tokens=1024 * P, degree=P, heads=16, kv_heads=8, head_dim=HD, itemsize=4)
        N, h = 1024 * P, 16 * HD
        ulysses = estimate_sp_bytes("ulysses", **given).forward["all-to-all"]
        assert ulysses == 4 * (2 * 16 + 2 * 8) * N * h * (P - 1) // (16 * P * P)
        assert ulysses * P / (P - 1) == 4 * 3 * 1024 * h  # N/P is constant
        assert estimate_sp_bytes("ring", **given).forward["ring"] == 4 * 2 * N * 8 * HD * (P - 1) // P
        assert estimate_sp_bytes("megatron", **given).forward["all-gather"] == 4 * 4 * N * h * (P - 1) // P


def test_a_window_shorter_than_a_stretch_goes_one_step() -> None:
    def work(rank: int) -> tuple[int, int]:
        whole = sent("ring", 4, 2, 8, torch.float32, layout="contiguous")[0]["ring"]
        return whole, sent("ring", 4, 2, 8, torch.float32, layout="contiguous", window=9)[0]["ring"]

    for whole, windowed in run_ranks(4, work):
        assert whole == 3 * windowed > 0


def test_times_cross_over_where_ranks_outnumber_key_heads_or_a_machine() -> None:
    given: dict[str, Any] = dict(machines=Machines(), heads=32, kv_heads=8, head_dim=128)
    short = {kind: estimate_sp_time(kind, tokens=8192, degree=8, **given) for kind in ("ulysses", "ring", "megatron")}
    assert short["ulysses"] < short["megatron"]
    long = {kind: estimate_sp_time(kind, tokens=2**21, degree=64, **given) for kind in ("ulysses", "ring")}
    assert long["ring"] < long["ulysses"]  # 64 ranks have 32 heads to share
