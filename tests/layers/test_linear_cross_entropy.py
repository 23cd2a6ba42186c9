"""The chunked head and loss against all logits at once, gradients included. Needs torch alone: pytest tests/layers."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from headway.layers.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "scale": {"logit_scale": 0.25},
    "all": {"label_smoothing": 0.1, "z_loss": 1e-2, "logit_scale": 1.5},
}


def inputs(n=23, d=16, v=50, dtype=torch.float32, ignored=0.3):
    torch.manual_seed(0)
    hidden = torch.randn(n, d).to(dtype).requires_grad_()
    weight = torch.randn(v, d).to(dtype).requires_grad_()
    targets = torch.randint(0, v, (n,))
    targets[torch.rand(n) < ignored] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("chunk", [None, 1, 7, 23, 100])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_values_and_gradients_are_the_references(name, chunk, dtype, tolerance):
    hidden, weight, targets = inputs(dtype=dtype)
    loss, count = linear_cross_entropy(hidden, weight, targets, chunk=chunk, **OPTIONS[name])
    assert loss.dtype == torch.float32 and loss.shape == () and count == (targets != -100).sum()
    got = torch.autograd.grad(loss / count, (hidden, weight))
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected, _ = linear_cross_entropy_reference(h, w, targets, **OPTIONS[name])
    wanted = torch.autograd.grad(expected / count, (h, w))
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    for a, b in zip(got, wanted):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def test_agrees_with_torch():
    hidden, weight, targets = inputs()
    loss, count = linear_cross_entropy(hidden, weight, targets, label_smoothing=0.2)
    theirs = F.cross_entropy(F.linear(hidden, weight), targets, label_smoothing=0.2)
    torch.testing.assert_close(loss / count, theirs)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(name):
    hidden, weight, targets = inputs(n=5, d=4, v=6, dtype=torch.float64)
    targets[0] = -100
    torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, chunk=2, **OPTIONS[name])[0], (hidden, weight)
    )


def test_everything_ignored_is_zero():
    hidden, weight, targets = inputs(ignored=1.1)
    loss, count = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss == 0 and count == 0 and hidden.grad.abs().sum() == 0 and weight.grad.abs().sum() == 0


def test_no_tokens():
    hidden, weight, targets = inputs(n=0)
    loss, count = linear_cross_entropy(hidden, weight, targets)
    assert loss == 0 and count == 0


def test_evaluation_without_gradients_is_the_same_number():
    hidden, weight, targets = inputs()
    with torch.no_grad():
        silent, _ = linear_cross_entropy(hidden, weight, targets, chunk=5)
    assert not silent.requires_grad
    torch.testing.assert_close(silent, linear_cross_entropy(hidden, weight, targets, chunk=5)[0].detach())


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=2)))
def test_frozen_inputs_get_no_gradient(needs):
    hidden, weight, targets = inputs()
    hidden, weight = hidden.detach().requires_grad_(needs[0]), weight.detach().requires_grad_(needs[1])
    loss, _ = linear_cross_entropy(hidden, weight, targets)
    if any(needs):
        loss.backward()
    assert (hidden.grad is not None, weight.grad is not None) == needs


def test_never_more_logits_than_a_chunk():
    """Counted: the widest tensor over the vocabulary that any operation produces."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Widest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == 50:
                self.rows = max(self.rows, out.shape[0])
            return out

    hidden, weight, targets = inputs(n=40)
    with Widest() as widest:
        loss, _ = linear_cross_entropy(hidden, weight, targets, chunk=8)
        loss.backward()
    # the transposed weight [D, V] is the one allowed exception
    assert widest.rows <= 16
