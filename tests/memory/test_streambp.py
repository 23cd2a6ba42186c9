"""StreamBP: gradients equal plain autograd's in fp64, for every shape of chunk, mask and block.

Needs transformers for some tests. Run: pytest tests/memory/test_streambp.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headway.core.build import build_trainer
from headway.core.errors import MethodError
from headway.core.meters import live_peak
from headway.core.recipe import Recipe
from headway.core.surgery import restore_blocks
from headway.layers.linear_cross_entropy import linear_cross_entropy
from headway.memory.streambp.stream import StreamedBlock, stream_backward
from headway.models.build import build_model
from headway.models.config import GPT2Config, LlamaConfig
from headway.models.structure import structure

T = 21
CONFIGS = {
    "plain": LlamaConfig(hidden=32, layers=2, heads=4, vocab=50, context=64),
    "gqa": LlamaConfig(hidden=32, layers=2, heads=4, kv_heads=2, vocab=50, context=64, tied=False),
    "qk-norm": LlamaConfig(hidden=32, layers=2, heads=4, kv_heads=1, qk_norm=True, vocab=50, context=64),
    "bias": LlamaConfig(hidden=32, layers=2, heads=4, qkv_bias=True, vocab=50, context=64),
    "window": LlamaConfig(hidden=32, layers=2, heads=4, window=5, vocab=50, context=64),
    "gpt2": GPT2Config(hidden=32, layers=2, heads=4, vocab=50, context=64),
}


def model_of(config: Any) -> Any:
    return build_model(config, seed=0).double()


def batch(padding: str = "none") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(50, (3, T), generator=generator)
    targets = torch.randint(50, (3, T), generator=generator)
    if padding == "left":
        targets[0, :9] = -100
    elif padding == "right":
        targets[1, 13:] = -100
    elif padding == "row":
        targets[2] = -100
    return {"tokens": tokens, "targets": targets}


def gradients(model: Any, data: dict[str, Tensor], chunk: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    hidden = model.hidden(data["tokens"], segments=data.get("segments"))
    loss, count = linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, data["targets"].flatten(), chunk=chunk)
    (loss / count).backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(model: Any, data: dict[str, Tensor], chunk: int) -> None:
    loss, plain = gradients(model, data)
    blocks = structure(model).blocks
    stream_backward(blocks, chunk)
    try:
        ours, streamed = gradients(model, data, chunk=4)
    finally:
        restore_blocks(blocks)
    torch.testing.assert_close(ours, loss, rtol=1e-12, atol=0)
    assert streamed.keys() == plain.keys(), "names change"
    most = max(grad.norm() for grad in plain.values())
    for name, grad in plain.items():  # the true gradient of a bias of keys is zero
        error = (streamed[name] - grad).norm() / grad.norm().clamp(min=1e-6 * most)
        assert error < 1e-10, f"{name}: {error}"


@pytest.mark.parametrize("chunk", [1, 7, T // 3, T, 2 * T])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_exact(name: str, chunk: int) -> None:
    assert_same(model_of(CONFIGS[name]), batch(), chunk)


@pytest.mark.parametrize("padding", ["left", "right", "row"])
def test_masked_targets(padding: str) -> None:
    assert_same(model_of(CONFIGS["gqa"]), batch(padding), 8)


@pytest.mark.parametrize("name", ["gqa", "gpt2", "window"])
def test_packed_documents(name: str) -> None:
    segments = torch.tensor([[0] * 5 + [1] * 9 + [2] * 7, [0] * T, [0] * 20 + [1]])
    assert_same(model_of(CONFIGS[name]), {**batch(), "segments": segments}, 8)


@pytest.mark.parametrize("name", ["gqa", "gpt2"])
def test_dropout_draws_the_same_again(name: str) -> None:
    """The streamed pass is its own reference: its gradient against finite differences of its own forward pass."""
    model = model_of(CONFIGS[name].model_copy(update={"dropout": 0.3}))
    blocks = structure(model).blocks
    stream_backward(blocks, 8)
    model.train()
    data = batch()

    def loss() -> Tensor:
        torch.manual_seed(5)
        hidden = model.hidden(data["tokens"])
        return linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, data["targets"].flatten())[0]

    loss().backward()
    for parameter in (model.embedding.weight, blocks[0].original.mlp.down.weight):
        direction = torch.randn_like(parameter)
        along = (parameter.grad * direction).sum()
        ends = []
        for step in (1e-6, -2e-6):
            parameter.data += step * direction
            ends.append(loss().detach())  # with a graph: without one the block runs whole and draws otherwise
        parameter.data += 1e-6 * direction
        torch.testing.assert_close((ends[0] - ends[1]) / 2e-6, along, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_layers_of_transformers(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    options = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                   num_key_value_heads=2, max_position_embeddings=64, head_dim=8)  # fmt: skip
    if family == "Mistral":
        options["sliding_window"] = 6
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**options)).double()
    data = batch()

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        logits = model(input_ids=data["tokens"], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), data["targets"].flatten())
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    loss, plain = run()
    blocks = structure(model).blocks
    stream_backward(blocks, 8)
    ours, streamed = run()
    # Their norms compute in fp32 whatever the model is, so a sum in another order differs by fp32's rounding.
    torch.testing.assert_close(ours, loss, rtol=1e-6, atol=0)
    for name, grad in plain.items():
        assert (streamed[name] - grad).norm() <= 1e-6 * grad.norm() + 1e-12, name


def test_unknown_blocks_are_refused_by_name_and_none_is_replaced() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTNeoXConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4)  # fmt: skip
    blocks = structure(transformers.GPTNeoXForCausalLM(config)).blocks
    with pytest.raises(MethodError, match="GPTNeoXLayer"):
        stream_backward(blocks)
    assert not any(isinstance(block, StreamedBlock) for block in blocks)


def test_one_gradient_per_weight_and_pass() -> None:
    model = model_of(CONFIGS["gqa"])
    stream_backward(structure(model).blocks, 3)
    seen: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.__setitem__(name, seen.get(name, 0) + 1))
    gradients(model, batch())
    assert set(seen.values()) == {1}


def test_frozen_weights_get_none_and_the_rest_is_exact() -> None:
    model = model_of(CONFIGS["gqa"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name or "head" in name)
    data = batch()

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        hidden = model.hidden(data["tokens"])
        linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, data["targets"].flatten())[0].backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = run()
    stream_backward(structure(model).blocks, 8)
    streamed = run()
    assert streamed.keys() == plain.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(streamed[name], grad, rtol=1e-10, atol=1e-14)


def test_memory_of_a_long_sequence_is_a_fraction_of_recomputation() -> None:
    config = LlamaConfig(hidden=64, layers=4, heads=4, vocab=8192, context=2048)
    tokens = torch.randint(8192, (1, 2048), generator=torch.Generator().manual_seed(0))

    def peak(stream: bool) -> int:
        model = build_model(config, seed=0)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        if stream:
            stream_backward(structure(model).blocks, 256)
        else:
            for block in model.blocks:
                plain = block.forward
                block.forward = lambda *a, plain=plain, **k: torch.utils.checkpoint.checkpoint(
                    plain, *a, use_reentrant=False, **k
                )

        def step() -> None:
            hidden = model.hidden(tokens).flatten(0, 1)
            if stream:
                linear_cross_entropy(hidden, model.head_weight, tokens.flatten(), chunk=128)[0].backward()
            else:
                nn.functional.cross_entropy(hidden @ model.head_weight.T, tokens.flatten()).backward()

        fixed = sum(2 * p.numel() * p.element_size() for p in model.parameters())
        return live_peak(step)[1] - fixed

    assert peak(True) <= 0.35 * peak(False)


def test_recipe(tiny: Any) -> None:
    recipe = Recipe.load(tiny(methods={"streambp": {"chunk": 8}}, train={"micro_batch": 2}))
    trainer = build_trainer(recipe)
    assert trainer.changes["streambp"][0].startswith("blocks streamed (2): 2 of 2")
    plain = build_trainer(recipe.override("methods.streambp=null"))
    for _ in range(5):
        assert trainer.train_step()["loss"] == pytest.approx(plain.train_step()["loss"], rel=1e-5)
    with pytest.raises(MethodError, match=r"train\.compile"):
        build_trainer(recipe.override("train.compile=true"))
