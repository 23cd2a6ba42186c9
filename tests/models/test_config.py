"""The options of the model families: what is refused, with which words, and what the defaults come to.

Needs: nothing.
Run: pytest tests/models/test_config.py
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from headway.core.errors import ModelError, RecipeError
from headway.core.options import parse_options
from headway.models.config import FAMILIES, GPT2Config, LlamaConfig, TransformersConfig

SMALL: dict[str, Any] = {"hidden": 64, "layers": 2, "heads": 4}


def test_defaults_that_follow_from_others() -> None:
    config = LlamaConfig(**SMALL, vocab="1k")
    assert (config.kv_head_count, config.head_width, config.intermediate_width, config.vocabulary) == (4, 16, 192, 1000)
    assert LlamaConfig(hidden=4096, layers=1, heads=32).intermediate_width == 10944
    assert LlamaConfig(**SMALL, head_dim=32, kv_heads=2, intermediate=100).intermediate_width == 100
    assert GPT2Config(**SMALL).intermediate_width == 256
    with pytest.raises(ModelError, match=r"model.vocab: is not known"):
        _ = GPT2Config(**SMALL).vocabulary


def test_windows_per_block() -> None:
    assert [LlamaConfig(**SMALL, window=8).window_of(i) for i in range(2)] == [8, 8]
    assert [LlamaConfig(**SMALL, window=8, window_layers=[1]).window_of(i) for i in range(2)] == [None, 8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 62}, "model.head_dim.*hidden \\(62\\) is no multiple of heads \\(4\\)"),
        ({"hidden": 60}, "model.head_dim.*an even number of channels per head"),
        ({"head_dim": 7}, "model.head_dim: got 7, expected an even number"),
        ({"kv_heads": 3}, "model.kv_heads: got 3, expected a divisor of heads \\(4\\)"),
        ({"layers": 0}, "model.layers: got 0"),
        ({"dropout": 1.0}, "model.dropout"),
        ({"window_layers": [0]}, "model.window_layers.*expected window to be set"),
        ({"window": 4, "window_layers": [2]}, "model.window_layers.*block numbers from 0 to 1"),
        ({"window": 0}, "model.window: got 0"),
        ({"rope_scaling": {"rope_type": "lineer", "factor": 2}}, "model.rope_scaling.*did you mean 'linear'"),
        ({"rope_scaling": {"factor": 2}}, "model.rope_scaling.*a rope_type of"),
        ({"rope_scaling": {"rope_type": "linear"}}, "model.rope_scaling.*expected factor for rope_type 'linear'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "beta_fst": 3}}, "did you mean 'beta_fast'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "a positive number as factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "big"}}, "a positive number as factor"),
        ({"kv_head": 2}, "model.kv_head: is not an option here.*Did you mean 'kv_heads'"),
        ({"vocab": "many"}, "model.vocab"),
        ({"family": "gpt2"}, "model.family"),
    ],
)
def test_what_is_refused_says_where_and_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_options(LlamaConfig, {**SMALL, **changes}, "model")


def test_gpt2_and_transformers_options() -> None:
    with pytest.raises(RecipeError, match=r"model.heads: got 5, expected a divisor of hidden \(64\)"):
        parse_options(GPT2Config, {**SMALL, "heads": 5}, "model")
    with pytest.raises(RecipeError, match=r"model.path: is required"):
        parse_options(TransformersConfig, {}, "model")


def test_configurations_survive_json() -> None:
    for name, cls in FAMILIES.items():
        raw = {"family": name, **({"path": "x"} if name == "transformers" else SMALL)}
        config = parse_options(cls, raw)
        assert cls.model_validate_json(config.model_dump_json()) == config
    config = LlamaConfig(**SMALL, window=8, window_layers=[1], rope_scaling={"type": "linear", "factor": 2.0})
    assert config.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    assert LlamaConfig.model_validate(config.model_dump(mode="json")) == config
    assert LlamaConfig(**SMALL, rope_scaling={"rope_type": "default"}).rope_scaling is None


def test_options_do_not_import_torch() -> None:
    code = "import sys, headway.models.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
