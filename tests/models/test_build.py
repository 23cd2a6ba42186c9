"""First weights: their sizes, and that they follow from the seed and nothing else.

Needs: nothing.
Run: pytest tests/models/test_build.py
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from headway.core.errors import ModelError
from headway.models.build import build_model, empty_model
from headway.models.config import GPT2Config, LlamaConfig, MoEConfig

CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(hidden=128, layers=4, heads=4, vocab=300, qkv_bias=True, qk_norm=True, tied=False),
    "moe": MoEConfig(hidden=128, layers=4, heads=4, vocab=300, experts=64, shared_experts=1, dense_layers=1),
    "gpt2": GPT2Config(hidden=128, layers=4, heads=4, vocab=300),
}


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_seed_alone_decides(config: Any) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = weights(build_model(config, seed=5))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = weights(build_model(config, seed=5)), weights(build_model(config, seed=6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    matrices = [name for name in first if first[name].ndim == 2]
    assert not any(torch.equal(first[name], other[name]) for name in matrices)
    # No two parameters of one model are the same numbers either.
    assert len({float(first[name].flatten()[0]) for name in matrices}) == len(matrices)


def test_without_a_seed_the_global_generator_decides() -> None:
    config = CONFIGS["llama"]
    torch.manual_seed(3)
    first, second = weights(build_model(config)), weights(build_model(config))
    torch.manual_seed(3)
    third = weights(build_model(config))
    assert torch.equal(first["head.weight"], third["head.weight"])
    assert not torch.equal(first["head.weight"], second["head.weight"])


def test_a_parameter_does_not_depend_on_what_else_there_is() -> None:
    few = weights(build_model(LlamaConfig(hidden=32, layers=2, heads=2, vocab=50), seed=0))
    more = weights(build_model(LlamaConfig(hidden=32, layers=2, heads=2, vocab=50, tied=False, qk_norm=True), seed=0))
    assert more.keys() > few.keys()
    assert all(torch.equal(few[name], more[name]) for name in few)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_sizes_of_the_first_weights(config: Any) -> None:
    for name, parameter in weights(build_model(config, seed=0)).items():
        if parameter.ndim == 1:
            assert (parameter == (0.0 if name.endswith("bias") else 1.0)).all(), name
            continue
        residual = name.endswith(("attention.out.weight", ".down.weight", ".experts.down"))
        expected = 0.02 / math.sqrt(2 * 4) if residual else 0.02
        assert abs(float(parameter.std()) / expected - 1) < 0.03, name
        assert abs(float(parameter.mean())) < expected / 30, name


def test_a_new_model_is_as_uncertain_as_the_vocabulary_is_large() -> None:
    model = build_model(CONFIGS["llama"], seed=0)
    x = torch.randint(0, 300, (4, 64), generator=torch.Generator().manual_seed(0))
    loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten())
    assert abs(loss.item() - math.log(300)) < 0.1


def test_dtype_tying_and_errors() -> None:
    assert {p.dtype for p in empty_model(CONFIGS["gpt2"], torch.bfloat16).parameters()} == {torch.bfloat16}
    tied = build_model(GPT2Config(hidden=16, layers=1, heads=2, vocab=20), seed=0)
    assert tied.head_weight is tied.embedding.weight
    assert tied.structure().tied and not build_model(CONFIGS["llama"], seed=0).structure().tied
    with pytest.raises(ModelError, match=r"model\.vocab"):
        build_model(LlamaConfig(hidden=16, layers=1, heads=2), seed=0)
