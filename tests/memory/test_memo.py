"""MEMO: gradients equal plain autograd's for every share of swapped tokens; buffers, bytes, failures, the method.

Needs transformers for some tests. Run: pytest tests/memory/test_memo.py
"""

from __future__ import annotations

import errno
import gc
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from headway.core.build import build_trainer
from headway.core.errors import HeadwayError, MethodError
from headway.core.fallback import FallbackLog, use_log
from headway.core.meters import live_rise
from headway.core.recipe import Recipe
from headway.core.run import Run
from headway.core.surgery import Shell
from headway.core.train import train
from headway.layers.linear_cross_entropy import linear_cross_entropy
from headway.memory.backends import FileBackend, HostBackend, Stored
from headway.memory.lanes import Lanes
from headway.memory.memo import Memo, memo_activations
from headway.memory.memo.alpha import AlphaPlan, Sizes, choose_alpha, gpt_layer, predicted_utilization
from headway.models.build import build_model
from headway.models.config import GPT2Config, LlamaConfig
from headway.models.structure import structure
from tests.conftest import tiny_recipe

T, VOCAB = 21, 50
CONFIGS = {
    "plain": LlamaConfig(hidden=32, layers=4, heads=4, vocab=VOCAB, context=64),
    "gqa": LlamaConfig(hidden=32, layers=4, heads=4, kv_heads=2, vocab=VOCAB, context=64, tied=False),
    "qk-norm": LlamaConfig(hidden=32, layers=4, heads=4, kv_heads=1, qk_norm=True, vocab=VOCAB, context=64),
    "bias": LlamaConfig(hidden=32, layers=4, heads=4, qkv_bias=True, vocab=VOCAB, context=64),
    "window": LlamaConfig(hidden=32, layers=4, heads=4, window=5, vocab=VOCAB, context=64),
    "dropout": LlamaConfig(hidden=32, layers=4, heads=4, dropout=0.2, vocab=VOCAB, context=64),
    "gpt2": GPT2Config(hidden=32, layers=4, heads=4, vocab=VOCAB, context=64),
    "gpt2-dropout": GPT2Config(hidden=32, layers=4, heads=4, vocab=VOCAB, context=64, dropout=0.3),
}
SHARES = [0.0, 0.25, 0.5, 1.0]


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    use_log(FallbackLog())
    yield
    use_log(None)


def model_of(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    return build_model(CONFIGS[name].model_copy(update=changes), seed=0).to(dtype)


def batch(length: int = T, rows: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randint(VOCAB, (rows, length), generator=generator) for name in ("tokens", "targets")}


def gradients(model: Any, data: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    hidden = model.hidden(data["tokens"], segments=data.get("segments"))
    loss, count = linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, data["targets"].flatten())
    (loss / count).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "random": torch.get_rng_state().double(), **found}


def assert_same(ours: dict[str, Tensor], plain: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert ours.keys() == plain.keys(), "names change"
    most = max(grad.norm() for name, grad in plain.items() if name not in ("loss", "random"))
    for name, grad in plain.items():  # the true gradient of a bias of keys is zero
        error = (ours[name] - grad).norm() / grad.norm().clamp(min=1e-3 * most)
        assert error <= tolerance, f"{name}: {error}"


# Exactness.


@pytest.mark.parametrize("alpha", SHARES)
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_exact(name: str, alpha: float) -> None:
    model, data = model_of(name), batch()
    plain = gradients(model, data)
    with memo_activations(model.blocks, alpha, verify=True) as memo:
        assert_same(gradients(model, data), plain)
        assert memo.counts.recomputed_tokens == 2 * 3 * (T - round(alpha * T))
    assert not any(isinstance(block, Shell) for block in model.blocks)


@pytest.mark.parametrize("name", ["gqa", "gpt2-dropout"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("alpha", SHARES)
def test_lower_precision_is_as_exact_as_its_kernels_are(name: str, dtype: torch.dtype, alpha: float) -> None:
    model, data = model_of(name, dtype), batch()
    plain = gradients(model, data)
    with memo_activations(model.blocks, alpha) as memo:
        ours = gradients(model, data)
        assert memo.counts.passes == 1
    # Swapped whole, all kernels see the same shapes. Else a product's rows may be summed in another order.
    assert_same(ours, plain, 0.0 if alpha == 1 else 1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("length", [2, 3, 9, 16, 40])
@pytest.mark.parametrize("rows", [1, 2])
def test_lengths_and_rows(length: int, rows: int) -> None:
    model, data = model_of("gqa"), batch(length, rows)
    plain = gradients(model, data)
    for alpha in (0.0, 0.3, 1 - 1 / length, 1 - 2 / length, 1.0):
        with memo_activations(model.blocks, alpha):
            assert_same(gradients(model, data), plain)


@pytest.mark.parametrize("name", ["gqa", "gpt2", "window"])
@pytest.mark.parametrize("buffers", [1, 3])
def test_packed_documents_and_padding(name: str, buffers: int) -> None:
    model, data = model_of(name), batch()
    data["segments"] = torch.tensor([[0] * 5 + [1] * 9 + [2] * 7, [0] * T, [0] * 20 + [1]])
    data["targets"][1, 13:] = -100
    plain = gradients(model, data)
    with memo_activations(model.blocks, 0.4, buffers=buffers):
        assert_same(gradients(model, data), plain)


def test_attention_is_never_run_again_and_the_last_product_of_a_block_neither() -> None:
    class Counted(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: Counter[str] = Counter()

        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls[operation.name().partition(".")[0]] += 1
            return operation(*args, **(kwargs or {}))

    def calls(alpha: float | None) -> Counter[str]:
        with Counted() as counted:
            if alpha is None:
                gradients(model, data)
            else:
                with memo_activations(model.blocks, alpha) as memo:
                    memo.blocks[0]._layouts = memo.blocks[1]._layouts = layouts
                    gradients(model, data)
        return counted.calls

    model, data = model_of("plain"), batch()
    layouts: dict[Any, Any] = {}
    with memo_activations(model.blocks, 0.5) as memo:
        gradients(model, data)
        layouts.update(memo.blocks[0]._layouts)
    once, again, whole = calls(None), calls(0.5), calls(1.0)
    assert again["headway::blocked_attention"] == once["headway::blocked_attention"] == 4
    # queries, keys, values, the output of attention, gate and up: all products but the last, in two blocks
    assert again["aten::mm"] == once["aten::mm"] + 2 * 6
    assert whole["aten::mm"] == once["aten::mm"]


@pytest.mark.parametrize("frozen", ["embedding", "attention", "mlp", "norm"])
def test_frozen_weights_get_none_and_the_rest_is_exact(frozen: str) -> None:
    model, data = model_of("gqa"), batch()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name and not name.startswith("embedding"))
    plain = gradients(model, data)
    with memo_activations(model.blocks, 0.3):
        assert_same(gradients(model, data), plain)


def test_a_retained_graph_can_be_used_twice() -> None:
    model, data = model_of("gqa"), batch()

    def twice() -> dict[str, Tensor]:
        model.zero_grad()
        loss = model.hidden(data["tokens"]).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = twice()
    with memo_activations(model.blocks, 0.5):
        assert_same(twice(), plain)


def test_two_forward_passes_before_their_backward_passes() -> None:
    model, data = model_of("plain"), batch()

    def both() -> dict[str, Tensor]:
        model.zero_grad()
        losses = [model.hidden(data[name]).square().mean() for name in ("tokens", "targets")]
        losses[0].backward()
        losses[1].backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = both()
    with memo_activations(model.blocks, 0.5):
        assert_same(both(), plain)


def test_autocast_is_as_it_was_in_the_forward_pass() -> None:
    model, data = model_of("plain", torch.float32), batch()

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.hidden(data["tokens"]).float().square().mean()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = run()
    with memo_activations(model.blocks, 0.5):
        assert_same(run(), plain, 1e-2)
    with memo_activations(model.blocks, 1.0):
        assert_same(run(), plain, 0.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            model.hidden(data["tokens"]).sum().backward()  # saves otherwise, at the same shape


def transformers_model(family: str, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    options = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
                   num_key_value_heads=2, max_position_embeddings=64, head_dim=8) | changes  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**options)).double()


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("padded", [False, True])
def test_layers_of_transformers(family: str, padded: bool) -> None:
    model = transformers_model(family, **({"sliding_window": 6} if family == "Mistral" else {}))
    data, mask = batch(), torch.ones(3, T, dtype=torch.long)
    if padded:
        mask[0, :5] = 0
        data["targets"][0, :5] = -100

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        logits = model(input_ids=data["tokens"], attention_mask=mask if padded else None, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), data["targets"].flatten())
        loss.backward()
        return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}

    plain = run()
    for alpha in (0.0, 0.5, 1.0):
        with memo_activations(structure(model).blocks, alpha) as memo:
            ours = run()
            assert memo.counts.passes == 1
        # Their norms compute in fp32 whatever the model is; the bias of keys has no gradient but rounding.
        for name, grad in plain.items():
            assert (ours[name] - grad).norm() <= 1e-6 * grad.norm() + 1e-12, name


def test_a_cache_that_is_filled_in_training_is_said_to_keep_activations() -> None:
    model, log = transformers_model("Llama"), FallbackLog()
    use_log(log)
    with memo_activations(structure(model).blocks, 0.5) as memo:
        model.eval()(input_ids=batch()["tokens"])  # generates, as far as anybody knows
        assert not log.entries
        model.train()(input_ids=batch()["tokens"]).logits.sum().backward()
        assert memo.counts.passes == 0 and len(log.entries) == 1 and "use_cache=False" in log.entries[0]["why"]


def test_what_cannot_be_taken_apart_is_refused_and_nothing_is_replaced() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTNeoXConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
                                        num_attention_heads=4)  # fmt: skip
    blocks = structure(transformers.GPTNeoXForCausalLM(config)).blocks
    with pytest.raises(MethodError, match="GPTNeoXLayer"):
        Memo(blocks)
    assert not any(isinstance(block, Shell) for block in blocks)
    with pytest.raises(MethodError, match="dropout of a LlamaDecoderLayer"):
        Memo(structure(transformers_model("Llama", attention_dropout=0.1)).blocks)
    model = transformers_model("Llama")
    model.gradient_checkpointing_enable()
    with pytest.raises(MethodError, match="recomputes itself already"):
        Memo(structure(model).blocks)


def test_a_block_that_mixes_tokens_outside_of_attention_is_found_out() -> None:
    class Mixes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x.mean(dim=1, keepdim=True)

    model = model_of("plain")
    model.blocks[0].mlp_norm = nn.Sequential(model.blocks[0].mlp_norm, Mixes())
    with memo_activations(model.blocks, 0.5), pytest.raises(HeadwayError, match=r"block 0.*token by token"):
        gradients(model, batch())


# What is where.


def expected_bytes(config: Any, rows: int, length: int, split: int, element: int) -> int:
    """Bytes of one Llama block without QK norm: counted by hand from its code."""
    d, hd, f = config.hidden, config.head_width, config.intermediate_width
    kv = config.kv_head_count * hd
    # two norms' scales in fp32 or better, two normed inputs, residual, q, k, v, gate and up, their product
    scale = max(4, element)
    others = 2 * scale + element * (2 * d + d + d + 2 * kv + 2 * f + f)
    return rows * (length * element * 2 * d + split * others)


@pytest.mark.parametrize("alpha", SHARES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_bytes_moved_are_input_and_attention_and_the_share_of_the_rest(alpha: float, dtype: torch.dtype) -> None:
    model, data = model_of("gqa", dtype), batch()
    with memo_activations(model.blocks, alpha) as memo:
        gradients(model, data)
        memo.lanes.drain()
        expected = 2 * expected_bytes(CONFIGS["gqa"], 3, T, round(alpha * T), dtype.itemsize)
        assert memo.report()["swapped_bytes"] == memo.store.report.stored_bytes == expected
        sizes = memo.sizes[3, T]
        assert 2 * (sizes.input + sizes.attention) == 2 * 2 * 3 * T * 32 * dtype.itemsize
        assert memo.store.report.fetched_bytes + memo.store.report.cancelled_bytes <= expected


def test_nothing_is_left_on_the_host_after_a_step() -> None:
    model, backend = model_of("gqa"), HostBackend()
    with memo_activations(model.blocks, 0.5, backend) as memo:
        gradients(model, batch())
        memo.store.drain()
        gc.collect()
        memo.store.drain()
        assert backend.bytes == 0


@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_no_more_sets_than_buffers_however_slow_the_link(buffers: int) -> None:
    model = model_of("plain", layers=8)
    lanes = Lanes(rates={"device_to_host": 4e6, "host_to_device": 4e6})
    plain = gradients(model, batch())
    with memo_activations(model.blocks, 0.5, lanes=lanes, buffers=buffers) as memo:
        for _ in range(2):
            assert_same(gradients(model, batch()), plain)
        report = memo.report()
    assert report["most_sets"] == buffers
    assert report["stall_seconds_forward"] > 0.01, "the forward pass did not wait for the link"
    lanes.close()


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_peak_of_saved_tensors_is_that_of_the_buffers(alpha: float) -> None:
    layers, data = 10, batch(256, 1)
    model = model_of("plain", torch.float32, layers=layers, context=256, hidden=64)
    gradients(model, data)

    def rise() -> int:
        gradients(model, data)
        return live_rise(lambda: gradients(model, data), torch.device("cpu"))[1]

    keep = rise()
    lanes = Lanes(rates={"device_to_host": 2e8, "host_to_device": 2e8})  # slower than computing: buffers are awaited
    with memo_activations(model.blocks, alpha, lanes=lanes):
        ours = rise()
    lanes.close()
    # two sets of ten, what the loss and the backward pass of one block take, and what is joined
    assert ours < 0.45 * keep, f"{ours / keep:.2f}"


# The share of tokens.


@pytest.mark.parametrize(
    ("tokens", "alpha", "binding"),
    [(64, 0.38, "bandwidth"), (128, 0.68, "bandwidth"), (192, 0.98, "bandwidth"), (256, 1.0, "none"),
     (512, 0.97, "host"), (1024, 0.41, "host")],
)  # fmt: skip
def test_worked_values_of_a_7b_model_on_eight_gpus(tokens: int, alpha: float, binding: str) -> None:
    sizes, flops = gpt_layer(tokens * 1024, 4096, 2, 8)
    seconds = flops / (8 * 0.6 * 312e12)
    plan = choose_alpha(sizes, seconds, 12e9, 2e12 / 8, 32)
    assert plan.alpha == pytest.approx(alpha, abs=0.006) and plan.binding == binding
    assert plan.stall_seconds == pytest.approx(0.0, abs=1e-9) and plan.shortfall == 0
    assert 0.5 < predicted_utilization(tokens * 1024, 4096, plan, seconds, 0.6) <= 0.6


def test_activations_of_a_7b_model_at_a_million_tokens_are_4096_gib() -> None:
    sizes, _ = gpt_layer(1 << 20, 4096)
    assert 32 * sizes.total == 4096 * 2**30
    assert (sizes.input + sizes.attention) / sizes.total == 1 / 8


def test_choosing_alpha_by_hand() -> None:
    sizes = Sizes(10.0, 10.0, 100.0)
    assert choose_alpha(sizes, 1.0, 70.0, 1e9, 6) == AlphaPlan(0.5, "bandwidth", 0.5, 0.0, 0.0)
    assert choose_alpha(sizes, 1.0, 1e9, 4 * 45.0, 6) == AlphaPlan(0.25, "host", 0.25, 0.0, 0.0)
    assert choose_alpha(sizes, 1.0, 1e9, 1e9, 6).binding == "none"
    slow = choose_alpha(sizes, 1.0, 15.0, 1e9, 6)  # not even what must leave hides
    assert slow.alpha == 0 and slow.unclipped == pytest.approx(-0.05) and slow.stall_seconds == pytest.approx(5 / 15)
    assert choose_alpha(sizes, 1.0, 1e9, 4 * 18.0, 6).shortfall == pytest.approx(8.0)
    assert choose_alpha(Sizes(1, 1, 0), 1.0, 3.0, 1e9, 6).alpha == 1
    assert choose_alpha(sizes, 1.0, 0.0, 1e9, 6).stall_seconds == float("inf")
    with pytest.raises(ValueError, match="negative"):
        choose_alpha(sizes, -1.0, 1.0, 1.0, 6)
    with pytest.raises(ValueError, match="leave none"):
        choose_alpha(sizes, 1.0, 1.0, 1.0, 2)


@pytest.mark.parametrize(("rate", "low", "high"), [(None, 0.05, 1.0), (3e6, 0.0, 0.0)])
def test_auto_measures_the_second_pass_of_a_shape(rate: float | None, low: float, high: float) -> None:
    model = model_of("plain", torch.float32, layers=5, hidden=64, context=512)
    lanes = Lanes(rates={"device_to_host": rate, "host_to_device": rate} if rate else None)
    with memo_activations(model.blocks, "auto", lanes=lanes, host_budget=1 << 30) as memo:
        for count in range(4):
            assert len(memo.plans) == (1 if count > 2 else 0)
            gradients(model, batch(512 if rate is None else 128, 1))
        (plan,) = memo.plans.values()
        assert low <= plan.alpha <= high
        report = memo.report()
        assert report["plans"][f"1x{512 if rate is None else 128}"]["binding"] in ("none", "bandwidth")
        if rate:
            assert report["measured"]["bandwidth"] == pytest.approx(rate, rel=0.3)
            assert plan.unclipped < 0 and plan.stall_seconds > 0
    lanes.close()


def test_frozen_first_blocks_do_not_hinder_the_plan_nor_the_budget() -> None:
    model, data = model_of("plain", torch.float32, layers=6), batch()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("embedding", "blocks.0.", "blocks.1.")))
    plain = gradients(model, data)
    with memo_activations(model.blocks, "auto", host_budget=1 << 30) as memo:
        for _ in range(3):
            assert_same(gradients(model, data), plain, 1e-5)
        model.hidden(data["tokens"])  # no backward pass follows
        gradients(model, data)
        assert memo.counts.passes == 5 and memo.counts.most_sets == 2
        assert (3, T) in memo.plans
    with memo_activations(model.blocks, 0.0, host_budget=1024), pytest.raises(MethodError, match="of 2 blocks take"):
        gradients(model, data)


def test_plans_survive_a_restart() -> None:
    first, second = (Memo(model_of("plain").blocks) for _ in range(2))
    assert first.state_dict() == {}
    first.plans[4, 32] = choose_alpha(Sizes(1, 1, 8), 1.0, 6.0, 1e9, 4)
    second.load_state_dict(first.state_dict())
    assert second.plans == first.plans and second.begin((4, 32)).alpha == 0.5
    first.close()
    second.close()


# Failures.


def test_a_host_budget_that_is_too_small_names_the_shortfall() -> None:
    model, data = model_of("gqa"), batch()
    must = 2 * expected_bytes(CONFIGS["gqa"], 3, T, 0, 8)
    with (
        memo_activations(model.blocks, "auto", host_budget=must - 1024),
        pytest.raises(MethodError, match=r"host_budget.*inputs and attention outputs of 2 blocks.*1\.00KiB more"),
    ):
        gradients(model, data)
    with (
        memo_activations(model.blocks, 1.0, host_budget=must + 1024),
        pytest.raises(MethodError, match=r"alpha 1 take.*[Ll]ower alpha"),
    ):
        gradients(model, data)
    with memo_activations(model.blocks, 0.0, host_budget=must):
        gradients(model, data)


class Jittery(HostBackend):
    """Copies take random times, and freed memory is overwritten at once."""

    def __init__(self) -> None:
        super().__init__()
        self.random = random.Random(0)

    def write(self, tensor: Tensor) -> Stored:
        time.sleep(self.random.random() * 2e-3)
        return super().write(tensor)

    def read(self, stored: Stored, into: Tensor) -> None:
        time.sleep(self.random.random() * 2e-3)
        super().read(stored, into)

    def delete(self, stored: Stored) -> None:
        stored.place[:] = b"\xff" * len(stored.place)
        super().delete(stored)


def test_no_corruption_over_a_slow_and_irregular_link() -> None:
    model = model_of("gqa", layers=6)
    data = batch()
    plain = gradients(model, data)
    lanes = Lanes(workers={"device_to_host": 2, "host_to_device": 3})
    with memo_activations(model.blocks, 0.5, Jittery(), lanes=lanes, verify=True):
        for _ in range(4):
            assert_same(gradients(model, data), plain)
    lanes.close()


def test_corruption_on_the_way_is_found_with_verify() -> None:
    class Corrupts(HostBackend):
        def read(self, stored: Stored, into: Tensor) -> None:
            super().read(stored, into)
            into.view(torch.uint8).view(-1)[3] ^= 1

    model = model_of("gqa")
    with (
        memo_activations(model.blocks, 0.5, Corrupts(), verify=True),
        pytest.raises(HeadwayError, match=r"block 1.*other bytes"),
    ):
        gradients(model, batch())


def test_a_full_disk_keeps_gradients_right_and_less_is_swapped_from_then_on(tmp_path: Path) -> None:
    class Small(FileBackend):
        room = 200_000

        def write(self, tensor: Tensor) -> Stored:
            if tensor.nbytes > self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.room -= tensor.nbytes
            return super().write(tensor)

        def delete(self, stored: Stored) -> None:
            self.room += stored.nbytes
            super().delete(stored)

    log = FallbackLog()
    use_log(log)
    model, data = model_of("plain"), batch()
    plain = gradients(model, data)
    with memo_activations(model.blocks, 1.0, Small(tmp_path)) as memo:
        amounts = []
        for _ in range(3):
            before = memo.counts.swapped_bytes
            assert_same(gradients(model, data), plain)
            amounts.append(memo.counts.swapped_bytes - before)
        assert amounts[1] < amounts[0] and amounts[1] <= 210_000
    assert len(log.entries) == 1 and "No space left" in log.entries[0]["why"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["torn", "flipped"])
def test_a_damaged_file_is_an_error_that_names_the_block(tmp_path: Path, damage: str) -> None:
    class Damaged(FileBackend):
        def write(self, tensor: Tensor) -> Stored:
            stored = super().write(tensor)
            data = bytearray(stored.place.read_bytes())
            data[5] ^= 1
            stored.place.write_bytes(bytes(data) if damage == "flipped" else b"")
            return stored

    model = model_of("gqa")
    with (
        memo_activations(model.blocks, 0.5, Damaged(tmp_path)) as memo,
        pytest.raises(HeadwayError, match=r"block 1, .*could not be read back"),
    ):
        hidden = model.hidden(batch()["tokens"])
        memo.lanes.drain()
        hidden.sum().backward()
    assert not list(tmp_path.iterdir())


def test_a_block_that_changes_what_it_saved_is_an_error_as_without_hooks() -> None:
    class Spoils(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.exp()  # saves its result
            y.add_(1)
            return y

    model = model_of("plain")
    model.blocks[0].mlp_norm = nn.Sequential(model.blocks[0].mlp_norm, Spoils())
    with pytest.raises(RuntimeError, match="inplace"):
        gradients(model, batch())
    with memo_activations(model.blocks, 0.5), pytest.raises(HeadwayError, match=r"block 0.*changed in place"):
        gradients(model, batch())


@pytest.mark.parametrize("name", ["attention.out.weight", "attention.v.bias"])
def test_weights_that_change_before_the_backward_pass_are_an_error(name: str) -> None:
    model = model_of("bias")
    with memo_activations(model.blocks, 0.5):
        loss = model.hidden(batch()["tokens"]).sum()
        with torch.no_grad():
            model.blocks[0].get_parameter(name).add_(1)
        with pytest.raises(HeadwayError, match=r"block 0.*changed in place"):
            loss.backward()


def test_a_block_that_saves_something_else_the_second_time_is_an_error() -> None:
    class Moody(nn.Module):
        again = False

        def forward(self, x: Tensor) -> Tensor:
            return x.exp() if self.again else x * 1.0

    model = model_of("plain")
    moody = Moody()
    model.blocks[0].mlp_norm = nn.Sequential(moody, model.blocks[0].mlp_norm)
    with memo_activations(model.blocks, 0.5):
        loss = model.hidden(batch()["tokens"]).sum()
        moody.again = True
        with pytest.raises(HeadwayError, match="block 0"):
            loss.backward()


def test_a_failed_step_does_not_hinder_the_next() -> None:
    model, data = model_of("gqa"), batch()
    plain = gradients(model, data)
    with memo_activations(model.blocks, 0.5) as memo:
        model.hidden(data["tokens"])  # no backward pass follows
        hook = model.norm.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.hidden(data["tokens"])
        hook.remove()
        assert_same(gradients(model, data), plain)
        assert memo.counts.most_sets == 2


def test_a_killed_run_leaves_no_files_behind_the_next(tmp_path: Path) -> None:
    script = f"""
import torch
from headway.memory.memo import FileBackend, memo_activations
from headway.models.build import build_model
from headway.models.config import LlamaConfig
model = build_model(LlamaConfig(hidden=32, layers=4, heads=4, vocab=50, context=64), seed=0)
with memo_activations(model.blocks, 0.5, FileBackend({str(tmp_path)!r})) as memo:
    out = model.hidden(torch.zeros(1, 32, dtype=torch.long))
    memo.lanes.drain()
    print("ready", flush=True)
    import time; time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline().strip() == "ready"
        assert len(list(tmp_path.glob("*/0*"))) > 4
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
    finally:
        process.kill()
    FileBackend(tmp_path).close()
    assert not list(tmp_path.iterdir())


# The method.


def losses(recipe: Recipe, steps: int = 5) -> list[float]:
    trainer = build_trainer(recipe)
    return [trainer.train_step()["loss"] for _ in range(steps)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("alpha", ["auto", 0.5, 1.0])
def test_losses_of_a_run(alpha: Any, precision: str) -> None:
    base = {"train": {"precision": precision, "micro_batch": 2}, "model": {"layers": 4}}
    plain = losses(Recipe.load(tiny_recipe(**base)))
    ours = losses(Recipe.load(tiny_recipe(methods={"memo": {"alpha": alpha, "verify": True}}, **base)))
    assert ours == pytest.approx(plain, rel=0 if alpha == 1.0 else 1e-5 if precision == "fp32" else 1e-3)


def test_the_report_is_kept_with_the_run(tmp_path: Path) -> None:
    options = {"alpha": 0.5, "backend": "disk", "path": str(tmp_path / "swap"), "rate": "100MiB", "buffers": 1}
    train(tiny_recipe(methods={"memo": options}, train={"steps": 3}), run=tmp_path / "run")
    report = Run(tmp_path / "run").summary["reports"]["memo"]
    assert report["passes"] == 3 and report["tier"] == "disk" and report["most_sets"] == 1
    assert report["swapped_bytes"] > 0 and report["write_rate"] < 110 * 2**20


def test_the_memory_plan_is_reported(tmp_path: Path) -> None:
    recipe = tiny_recipe(methods={"memo": {"alpha": 0.5, "memory_plan": True}}, model={"layers": 4}, train={"steps": 4})
    train(recipe, run=tmp_path / "run")
    plan = Run(tmp_path / "run").summary["reports"]["memo"]["memory_plan"]
    assert plan["allocations"] > 100 and plan["lower_bound"] <= plan["planned"] <= 1.1 * plan["lower_bound"]
    short = Run(train({**recipe, "train": {**recipe["train"], "steps": 2}}, run=tmp_path / "short").path)
    assert "third step" in short.summary["reports"]["memo"]["memory_plan"]
    trainer = build_trainer(Recipe.load(recipe))
    plain = build_trainer(Recipe.load(recipe).override("methods.memo.memory_plan=false"))
    assert [trainer.train_step()["loss"] for _ in range(4)] == [plain.train_step()["loss"] for _ in range(4)]


def test_refusals() -> None:
    def refused(match: str, **sections: Any) -> None:
        with pytest.raises(MethodError, match=match):
            build_trainer(Recipe.load(tiny_recipe(**{"model": {"layers": 4}, **sections})))

    refused(r"train\.compile", methods={"memo": {}}, train={"compile": True})
    refused("nothing to swap.*last 2 blocks", methods={"memo": {}}, model={"layers": 2})
    refused("of no use", methods={"memo": {"path": "/x"}})
    refused("share from 0 to 1", methods={"memo": {"alpha": 1.5}})
    for other in ("recompute", "streambp", "ssdtrain"):
        refused(f"cannot be combined with {other}", methods={"memo": {}, other: {}})


def test_evaluation_is_not_touched() -> None:
    trainer = build_trainer(Recipe.load(tiny_recipe(methods={"memo": {}}, model={"layers": 4})))
    trainer.train_step()
    (method,) = trainer.methods
    before = method.report()["passes"]
    trainer.evaluate()
    assert method.report()["passes"] == before == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("alpha", SHARES)
def test_on_a_gpu(alpha: float) -> None:
    make: Callable[[], Any] = lambda: model_of("dropout", torch.bfloat16).cuda()  # noqa: E731
    model, data = make(), {name: tensor.cuda() for name, tensor in batch(64).items()}
    plain = gradients(model, data)
    with memo_activations(model.blocks, alpha, verify=True):
        for _ in range(3):
            assert_same(gradients(model, data), plain, 1e-2)
