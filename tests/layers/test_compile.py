"""Compiled layers are one graph each and give the same numbers. Needs torch alone: pytest tests/layers.

The back end traces forward and backward but generates no code, so that no C++ compiler is needed.
"""

import pytest
import torch

from headway.layers.attention import attention
from headway.layers.embedding import embedding
from headway.layers.linear_cross_entropy import linear_cross_entropy
from headway.layers.norm import rms_norm
from headway.layers.rope import apply_rope, rope_frequencies, rope_tables
from headway.layers.swiglu import swiglu

T, HD = 40, 8
COS, SIN = rope_tables(rope_frequencies(HD, 1e4)[0], torch.arange(T))


def heads(*counts):
    return [torch.randn(2, T, count, HD).transpose(1, 2).requires_grad_() for count in counts]


def matrix(*shape):
    return torch.randn(*shape, requires_grad=True)


SEGMENTS = (torch.arange(T) // 13)[None].repeat(2, 1)
TARGETS = torch.randint(0, 11, (T,))
CASES = {
    "norm": (lambda x, w: rms_norm(x, w, 1e-5), lambda: [matrix(T, 16), matrix(16)]),
    "swiglu": (swiglu, lambda: [matrix(T, 16), matrix(T, 16)]),
    "rope": (lambda q, k: torch.cat(apply_rope(q, k, COS, SIN), 1), lambda: heads(4, 2)),
    "attention": (attention, lambda: heads(4, 2, 2)),
    "attention within documents": (lambda q, k, v: attention(q, k, v, segments=SEGMENTS), lambda: heads(4, 2, 2)),
    "attention in a window": (lambda q, k, v: attention(q, k, v, window=9), lambda: heads(4, 4, 4)),
    "embedding": (lambda w: embedding(TARGETS, w), lambda: [matrix(11, 6)]),
    "head and loss": (
        lambda h, w: linear_cross_entropy(h, w, TARGETS, chunk=16)[0],
        lambda: [matrix(T, 6), matrix(11, 6)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_compiled_as_one_graph(name):
    torch.manual_seed(0)
    torch._dynamo.reset()
    function, make = CASES[name]
    tensors = make()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    plain, out = function(*tensors), compiled(*tensors)
    upstream = torch.randn_like(plain)
    torch.testing.assert_close(out, plain)
    for a, b in zip(torch.autograd.grad(out, tensors, upstream), torch.autograd.grad(plain, tensors, upstream)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_attention_below_a_checkpoint():
    tensors = heads(4, 2, 2)
    plain = attention(*tensors)
    again = torch.utils.checkpoint.checkpoint(attention, *tensors, use_reentrant=False)
    upstream = torch.randn_like(plain)
    for a, b in zip(torch.autograd.grad(again, tensors, upstream), torch.autograd.grad(plain, tensors, upstream)):
        assert torch.equal(a, b)


def test_blocks_pass_the_checks_of_custom_operators():
    from headway.layers import blocked_attention as blocked

    q, k, v = heads(4, 2, 2)
    for keep in (True, False):
        torch.library.opcheck(blocked._forward, (q, k, v, None, None, True, 0.3, 0, 16, keep))
