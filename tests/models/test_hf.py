"""Hugging Face folders both ways against transformers' own implementation: logits, gradients, greedy text, damage.

Needs: transformers, as the independent reference; random weights, no network.
Run: pytest tests/models/test_hf.py
"""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from headway.core.errors import ModelError
from headway.models.build import build_model
from headway.models.config import GPT2Config, LlamaConfig, MoEConfig
from headway.models.hf import load_hf, read_config, save_hf
from headway.models.hf_config import UnsupportedModel
from tests.models.references import CASES, SIZES, reference, saved, tokens

OURS: dict[str, LlamaConfig | GPT2Config] = {
    "llama": LlamaConfig(hidden=32, layers=2, heads=4, kv_heads=2, vocab=97, context=96, tied=False),
    "tied": LlamaConfig(hidden=32, layers=2, heads=4, vocab=97, context=96, head_dim=16),
    "odd width": LlamaConfig(hidden=36, layers=2, heads=5, head_dim=8, vocab=97, context=96),
    "window": LlamaConfig(hidden=32, layers=2, heads=4, vocab=97, context=96, window=5),
    "some windows": LlamaConfig(hidden=32, layers=3, heads=4, vocab=97, context=96, window=5, window_layers=(0, 2)),
    "bias": LlamaConfig(hidden=32, layers=2, heads=4, vocab=97, context=96, qkv_bias=True),
    "qk norm": LlamaConfig(hidden=32, layers=2, heads=4, vocab=97, context=96, qk_norm=True, window=5),
    "scaled": LlamaConfig(
        hidden=32, layers=2, heads=4, vocab=97, context=96, rope_scaling={"type": "yarn", "factor": 4.0}
    ),
    "mixtral": MoEConfig(
        hidden=32, layers=2, heads=4, kv_heads=2, vocab=97, context=96, experts=4, expert_width=24, tied=False, window=5
    ),
    "qwen3 moe": MoEConfig(
        hidden=32,
        layers=3,
        heads=4,
        vocab=97,
        context=96,
        experts=4,
        top_k=3,
        normalize=False,
        dense_layers=1,
        qk_norm=True,
    ),
    "gpt2": GPT2Config(hidden=32, layers=2, heads=4, vocab=97, context=96),
    "gpt2 untied": GPT2Config(hidden=32, layers=2, heads=4, vocab=97, context=96, tied=False, intermediate=40),
}


def in_transformers(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    return model.eval()


def shaken(model: Any) -> Any:
    """Random norms and biases, and matrices large enough for attention to be far from uniform."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_their_folder_gives_their_logits_here_and_back_again(case: str, tmp_path: Path) -> None:
    theirs = saved(case, tmp_path / "theirs")
    ours = load_hf(tmp_path / "theirs").eval()
    x = tokens()
    expected = theirs(x).logits
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.1  # the reference is no trivial one

    save_hf(ours, tmp_path / "back")
    again = in_transformers(tmp_path / "back")
    if case != "mistral-full":  # without its window it is a Llama
        assert type(again) is type(theirs)
    assert torch.equal(again(x).logits, expected)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize("name", OURS)
@torch.no_grad()
def test_our_model_gives_our_logits_in_transformers(name: str, tmp_path: Path) -> None:
    ours = shaken(build_model(OURS[name], seed=1))
    save_hf(ours, tmp_path)
    x = tokens()
    torch.testing.assert_close(in_transformers(tmp_path)(x).logits, ours(x), rtol=0, atol=1e-4)
    back = load_hf(tmp_path).eval()
    torch.testing.assert_close(back(x), ours(x), rtol=0, atol=1e-5)
    if name != "some windows":  # that one comes back with biases of zero
        # Spelled out, the two configurations are the same model.
        assert back.state_dict().keys() == ours.state_dict().keys()


@pytest.mark.parametrize("case", ["llama-tied", "mixtral", "qwen3-moe", "gpt2"])
def test_gradients_equal_those_of_transformers(case: str, tmp_path: Path) -> None:
    theirs = saved(case, tmp_path / "theirs")
    ours = load_hf(tmp_path / "theirs").eval()  # GPT-2's dropout off, as in theirs
    x, y = tokens(length=24), tokens(length=24, seed=2)
    for model, logits in ((theirs, theirs(x).logits), (ours, ours(x))):
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
    for model in (theirs, ours):
        for parameter in model.parameters():
            parameter.data.copy_(parameter.grad)  # the gradients travel as weights, through the same maps
    save_hf(ours, tmp_path / "gradients")
    got, expected = in_transformers(tmp_path / "gradients").state_dict(), theirs.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", ["llama-tied", "mixtral", "gpt2"])
@torch.no_grad()
def test_shards_are_read_and_written(case: str, tmp_path: Path) -> None:
    theirs = saved(case, tmp_path / "theirs", max_shard_size="30KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 1
    ours = load_hf(tmp_path / "theirs").eval()
    x = tokens()
    torch.testing.assert_close(ours(x), theirs(x).logits, rtol=0, atol=1e-4)
    save_hf(ours, tmp_path / "ours", shard_bytes=20_000)
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in ours.parameters())
    assert torch.equal(in_transformers(tmp_path / "ours")(x).logits, theirs(x).logits)
    # Writing a whole file over shards leaves no shard behind for anybody to read.
    save_hf(ours, tmp_path / "ours")
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "gpt2"])
def test_keys_left_out_mean_what_transformers_takes_them_for(kind: str, tmp_path: Path) -> None:
    if kind == "gpt2":
        given = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4}
    else:
        given = {"vocab_size": 97, "hidden_size": 1024, "intermediate_size": 64, "num_hidden_layers": 2}
        given["num_attention_heads"] = 32
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **given}))
    theirs = transformers.AutoConfig.for_model(kind, **given)
    ours = read_config(tmp_path)
    assert ours.context == theirs.max_position_embeddings
    assert ours.tied == theirs.tie_word_embeddings
    if isinstance(ours, LlamaConfig):
        assert ours.kv_head_count == theirs.num_key_value_heads
        assert ours.head_width == (getattr(theirs, "head_dim", None) or 32)
        assert ours.window == getattr(theirs, "sliding_window", None)
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert ours.norm_eps == theirs.rms_norm_eps
    else:
        assert (ours.dropout, ours.norm_eps) == (theirs.resid_pdrop, theirs.layer_norm_epsilon)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "changes", [{}, {"sliding_window": 9}, {"max_window_layers": 3}, {"max_window_layers": 0}, {"sliding_window": None}]
)
def test_windows_without_a_list_of_layers(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    given = {**SIZES, "num_hidden_layers": 30, "use_sliding_window": True, **changes}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **given}))
    theirs = transformers.AutoConfig.for_model(kind, **given)
    ours = read_config(tmp_path)
    assert isinstance(ours, LlamaConfig)
    windows = [theirs.sliding_window if name == "sliding_attention" else None for name in theirs.layer_types]
    assert [ours.window_of(layer) for layer in range(30)] == windows


@torch.no_grad()
def test_a_tied_folder_may_hold_its_head_as_well(tmp_path: Path) -> None:
    theirs = saved("llama-tied", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    x = tokens()
    torch.testing.assert_close(load_hf(tmp_path).eval()(x), theirs(x).logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_configurations_of_transformers_4_are_read(tmp_path: Path) -> None:
    theirs = saved("llama-llama3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": {"type": scaling.pop("rope_type"), **scaling}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    x = tokens()
    torch.testing.assert_close(load_hf(tmp_path).eval()(x), theirs(x).logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_original_gpt2_folder_without_prefix_and_with_buffers(tmp_path: Path) -> None:
    theirs = saved("gpt2", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 128, 128).tril()
    save_file(bare, tmp_path / "model.safetensors", {"format": "pt"})
    x = tokens()
    torch.testing.assert_close(load_hf(tmp_path).eval()(x), theirs(x).logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_dtype_on_loading_and_in_the_folder(tmp_path: Path) -> None:
    saved("llama", tmp_path / "fp32")
    half = load_hf(tmp_path / "fp32", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    save_hf(half, tmp_path / "bf16")
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    full = load_hf(tmp_path / "bf16")
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    assert torch.equal(full.embedding.weight, half.embedding.weight.float())


def test_the_tokenizer_goes_along_and_the_end_of_text_is_written(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<|end|>": 0, "a": 1, "b": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(tmp_path / "tok.json"))
    model = build_model(LlamaConfig(hidden=16, layers=1, heads=2, vocab=3, context=32), seed=0)
    save_hf(model, tmp_path / "model", tmp_path / "tok.json", eos=0)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model", local_files_only=True)
    assert theirs("a b a")["input_ids"] == [1, 2, 1]
    assert (theirs.eos_token_id, theirs.model_max_length) == (0, 32)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "model").eos_token_id == 0
    # A folder of a tokenizer is copied with all its files.
    save_hf(model, tmp_path / "again", tmp_path / "model", eos=0)
    assert (tmp_path / "again" / "tokenizer_config.json").read_text() == (
        tmp_path / "model" / "tokenizer_config.json"
    ).read_text()
    with pytest.raises(ModelError, match="holds no tokenizer"):
        save_hf(model, tmp_path / "third", tmp_path / "missing.json")


def test_no_end_of_text_means_none_in_transformers(tmp_path: Path) -> None:
    save_hf(build_model(LlamaConfig(hidden=16, layers=1, heads=2, vocab=97), seed=0), tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.eos_token_id is config.bos_token_id is None  # a Llama's own would be 2 and 1


# Damage: (what is done to a good folder, what the message must say).


def edit_config(**changes: Any) -> Any:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in config.items() if value != "REMOVED"}))

    return edit


def edit_tensors(change: Any) -> Any:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return edit


def cut(folder: Path, keep: float) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


NORM = "model.norm.weight"
DAMAGE: dict[str, tuple[Any, str]] = {
    "no folder": (shutil.rmtree, "there is no such folder"),
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "no json": (lambda d: (d / "config.json").write_text("{"), r"config.json: is no JSON"),
    "binary config": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe"), r"config.json: is no JSON"),
    "a list": (lambda d: (d / "config.json").write_text("[]"), "holds a list, expected an object"),
    "unknown family": (edit_config(model_type="gpt_neox"), "model_type .* got 'gpt_neox', .*family: transformers"),
    "no family": (edit_config(model_type="REMOVED"), "model_type .* got None"),
    "no width": (edit_config(hidden_size="REMOVED"), "does not say hidden_size"),
    "impossible width": (edit_config(hidden_size=-1), r"no possible model \(hidden: got -1"),
    "text for a number": (edit_config(num_hidden_layers="many"), "no possible model"),
    "impossible heads": (edit_config(num_key_value_heads=3), r"kv_heads: got 3, expected a divisor of heads \(4\)"),
    "unknown scaling": (edit_config(rope_parameters={"rope_type": "longrope"}), "rope_type .* got 'longrope'"),
    "scaling lacks a key": (edit_config(rope_parameters={"rope_type": "llama3", "factor": 2.0}), "low_freq_factor"),
    "mlp bias": (edit_config(mlp_bias=True), "mlp_bias .*family: transformers"),
    "activation": (edit_config(hidden_act="gelu"), "hidden_act .* got 'gelu', expected silu"),
    "quantised": (edit_config(quantization_config={"bits": 4}), "quantization_config"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has neither model.safetensors nor"),
    "pickled weights": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        "Only safetensors are read, not pytorch_model.bin",
    ),
    "half a file": (lambda d: cut(d, 0.5), "model.safetensors: is truncated or no safetensors"),
    "a few bytes": (lambda d: cut(d, 0.0001), "model.safetensors: is truncated or no safetensors"),
    "an empty file": (lambda d: cut(d, 0), "model.safetensors: is truncated or no safetensors"),
    "a missing tensor": (edit_tensors(lambda t: t.pop(NORM)), f"lacks 1 tensors: {NORM}"),
    "a tensor too many": (
        edit_tensors(lambda t: t.update({"model.extra": t[NORM].clone()})),
        "without a place for them in the configuration, 1 tensors: model.extra",
    ),
    "a wrong shape": (
        edit_tensors(lambda t: t.update({NORM: torch.ones(31)})),
        rf"tensor '{NORM}' has the wrong shape, got \(31,\), expected \(32,\)",
    ),
    "another vocabulary": (edit_config(vocab_size=98), r"embed_tokens.weight' .*got \(97, 32\), expected \(98, 32\)"),
    "integers": (edit_tensors(lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)})), "is quantised"),
    "a broken index": (
        lambda d: (
            (d / "model.safetensors").unlink(),
            (d / "model.safetensors.index.json").write_text('{"weight_map": 3}'),
        ),
        "is no index of shards",
    ),
    "an index out of the folder": (
        lambda d: (
            (d / "model.safetensors").rename(d.parent / "x.safetensors"),
            (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
        ),
        "names a file outside the folder",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders_give_one_clear_message(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    reference("llama").save_pretrained(folder)
    act, message = DAMAGE[damage]
    act(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load_hf(folder)
    assert str(folder) in str(caught.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    saved("llama", tmp_path, max_shard_size="30KB")
    sorted(tmp_path.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-\d+.safetensors: is missing"):
        load_hf(tmp_path)


def test_only_settings_of_our_own_families_count_as_known(tmp_path: Path) -> None:
    for changes, known in (({"model_type": "opt"}, False), ({"mlp_bias": True}, True)):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES, **changes}))
        with pytest.raises(UnsupportedModel) as caught:
            read_config(tmp_path)
        assert caught.value.known_family is known


def test_a_model_whose_parts_were_replaced_is_not_written(tmp_path: Path) -> None:
    model = build_model(OURS["llama"], seed=0)
    model.blocks[0].mlp.down = torch.nn.Identity()
    with pytest.raises(ModelError, match=r"blocks.0.mlp.down.weight.*Undo or merge"):
        save_hf(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_family_of_transformers_has_both_biases_and_qk_norm(tmp_path: Path) -> None:
    config = LlamaConfig(hidden=16, layers=1, heads=2, vocab=97, qk_norm=True, qkv_bias=True)
    with pytest.raises(ModelError, match=r"model.qkv_bias"):
        save_hf(build_model(config, seed=0), tmp_path)


def test_a_full_disk_leaves_the_old_model_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = build_model(OURS["llama"], seed=0)
    save_hf(old, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("headway.models.hf.save_file", full)
    with pytest.raises(ModelError, match=r"cannot be written .*No space left"):
        save_hf(build_model(OURS["gpt2"], seed=0), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_in_the_way_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ModelError, match="cannot be written"):
        save_hf(build_model(OURS["llama"], seed=0), tmp_path / "taken")
