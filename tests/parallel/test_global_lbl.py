"""Balancing over the global batch: the loss by hand, four ranks against one process, windows, recomputation, metrics.

Needs nothing; forks four ranks. Run: pytest tests/parallel/test_global_lbl.py
"""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from headway.core.build import build_trainer
from headway.core.errors import MethodError, ModelError
from headway.core.fallback import entries
from headway.core.recipe import Recipe
from headway.layers.experts import MoE
from headway.layers.router import Router
from headway.models.build import build_model
from headway.models.config import MoEConfig
from headway.models.moe import moe_layers
from headway.parallel.global_lbl import (
    Balancer,
    LoadBalancingLoss,
    expert_counts,
    frequencies,
    load_balancing_loss,
    routing_report,
    z_loss,
)
from headway.parallel.global_lbl.specialisation import mutual_information
from headway.parallel.local import run_ranks
from headway.parallel.parity import parity
from tests.conftest import tiny_recipe
from tests.parallel.recipes import BASE
from tests.parallel.recipes import recipe as small

E, K, D, W = 6, 2, 8, 4
MODEL = {"family": "moe", "experts": 4, "top_k": 2, "expert_width": 32}


def layers(count: int = 2, experts: int = E, top_k: int = K, score: Any = "softmax") -> Any:
    """A model of layers of experts, fp64, the same on every call."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(MoE(D, 8, experts, Router(D, experts, top_k, score=score)) for _ in range(count)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.double()


def batch(rank: int) -> tuple[Tensor, Tensor]:
    """Tokens [2, 5, D] of one rank and which of them count; ranks differ in how many do."""
    generator = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(2, 5, D, dtype=torch.float64, generator=generator) + rank
    mask = torch.rand(2, 5, generator=generator) < 0.3 + 0.2 * rank
    mask[0, 0] = True
    return x, mask


def routers(model: torch.nn.Module) -> list[Tensor]:
    return [layer.router.weight for layer in model.modules() if isinstance(layer, MoE)]


def plain_loss(model: torch.nn.Module, parts: list[tuple[Tensor, Tensor]], shares: Any = None) -> tuple[Tensor, int]:
    """The balancing loss of one batch written out, by autograd; ``shares(layer, part)`` chooses the frequencies."""
    routings: list[list[Any]] = []
    for x, _ in parts:
        routings.append([])
        for layer in moe_layers(model):
            routings[-1].append(layer.router(x.flatten(0, 1)))
            x = layer(x)
    tokens = int(sum(mask.sum() for _, mask in parts))
    total = torch.zeros((), dtype=torch.float64)
    for index in range(len(routings[0])):
        counts = [expert_counts(r[index].indices, E, m.flatten()) for r, (_, m) in zip(routings, parts)]
        for part, (routing, (_, mask)) in enumerate(zip(routings, parts)):
            f = frequencies(sum(counts) if shares is None else shares(counts, part))  # type: ignore[arg-type]
            probs = routing[index].probs * mask.flatten()[:, None]
            total = total + E * (probs.sum(0) / tokens * f).sum()
    return total, tokens


def step(
    model: Any, balancer: Balancer, micro: list[tuple[Tensor, Tensor]], tokens: int, end: bool = True
) -> list[Tensor]:
    """The gradients of the routers from balancing alone: the other loss is multiplied by zero."""
    model.zero_grad()
    for x, mask in micro:
        balancer.begin(tokens)
        with balancer.forward(mask):
            y = model(x)
        (y.sum() * 0).backward()
    if end:
        balancer.end_step()
    return [w.grad.clone() for w in routers(model)]  # type: ignore[union-attr]


def close(a: Any, b: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=tolerance)


# The loss by itself


def test_loss_by_hand() -> None:
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.0, 0.0, 1.0]], requires_grad=True)
    indices = torch.tensor([[0, 1], [0, 1], [2, 0]])
    mask = torch.tensor([True, True, False])
    counts = expert_counts(indices, 3, mask)
    assert counts.tolist() == [2, 2, 0]
    loss = load_balancing_loss(probs, frequencies(counts), mask)
    assert loss.item() == pytest.approx(3 * (0.5 * 0.6 + 0.5 * 0.3))
    loss.backward()
    close(probs.grad, torch.tensor([[0.75, 0.75, 0.0], [0.75, 0.75, 0.0], [0.0, 0.0, 0.0]]))
    assert load_balancing_loss(probs, frequencies(counts), mask, tokens=8).item() == pytest.approx(loss.item() / 4)
    logits = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    expected = (math.log(math.e + math.e**2) ** 2 + math.log(math.e**3 + math.e**4) ** 2) / 2
    assert z_loss(logits).item() == pytest.approx(expected)
    assert z_loss(logits, torch.tensor([True, False]), tokens=2).item() == pytest.approx(
        1.3132617**2 * 0 + 2.3132617**2 / 2
    )


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 1), (4, 2), (4, 4)])
def test_perfect_balance_is_one(experts: int, top_k: int) -> None:
    probs = torch.full((8, experts), 1 / experts)
    indices = torch.stack([(torch.arange(top_k) + t) % experts for t in range(8)])
    lbl = LoadBalancingLoss(experts)
    assert lbl(probs, indices).item() == pytest.approx(1)


def test_nothing_that_counts_is_a_loss_of_zero_without_nan() -> None:
    probs, mask = torch.rand(5, 3, requires_grad=True), torch.zeros(5, dtype=torch.bool)
    loss = LoadBalancingLoss(3)(probs, torch.zeros(5, 2, dtype=torch.int64), mask)
    loss.backward()
    assert loss.item() == 0
    assert probs.grad is not None
    assert not probs.grad.any()
    model = layers()
    balancer = Balancer(list(moe_layers(model)), weight=1.0, micro_ratio=0.5, z_weight=0.1)
    x, mask = batch(0)
    assert all(not g.any() for g in step(model, balancer, [(x, torch.zeros_like(mask))], 7))
    assert not balancer.load.any()


# One process


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gradient_is_that_of_the_loss_written_out(score: Any) -> None:
    model = layers(score=score)
    balancer = Balancer(moe_layers(model), weight=0.3)
    parts = [batch(0)]
    loss, tokens = plain_loss(copy.deepcopy(model), parts)
    reference = copy.deepcopy(model)
    for layer in moe_layers(reference):
        layer.router.balance = None
    loss, tokens = plain_loss(reference, parts)
    (0.3 * loss).backward()
    close(step(model, balancer, parts, tokens), [w.grad for w in routers(reference)])
    assert float(balancer.lbl.sum()) == pytest.approx(loss.item())


def test_z_loss_gradient() -> None:
    model, (x, mask) = layers(1), batch(1)
    tokens = 11
    loss = z_loss(model[0].router(x.flatten(0, 1)).logits, mask.flatten(), tokens)
    (expected,) = torch.autograd.grad(0.2 * loss, routers(model))
    close(step(model, Balancer(moe_layers(model), weight=0, z_weight=0.2), [(x, mask)], tokens), [expected])


def test_the_loss_that_is_logged_and_all_other_gradients_stay() -> None:
    plain, balanced = layers(), layers()
    x, mask = batch(2)
    balancer = Balancer(moe_layers(balanced), weight=5.0)
    balancer.begin(4)
    with balancer.forward(mask):
        y = balanced(x)
    expected = plain(x)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for (name, a), (_, b) in zip(balanced.named_parameters(), plain.named_parameters()):
        same = torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
        # The second layer's router moves what the first layer is asked for, so that only the last experts are alike.
        assert same == name.startswith("1.experts"), name


def windows(model: Any, parts: list[Any]) -> list[list[Tensor]]:
    """Counts [layer][micro-batch], by a model without a balancer."""
    found = []
    for x, mask in parts:
        row = []
        for layer in model:
            row.append(expert_counts(layer.router(x.flatten(0, 1)).indices, E, mask.flatten()))
            x = layer(x)
        found.append(row)
    return [list(column) for column in zip(*found)]


@pytest.mark.parametrize("kind", ["micro", "buffer", "each", "ratio"])
@torch.no_grad()
def test_windows_of_accumulation(kind: str) -> None:
    """Algorithm 1: micro-batch j sees the choices of micro-batches up to j; the last one all of them."""
    parts = [batch(r) for r in range(3)]
    counts = windows(layers(), parts)
    options: dict[str, Any] = {
        "micro": {"alone": True, "buffer": False},
        "buffer": {},
        "each": {"buffer": False},
        "ratio": {"micro_ratio": 0.1},
    }[kind]
    reference, model = layers(), layers()

    def shares(of_layer: list[Tensor], part: int) -> Tensor:
        return of_layer[part] if kind in ("micro", "each") else torch.stack(of_layer[: part + 1]).sum(0)

    with torch.enable_grad():
        loss, tokens = plain_loss(reference, parts, shares)
        if kind == "ratio":
            loss = loss + 0.1 * plain_loss(reference, parts, lambda counts, part: counts[part])[0]
        (2.0 * loss).backward()
        balancer = Balancer(moe_layers(model), weight=2.0, **options)
        got = step(model, balancer, parts, tokens, end=False)
    close(got, [w.grad for w in routers(reference)])
    if kind in ("buffer", "ratio"):
        close(balancer.window, torch.stack([torch.stack(column).sum(0) for column in counts]))


def test_end_of_step_forgets_even_a_step_that_is_skipped() -> None:
    model = layers()
    balancer = Balancer(moe_layers(model), weight=1.0)
    first = step(model, balancer, [batch(0)], 5)
    step(model, balancer, [batch(3), batch(1)], 5)  # whatever the optimizer does with these
    assert not balancer.window.any()
    close(step(model, balancer, [batch(0)], 5), first)


def test_resume_in_the_middle_of_a_step() -> None:
    parts = [batch(r) for r in range(4)]
    options: dict[str, Any]
    for options in ({}, {"shuffle": True}):
        whole, first, second = layers(), layers(), layers()
        a, b, c = (Balancer(moe_layers(m), weight=1.0, **options) for m in (whole, first, second))
        torch.manual_seed(5)
        expected = step(whole, a, parts, 9, end=False)
        torch.manual_seed(5)
        early = step(first, b, parts[:2], 9, end=False)
        c.load_state_dict(copy.deepcopy(b.state_dict()))
        late = step(second, c, parts[2:], 9, end=False)
        close([x + y for x, y in zip(early, late)], expected)
        a.end_step()
        c.end_step()
        close((c.load, c.lbl), (a.load, a.lbl))


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_counts_once(reentrant: bool) -> None:
    class Recomputed(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Any:
            x = x.requires_grad_()
            for layer in self.inner:
                x = checkpoint(layer, x, use_reentrant=reentrant)
            return x

    parts, plain, other = [batch(r) for r in range(3)], layers(), layers()
    a, b = Balancer(moe_layers(plain), weight=1.0, z_weight=0.1), Balancer(moe_layers(other), weight=1.0, z_weight=0.1)
    close(step(Recomputed(other), b, parts, 9, end=False), step(plain, a, parts, 9, end=False))
    assert torch.equal(a.window, b.window)


def test_evaluation_and_stray_passes_touch_nothing() -> None:
    model = layers()
    balancer = Balancer(moe_layers(model), weight=1.0)
    step(model, balancer, [batch(0)], 5, end=False)
    before = copy.deepcopy(balancer.state_dict())
    model.eval()
    model(batch(1)[0])
    model.train()
    assert all(
        torch.equal(x, y) for x, y in zip(before.values(), balancer.state_dict().values()) if isinstance(x, Tensor)
    )
    balancer.begin(5)
    model.eval()
    model(batch(1)[0])
    model.train()
    assert balancer._micro is not None
    assert not balancer._micro.counted
    assert torch.equal(before["probs"], balancer._probs)
    balancer.end_step()
    grad = torch.autograd.grad((model(batch(1)[0]) * 0).sum(), routers(model))  # no micro-batch has begun
    assert all(not g.any() for g in grad)
    assert not balancer._own.any()


def test_a_router_with_a_share_of_each_sequence_has_that_share_of_the_mask() -> None:
    x, mask = torch.randn(2, 4, D, dtype=torch.float64), torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1]]).bool()
    model = layers(1)
    model[0].router.place = SimpleNamespace(mine=lambda whole, dim: whole.narrow(dim, 2, 2))
    balancer = Balancer(moe_layers(model))
    step(model, balancer, [(x[:, 2:], mask)], 5, end=False)
    expected = layers(1)[0].router(x[:, 2:].flatten(0, 1)).indices[[0, 2, 3]]
    assert torch.equal(balancer.window[0], expert_counts(expected, E))


def test_wrong_use_is_told() -> None:
    model = layers()
    balancer = Balancer(moe_layers(model))
    with pytest.raises(RuntimeError, match="begin"), balancer.forward():
        pass
    balancer.begin(3)
    with (
        pytest.raises(RuntimeError, match="sees 10 tokens, and the mask has 3"),
        balancer.forward(torch.ones(3).bool()),
    ):
        model(batch(0)[0])
    balancer.detach()
    assert all(layer.router.balance is None for layer in moe_layers(model))


def test_own_loop_loss_and_recomputation() -> None:
    probs, indices = torch.rand(6, 4), torch.tensor([[0, 1], [0, 2], [0, 1], [3, 0], [0, 1], [2, 0]])
    lbl = LoadBalancingLoss(4)
    first = lbl(probs[:3], indices[:3], layer=0, micro_batch=0)
    assert torch.equal(lbl(probs[:3], indices[:3], layer=0, micro_batch=0), first)
    second = lbl(probs[3:], indices[3:], layer=0, micro_batch=1)
    close(second, load_balancing_loss(probs[3:], frequencies(expert_counts(indices, 4))))
    # A pipeline has begun another micro-batch when it recomputes this one.
    assert torch.equal(lbl(probs[:3], indices[:3], layer=0, micro_batch=0), first)
    assert torch.equal(lbl(probs[3:], indices[3:], layer=0, micro_batch=1), second)
    other = LoadBalancingLoss(4)
    other.load_state_dict(lbl.state_dict())
    lbl.step()
    assert torch.equal(lbl(probs[:3], indices[:3], layer=0, micro_batch=0), first)
    assert not torch.equal(other(probs[:3], indices[:3], layer=0), first)
    alone = LoadBalancingLoss(4, buffer=False)
    alone(probs[:3], indices[:3])
    close(alone(probs[3:], indices[3:]), load_balancing_loss(probs[3:], frequencies(expert_counts(indices[3:], 4))))


def test_biases_move_towards_balance_by_the_whole_steps_load() -> None:
    model = layers(1)
    balancer = Balancer(moe_layers(model), weight=0.0, bias_rate=0.01)
    loads = []
    parts = [(torch.randn(1, 300, D, dtype=torch.float64) + shift, torch.ones(1, 300).bool()) for shift in (0, 0.5)]
    for _ in range(60):
        step(model, balancer, parts, 600)
        loads.append(float(balancer.load.max()) * E)
        before = model[0].router.bias.clone()
        balancer.move_biases()
        moved = model[0].router.bias - before
        assert torch.equal(moved.sign(), (1 / E - balancer.load[0]).sign().to(moved))
    assert loads[0] > 1.25
    assert max(loads[-5:]) < 1.1


# Four ranks


def _ranks(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    tokens = int(sum(batch(r)[1].sum() for r in range(W)))
    pairs = [dist.new_group(list(ranks)) for ranks in ((0, 1), (2, 3))]
    pair = pairs[rank // 2]
    for name, options in {
        "world": {},
        "pair": {"group": pair},
        "micro": {"alone": True},
        "shuffle": {"shuffle": True, "buffer": False},
    }.items():
        model = layers()
        balancer = Balancer(moe_layers(model), weight=0.7, **options)  # type: ignore[arg-type]
        torch.manual_seed(rank)
        draws = [step(model, balancer, [batch(rank)], tokens) for _ in range(80 if name == "shuffle" else 1)]
        grads = [torch.stack(drawn).mean(0) for drawn in zip(*draws)]
        for grad in grads:
            dist.all_reduce(grad)
        found[name] = grads, balancer.load, balancer.lbl
    x, mask = batch(0)
    same = {}
    for name, options in {"global": {}, "micro": {"alone": True}}.items():
        model = layers()
        same[name] = step(model, Balancer(moe_layers(model), **options), [(x, mask)], W * int(mask.sum()))  # type: ignore[arg-type]
    found["same"] = same
    order = []
    real = dist.all_reduce

    def counted(tensor: Tensor, **named: Any) -> None:
        order.append(tuple(tensor.shape))
        real(tensor, **named)

    dist.all_reduce = counted  # type: ignore[assignment]
    model = layers(3)
    step(model, Balancer(moe_layers(model)), [batch(rank), batch(rank)], tokens)
    dist.all_reduce = real
    found["messages"] = order
    lbl = LoadBalancingLoss(E)
    routing = layers(1)[0].router(batch(rank)[0].flatten(0, 1))
    own = lbl(routing.probs, routing.indices, batch(rank)[1].flatten(), tokens=tokens)
    dist.all_reduce(own)
    found["own loop"] = own
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(W, _ranks)


def test_four_ranks_equal_one_process_with_the_whole_batch(ranks: list[dict[str, Any]]) -> None:
    model = layers()
    loss, _ = plain_loss(model, [batch(r) for r in range(W)])
    (0.7 * loss).backward()
    for found in ranks:
        grads, load, lbl = found["world"]
        close(grads, [w.grad for w in routers(model)])
        assert float(lbl.sum()) == pytest.approx(loss.item(), rel=1e-12)
        close(load.sum(-1), torch.ones(2, dtype=torch.float64))
        first = layers(1)
        close(found["own loop"], plain_loss(first, [batch(r) for r in range(W)])[0].detach())


def test_narrower_scopes_count_what_they_say(ranks: list[dict[str, Any]]) -> None:
    for name, size in (("pair", 2), ("micro", 1)):
        model = layers()

        def shares(counts: list[Tensor], part: int, size: int = size) -> Tensor:
            start = part // size * size
            return torch.stack(counts[start : start + size]).sum(0)

        (0.7 * plain_loss(model, [batch(r) for r in range(W)], shares)[0]).backward()
        for found in ranks:
            close(found[name][0], [w.grad for w in routers(model)])
            # Load and loss are judged over the whole batch whatever the gradient had.
            close(found[name][1:], ranks[0]["world"][1:])


def test_identical_data_on_all_ranks_makes_global_micro(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        close(found["same"]["global"], found["same"]["micro"])
        assert found["same"]["global"][0].abs().max() > 1e-4


def test_one_message_a_micro_batch_and_one_a_step(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["messages"] == [(3, E), (3, E), (2, 3, E)]


def test_shuffled_frequencies_are_of_everybodys_tokens(ranks: list[dict[str, Any]]) -> None:
    """On average they are those of the global batch."""
    shuffled, world, micro = (ranks[0][name][0] for name in ("shuffle", "world", "micro"))
    assert not torch.equal(shuffled[0], world[0])

    def distance(a: list[Tensor], b: list[Tensor]) -> float:
        return float(sum((x - y).norm() for x, y in zip(a, b)))

    assert distance(shuffled, world) < 0.7 * distance(micro, world)


# In a recipe


def losses(options: dict[str, Any] | None, steps: int = 6, **methods: Any) -> Any:
    """The trainer of a small recipe, and its first losses."""
    on = {} if options is None else {"global-lbl": options}
    recipe = tiny_recipe(model=MODEL, methods={**on, **methods}, train={"micro_batch": 1})
    trainer = build_trainer(Recipe.load(recipe))
    return trainer, [trainer.train_step()["loss"] for _ in range(steps)]


def test_recipe_balances_and_says_with_what_weight() -> None:
    _, plain = losses(None)
    trainer, balanced = losses({"weight": 0.5, "micro_ratio": 0.01, "z_loss": 0.001})
    assert balanced[0] == plain[0]
    assert balanced[1:] != plain[1:]
    said = " ".join(trainer.changes["global-lbl"])
    assert "routers balanced (2): effective weight 0.5 in the mean loss" in said
    assert "0.005" in said
    assert "routers with a z-loss (2)" in said
    report = {m.card.name: m.report() for m in trainer.methods}["global-lbl"]
    assert all(0.9 < value < 4 for value in report["load_balancing_loss"])
    assert all(1 <= value < 4 for value in report["max_over_mean_load"])


def test_load_evens_out() -> None:
    def late(weight: float) -> float:
        recipe = tiny_recipe(model=MODEL, methods={"global-lbl": {"weight": weight}}, optimizer={"lr": 0.002})
        trainer = build_trainer(Recipe.load(recipe))
        loads = []
        for _ in range(50):
            trainer.train_step()
            loads.append(max(trainer.methods[0].report()["max_over_mean_load"]))
        return sum(loads[-10:]) / 10

    assert late(0.5) < 0.9 * late(1e-9)


@pytest.mark.parametrize("other", ["recompute", "sam"])
def test_one_count_per_micro_batch_with(other: str) -> None:
    trainer, got = losses({"weight": 0.5}, **{other: {}})  # type: ignore[arg-type]
    sizes: list[int] = []
    balancer = trainer.methods[[m.card.name for m in trainer.methods].index("global-lbl")]._balancer
    end = balancer.end_step

    def counted() -> None:
        sizes.append(int(balancer.window[0].sum()))
        end()

    balancer.end_step = counted
    trainer.train_step()
    assert sizes == [4 * 32 * 2]  # sequences, tokens, choices
    if other == "recompute":
        assert got == pytest.approx(losses({"weight": 0.5})[1], rel=1e-5)


def test_bias_is_part_of_the_model_and_goes_on(tmp_path: Any) -> None:
    trainer, _ = losses({"weight": 0.0, "bias_rate": 0.01})
    state = trainer.state_dict()
    assert state["model"]["blocks.0.mlp.router.bias"].abs().max() > 0.005
    other, _ = losses({"weight": 0.0, "bias_rate": 0.01}, steps=0)
    other.load_state_dict(copy.deepcopy(state))
    assert other.train_step()["loss"] == trainer.train_step()["loss"]


def test_dead_experts_raise_an_alarm() -> None:
    trainer, _ = losses({"weight": 1e-9, "dead_after": 3}, steps=0)
    with torch.no_grad():
        router: Any = moe_layers(trainer.model)[1].router
        router.use_bias()
        router.bias[2] = -100
    trainer.train_step()
    trainer.train_step()
    assert entries() == []
    trainer.train_step()
    trainer.train_step()
    assert [entry["why"] for entry in entries()] == ["no token for 3 steps came to expert 2 of layer 1"]
    assert trainer.methods[0].report()["dead_experts"] == 1


def test_a_loss_below_that_of_perfect_balance_raises_an_alarm() -> None:
    trainer, _ = losses({"weight": 0.1}, steps=0)
    with torch.no_grad():
        routers: list[Any] = [layer.router for layer in moe_layers(trainer.model)]
        for router in routers:
            router.use_bias()
            router.bias[:2] = -1  # the two experts with all the probability are never chosen
            router.weight.zero_()
            router.weight[0, 0], router.weight[1, 0] = 40.0, -40.0
    trainer.train_step()
    assert "less than the 1 of perfect balance" in entries()[0]["why"]
    assert trainer.methods[0].report()["alarms"] == ["low"]


def test_refusals() -> None:
    with pytest.raises(MethodError, match=r"balances experts, and a llama model has none"):
        build_trainer(Recipe.load(tiny_recipe(methods={"global-lbl": {}})))
    with pytest.raises(MethodError, match="changes nothing"):
        losses({"weight": 0})
    with pytest.raises(MethodError, match="pieces of a sequence"):
        losses({}, streambp={})


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(4, {"replicate": 2, "shard": 2}), (4, {"shard": 2, "tensor": 2}), (2, {"shard": 2, "experts": 2}),
     (2, {"shard": 1, "sequence": 2})],
    ids=str,
)  # fmt: skip
def test_layouts_train_what_one_process_trains(ranks: int, layout: dict[str, Any]) -> None:
    model = {**BASE["model"], "family": "moe", "experts": 8, "expert_width": 32, "dense_layers": 1, "shared_experts": 1}
    options = {"weight": 0.5, "z_loss": 1e-3, "bias_rate": 0.01}
    found = parity(small(model=model, parallel=layout, methods={"global-lbl": options}), ranks)
    assert found.loss_difference < 1e-9
    assert found.gradient_difference < 1e-9


# How specialised


def test_mutual_information() -> None:
    alike = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]], dtype=torch.float64)
    apart = torch.eye(4, dtype=torch.float64)
    assert mutual_information(alike) == 0
    assert mutual_information(apart) == pytest.approx(math.log(4))


def test_routing_report_of_a_router_that_knows_the_domains() -> None:
    config = MoEConfig(hidden=16, layers=1, heads=2, vocab=8, experts=8, top_k=1, normalize=False, expert_width=8)
    model = build_model(config, seed=0)
    layer = moe_layers(model)[0]

    def by_token(rows: Tensor) -> Any:
        tokens = seen[-1].flatten()
        probs = torch.full((len(tokens), 8), 0.05).scatter_(1, tokens[:, None], 0.65)
        return type(routing)(probs, tokens[:, None], torch.ones(len(tokens), 1), probs.log())

    routing = layer.router(torch.zeros(1, 16))
    seen: list[Tensor] = []
    model.embedding.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    layer.router.forward = by_token  # type: ignore[method-assign]
    a = torch.tensor([[0, 1, 0, 1]])
    report = routing_report(model, {"a": [a, a], "b": [{"tokens": a + 2, "targets": torch.tensor([[1, 1, -100, 1]])}]})
    (found,) = report.layers
    assert found.frequencies["a"][:3] == [0.5, 0.5, 0]
    assert found.frequencies["b"][2:4] == pytest.approx([1 / 3, 2 / 3])
    assert report.mean("mutual_information") == pytest.approx(math.log(2))
    assert found.max_frequency == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert (found.frequent, found.overlap) == (2, 0)
    assert found.score == pytest.approx(0.65)
    assert found.load == pytest.approx(8 / 3)
    assert found.micro_load == pytest.approx((4 + 4 + 16 / 3) / 3)
    (even,) = routing_report(model, {"c": [torch.arange(5)[None]], "d": [torch.arange(5)[None]]}).layers
    assert even.frequent == 0  # a fifth is more than an eighth, and less than twice that
    assert math.isnan(even.overlap)
    assert model.training
    assert report.to_dict()["domains"] == ["a", "b"]


def test_routing_report_needs_experts_and_tokens() -> None:
    with pytest.raises(ModelError, match="no layer of experts"):
        routing_report(torch.nn.Linear(2, 2), {})
    with pytest.raises(ModelError, match="'empty' has no tokens"):
        routing_report(build_model(MoEConfig(hidden=16, layers=1, heads=2, vocab=8), seed=0), {"empty": []})
