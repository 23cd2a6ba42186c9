"""Linear attention in chunks against the recurrence, token by token, and that against a loop in numpy.

Needs: nothing.
Run: pytest tests/layers/test_linear_attention.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headway.core.errors import ModelError
from headway.layers.chunks import check_log_decay
from headway.layers.linear_attention import linear_attention, linear_attention_reference

DECAYS = ("vector", "scalar", "none")


def inputs(
    kind: str, B: int = 2, H: int = 3, T: int = 75, dk: int = 6, dv: int = 5, strength: float = 1.0, seed: int = 0
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    made: dict[str, Any] = {"q": normal(B, H, T, dk), "k": normal(B, H, T, dk), "v": normal(B, H, T, dv)}
    if kind != "none":
        shape = (B, H, T, dk) if kind == "vector" else (B, H, T)
        uniform = torch.rand(*shape, generator=generator, dtype=torch.float64)
        made["log_decay"] = (-strength * uniform).requires_grad_()
    return made | {"state": normal(B, H, dk, dv)}


def everything(function: Any, made: dict[str, Any], **options: Any) -> list[Tensor]:
    """Output, last state, and the gradients of a random function of both."""
    generator = torch.Generator().manual_seed(9)
    y, last = function(**made, **options)
    value = sum((x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum() for x in (y, last))
    return [y.detach(), last.detach(), *torch.autograd.grad(value, [x for x in made.values() if x.requires_grad])]


def test_the_reference_is_the_equation() -> None:
    made = inputs("vector", T=9)
    y, last = linear_attention_reference(**made)
    q, k, v, g, S = (x.detach().numpy() for x in made.values())
    for b, h in np.ndindex(2, 3):
        state = S[b, h]
        for t in range(9):
            state = np.diag(np.exp(g[b, h, t])) @ state + np.outer(k[b, h, t], v[b, h, t])
            np.testing.assert_allclose(y[b, h, t].detach().numpy(), state.T @ q[b, h, t], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(last[b, h].detach().numpy(), state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kind", DECAYS)
def test_chunks_equal_the_recurrence(kind: str, documents: bool) -> None:
    options: dict[str, Any] = {}
    for length, chunk in ((1, 64), (5, 4), (64, 16), (75, 16), (130, 64)):
        if documents:
            # Boundaries within chunks, on their borders, next to each other; the second row continues no document.
            segments = (torch.arange(length) // torch.tensor([[7], [16]])).clone()
            segments[0, 30:31] = 99
            options = {"segments": segments, "before": torch.tensor([0, 5])}
        made = inputs(kind, T=length)
        expected = everything(linear_attention_reference, made, **options)
        found = everything(linear_attention, made, **options, chunk=chunk)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", ["vector", "scalar"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strong_decays_neither_overflow_nor_lose_digits(kind: str, dtype: torch.dtype) -> None:
    made = inputs(kind, T=256, strength=40.0)  # a chunk decays by exp(-1280): its inverse is no number
    made["log_decay"].data[:, :, 100:140] = -1e-4  # and within the same chunks hardly at all
    exact = everything(linear_attention_reference, made)
    cast = {name: x.detach().to(dtype).requires_grad_() for name, x in made.items()}
    exact_of_cast = everything(
        linear_attention_reference, {n: x.detach().double().requires_grad_() for n, x in cast.items()}
    )
    # Sums of logarithms in the hundreds leave four digits of fp32 to their differences.
    tolerance = 2e-4 if dtype == torch.float32 else 2e-2
    for a, b, c in zip(everything(linear_attention, cast), exact_of_cast, exact, strict=True):
        assert torch.isfinite(a).all() and torch.isfinite(c).all()
        assert float((a.double() - b).norm() / b.norm()) < tolerance
    y, last = linear_attention(**cast)
    assert y.dtype == dtype and last.dtype == torch.float32  # the state keeps its digits


@pytest.mark.parametrize("kind", DECAYS)
def test_gradients_by_finite_differences(kind: str) -> None:
    made = inputs(kind, B=1, H=1, T=11, dk=3, dv=2)
    segments = torch.tensor([[0] * 5 + [1] * 6])

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return linear_attention(**dict(zip(made, tensors, strict=True)), segments=segments, chunk=4)

    assert torch.autograd.gradcheck(function, tuple(made.values()))


@pytest.mark.parametrize("kind", DECAYS)
def test_a_sequence_can_be_cut_anywhere(kind: str) -> None:
    made = inputs(kind)
    whole, last = linear_attention(**made, chunk=16)
    state, outputs = made["state"], []
    for start, end in ((0, 1), (1, 2), (2, 33), (33, 75)):
        piece = {name: x[:, :, start:end] for name, x in made.items() if name != "state"}
        y, state = linear_attention(**piece, state=state, chunk=16)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 2), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)


def test_documents_do_not_see_each_other_and_their_first_decay_does_nothing() -> None:
    made = inputs("vector", B=1, T=40) | {"state": None}
    segments = torch.tensor([[0] * 13 + [1] * 27])
    y, last = linear_attention(**made, segments=segments, chunk=16)
    alone = {name: x[:, :, 13:] for name, x in made.items() if x is not None}
    expected, state = linear_attention_reference(**alone)
    torch.testing.assert_close(y[:, :, 13:], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, state, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(y.square().sum() + last.square().sum(), made["log_decay"])
    assert not grad[:, :, 13].any() and grad[:, :, 12].any() and grad[:, :, 14].any()


def test_only_what_is_asked_for_is_differentiated() -> None:
    made = {name: x.detach() for name, x in inputs("vector").items()}
    made["v"].requires_grad_()
    _, last = linear_attention(**made)
    (only_state,) = torch.autograd.grad(last.sum(), made["v"])  # the output is not used at all
    _, last = linear_attention_reference(**made)
    torch.testing.assert_close(only_state, torch.autograd.grad(last.sum(), made["v"])[0], rtol=1e-11, atol=1e-11)


def test_what_does_not_fit_is_refused() -> None:
    made = inputs("vector")
    with pytest.raises(ValueError, match="power of two"):
        linear_attention(**made, chunk=48)
    with pytest.raises(ValueError, match=r"log_decay \[2, 3, 75, 5\]"):
        linear_attention(**made | {"log_decay": made["log_decay"][..., :5]})
    with pytest.raises(ValueError, match="do not fit"):
        linear_attention(**made | {"v": made["v"][:, :, 1:]})
    wrong = made["log_decay"].detach().clone()
    wrong[1, 0, 7, 2] = 0.25
    with pytest.raises(ModelError, match=r"blocks.0: has a logarithmic decay of 0.25 at \[1, 0, 7, 2\]"):
        check_log_decay(wrong, "blocks.0")
    wrong[1, 0, 7, 2] = torch.nan
    with pytest.raises(ModelError, match="nan"):
        check_log_decay(wrong, "blocks.0")
