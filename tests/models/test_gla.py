"""The family with gated linear attention: against a loop, packed, step by step, hybrid, trained, generated from.

Needs: nothing.
Run: pytest tests/models/test_gla.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from headway.core.build import build_trainer
from headway.core.errors import ModelError, RecipeError
from headway.core.options import parse_options
from headway.core.recipe import Recipe
from headway.layers.linear_attention import linear_attention_reference
from headway.models.build import build_model
from headway.models.config import GLAConfig
from headway.models.hf import save_hf
from headway.serve.cache import Cache
from headway.serve.engine import generate
from tests.conftest import tiny_recipe

SMALL: dict[str, Any] = {"hidden": 32, "layers": 3, "heads": 4, "vocab": 97, "context": 128, "chunk": 8}
CONFIGS = {
    "channel": GLAConfig(**SMALL),
    "head": GLAConfig(**SMALL, decay="head", tied=False),
    "none": GLAConfig(**SMALL, decay="none", expand_k=1.0),
    "hybrid": GLAConfig(**SMALL, softmax_layers=(1,), kv_heads=2),
}


def model_of(name: str) -> Any:
    model = build_model(CONFIGS[name], seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def tokens(batch: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(97, (batch, length), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_a_mixer_is_the_papers_equations() -> None:
    mixer = model_of("channel").double().blocks[0].mixer
    x = torch.randn(1, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    alpha = torch.sigmoid(F.linear(x @ mixer.decay[0].weight.T, mixer.decay[1].weight, mixer.decay[1].bias)) ** (1 / 16)
    heads = []
    for h in range(4):
        q, k, a = ((y @ w.T)[0, :, 4 * h : 4 * h + 4] for y, w in ((x, mixer.q.weight), (x, mixer.k.weight),
                                                                   (alpha, torch.eye(16).double())))  # fmt: skip
        v = (x @ mixer.v.weight.T)[0, :, 8 * h : 8 * h + 8]
        state, outputs = torch.zeros(4, 8, dtype=torch.float64), []
        for t in range(9):
            state = a[t, :, None] * state + k[t, :, None] * v[t]
            o = (q[t] / 2) @ state
            outputs.append(o / (o.square().mean() + 1e-5).sqrt() * mixer.norm.weight)
        heads.append(torch.stack(outputs))
    gate = x @ mixer.gate.weight.T
    expected = (gate * torch.sigmoid(gate) * torch.cat(heads, -1)) @ mixer.out.weight.T
    torch.testing.assert_close(mixer(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_packed_documents_equal_separate_passes(name: str) -> None:
    model, x = model_of(name), tokens()
    lengths = [[17, 1, 22], [9, 28, 3]]
    segments = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in lengths])
    packed = model(x, segments=segments)
    for row in range(2):
        start = 0
        for length in lengths[row]:
            alone = model(x[row : row + 1, start : start + length])
            torch.testing.assert_close(packed[row : row + 1, start : start + length], alone, rtol=0, atol=2e-5)
            start += length
    assert not torch.allclose(packed, model(x), atol=1e-2)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_step_by_step_equals_the_whole(name: str) -> None:
    model, x = model_of(name), tokens()
    expected = model(x)
    cache = model.new_cache(2, 40)
    assert isinstance(cache, Cache) and cache.length == 0
    size = cache.nbytes
    parts = []
    for start, end in ((0, 13), (13, 14), (14, 15), (15, 40)):
        parts.append(model(x[:, start:end], cache=cache))
        assert cache.length == end
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=2e-5)
    assert cache.nbytes == size and cache.state["states.0"].shape == (2, 4, CONFIGS[name].key_width // 4, 8)
    assert ("keys.1" in cache.state) is (name == "hybrid")
    with pytest.raises(ValueError, match="exclude each other"):
        model(x, segments=x, cache=cache)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_future_is_not_seen_and_all_the_past_is(name: str) -> None:
    model, x = model_of(name), tokens(batch=1)
    y = x.clone()
    y[0, 20] = (y[0, 20] + 1) % 97
    changed = ((model(x) - model(y)).abs().amax(-1) > 1e-6)[0]
    assert not changed[:20].any() and changed[20:].all()


def test_generation_with_the_cache_equals_that_without() -> None:
    model = model_of("hybrid")
    made = [list(generate(model, [3, 4, 5], max_new_tokens=30, temperature=0, use_cache=use)) for use in (True, False)]
    assert made[0] == made[1] and len(made[0]) == 30


@pytest.mark.parametrize("softmax_layers", [[], [0]])
def test_it_trains_from_a_recipe(softmax_layers: list[int]) -> None:
    model = {"family": "gla", "hidden": 32, "layers": 2, "heads": 2, "context": 64, "softmax_layers": softmax_layers}
    raw = tiny_recipe()
    raw["model"] = model
    trainer = build_trainer(Recipe.load(raw))
    losses = [trainer.train_step()["loss"] for _ in range(20)]
    assert losses[-1] < losses[0] - 1.0


def test_bf16_decays_keep_their_digits() -> None:
    model, x = model_of("channel"), tokens(length=100)
    half = build_model(CONFIGS["channel"], seed=0).bfloat16()
    half.load_state_dict(model.state_dict())
    rounded = build_model(CONFIGS["channel"], seed=0)
    rounded.load_state_dict({name: x.float() for name, x in half.state_dict().items()})
    assert half.blocks[0].mixer.log_decay(half.embedding(x)).dtype == torch.float32
    difference = (half(x).float() - rounded(x)).abs().mean() / rounded(x).std()
    assert difference < 0.03


def test_it_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.family: is gla, which transformers does not have"):
        save_hf(model_of("channel"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_flops_are_those_of_the_recurrence() -> None:
    model = build_model(CONFIGS["hybrid"], seed=0)
    weights = 2 * (2 * 16 * 32 + 3 * 32 * 32 + 16 * 32 + 16 * 16) + (2 * 32 * 32 + 2 * 16 * 32) + 3 * 3 * 32 * 128
    states, keys = 2 * 4 * 4 * 8, 32
    assert model.flops_per_token(10) == 6 * (weights + 97 * 32) + 12 * (states + 10 * keys)
    assert model.flops_per_token(20) - model.flops_per_token(10) == 12 * keys * 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expand_k": 0.3}, r"model.expand_k: got 0.3, expected a multiple of hidden \(32\)"),
        ({"expand_v": 0.03125}, r"model.expand_v.*each of 4 heads"),
        ({"chunk": 48}, "model.chunk: got 48, expected a power of two, such as 32 or 64"),
        ({"softmax_layers": [3]}, "model.softmax_layers.*block numbers from 0 to 2"),
        ({"kv_heads": 3}, r"model.kv_heads.*a divisor of heads \(4\)"),
        ({"decay": "vector"}, "model.decay"),
        ({"gate_rnk": 3}, "Did you mean 'gate_rank'"),
    ],
)
def test_what_is_refused_says_where_and_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_options(GLAConfig, {**SMALL, **changes}, "model")


def test_the_reference_may_take_the_place_of_the_chunks() -> None:
    model, x = model_of("channel"), tokens()
    expected = model(x)
    for block in model.blocks:
        block.mixer.attend = lambda q, k, v, g, *, chunk, **options: linear_attention_reference(
            q, k, v, g.expand_as(q), **options
        )
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-4)
