"""Divided experts: outputs and all gradients equal one process in fp64, for every pair of grids, dropless or not.

Needs nothing. Run: pytest tests/parallel/test_experts.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from headway.core.errors import MethodError, ModelError, RecipeError
from headway.layers.capacity import Capacity
from headway.layers.experts import Experts, MoE
from headway.layers.router import Router
from headway.parallel.experts.dispatcher import DISPATCHERS, AllToAll
from headway.parallel.experts.grids import Grids, fold, mappings, unfolded
from headway.parallel.experts.parallel import dispatchers, expert_mesh, expert_parallel, load_report
from headway.parallel.local import run_ranks

E, F, D, K = 8, 8, 4, 3
TOLERANCE = 1e-10


def layer(experts: int = E, top_k: int = K, capacity: Capacity | None = None, router: float = 1.0) -> MoE:
    torch.manual_seed(0)
    made = MoE(D, F, experts, Router(D, experts, top_k, normalize=False), capacity=capacity).double()
    for parameter in made.experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    torch.nn.init.normal_(made.router.weight, std=router)
    return made


def tokens(ranks: int, each: int = 6) -> Tensor:
    return torch.randn(ranks, 1, each, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def objective(y: Tensor) -> Tensor:
    """A sum over tokens, other for each token: a mean, or a weight lost, would show."""
    return (y * torch.linspace(1, 2, D, dtype=y.dtype)).pow(2).sum()


def one_process(model: MoE, x: Tensor) -> dict[str, Tensor]:
    """Outputs and gradients of all ranks' tokens at once."""
    model = copy.deepcopy(model)
    x = x.flatten(0, 2)[None].requires_grad_()
    y = model(x)
    objective(y).backward()
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in model.named_parameters()}}


def on_ranks(model: MoE, x: Tensor, grids: Grids, mine: Callable[[int], Tensor] | None = None, **options: Any) -> Any:
    """What rank 0 makes of all ranks' outputs and gradients: those of one process, if all is well."""
    model = copy.deepcopy(model)
    mesh = expert_mesh(grids)
    expert_parallel(model, mesh["expert"], mesh["expert_tensor"], **options)
    rank, world = dist.get_rank(), dist.get_world_size()
    bag = (x[rank] if mine is None else mine(rank)).clone().requires_grad_()
    y = model(bag)
    objective(y).backward()
    assert bag.grad is not None and model.router.weight.grad is not None
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, (y.detach(), bag.grad))
    grads = {"y": torch.cat([g[0].flatten(0, 1) for g in gathered])[None],
             "x": torch.cat([g[1].flatten(0, 1) for g in gathered])[None]}  # fmt: skip
    dist.all_reduce(model.router.weight.grad)  # dense weights: the sum over all ranks with tokens of their own
    grads["router.weight"] = model.router.weight.grad
    for name, parameter in model.experts.named_parameters():
        assert isinstance(parameter.grad, DTensor)
        dist.all_reduce(parameter.grad.to_local(), group=mesh.get_group("expert_data"))  # experts: over expert_data
        grads[f"experts.{name}"] = parameter.grad.full_tensor()
    return grads, next(iter(dispatchers(model).values()), None)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], where: str) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        error = float((ours[name] - value).norm() / value.norm().clamp_min(1e-300))
        assert error < TOLERANCE, f"{where}: {name} is off by {error:.1e}"


@pytest.mark.parametrize("kind", DISPATCHERS)
@pytest.mark.parametrize("world", [4, 8])
def test_every_pair_of_grids_equals_one_process(world: int, kind: str) -> None:
    """Tokens are bags: only which experts' grid lies over the ranks differs, so that each of those is run once."""
    model, x = layer(), tokens(world)
    expected = one_process(model, x)
    grids = {g.experts.shape: g for g in mappings(world, experts=E, width=F)}
    assert len(grids) == {4: 6, 8: 10}[world]

    def work(rank: int) -> None:
        for shape, pair in grids.items():
            found, dispatcher = on_ranks(model, x, pair, dispatcher=kind)
            assert_same(found, expected, f"{shape} {kind}")
            assert dispatcher.load.dropped == 0
        if world == 8:
            found, _ = on_ranks(model, x, unfolded(world, sequence=2, tensor=2, expert=2), dispatcher=kind)
            assert_same(found, expected, "unfolded")

    run_ranks(world, work)


@pytest.mark.parametrize("kind", DISPATCHERS)
def test_every_number_of_choices_and_unequal_or_empty_bags(kind: str) -> None:
    def work(rank: int) -> None:
        for pair in (fold(4, expert=4), fold(4, expert=2, expert_tensor=2)):
            for top_k in (1, 2, 8):
                model, x = layer(top_k=top_k), tokens(4)
                assert_same(on_ranks(model, x, pair, dispatcher=kind)[0], one_process(model, x), f"k {top_k}")
            model, x = layer(top_k=2), tokens(4)
            bags = [x[r, :, :size] for r, size in enumerate((6, 0, 1, 4))]
            some = torch.cat(bags, 1)[None]
            found = on_ranks(model, x, pair, mine=bags.__getitem__, dispatcher=kind)[0]
            assert_same(found, one_process(model, some), "unequal bags")

    run_ranks(4, work)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_without_rows_has_zero_gradients_in_every_precision(dtype: torch.dtype) -> None:
    """They must be there: FSDP2 sums them with those of ranks that have rows."""
    experts = Experts(16, 32, 4).to(dtype)
    x = torch.zeros(0, 16, dtype=dtype, requires_grad=True)
    experts(x, torch.zeros(4, dtype=torch.int64)).backward(torch.ones(0, 16, dtype=dtype))
    assert all(p.grad is not None and not p.grad.any() for p in experts.parameters())
    experts.zero_grad()
    experts(torch.ones(5, 16, dtype=dtype), torch.tensor([0, 5, 0, 0])).backward(torch.ones(5, 16, dtype=dtype))
    assert all(p.grad is not None and not p.grad[[0, 2, 3]].any() and p.grad[1].any() for p in experts.parameters())


@pytest.mark.parametrize("kind", DISPATCHERS)
def test_experts_that_nobody_chooses_have_zero_gradients(kind: str) -> None:
    model = layer(top_k=1)
    model.router.use_bias()
    assert model.router.bias is not None
    model.router.bias[:2] = 100  # all tokens go to rank 0's experts

    def work(rank: int) -> None:
        found, dispatcher = on_ranks(model, tokens(4), fold(4, expert=4), dispatcher=kind)
        assert_same(found, one_process(model, tokens(4)), kind)
        assert found["experts.gate"][2:].abs().max() == 0
        assert sum(dispatcher.load.received) == (24 if rank == 0 else 0)

    run_ranks(4, work)


def test_rows_are_conserved() -> None:
    def work(rank: int) -> tuple[int, int]:
        _, dispatcher = on_ranks(layer(), tokens(4), fold(4, expert=4))
        return dispatcher.load.choices, sum(dispatcher.load.received)

    sent, received = zip(*run_ranks(4, work))
    assert sum(sent) == sum(received) == 4 * 6 * K


@pytest.mark.parametrize("keep", ["probs", "position"])
def test_dropping_by_rank_is_each_ranks_own_and_the_same_with_padding(keep: Any) -> None:
    """With scope local the reference is each rank's bag by itself in one process with the same capacity."""
    x = tokens(4)
    limits = {pad: Capacity(0.7, keep, pad) for pad in (False, True)}
    parts = [one_process(layer(capacity=limits[False]), bag[None]) for bag in x]
    alone = {name: torch.cat([p[name] for p in parts], 1) if name in ("y", "x") else sum(p[name] for p in parts)
             for name in parts[0]}  # fmt: skip

    def work(rank: int) -> float:
        for pair in (fold(4, expert=4), fold(4, expert=2, expert_tensor=2), fold(4, expert=2)):
            for kind in DISPATCHERS:
                for pad, limit in limits.items():
                    found, dispatcher = on_ranks(layer(capacity=limit), x, pair, dispatcher=kind)
                    assert_same(found, alone, f"{pair.experts} {kind} pad {pad}")
        return float(dispatcher.load.dropped)

    assert all(0 < dropped < 0.5 for dropped in run_ranks(4, work))


def test_dropping_over_whole_sequences_does_not_depend_on_the_mapping() -> None:
    x, limit = tokens(4), Capacity(0.7)
    expected = one_process(layer(capacity=limit), x)

    def work(rank: int) -> None:
        for pair in (fold(4, sequence=4, expert=4), fold(4, sequence=4, expert=2, expert_tensor=2)):
            for kind in DISPATCHERS:
                found, _ = on_ranks(layer(capacity=limit), x, pair, dispatcher=kind, sequence=dist.group.WORLD)
                assert_same(found, expected, f"{pair.experts} {kind}")
        with pytest.raises(MethodError, match=r"model.pad"):
            on_ranks(layer(capacity=Capacity(1.0, pad=True)), x, fold(4, expert=4), sequence=dist.group.WORLD)

    run_ranks(4, work)


def test_nothing_is_dropped_in_evaluation_and_padded_shapes_are_static() -> None:
    model, x = layer(capacity=Capacity(0.7, pad=True)), tokens(2)

    def work(rank: int) -> tuple[int, ...]:
        mesh = expert_mesh(fold(2, expert=2))
        ours = copy.deepcopy(model)
        expert_parallel(ours, mesh["expert"])
        ours(x[rank])
        padded = dispatchers(ours)[""].load.received
        torch.testing.assert_close(ours.eval()(x[rank]), copy.deepcopy(model).eval()(x[rank]))
        assert dispatchers(ours)[""].load.dropped == 0
        return padded

    rows = 2 * Capacity(0.7).rows(6, K, E)
    assert run_ranks(2, work) == [(rows,) * 4] * 2


def test_padding_of_unequal_bags_is_refused_by_every_rank() -> None:
    def work(rank: int) -> str:
        pair = fold(4, expert=2, expert_tensor=2)
        with pytest.raises(MethodError) as error:
            on_ranks(layer(capacity=Capacity(1.0, pad=True)), tokens(4), pair, mine=lambda r: tokens(4)[r, :, : 3 + r])
        return str(error.value)

    for said in run_ranks(4, work, timeout=20):
        assert "as many tokens on every rank" in said and "[2, 2, 2, 3]" in said


def test_rows_are_counted_by_group_and_by_node() -> None:
    model, x = layer(top_k=2), tokens(4)

    def work(rank: int) -> Any:
        _, inside = on_ranks(model, x, fold(4, sequence=2, expert=2), node=2)
        _, across = on_ranks(model, x, unfolded(4, sequence=2, expert=2), node=2)
        away = int((model.router(x[rank][0]).indices // 4 != rank % 2).sum())  # rows for the other rank
        come = sum(inside.load.received) - (6 * 2 - away)  # rows from it
        # Counts once; rows there, answers back, and both again for the gradients.
        assert inside.traffic.by["expert"].bytes == 4 * 8 + 2 * (away + come) * D * 8
        return inside.traffic.by["expert"].crossing, across.traffic.by["expert"].crossing

    for folded, apart in run_ranks(4, work):
        assert folded == 0 < apart


@pytest.mark.parametrize("options", [{"expert": 8}, {"expert": 4, "expert_tensor": 2}])
def test_a_fake_group_of_many_ranks_counts_what_a_real_one_would_send(options: dict[str, int]) -> None:
    """For planning: rank 0 of 64 alone, with evenly spread tokens."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=64)
    try:
        model, mesh = layer(top_k=E), expert_mesh(fold(64, **options))  # every token visits every expert
        expert_parallel(model, mesh["expert"], mesh["expert_tensor"], node=2)
        objective(model(tokens(1)[0].requires_grad_())).backward()
        traffic = next(iter(dispatchers(model).values())).traffic.by
        ep, each = options["expert"], 6 * E // options["expert"]  # rows for each rank
        assert traffic["expert"].bytes == (ep - 1) * (4 * each * D * 8 + E // ep * 8)
        assert traffic["expert"].crossing * (ep - 1) == traffic["expert"].bytes * (
            ep - 2 // options.get("expert_tensor", 1)
        )
        if "expert_tensor" in options:
            assert traffic["expert_tensor"].bytes == 4 * ep * each * D * 8 + ep * E // ep * 8
            assert traffic["expert_tensor"].crossing == 0
    finally:
        dist.destroy_process_group()


def test_bf16_weights_and_the_report() -> None:
    model, x = layer(top_k=1).bfloat16(), tokens(2).bfloat16()

    def work(rank: int) -> list[str]:
        mesh = expert_mesh(fold(2, expert=2))
        ours = copy.deepcopy(model)
        said = expert_parallel(ours, mesh["expert"])
        torch.testing.assert_close(ours(x[rank]), copy.deepcopy(model)(x[rank]))
        return said + load_report(ours)

    said = run_ranks(2, work)[0]
    assert said[0] == "1 MoE layers over 2 expert ranks, all-to-all"
    assert "0.00% dropped" in said[1]


def test_what_cannot_be_divided_is_refused() -> None:
    def work(rank: int) -> None:
        mesh = expert_mesh(fold(2, expert=2))
        with pytest.raises(RecipeError, match=r"parallel.experts.degree: of 2 does not divide the 3 experts.*1 or 3"):
            expert_parallel(layer(experts=3), mesh["expert"])
        with pytest.raises(MethodError, match="no MoE layer"):
            expert_parallel(torch.nn.Linear(2, 2), mesh["expert"])
        with pytest.raises(MethodError, match="all-to-all"):
            expert_parallel(layer(), mesh["expert"], dispatcher="all-to-al")
        with pytest.raises(ModelError, match=r"order \[1, 0\]"):
            expert_parallel(layer(), DeviceMesh("cpu", torch.tensor([1, 0])))
        model = layer()
        expert_parallel(model, dist.group.WORLD)
        with pytest.raises(MethodError, match="divided already"):
            expert_parallel(model, mesh["expert"])
        odd = layer()
        odd.experts = Experts(D, 5, E)
        both = expert_mesh(fold(2, expert_tensor=2))
        with pytest.raises(RecipeError, match=r"parallel.experts.tensor: of 2 does not divide the 5 channels"):
            expert_parallel(odd, both["expert"], both["expert_tensor"])

    run_ranks(2, work)


def test_a_count_read_too_early_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = AllToAll._splits
    monkeypatch.setattr(AllToAll, "_splits", lambda self, c: ([n + 1 for n in splits(self, c)[0]], splits(self, c)[1]))
    model = layer()
    model.dispatch = AllToAll(E)
    with pytest.raises(RuntimeError, match="counts were read too early"):
        model(tokens(1)[0])
