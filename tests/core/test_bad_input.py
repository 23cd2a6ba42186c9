"""Malformed recipes and damaged inputs: one message with the recipe path or the file, exit status 2, nothing lost.

Needs nothing; a small tmpfs where mounting is allowed (skipped elsewhere). Most cases call the command line's `main`
in this process, some are real processes. Run: pytest tests/core/test_bad_input.py
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from headway.cli.main import main
from headway.core.train import train
from headway.resilience.manifest import verify
from tests.conftest import generated_text, tiny_recipe

STEPS = 4
DOCUMENTS = generated_text(documents=12, words=60)


def recipe(**sections: Any) -> dict[str, Any]:
    sections["data"] = {"documents": DOCUMENTS, **sections.get("data", {})}
    sections["train"] = {"steps": STEPS, **sections.get("train", {})}
    return tiny_recipe(**{"model": {"hidden": 16}, "checkpoint": {"every": 2}, **sections})


class Place:
    """A finished run and what it was made of, to be damaged in copies."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.recipe = self.write("recipe.yaml", yaml.safe_dump(recipe()))
        self.run = train(recipe(), run=root / "run").path

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.root / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def copy(self, what: str = "run") -> Path:
        number = sum(1 for _ in self.root.iterdir())
        return Path(shutil.copytree(self.root / what, self.root / f"{what}-{number}"))

    def hf(self) -> Path:
        """A Hugging Face folder of the run's model."""
        if not (self.root / "hf").exists():
            assert main(["export", str(self.run), "--to", "hf", str(self.root / "hf")]) == 0
        return self.copy("hf")

    def recipe_on(self, **sections: Any) -> Path:
        return self.write("other.yaml", yaml.safe_dump(recipe(**sections)))

    def text_recipe(self, text: str | bytes, name: str = "text.txt", **data: Any) -> Path:
        path = self.write(name, text)
        data = {"source": "text", "documents": None, "path": str(path), "cache": str(self.root / "cache"), **data}
        return self.recipe_on(data=data)

    def from_hf(self, folder: Path) -> Path:
        return self.recipe_on(data={"tokenizer": str(self.run / "tokenizer.json")}, train={"from": f"hf:{folder}"})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything in a folder; the lock file, empty or with a process id, does not count."""
    if not folder.is_dir():
        return {}
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def refused(capsys: Any, argv: list[Any], fragments: tuple[str, ...], kept: Path) -> str:
    """Run a command that must be refused; ``kept`` must be the same before and after."""
    before = files_of(kept)
    capsys.readouterr()
    status = main([str(argument) for argument in argv])
    error = capsys.readouterr().err
    assert status == 2, error
    assert "Traceback" not in error
    messages = [line for line in error.splitlines() if line.startswith("headway: ") and "fallback:" not in line]
    assert len(messages) == 1, error
    message = error[error.index(messages[0]) :]
    for fragment in fragments:
        assert fragment in message, f"{fragment!r} is not in {message!r}"
    assert len(message) < 1200, f"{len(message)} characters bury the message"
    assert files_of(kept) == before, "the run directory was touched"
    return message


# Recipes that cannot be read, or hold something that is refused when they are read.

RECIPES: list[tuple[str, tuple[str, ...]]] = [
    # unknown names: the path and the nearest right one
    ("modle.hidden=1", ("modle: is not a key of a recipe", "Did you mean 'model'?")),
    ("train.stpes=3", ("train.stpes: is not an option here", "Did you mean 'steps'?")),
    ("model.hiden=3", ("model.hiden", "Did you mean 'hidden'?")),
    ("model.family=lama", ("model.family: got 'lama'", "Did you mean 'llama'?")),
    ("workload=langage", ("workload: there is no workload 'langage'", "Did you mean 'language'?")),
    ("optimizer.name=adam", ("optimizer.name: there is no optimizer 'adam'", "Did you mean 'adamw'?")),
    ("schedule.name=cosin", ("schedule.name: there is no schedule 'cosin'", "Did you mean 'cosine'?")),
    ("checkpoint.mode=plane", ("checkpoint.mode: there is no checkpointer 'plane'", "Did you mean 'plain'?")),
    ("checkpoint.evry=5", ("checkpoint.evry", "Did you mean 'every'?")),
    ("methods.emma={}", ("methods.emma: there is no method 'emma'", "Did you mean 'ema'?")),
    ("methods.ema.decy=0.5", ("methods.ema.decy", "Did you mean 'decay'?")),
    ("log.sinks=[wandbb]", ("log.sinks.0: got 'wandbb'", "Did you mean 'wandb'?")),
    ("data.source=txt", ("data.source: got 'txt'", "Did you mean 'text'?")),
    # wrong types
    ("model.hidden=abc", ("model.hidden: got 'abc', expected a valid integer",)),
    ("model.hidden=2.5", ("model.hidden: got 2.5, expected a valid integer",)),
    ("model.family=[x]", ("model.family: got ['x']",)),
    ("optimizer.lr=fast", ("optimizer.lr: got 'fast', expected a valid number",)),
    ("optimizer.lr=.inf", ("optimizer.lr: got inf, expected a finite number",)),
    ("optimizer.name=[a]", ("optimizer.name: got ['a'], expected a name", "adamw")),
    ("optimizer=[]", ("optimizer: got [], expected a mapping of options",)),
    ("train=fast", ("train: got 'fast', expected a mapping of options",)),
    ("train.clip=[1]", ("train.clip: got [1], expected a valid number",)),
    ("train.steps={a: 1}", ("train.steps: got {'a': 1}", "64k")),
    ("train.tokens=5Q", ("train.tokens: got '5Q'", "such as 1000, 64k, 5M")),
    ("train.time=2 fortnights", ("train.time: got '2 fortnights'", "such as 90s, 30min")),
    ("seed=abc", ("seed: got 'abc', expected a valid integer",)),
    ("strict=maybe", ("strict: got 'maybe', expected a valid boolean",)),
    ("methods=[ema]", ("methods: got ['ema'], expected a mapping of options",)),
    ("methods.ema=3", ("methods.ema: got 3, expected a mapping of options",)),
    ("data.documents=[1]", ("data.documents.0: got 1, expected a valid string",)),
    # refused values
    ("model.hidden=0", ("model.hidden: got 0, expected greater than or equal to 1",)),
    ("model.heads=3", ("head_dim", "hidden (16) is no multiple of heads (3)")),
    ("model.kv_heads=3", ("model.kv_heads: got 3, expected a divisor of heads (2)",)),
    ("model.dropout=1", ("model.dropout: got 1, expected less than 1",)),
    ("model.rope_scaling={rope_type: foo}", ("model.rope_scaling", "linear, dynamic, llama3, yarn")),
    ("optimizer.lr=-1", ("optimizer.lr: got -1, expected greater than 0",)),
    ("optimizer.betas=[0.9, 1.0]", ("optimizer: betas (0.9, 1.0)", "two numbers in [0, 1)")),
    ("schedule.warmup=150%", ("schedule.warmup: got '150%'", "a share of the run below 100%")),
    ("schedule.decay=10%", ("schedule: cosine has no `decay`", "`name: wsd`")),
    ("schedule={name: wsd, warmup: 60%, decay: 60%}", ("schedule: warmup and decay together take 120%",)),
    ("train.batch=0", ("train.batch: got 0",)),
    ("train.steps=1.5", ("train.steps: got 1.5, expected a whole number",)),
    ("train.precision=fp16", ("train.precision: got 'fp16', expected 'fp32', 'bf16' or 'fp64'",)),
    ("train.device=tpu", ("train.device: got 'tpu', expected 'auto', 'cpu' or 'cuda'",)),
    ("checkpoint.keep=0", ("checkpoint.keep: got 0",)),
    ("eval.every=-1", ("eval.every: got -1",)),
    ("log.every=0", ("log.every: got 0",)),
    ("data.sequence=0", ("data.sequence: got 0",)),
    ("data.vocab=10", ("data.vocab: got 10, expected greater than or equal to 257",)),
    ("data.validation_fraction=0.9", ("data.validation_fraction: got 0.9, expected less than or equal to 0.5",)),
    ("data.on_exhausted=explode", ("data.on_exhausted: got 'explode'", "'stop'")),
    ("data.path=x", ("data.path: got 'x'", "source: memory has none")),
    ("data.source=text", ("data.path", "expected a path for source: text")),
    ("methods.ema.decay=2", ("methods.ema.decay: got 2, expected less than 1",)),
    ("methods.sam={rho: -1}", ("methods.sam.rho: got -1",)),
    ("methods.token-accumulation={}", ("methods.token-accumulation.targets: is required",)),
    ("name=../up", ("name: got '../up'", "pattern")),
    ("seed=-1", ("seed: got -1",)),
    # classes named in the recipe
    ("workload=nowhere:X", ("workload: cannot import 'nowhere:X'", "No module named 'nowhere'")),
    ("workload=json:loads", ("workload: got 'json:loads', expected a headway workload",)),
    ("methods.json:loads={}", ("methods.json:loads: got 'json:loads', expected a headway method",)),
    ("methods.json:nope={}", ("methods.json:nope: 'json' has no 'nope'",)),
    ("methods.this_is_broken:X={}", ("methods.this_is_broken:X: cannot import", "SyntaxError")),
    # overrides that are none
    ("novalue", ("novalue: is not an override", "key.path=value")),
    ("train..steps=3", ("train..steps=3: is not an override",)),
    ("train.steps=[", ("train.steps: got '[', expected a value in YAML",)),
    ("base=other.yaml", ("base: is not a key of a recipe",)),
]


@pytest.mark.parametrize(("override", "fragments"), RECIPES, ids=[case[0] for case in RECIPES])
def test_overrides(
    place: Place, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, override: str, fragments: Any
) -> None:
    (tmp_path / "this_is_broken.py").write_text("x = = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    refused(capsys, ["train", place.recipe, override, "--run", place.run], fragments, place.run)


FILES: list[tuple[str, str | bytes, tuple[str, ...]]] = [
    ("empty", "", ("is empty", "headway recipe schema")),
    ("a list", "- a\n- b\n", ("holds a list, expected a mapping of recipe keys",)),
    ("a sentence", "just text\n", ("holds a str",)),
    ("cut short", "model: {hidden: 3\n", ("is not YAML in line 2",)),
    ("tabs", "model:\n\thidden: 3\n", ("is not YAML in line 2", "\\t")),
    ("a key twice", "seed: 1\nseed: 2\n", ("the key 'seed' stands twice", "line 2")),
    ("latin-1", "name: caf\xe9\n".encode("latin-1"), ("is not UTF-8 text", "byte 9")),
    ("a zero byte", b"name: a\x00b\n", ("is not YAML", "#x0000")),
    ("code", "model: !!python/object/apply:os.system ['echo hi']\n", ("is not YAML in line 1", "os.system")),
    ("nested too deeply", "a: " + "[" * 5000 + "]" * 5000, ("is nested too deeply",)),
    ("its own base", "base: bad.yaml\n", ("inherits from itself",)),
    ("a missing base", "base: basis.yaml\n", ("basis.yaml: there is no such recipe",)),
    ("a base that is a list", "base: [a]\n", ("base: got ['a'], expected the path of a recipe file",)),
    ("a number as key", "3: 4\n", ("3: is not a key of a recipe",)),
    ("no model", "train: {steps: 3}\n", ("model.hidden: is required", "model.layers", "model.heads")),
]


@pytest.mark.parametrize(("content", "fragments"), [case[1:] for case in FILES], ids=[case[0] for case in FILES])
def test_files(place: Place, capsys: Any, content: str | bytes, fragments: Any) -> None:
    path = place.write("bad.yaml", content)
    message = refused(capsys, ["train", path, "--run", place.run], fragments, place.run)
    assert "bad.yaml" in message or any(key in message for key in ("base", "model.hidden", "3: is not"))


def test_a_missing_file(place: Place, capsys: Any) -> None:
    refused(capsys, ["train", place.root / "recipes.yaml"], ("there is no such recipe", "recipe.yaml'?"), place.run)


def test_several_mistakes_are_told_at_once(place: Place, capsys: Any) -> None:
    refused(
        capsys, ["train", place.recipe, "model.hidden=x", "model.layers=y", "--run", place.run],
        ("model.hidden: got 'x'", "also model.layers: got 'y'"), place.run,
    )  # fmt: skip


# Recipes that are refused when the run is built.

BUILDS: list[tuple[str, tuple[str, ...]]] = [
    ("train.steps=null", ("train: has no end", "train.tokens or train.time")),
    ("train.micro_batch=3", ("train.micro_batch: does not divide", "1, 2, 4")),
    ("data.sequence=128", ("data.sequence: got 128, expected at most model.context (64)",)),
    ("data.documents=[]", ("data.documents: holds no text",)),
    ("data.tokenizer=nope", ("data.tokenizer: got 'nope'", "byte, bpe, or the path")),
    ("model.vocab=10", ("model.vocab: got 10, expected at least 257, the tokenizer's vocabulary",)),
    ("train.from=/nonexistent", ("/nonexistent: there is no such folder",)),
    ("methods.length-warmup={}", ("methods.length-warmup.first: got 64, expected less than data.sequence (32)",)),
]


@pytest.mark.parametrize(("override", "fragments"), BUILDS, ids=[case[0] for case in BUILDS])
def test_builds(place: Place, capsys: Any, tmp_path: Path, override: str, fragments: Any) -> None:
    refused(capsys, ["train", place.recipe, override, "--run", tmp_path / "new"], fragments, tmp_path)
    assert not (tmp_path / "new").exists()


def test_a_missing_package_is_named_before_the_run_is_touched(place: Place, capsys: Any) -> None:
    if shutil.which("wandb"):
        pytest.skip("wandb is installed here")
    run = place.copy()
    refused(capsys, ["train", place.recipe, "log.sinks=[wandb]", "--run", run], ("log.sinks", "headway[wandb]"), run)


def test_there_are_enough_cases() -> None:
    assert len(RECIPES) + len(FILES) + len(BUILDS) >= 40 and len(DAMAGES) >= 15


# Damaged inputs. Each case makes the damage and returns the command, what its message must hold, and what must be kept.

Case = tuple[list[Any], tuple[str, ...], Path]
DAMAGES: dict[str, Callable[[Place], Case]] = {}


def damage(case: Callable[[Place], Case]) -> Callable[[Place], Case]:
    DAMAGES[case.__name__] = case
    return case


@damage
def text_missing(place: Place) -> Case:
    path = place.text_recipe("x", path=str(place.root / "texd.txt"))
    return ["train", path, "--run", place.root / "new"], ("texd.txt: does not exist", "text.txt"), place.run


@damage
def text_empty(place: Place) -> Case:
    return ["train", place.text_recipe(""), "--run", place.root / "new"], ("text.txt: holds no text",), place.run


@damage
def text_too_short(place: Place) -> Case:
    path = place.text_recipe("short")
    return ["train", path, "--run", place.root / "new"], ("text.txt", "too short", "data.validation_path"), place.run


@damage
def text_not_utf8(place: Place) -> Case:
    path = place.text_recipe(b"fine \xff\xfe not" * 100)
    return ["train", path, "--run", place.root / "new"], ("text.txt: is not UTF-8", "at byte 5"), place.run


@damage
def jsonl_malformed_line(place: Place) -> Case:
    path = place.text_recipe('{"text": "fine"}\n{"text": \n' * 20, "data.jsonl", source="jsonl")
    return ["train", path, "--run", place.root / "new"], ("data.jsonl:2: is not JSON", "column 10"), place.run


@damage
def jsonl_without_the_field(place: Place) -> Case:
    path = place.text_recipe('{"txt": "fine"}\n' * 20, "data.jsonl", source="jsonl")
    return ["train", path, "--run", place.root / "new"], ("data.jsonl:1: has no field 'text'", "data.field"), place.run


@damage
def parquet_damaged(place: Place) -> Case:
    pytest.importorskip("pyarrow")
    path = place.text_recipe(b"PAR1 nothing", "data.parquet", source="parquet")
    return ["train", path, "--run", place.root / "new"], ("data.parquet: is not a readable Parquet",), place.run


@damage
def tokenizer_damaged(place: Place) -> Case:
    tokenizer = place.write("tokenizer.json", '{"version": "1.0", "model"')
    path = place.recipe_on(data={"tokenizer": str(tokenizer)})
    return ["train", path, "--run", place.root / "new"], ("tokenizer.json: is not a tokenizer file",), place.run


@damage
def wrong_vocabulary(place: Place) -> Case:
    path = place.recipe_on(data={"tokenizer": "bpe", "vocab": 300}, train={"from": str(place.run)})
    return ["train", path, "--run", place.root / "new"], ("train.from", "another tokenizer"), place.run


@damage
def cache_truncated_in_a_strict_run(place: Place) -> Case:
    path = place.text_recipe("\n\n".join(DOCUMENTS), name="cached.txt")
    assert main(["train", str(path), "--run", str(place.root / "cached")]) == 0
    for file in (place.root / "cache" / "tokens").glob("*.bin"):
        file.write_bytes(file.read_bytes()[:-9])
    argv = ["train", path, "strict=true", "--run", place.root / "new"]
    return argv, ("building the token cache", "bytes instead of", "strict"), place.root / "cached"


@damage
def cache_is_a_file(place: Place) -> Case:
    path = place.text_recipe("\n\n".join(DOCUMENTS), cache=str(place.recipe))
    return ["train", path, "--run", place.root / "new"], ("recipe.yaml", "cannot be written"), place.run


@damage
def run_without_recipe(place: Place) -> Case:
    run = place.copy()
    (run / "recipe.yaml").unlink()
    return ["train", place.recipe, "--run", run], (str(run), "is not empty and holds no run", "--run"), run


@damage
def run_with_damaged_recipe(place: Place) -> Case:
    run = place.copy()
    (run / "recipe.yaml").write_text("model: {")
    return ["train", place.recipe, "--run", run], (f"{run}/recipe.yaml", "is not YAML in line 1"), run


@damage
def run_with_foreign_recipe(place: Place) -> Case:
    run = place.copy()
    (run / "recipe.yaml").write_text("modl: {}")
    return ["generate", run, "--prompt", "a"], (f"{run}/recipe.yaml", "modl: is not a key", "'model'"), run


@damage
def run_is_a_file(place: Place) -> Case:
    return ["train", place.recipe, "--run", place.recipe], ("recipe.yaml: is a file", "directory"), place.run


@damage
def run_below_a_file(place: Place) -> Case:
    return ["train", place.recipe, "--run", place.recipe / "run"], ("cannot be written", "--run"), place.run


@damage
def run_of_another_method(place: Place) -> Case:
    path = place.recipe_on(methods={"ema": {}})
    return ["train", path, "--run", place.run], ("methods.ema", "another recipe", "--fresh"), place.run


@damage
def run_on_other_data(place: Place) -> Case:
    path = place.text_recipe("\n\n".join(DOCUMENTS), name="changing.txt", tokenizer="byte")
    run = place.root / "changing"
    assert main(["train", str(path), "--run", str(run)]) == 0
    (place.root / "changing.txt").write_text("\n\n".join(generated_text(documents=12, words=60, seed=9)))
    return ["train", path, "--run", run], ("data: is not what the checkpoint was trained on", "Restore the data"), run


@damage
def checkpoints_all_damaged(place: Place) -> Case:
    run = place.copy()
    for folder in (run / "checkpoints").iterdir():
        (folder / "state.json").write_text("{}")
    expected = ("checkpoints: holds no checkpoint that can be read", "step-00000004/state.json", "step-00000002")
    return ["train", place.recipe, "--run", run], expected, run


@damage
def checkpoint_damaged_in_a_strict_run(place: Place) -> Case:
    run = place.copy()
    next((run / "checkpoints" / "step-00000004").glob("*.distcp")).write_bytes(b"x")
    return (
        ["train", place.recipe, "strict=true", "--run", run],
        ("step-00000004/", ".distcp: is damaged", "strict"),
        run,
    )


@damage
def checkpoints_gone(place: Place) -> Case:
    run = place.copy()
    shutil.rmtree(run / "checkpoints")
    return ["train", place.recipe, "--run", run], ("checkpoints: is gone or empty", "--fresh"), run


@damage
def checkpoints_is_a_file(place: Place) -> Case:
    run = place.copy()
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("x")
    return ["train", place.recipe, "--run", run], ("checkpoints: is a file",), run


@damage
def generating_without_checkpoints(place: Place) -> Case:
    run = place.copy()
    shutil.rmtree(run / "checkpoints")
    return ["generate", run, "--prompt", "a"], (f"{run}: holds no checkpoint yet",), run


@damage
def generating_without_tokenizer(place: Place) -> Case:
    run = place.copy()
    (run / "tokenizer.json").unlink()
    return ["generate", run, "--prompt", "a"], (f"{run}/tokenizer.json",), run


@damage
def metrics_is_a_folder(place: Place) -> Case:
    run = place.copy()
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    return ["train", place.recipe, "--run", run], (f"{run}/metrics.jsonl: cannot be written",), run


@damage
def summary_damaged(place: Place) -> Case:
    run = place.copy()
    (run / "summary.json").write_text('{"steps": ')
    return ["report", run], (f"{run}/summary.json", "JSON"), run


def _hf_tensors(folder: Path, change: Callable[[dict[str, Any], str], None]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors, next(name for name in tensors if "mlp" in name))
    save_file(tensors, folder / "model.safetensors")


@damage
def hf_missing_tensor(place: Place) -> Case:
    folder = place.hf()
    _hf_tensors(folder, lambda tensors, name: tensors.pop(name))
    expected = (f"{folder}/model.safetensors: lacks 1 tensors", "mlp")
    return ["train", place.from_hf(folder), "--run", place.root / "new"], expected, folder


@damage
def hf_misshapen_tensor(place: Place) -> Case:
    folder = place.hf()
    _hf_tensors(folder, lambda tensors, name: tensors.update({name: tensors[name][:-1].clone()}))
    return ["generate", folder, "--prompt", "a"], (f"{folder}/model.safetensors", "has the wrong shape", "got"), folder


@damage
def hf_truncated(place: Place) -> Case:
    folder = place.hf()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    expected = (f"{file}: is truncated",)
    return ["import", folder, "--run", place.root / "imported"], expected, folder


@damage
def hf_damaged_config(place: Place) -> Case:
    folder = place.hf()
    (folder / "config.json").write_text("{")
    return ["generate", folder, "--prompt", "a"], (f"{folder}/config.json: is no JSON",), folder


@damage
def hf_lost_shard(place: Place) -> Case:
    folder = place.hf()
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = ("model-00001-of-00001.safetensors: is missing", "incomplete")
    return ["generate", folder, "--prompt", "a"], expected, folder


@pytest.mark.parametrize("case", DAMAGES.values(), ids=DAMAGES)
def test_damages(place: Place, capsys: Any, case: Callable[[Place], Case]) -> None:
    argv, fragments, kept = case(place)
    refused(capsys, argv, fragments, kept)
    for made in (place.root / "new", place.root / "imported"):
        assert not files_of(made), f"{made} was left behind"


def test_a_run_that_another_process_holds(place: Place, capsys: Any) -> None:
    with (place.run / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(capsys, ["train", place.recipe, "--run", place.run], (str(place.run), "another process"), place.run)


def test_checkpoints_that_may_not_be_read(place: Place, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, opened = place.copy(), io.open
    before = files_of(run)

    def refuse(file: Any, *args: Any, **kwargs: Any) -> Any:  # simulated: root may read everything
        if "checkpoints" in str(file):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return opened(file, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(io, "open", refuse)
        status = main(["train", str(place.recipe), "--run", str(run)])
        error = capsys.readouterr().err
    assert status == 2 and "cannot be read (Permission denied)" in error and "Traceback" not in error
    assert files_of(run) == before


def test_divergence_keeps_the_checkpoints(place: Place, capsys: Any, tmp_path: Path) -> None:
    path = place.recipe_on(train={"clip": None, "steps": 9}, optimizer={"lr": 1e30}, checkpoint={"every": 1})
    assert main(["train", str(path), "schedule.warmup=0", "--run", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and "headway: step" in error and "nan" in error and "optimizer.lr" in error
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert kept and all(verify(folder) for folder in kept)
    before = files_of(tmp_path / "run")
    assert main(["train", str(path), "schedule.warmup=0", "--run", str(tmp_path / "run")]) == 2
    assert files_of(tmp_path / "run" / "checkpoints") == {
        name.removeprefix("checkpoints/"): data for name, data in before.items() if name.startswith("checkpoints/")
    }


# Damage that a run recovers from by itself, and says so.


def losses(run: Path) -> list[Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss"), line.get("eval_loss")) for line in lines]


def test_a_damaged_newest_checkpoint_costs_some_steps(place: Place, capsys: Any) -> None:
    run = place.copy()
    next((run / "checkpoints" / "step-00000004").glob("*.distcp")).write_bytes(b"x")
    assert main(["train", str(place.recipe), "--run", str(run)]) == 0
    error = capsys.readouterr().err
    assert "fallback" in error and "step-00000004" in error and "2 steps of training" in error
    assert losses(run) == losses(place.run)
    assert all(verify(folder) for folder in (run / "checkpoints").iterdir())


def test_a_damaged_tail_of_the_metrics_is_written_again(place: Place) -> None:
    run = place.copy()
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    (run / "summary.json").unlink()
    file = run / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-30] + b"\xff\x00{")
    assert main(["train", str(place.recipe), "--run", str(run)]) == 0
    assert losses(run) == losses(place.run)


def test_a_truncated_cache_is_built_again(place: Place, capsys: Any, tmp_path: Path) -> None:
    path = place.text_recipe("\n\n".join(DOCUMENTS), cache=str(tmp_path / "cache"))
    assert main(["train", str(path), "--run", str(tmp_path / "a")]) == 0
    for file in (tmp_path / "cache" / "tokens").glob("*.bin"):
        file.write_bytes(file.read_bytes()[:-9])
    capsys.readouterr()
    assert main(["train", str(path), "--run", str(tmp_path / "b")]) == 0
    assert "fallback: building the token cache" in capsys.readouterr().err
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


# A disk that is full.


@pytest.mark.parametrize("after", [0, 2, 4, 9, 11])
def test_a_disk_that_fills_up(
    place: Place, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, after: int
) -> None:
    """Simulated: after so many files no more can be synced."""
    synced, calls = os.fsync, [0]

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        status = main(["train", str(place.recipe), "--run", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert status == 2 and "No space left on device" in error and "Traceback" not in error
    assert str(tmp_path / "run") in error
    for folder in (tmp_path / "run").glob("checkpoints/*"):
        assert verify(folder)
    assert main(["train", str(place.recipe), "--run", str(tmp_path / "run")]) == 0, "it goes on when there is room"
    assert losses(tmp_path / "run") == losses(place.run)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("needs root and mount")
    mounted = []

    def make(size: str) -> Path:
        disk = tmp_path / f"disk-{size}"
        disk.mkdir()
        argv = [mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")
        mounted.append(disk)
        return disk

    yield make
    for disk in mounted:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_really_full_disk(place: Place, capsys: Any, tiny_disk: Callable[[str], Path]) -> None:
    sizes = {"recipe": "4k", "checkpoint": "100k", "metrics": "72k"}
    for what, size in sizes.items():
        disk = tiny_disk(size)
        # Without checkpoints on the way, the metrics of many steps fill the disk.
        changes = ["checkpoint.every=null", "train.steps=600"] if what == "metrics" else []
        status = main(["train", str(place.recipe), *changes, "--run", str(disk / "run")])
        error = capsys.readouterr().err
        assert status == 2 and "No space left on device" in error and "Traceback" not in error, error[-800:]
        assert what in error.splitlines()[-1], error.splitlines()[-1]
        assert not list(disk.rglob("*.tmp*")), "parts of files are left"


# Real processes.


@pytest.mark.parametrize("kind", ["recipe", "checkpoint"])
def test_as_a_process(place: Place, kind: str) -> None:
    if kind == "recipe":
        argv, message = [place.recipe, "train.stpes=3", "--run", place.run], "train.stpes: is not an option here"
        kept = place.run
    else:
        argv, (message, *_), kept = checkpoints_all_damaged(place)
        argv = argv[1:]
    before = files_of(kept)
    done = subprocess.run(
        [sys.executable, "-m", "headway.cli.main", "train", *map(str, argv)], capture_output=True, text=True
    )
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and files_of(kept) == before
