"""Whole models with shared sequences: losses and all gradients of 2 and 4 forked ranks against one process, fp64.

Needs nothing. Run: pytest tests/parallel/test_ulysses_model.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from headway.core.errors import DataError, HeadwayError, ModelError, RecipeError
from headway.layers.attention import attention
from headway.models.build import build_model
from headway.models.config import GPT2Config, LlamaConfig
from headway.parallel.local import run_ranks
from headway.parallel.sequence import sequence_parallel, shard_batch, undo_sequence_parallel
from headway.parallel.sequence.apply import restarts_positions
from headway.parallel.sequence.batch import check_same_batch, own_positions, padding, sp_token_mean

VOCAB, T = 40, 24
MODELS = {
    "mha": LlamaConfig(hidden=32, layers=2, heads=4, vocab=VOCAB, context=32),
    "gqa": LlamaConfig(hidden=32, layers=2, heads=4, kv_heads=2, vocab=VOCAB, context=32, qk_norm=True, tied=False),
    "mqa": LlamaConfig(hidden=32, layers=2, heads=4, kv_heads=1, vocab=VOCAB, context=32, window=7, window_layers=(1,)),
    "uneven": LlamaConfig(hidden=24, layers=2, heads=6, kv_heads=3, head_dim=4, vocab=VOCAB, context=32),
    "gpt2": GPT2Config(hidden=32, layers=2, heads=4, vocab=VOCAB, context=T),
}
WAYS: list[dict[str, Any]] = [
    {"kind": "ulysses"},
    {"kind": "ring", "layout": "zigzag"},
    {"kind": "ring", "layout": "contiguous"},
    {"kind": "usp", "ring": 2, "layout": "zigzag"},
]
SEGMENTS = torch.tensor([[0] * 5 + [1] * 11 + [2] * 8, [0] * 18 + [1] * 6])


def batch(tokens: int = T, packed: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(VOCAB, (2, tokens + 1), generator=generator)
    found = {"tokens": text[:, :-1].contiguous(), "targets": text[:, 1:].clone()}
    found["targets"][1, 2:5] = -100
    if packed:
        found["segments"] = SEGMENTS[:, :tokens].contiguous()
    return found


def prompt_only() -> dict[str, Tensor]:
    """All of rank 0's targets are masked, whether of two ranks or four."""
    data = batch()
    data["targets"][:, : T // 2] = -100
    return data


BATCHES = {"plain": batch(), "packed": batch(packed=True), "padded": batch(21), "padded packed": batch(21, packed=True),
           "prompt only": prompt_only()}  # fmt: skip


def gradients(model: Any, data: dict[str, Tensor], targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    given = {key: data[key] for key in ("positions", "segments") if key in data}
    hidden = model.hidden(data["tokens"], **given).flatten(0, 1)
    loss = model.head_loss(hidden, model.head_weight, data["targets"].flatten())[0] / targets
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def model_of(name: str) -> Any:
    return build_model(MODELS[name], seed=0).double()


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_sum_to_one_process_s(name: str, world: int) -> None:
    expected = {}
    for key, data in BATCHES.items():
        expected[key] = gradients(model_of(name), data, (data["targets"] != -100).sum())

    def work(rank: int) -> dict[str, float]:
        worst, mesh = {}, init_device_mesh("cpu", (world,))
        for way in WAYS:
            model = model_of(name)
            assert str(world) in sequence_parallel(model, mesh, **way)[0]
            for key, data in BATCHES.items():
                count = (data["targets"] != -100).sum()
                part = shard_batch(data, rank, world, restart=restarts_positions(model), **way)
                loss, found = gradients(model, part, count)
                dist.all_reduce(loss)
                errors = [float((loss - expected[key][0]).abs())]
                for weight, grad in found.items():
                    dist.all_reduce(grad)
                    wanted = expected[key][1][weight]
                    if not weight.endswith("attention.k.bias"):  # softmax does not see it: its gradient is rounding
                        errors.append(float((grad - wanted).norm() / wanted.norm()))
                worst[f"{way} {key}"] = max(errors)
        return worst

    for worst in run_ranks(world, work):
        assert max(worst.values()) < 1e-9, max(worst, key=lambda key: worst[key])


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_every_token_and_target_is_on_one_rank_with_its_position(way: dict[str, Any]) -> None:
    data = BATCHES["plain"]
    parts = [shard_batch(data, rank, 4, **way) for rank in range(4)]
    order = torch.cat([part["positions"] for part in parts])
    assert order.sort().values.tolist() == list(range(T))
    for key in ("tokens", "targets"):
        joined = torch.cat([part[key] for part in parts], 1)
        assert torch.equal(joined, data[key][:, order])


def test_padding_is_masked_and_a_document_of_its_own() -> None:
    data = BATCHES["padded packed"]
    assert padding(21, 4) == 3 and padding(21, 4, "ring") == 3 and padding(24, 4, "ring") == 0
    last = shard_batch(data, 3, 4, restart=True)
    assert last["targets"][:, -3:].eq(-100).all() and last["segments"].shape == (2, 24)
    assert last["segments"][0, 21:].tolist() == [3] * 3 and last["segments"][1, 21:].tolist() == [2] * 3
    assert last["positions"][:, -3:].tolist() == [[0, 1, 2]] * 2
    scan = shard_batch(data, 3, 4, kind="all-scan")
    assert torch.equal(scan["segments"], last["segments"][:, 18:])


def test_a_zigzag_gives_each_place_a_piece_from_the_front_and_one_from_the_back() -> None:
    assert own_positions(16, 1, 4, "ring").tolist() == [2, 3, 12, 13]
    assert [own_positions(16, rank, 4, "usp", 2).tolist() for rank in (0, 1, 2, 3)] == [
        [0, 1, 2, 3], [12, 13, 14, 15], [4, 5, 6, 7], [8, 9, 10, 11]]  # fmt: skip


def test_the_mean_over_ranks_weighs_tokens_and_survives_a_rank_without_any() -> None:
    def work(rank: int) -> tuple[float, float, float]:
        loss = torch.tensor(6.0 * rank, requires_grad=True)
        mean = sp_token_mean(loss, 3 * rank)
        (grad,) = torch.autograd.grad(mean, loss)
        return float(mean), float(grad), float(sp_token_mean(torch.tensor(0.0), 0))

    assert run_ranks(3, work) == [(2.0, pytest.approx(1 / 9), 0.0)] * 3


def test_ranks_with_other_samples_are_found() -> None:
    def work(rank: int) -> str:
        data = batch()
        check_same_batch(data)
        if rank == 1:  # the same tokens in another order
            data["tokens"] = data["tokens"].flip(1)
        try:
            check_same_batch(data)
        except DataError as error:
            return str(error)
        return ""

    assert all("ranks 1 of 3" in said for said in run_ranks(3, work))


def _said(action: Any) -> str:
    try:
        action()
    except HeadwayError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_what_cannot_be_divided_is_refused_and_all_can_be_undone() -> None:
    def work(rank: int) -> list[str]:
        mesh, model = init_device_mesh("cpu", (2,)), model_of("gqa")
        said = [_said(lambda: sequence_parallel(torch.nn.Linear(2, 2), mesh))]
        said.append(_said(lambda: sequence_parallel(model, mesh, kind="rings")))
        said.append(_said(lambda: sequence_parallel(model, mesh, kind="usp", ring=3)))
        scaling = {"rope_type": "dynamic", "factor": 2.0}
        dynamic = build_model(MODELS["mha"].model_copy(update={"rope_scaling": scaling}), seed=0)
        said.append(_said(lambda: sequence_parallel(dynamic, mesh)))
        sequence_parallel(model, mesh)
        part = shard_batch(BATCHES["packed"], rank, 2)
        said.append(_said(lambda: sequence_parallel(model, mesh)))
        said.append(_said(lambda: model.hidden(part["tokens"])))
        cut = part["segments"][:, : T // 2]
        said.append(_said(lambda: model.hidden(part["tokens"], positions=part["positions"], segments=cut)))
        cache, positions = model.new_cache(2, 8, torch.float64), torch.arange(4)
        model.hidden(part["tokens"][:, :4], positions=positions, cache=cache)
        said.append(_said(lambda: model.hidden(part["tokens"][:, :4], positions=positions, cache=cache)))
        undo_sequence_parallel(model)
        assert all(block.attention.attend is attention for block in model.blocks)
        model.hidden(part["tokens"])
        said.append(_said(lambda: sequence_parallel(model, DeviceMesh("cpu", torch.tensor([1, 0])))))
        uneven = model_of("uneven")
        said.append(" ".join(sequence_parallel(uneven, mesh, kind="ulysses")))
        return said

    expected = ["in a Linear", "'rings'", "ring: of 3 does not make rings of 2", "dynamic", "already",
                "a Llama that shares its sequences", "hold 24", "cannot generate", "order [1, 0]",
                "2 attentions"]  # fmt: skip
    for said in run_ranks(2, work):
        assert all(part in text for part, text in zip(expected, said, strict=True)), said


def test_heads_that_do_not_divide_are_said() -> None:
    def work(rank: int) -> list[str]:
        return sequence_parallel(model_of("uneven"), init_device_mesh("cpu", (4,)))

    assert "6 heads do not divide among 4 ranks" in run_ranks(4, work)[0][1]


def test_a_batch_that_is_not_whole_is_refused() -> None:
    with pytest.raises(DataError, match="targets"):
        shard_batch({"tokens": torch.zeros(2, 8), "targets": torch.zeros(2, 7)}, 0, 2)
    with pytest.raises(RecipeError, match=r"rings of 4.*1, 2, 4"):
        shard_batch(batch(), 0, 4, kind="usp", ring=3)
    assert issubclass(ModelError, HeadwayError)
