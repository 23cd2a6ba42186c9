"""The key/value cache: the same logits with and without it, bounded buffers under windows, its protocol.

Needs: nothing.
Run: pytest tests/serve/test_cache.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headway.models.build import build_model
from headway.models.config import GPT2Config, LlamaConfig
from headway.serve.cache import Cache, KVCache

CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(hidden=32, layers=2, heads=4, kv_heads=2, vocab=97, context=64),
    "window": LlamaConfig(hidden=32, layers=3, heads=4, vocab=97, context=64, window=5, window_layers=(0, 2)),
    "window 1": LlamaConfig(hidden=32, layers=2, heads=4, vocab=97, context=64, window=1),
    "gpt2": GPT2Config(hidden=32, layers=2, heads=4, vocab=97, context=64),
}


def model_of(name: str) -> Any:
    model = build_model(CONFIGS[name], seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("steps", [[50], [1] * 50, [20, *[1] * 30], [3, 1, 1, 12, 2, 9, 1, 1, 20], [9] * 5 + [5]])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_any_division_into_steps_gives_the_logits_of_one_pass(name: str, steps: list[int]) -> None:
    model, x = model_of(name), torch.randint(0, 97, (2, 50), generator=torch.Generator().manual_seed(2))
    cache = model.new_cache(2, 50)
    seen, logits = 0, []
    for step in steps:
        assert cache.length == seen
        logits.append(model(x[:, seen : seen + step], cache=cache))
        seen += step
    torch.testing.assert_close(torch.cat(logits, dim=1), model(x), rtol=0, atol=2e-5)


@torch.no_grad()
def test_windows_bound_the_memory_and_buffers_never_move() -> None:
    model = model_of("window")
    cache = model.new_cache(1, 60)
    assert [cache.state[f"keys.{layer}"].shape[2] for layer in range(3)] == [0, 0, 0]
    expected = 2 * 4 * (1 * 4 * 8) * (10 + 60 + 10)  # keys and values, 4 bytes, [1, 4, slots, 8]
    assert cache.nbytes == expected
    model(torch.zeros(1, 1, dtype=torch.long), cache=cache)
    place = cache.state["keys.0"].data_ptr()
    for _ in range(59):
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache)
        assert cache.state["keys.0"].data_ptr() == place
        assert cache.state["keys.0"].shape[2] <= 10
    assert (cache.length, cache.nbytes) == (60, expected)
    with pytest.raises(ValueError, match="a cache of 60 tokens holds 60: 1 more do not fit"):
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache)


@torch.no_grad()
def test_dtype_state_and_protocol() -> None:
    model = model_of("llama")
    cache = model.new_cache(3, 16, dtype=torch.bfloat16)
    assert isinstance(cache, Cache) and isinstance(cache, KVCache)
    model.to(torch.bfloat16)(torch.zeros(3, 7, dtype=torch.long), cache=cache)
    state = cache.state
    assert set(state) == {"keys.0", "values.0", "keys.1", "values.1"}
    assert {(tuple(t.shape), t.dtype) for t in state.values()} == {((3, 2, 7, 8), torch.bfloat16)}
    assert model.new_cache(1, 4).state["keys.0"].dtype == torch.bfloat16  # as the weights


def test_layers_advance_on_their_own_and_the_length_is_what_all_have_seen() -> None:
    cache = KVCache(1, 8, [None, None], heads=1, head_dim=2)
    new = torch.ones(1, 1, 3, 2)
    k, v = cache.append(0, new, 2 * new)
    assert cache.length == 0
    assert torch.equal(k, new) and torch.equal(v, 2 * new)
    cache.append(1, new, new)
    assert cache.length == 3
