"""Rotary embedding against transformers (frequencies, scalings, rotation) and against complex numbers.

Needs transformers for the comparison with it: pytest tests/layers.
"""

import pytest
import torch

from headway.layers.rope import apply_rope, apply_rope_reference, rope_frequencies, rope_tables

SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-tuned": {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "original_max_position_embeddings": 64,
        "truncate": False,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("head_dim,theta", [(16, 10000.0), (64, 500000.0)])
def test_frequencies_are_those_of_transformers(name, head_dim, theta):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_theta": theta, "rope_type": "default", **(SCALINGS[name] or {})}
    config = transformers.LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=256,
        rope_parameters=parameters,
    )
    theirs = LlamaRotaryEmbedding(config)
    inv_freq, factor = rope_frequencies(head_dim, theta, SCALINGS[name], 256)
    torch.testing.assert_close(inv_freq, theirs.inv_freq, rtol=1e-6, atol=0)
    assert factor == pytest.approx(theirs.attention_scaling)
    positions = torch.arange(100)[None]
    cos, sin = rope_tables(inv_freq, positions, torch.float32, factor)
    their_cos, their_sin = theirs(torch.zeros(1), positions)
    torch.testing.assert_close(torch.cat((cos, cos), -1), their_cos)
    torch.testing.assert_close(torch.cat((sin, sin), -1), their_sin)


def test_dynamic_scaling_grows_with_the_sequence():
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    short, _ = rope_frequencies(16, 1e4, scaling, 64, length=32)
    exact, _ = rope_frequencies(16, 1e4, scaling, 64, length=64)
    long, _ = rope_frequencies(16, 1e4, scaling, 64, length=256)
    torch.testing.assert_close(short, exact)
    assert (long[1:] < short[1:]).all()


@pytest.mark.parametrize("batched", [False, True])
def test_rotation_is_that_of_transformers(batched):
    pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = torch.randn(2, 4, 7, 16), torch.randn(2, 2, 7, 16)
    positions = torch.randint(0, 50, (2, 7)) if batched else torch.arange(7)
    cos, sin = rope_tables(rope_frequencies(16, 1e4)[0], positions)
    full = [torch.cat((t, t), -1).expand(2, 7, 16) for t in (cos, sin)]
    for a, b in zip(apply_rope(q, k, cos, sin), apply_rotary_pos_emb(q, k, *full)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("batched", [False, True])
def test_rotation_and_gradient_are_complex_multiplication(dtype, tolerance, batched):
    torch.manual_seed(0)
    # the memory layout that a projection gives: [B, T, H, hd], seen as [B, H, T, hd]
    q, k = (torch.randn(2, 7, h, 16).to(dtype).transpose(1, 2).requires_grad_() for h in (4, 2))
    positions = torch.randint(0, 50, (2, 7)) if batched else torch.arange(7)
    inv_freq, _ = rope_frequencies(16, 1e4)
    cos, sin = rope_tables(inv_freq, positions, torch.float32)
    rotated = apply_rope(q, k, cos.to(dtype), sin.to(dtype))
    upstream = [torch.randn_like(t) for t in rotated]
    grads = torch.autograd.grad(rotated, (q, k), upstream)
    phase = torch.complex(cos, sin)
    phase = phase[:, None] if batched else phase

    def turn(x, by):
        z = torch.complex(*x.float().chunk(2, -1)) * by
        return torch.cat((z.real, z.imag), -1)

    for x, out, g, up in zip((q, k), rotated, grads, upstream):
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), turn(x, phase), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(g.float(), turn(up, phase.conj()), rtol=tolerance, atol=tolerance)


def test_gradcheck():
    cos, sin = rope_tables(rope_frequencies(8, 1e4)[0], torch.arange(3), torch.float64)
    q, k = (torch.randn(1, 2, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(lambda q, k: apply_rope(q, k, cos, sin), (q, k))


def test_fast_path_is_the_reference():
    cos, sin = rope_tables(rope_frequencies(32, 1e4)[0], torch.arange(9))
    q, k = torch.randn(2, 9, 3, 32).transpose(1, 2), torch.randn(2, 9, 1, 32).transpose(1, 2)
    for a, b in zip(apply_rope(q, k, cos, sin), apply_rope_reference(q, k, cos, sin)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("scaling", [{"rope_type": "lineal", "factor": 2.0}, {"rope_type": "linear"}])
def test_bad_scalings_are_refused(scaling):
    with pytest.raises(ValueError, match="rope scaling"):
        rope_frequencies(16, 1e4, scaling, 64)
