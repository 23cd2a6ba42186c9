"""Recipes: typed, strict, inherited, overridden, saved and run again.

Needs nothing. Run: pytest tests/core/test_recipe.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from headway.core.errors import RecipeError
from headway.core.recipe import Recipe, parse_override


def write(path: Path, recipe: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_top_level_keys_are_frozen() -> None:
    """A new key needs an argued change here: options belong under a section or a method."""
    assert list(Recipe.model_fields) == [
        "name", "seed", "workload", "model", "data", "train", "optimizer", "schedule", "eval", "log", "checkpoint",
        "memory", "parallel",
        "methods", "strict",
    ]  # fmt: skip


def test_resolved_recipe_is_complete_and_runs_as_it_is(tiny: Any, tmp_path: Path) -> None:
    recipe = Recipe.load(tiny(methods={"ema": {}}))
    recipe.save(tmp_path / "recipe.yaml")
    again = Recipe.load(tmp_path / "recipe.yaml")
    assert again == recipe
    assert again.to_dict() == recipe.to_dict()
    assert again.methods["ema"].decay == 0.999
    assert again.model.norm_eps == 1e-5, "defaults are spelled out"


def test_base_inherits_and_null_removes(tiny: Any, tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", tiny(methods={"ema": {"decay": 0.9}, "sam": {}}))
    (tmp_path / "sub").mkdir()
    child = {
        "base": "../base.yaml",
        "name": "child",
        "train": {"steps": 7},
        "methods": {"sam": None, "ema": {"decay": 0.5}},
    }
    recipe = Recipe.load(write(tmp_path / "sub" / "child.yaml", child))
    assert (recipe.name, recipe.train.steps, recipe.train.batch) == ("child", 7, 4)
    assert list(recipe.methods) == ["ema"]
    assert recipe.methods["ema"].decay == 0.5


def test_a_changed_family_starts_from_nothing(tiny: Any) -> None:
    llama = tiny(model={"qk_norm": True})
    recipe = Recipe.load(llama).override("model={family: gpt2, hidden: 32, layers: 1, heads: 2}")
    assert recipe.model.family == "gpt2"


def test_overrides(tiny: Any) -> None:
    recipe = Recipe.load(tiny(), ["train.steps=2k", "train.clip=null", "methods.ema={}", "methods.ema.decay=0.5"])
    assert recipe.train.steps == 2000
    assert recipe.train.clip is None
    assert recipe.methods["ema"].decay == 0.5
    assert recipe.override("methods.ema=null").methods == {}
    assert parse_override("methods.pkg.mod:Class.rate=0.1") == {"methods": {"pkg.mod:Class": {"rate": 0.1}}}


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("trian.steps=3", ["trian", "did you mean 'train'"]),
        ("train.stesp=3", ["train.stesp", "did you mean 'steps'"]),
        ("train.steps=soon", ["train.steps", "'soon'", "64k"]),
        ("model.hiden=3", ["model.hiden", "did you mean 'hidden'"]),
        ("model.family=lama", ["model.family", "did you mean 'llama'"]),
        ("methods.emma={}", ["methods.emma", "did you mean 'ema'"]),
        ("methods.ema.decay=2", ["methods.ema.decay", "less than 1"]),
        ("optimizer.name=adamv", ["optimizer.name", "did you mean 'adamw'"]),
        ("workload=languag", ["workload", "did you mean 'language'"]),
        ("train.precision=fp8", ["train.precision", "fp32"]),
        ("methods=[ema]", ["methods", "mapping"]),
        ("train.batch=true", ["train.batch"]),
        ("steps", ["steps", "key.path=value"]),
        ("train.batch={", ["train.batch", "YAML"]),
        ("methods.os:nothing={}", ["methods.os:nothing", "no 'nothing'"]),
        ("methods.no_such_module:X={}", ["methods.no_such_module:X", "cannot import"]),
    ],
)
def test_mistakes_name_the_path_and_the_remedy(tiny: Any, override: str, fragments: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.load(tiny(), [override])
    for fragment in fragments:
        assert fragment.lower() in str(error.value).lower()


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    cases = {
        "empty.yaml": ("", "empty"),
        "list.yaml": ("- 1\n", "list"),
        "broken.yaml": ("a: [1\n", "line"),
        "twice.yaml": ("name: a\nname: b\n", "twice"),
        "loop.yaml": ("base: loop.yaml\n", "inherits from itself"),
        "tab.yaml": ("train:\n\tsteps: 1\n", "line 2"),
    }
    for name, (text, fragment) in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(RecipeError, match=fragment):
            Recipe.load(tmp_path / name)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(RecipeError, match="UTF-8"):
        Recipe.load(tmp_path / "latin.yaml")
    with pytest.raises(RecipeError, match="no such recipe"):
        Recipe.load(tmp_path / "absent.yaml")


def test_several_mistakes_come_in_one_message(tiny: Any) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.load(tiny(), ["train.batch=0", "train.clip=-1"])
    assert "train.batch" in str(error.value)
    assert "train.clip" in str(error.value)


def test_schema_knows_every_method_and_option() -> None:
    schema = Recipe.file_schema()
    assert set(Recipe.model_fields) < set(schema["properties"])
    assert "ema" in schema["$defs"]["Methods"]["properties"]
    assert schema["$defs"]["LlamaConfig"]["properties"]["hidden"]["description"]
    assert schema["additionalProperties"] is False
    assert "from" in schema["$defs"]["TrainOptions"]["properties"]
