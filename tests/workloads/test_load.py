"""Models from run directories and Hugging Face folders, and `train.from`. Needs torch. Run: pytest tests/workloads/"""

import json
import shutil

import pytest
import torch

from headway.core.build import build_trainer
from headway.core.errors import CheckpointError, HeadwayError, ModelError, RecipeError
from headway.core.recipe import Recipe
from headway.core.run import Run
from headway.core.train import train
from headway.data.tokenizers import train_bpe
from headway.workloads.language import NextTokenLoss
from headway.workloads.load import export_hf, import_hf, load_model
from tests.conftest import generated_text, tiny_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tiny_recipe(train={"steps": 8}), run=tmp_path_factory.mktemp("load") / "run")


def evaluation(run: Run, model) -> float:
    """The loss that the run's own workload gives a model."""
    workload = build_trainer(run.recipe.override("methods={}")).workload
    with torch.no_grad():
        return workload.evaluate(model, torch.device("cpu"))["eval_loss"]


def test_a_run_gives_the_model_that_it_evaluated(run):
    model, tokenizer = load_model(run.path)
    assert not model.training and next(model.parameters()).dtype == torch.float32
    assert evaluation(run, model) == run.summary["eval_loss"]
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    assert tokenizer.fingerprint == build_trainer(run.recipe).workload.data.tokenizer.fingerprint


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_averaged_weights_are_those_that_are_loaded(precision, tmp_path):
    methods = {"ema": {"decay": 0.9}}
    averaged = train(tiny_recipe(train={"steps": 8, "precision": precision}, methods=methods), run=tmp_path / "ema")
    model, _ = load_model(averaged)
    state = _newest(averaged)
    weights, averages = state["model"], state["methods"]["ema"]["averages"]
    name = next(iter(averages))
    loaded = dict(model.named_parameters())[name]
    assert torch.equal(loaded, averages[name]) and not torch.equal(loaded, weights[name])
    tolerance = {"fp32": 0.0, "bf16": 0.05}[precision]  # in bf16 the run itself evaluates rounded weights
    assert evaluation(averaged, model) == pytest.approx(averaged.summary["eval_loss"], abs=tolerance)


def _newest(run: Run) -> dict:
    from headway.workloads.load import _checkpointer

    return _checkpointer(run.recipe, run.path).load()


def test_training_goes_on_from_a_run(run):
    data = {"tokenizer": str(run.path / "tokenizer.json")}
    started = build_trainer(Recipe.load(tiny_recipe(data=data, train={"from": str(run.path), "steps": 1})))
    assert started.evaluate()["eval_loss"] < build_trainer(Recipe.load(tiny_recipe())).evaluate()["eval_loss"] - 0.1
    model, _ = load_model(run.path)
    batch = {"tokens": torch.arange(32)[None], "targets": torch.arange(1, 33)[None]}
    with torch.no_grad():
        assert torch.equal(started.model.eval().hidden(batch["tokens"]), model.hidden(batch["tokens"]))


def test_training_goes_on_from_a_hugging_face_folder(run, tmp_path):
    folder = export_hf(run.path, tmp_path / "hf")
    data = {"tokenizer": str(folder)}
    started = build_trainer(Recipe.load(tiny_recipe(data=data, train={"from": f"hf:{folder}", "steps": 1})))
    assert started.evaluate()["eval_loss"] == pytest.approx(run.summary["eval_loss"], abs=1e-6)
    by_path = build_trainer(
        Recipe.load({**tiny_recipe(data=data), "model": {"family": "transformers", "path": str(folder)}})
    )
    assert by_path.evaluate()["eval_loss"] == pytest.approx(run.summary["eval_loss"], abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"layers": 3}}, "holds another model: layers 2, here 3"),
        ({"model": {"hidden": 64}}, "hidden 32, here 64"),
        ({"data": {"tokenizer": "bpe", "vocab": 300}}, "was trained with another tokenizer"),
        ({"train": {"from": "nowhere"}}, "nowhere: there is no such folder"),
    ],
)
def test_train_from_refuses_what_does_not_fit(changes, message, run):
    sections = {"train": {"from": str(run.path), "steps": 1}, **changes}
    with pytest.raises(HeadwayError, match=message):
        build_trainer(Recipe.load(tiny_recipe(**sections)))


def test_train_from_beside_a_path_is_refused(run, tmp_path):
    folder = export_hf(run.path, tmp_path / "hf")
    recipe = tiny_recipe(data={"tokenizer": str(folder)}, train={"from": f"hf:{folder}"})
    with pytest.raises(RecipeError, match=r"train\.from: stands beside model\.path"):
        build_trainer(Recipe.load({**recipe, "model": {"family": "transformers", "path": str(folder)}}))


def test_damage_is_told(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy)
    for file in copy.glob("checkpoints/*/*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="holds no checkpoint that can be read"):
        load_model(copy)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        load_model(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(HeadwayError, match="tokenizer"):
        load_model(copy)
    with pytest.raises(HeadwayError, match="holds neither"):
        load_model(tmp_path)


def test_export_keeps_away_from_what_is_no_model(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(HeadwayError, match="holds something that is no model"):
        export_hf(run.path, tmp_path / "full")
    export_hf(run.path, tmp_path / "hf")
    export_hf(run.path, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "llama"


def test_an_imported_folder_is_a_run_without_a_budget(run, tmp_path):
    folder = export_hf(run.path, tmp_path / "hf")
    imported = import_hf(folder, tmp_path / "in")
    theirs, ours = load_model(run)[0].state_dict(), load_model(imported)[0].state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    with pytest.raises(RecipeError, match="train: has no end"):
        train(imported.recipe, run=imported.path)
    with pytest.raises(RecipeError, match="was started with another recipe"):
        train(imported.recipe.override("train.steps=3"), run=imported.path)
    with pytest.raises(HeadwayError, match="is there already"):
        import_hf(folder, imported.path)
    with pytest.raises(ModelError):
        import_hf(_without_weights(folder, tmp_path / "broken"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def _without_weights(folder, copy):
    shutil.copytree(folder, copy)
    (copy / "model.safetensors").unlink()
    return copy


def test_a_model_of_transformers_alone_is_imported(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.GPTNeoXConfig(**sizes, vocab_size=300, max_position_embeddings=64)
    theirs = transformers.GPTNeoXForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    train_bpe(generated_text(), 300).save(tmp_path / "hf")
    imported = import_hf(tmp_path / "hf", tmp_path / "run")
    model, tokenizer = load_model(imported)
    tokens = torch.tensor([tokenizer.encode("the cat sees the tree.")])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-4)


def test_the_loss_of_a_loaded_model_is_the_plain_cross_entropy(run):
    """Against torch's own, on text written here."""
    model, tokenizer = load_model(run)
    ids = torch.tensor([tokenizer.encode("the cat sees the tree. the child finds the lamp.")])
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:]}
    with torch.no_grad():
        total, count = NextTokenLoss()(model, batch)
        expected = torch.nn.functional.cross_entropy(model(batch["tokens"])[0], batch["targets"][0])
    assert float(total) / int(count) == pytest.approx(float(expected), abs=1e-5)
