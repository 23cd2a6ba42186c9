"""The mixture-of-experts layer: routing, permutation, grouped products, capacity, against loops written out.

Needs nothing. Run: pytest tests/layers/test_experts.py
"""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from headway.layers import experts as experts_module
from headway.layers.capacity import Capacity, kept
from headway.layers.experts import LimitedDispatch, MoE, grouped_linear, moe_reference
from headway.layers.permute import combine, permute, plan
from headway.layers.router import Router


def layer(
    experts: int = 6,
    top_k: int = 2,
    dtype: torch.dtype = torch.float64,
    hidden: int = 8,
    width: int = 16,
    **options: Any,
) -> MoE:
    """A layer whose weights are large enough for its answers to differ."""
    torch.manual_seed(0)
    capacity, shared = options.pop("capacity", None), options.pop("shared", None)
    made = MoE(hidden, width, experts, Router(hidden, experts, top_k, **options), shared=shared, capacity=capacity)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made.to(dtype)


def gradients(function: Any, model: MoE, x: Tensor) -> list[Tensor]:
    """Output, and gradients of a weighted sum of it by input and parameters."""
    x = x.clone().requires_grad_()
    y = function(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).to(y.dtype).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), [x, *model.parameters()])]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_equals_the_dense_loop(score: Literal["softmax", "sigmoid"], normalize: bool, top_k: int) -> None:
    model = layer(top_k=top_k, score=score, normalize=normalize, shared=torch.nn.Linear(8, 8))
    x = torch.randn(3, 7, 8, dtype=torch.float64)
    for ours, theirs in zip(
        gradients(model, model, x), gradients(lambda x: moe_reference(model, x), model, x), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_equals_the_dense_loop_in_the_grouped_product(dtype: torch.dtype, tolerance: float) -> None:
    model = layer(dtype=dtype)
    x = torch.randn(2, 9, 8, dtype=dtype)
    assert experts_module._grouped(x.flatten(0, 1), model.experts.gate)
    exact = layer(dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    exact.router.forward = lambda rows: model.router(rows.to(dtype))  # type: ignore[method-assign]  # same choices
    y = moe_reference(exact, x.double())
    torch.testing.assert_close(model(x).double(), y, rtol=tolerance, atol=tolerance * float(y.detach().abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_and_gradients_in_any_order_of_memory(dtype: torch.dtype) -> None:
    experts, counts = layer(hidden=16, dtype=dtype).experts, torch.tensor([3, 0, 2, 0, 5, 0])
    rows, grad = torch.randn(16, 10, dtype=dtype).T, torch.randn(16, 10, dtype=dtype).T
    for given in (grad, torch.ones((), dtype=dtype).expand(10, 16)):  # transposed; of a plain sum, with strides of 0
        found = [
            torch.autograd.grad(experts(x, counts), [x, *experts.parameters()], g)
            for x, g in ((rows.requires_grad_(), given), (rows.detach().clone().requires_grad_(), given.contiguous()))
        ]
        for ours, theirs in zip(*found, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("dtype", "capacity"), [(torch.float32, None), (torch.bfloat16, Capacity(0.5))])
def test_compiled_it_is_the_same(dtype: torch.dtype, capacity: Capacity | None) -> None:
    torch._dynamo.reset()
    model = layer(hidden=16, dtype=dtype, capacity=capacity)
    compiled = torch.compile(model, backend="aot_eager")  # traces, and needs no C++ compiler
    x = torch.randn(2, 9, 16, dtype=dtype)
    for ours, theirs in zip(gradients(compiled, model, x), gradients(model, model, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_grouped_product_and_loop_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    rows, weight = torch.randn(30, 8, requires_grad=True), torch.randn(4, 12, 8, requires_grad=True)
    counts = torch.tensor([7, 0, 22, 1])
    grad = torch.randn(30, 12)

    def both() -> list[Tensor]:
        y = grouped_linear(rows, weight, counts)
        return [y.detach(), *torch.autograd.grad(y, (rows, weight), grad)]

    calls: list[Any] = []
    real = torch._grouped_mm

    def counted(*given: Any, **named: Any) -> Tensor:
        calls.append(given)
        return real(*given, **named)

    monkeypatch.setattr(torch, "_grouped_mm", counted)
    fast = both()
    assert calls
    monkeypatch.setattr(experts_module, "_grouped", lambda *a: False)
    count = len(calls)
    for a, b in zip(fast, both(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert len(calls) == count


@pytest.mark.parametrize("width", [5, 6])  # no multiple of 16 bytes: the loop
def test_any_width(width: int) -> None:
    rows, weight = torch.randn(9, width), torch.randn(2, 7, width)
    expected = torch.cat([rows[:4] @ weight[0].T, rows[4:] @ weight[1].T])
    torch.testing.assert_close(grouped_linear(rows, weight, torch.tensor([4, 5])), expected)


def test_an_expert_without_tokens_gets_no_gradient_and_disturbs_nobody() -> None:
    for dtype in (torch.float32, torch.float64):
        model = layer(dtype=dtype)
        with torch.no_grad():
            model.router.weight[2] = 0
        x = torch.randn(1, 40, 8, dtype=dtype).abs()
        with torch.no_grad():
            model.router.weight.abs_()
            model.router.weight[2] = -10
        indices = model.router(x.flatten(0, 1)).indices
        assert not (indices == 2).any()
        model(x).sum().backward()
        for parameter in model.experts.parameters():
            assert parameter.grad is not None
            assert not parameter.grad[2].any()
            assert parameter.grad[int(indices[0, 0])].any()


def test_no_tokens_at_all() -> None:
    for dtype in (torch.float32, torch.float64):
        model = layer(dtype=dtype)
        y = model(torch.zeros(1, 0, 8, dtype=dtype, requires_grad=True))
        assert y.shape == (1, 0, 8)
        y.sum().backward()


def test_router_scores_in_fp32_whatever_the_tokens() -> None:
    torch.manual_seed(0)
    router = Router(64, 32, 4).bfloat16()
    x = torch.randn(100, 64).bfloat16()
    routing = router(x)
    assert routing.probs.dtype == routing.weights.dtype == torch.float32
    exact = (x.double() @ router.weight.double().T).softmax(-1)
    torch.testing.assert_close(routing.probs.double(), exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(routing.indices, exact.topk(4, dim=-1).indices)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(x).probs, routing.probs)


def test_weights_of_the_two_kinds_of_scores() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 8)
    for score, normalize in (("softmax", True), ("softmax", False), ("sigmoid", True), ("sigmoid", False)):
        router = Router(8, 6, 3, score=score, normalize=normalize)  # type: ignore[arg-type]
        routing = router(x)
        logits = F.linear(x, router.weight)
        scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
        top = scores.topk(3, -1)
        expected = top.values / top.values.sum(-1, keepdim=True) if normalize else top.values
        torch.testing.assert_close(routing.weights, expected)
        torch.testing.assert_close(routing.probs.sum(-1), torch.ones(5))


def test_bias_chooses_but_does_not_weigh() -> None:
    router = Router(8, 4, 1, normalize=False)
    x = torch.randn(6, 8)
    plain = router(x)
    router.bias = torch.tensor([0.0, 0.0, 5.0, 0.0])
    routing = router(x)
    assert (routing.indices == 2).all()
    torch.testing.assert_close(routing.weights[:, 0], plain.probs[:, 2])


def test_permutation_there_and_back() -> None:
    torch.manual_seed(0)
    indices = torch.stack([torch.randperm(5)[:3] for _ in range(11)])
    permutation = plan(indices, 5)
    assert torch.equal(permutation.counts, torch.bincount(indices.flatten(), minlength=5))
    sorted_experts = indices.flatten()[permutation.choice]
    assert torch.equal(sorted_experts, sorted_experts.sort(stable=True).values)
    x = torch.randn(11, 4, dtype=torch.float64)
    thirds = torch.full((11, 3), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(combine(permute(x, permutation), thirds, permutation), x)


@pytest.mark.parametrize("case", ["whole", "dropped", "padded"])
def test_gradients_of_permute_and_combine(case: str) -> None:
    torch.manual_seed(0)
    indices = torch.stack([torch.randperm(4)[:2] for _ in range(6)])
    weights = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    keep = None if case == "whole" else kept(indices, weights, 4, 2, "probs")
    permutation = plan(indices, 4, keep, 3 if case == "padded" else None)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(len(permutation.choice), 1, dtype=torch.float64)
    torch.autograd.gradcheck(lambda x, w: combine(permute(x, permutation) * scale, w, permutation), (x, weights))


def test_capacity_formula_and_policies_by_hand() -> None:
    assert Capacity(1.0).rows(10, 2, 8) == 3  # 2.5 rounded up
    assert Capacity(1.2).rows(100, 2, 8) == 30  # 30.000000000000004 in floating point
    assert Capacity(0.01, minimum=4).rows(10, 1, 8) == 4
    assert Capacity(9.0).rows(10, 2, 4) == 10  # a token chooses an expert once
    indices = torch.tensor([[0], [0], [1], [0]])
    weights = torch.tensor([[0.2], [0.9], [0.1], [0.5]])
    assert kept(indices, weights, 2, 2, "probs").flatten().tolist() == [False, True, True, True]
    assert kept(indices, weights, 2, 2, "position").flatten().tolist() == [True, True, True, False]


@pytest.mark.parametrize("keep", ["probs", "position"])
def test_padding_changes_shapes_and_no_numbers(keep: Literal["probs", "position"]) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8, 8, dtype=torch.float64)
    counts: list[Tensor] = []
    seen: dict[bool, tuple[list[Tensor], Tensor]] = {}
    for pad in (False, True):
        model = layer(capacity=Capacity(0.7, keep, pad=pad))
        model.experts.register_forward_pre_hook(lambda module, given: counts.append(given[1]))
        seen[pad] = gradients(model, model, x), counts[-1]
        dispatch = model.dispatch
        assert isinstance(dispatch, LimitedDispatch)
        assert dispatch.dropped is not None
        assert 0.25 <= float(dispatch.dropped) < 1  # 64 choices, 48 places
    for a, b in zip(seen[False][0], seen[True][0], strict=True):
        torch.testing.assert_close(a, b)
    assert seen[True][1].tolist() == [8] * 6  # ceil(32 * 2 / 6 * 0.7)
    assert max(seen[False][1].tolist()) == 8
    assert min(seen[False][1].tolist()) < 8


def test_what_is_dropped_adds_nothing_and_evaluation_drops_nothing() -> None:
    model, x = layer(capacity=Capacity(0.5)), torch.randn(1, 24, 8, dtype=torch.float64)
    rows = x.flatten(0, 1)
    routing = model.router(rows)
    keep = kept(routing.indices, routing.weights, 6, 4, "probs")
    whole = layer()
    full = whole.router.forward(rows)
    masked = type(full)(full.probs, full.indices, full.weights * keep, full.logits)
    whole.router.forward = lambda rows: masked  # type: ignore[method-assign]
    torch.testing.assert_close(model(x), moe_reference(whole, x))
    model.eval()
    torch.testing.assert_close(model(x), moe_reference(layer(), x))
    generous = layer(capacity=Capacity(100.0))
    torch.testing.assert_close(generous(x), moe_reference(layer(), x))
    assert float(generous.dispatch.dropped) == 0  # type: ignore[attr-defined]


def test_the_same_bits_every_time() -> None:
    model, x = layer(dtype=torch.bfloat16, hidden=32, width=32), torch.randn(2, 50, 32).bfloat16()
    first, second = gradients(model, model, x), gradients(model, model, x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_token_alone_gets_what_it_gets_in_company() -> None:
    model, x = layer(), torch.randn(2, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x)[1:, 3:4], model(x[1:, 3:4]))
