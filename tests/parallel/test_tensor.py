"""Tensor parallelism against one process, on forked ranks, in fp64.

Needs gloo. Run: pytest tests/parallel/test_tensor.py
"""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from headway.core.surgery import replace_blocks
from headway.layers.linear_cross_entropy import linear_cross_entropy
from headway.memory.memo.runtime import memo_activations
from headway.memory.recompute import RecomputedBlock
from headway.memory.streambp.stream import stream_backward
from headway.models.build import build_model
from headway.models.llama import Llama
from headway.parallel.clip import clip_divided_
from headway.parallel.local import run_ranks
from headway.parallel.tensor import tensor_parallel
from headway.parallel.tensor.head import VocabularyHead
from headway.parallel.tensor.place import Place
from tests.parallel.tensors import CONFIGS, batch, shard, step, whole, worst


def pair(name: str, mesh: Any, sequence: bool, regather: bool = False) -> tuple[Any, Any]:
    """The model of one process, and the divided one."""
    plain, model = (build_model(CONFIGS[name], 0).double() for _ in range(2))
    tensor_parallel(model, mesh, sequence=sequence, regather=regather)
    return plain, model


def assert_exact(results: list[dict[Any, tuple[float, ...]]], cases: int) -> None:
    for errors in results:
        assert len(errors) == cases
        for case, error in errors.items():
            assert max(error) < 1e-9, (case, error)


@pytest.mark.parametrize("world", [2, 4])
def test_losses_and_gradients_are_those_of_one_process(world: int) -> None:
    def work(rank: int) -> dict[Any, tuple[float, ...]]:
        mesh, errors = init_device_mesh("cpu", (world,)), {}
        for name in CONFIGS:
            for sequence in (True, False):
                plain, model = pair(name, mesh, sequence)
                data = batch(CONFIGS[name].vocabulary)
                expected, loss = step(plain, data), step(model, data, parts=2)
                errors[name, sequence] = float(abs(loss / expected - 1)), worst(model, plain)
        return errors

    assert_exact(run_ranks(world, work), 2 * len(CONFIGS))


def test_names_shapes_and_parts_of_parameters() -> None:
    def work(rank: int) -> list[str]:
        mesh = init_device_mesh("cpu", (4,))
        plain, model = pair("untied", mesh, True)
        given, divided = dict(plain.named_parameters()), dict(model.named_parameters())
        assert {k: v.shape for k, v in given.items()} == {k: v.shape for k, v in divided.items()}
        assert all(torch.equal(whole(divided[name]), given[name]) for name in given)
        assert divided["blocks.0.attention.q.weight"].to_local().shape == (8, 32)
        assert divided["blocks.0.mlp.down.weight"].to_local().shape == (32, 12)
        assert divided["blocks.0.attention.k.weight"].to_local().shape == (16, 32), "two heads for four ranks"
        assert divided["head.weight"].to_local().shape == ((12 if rank == 3 else 13), 32)
        return tensor_parallel(build_model(CONFIGS["gpt2"], 0), mesh)

    assert run_ranks(4, work)[3] == [
        "8 matrices divided by columns, 4 by rows, among 4 ranks",
        "a vocabulary of 53 divided among 4 ranks, with the loss of its head",
        "norms and residual stream on 1/4 of the tokens",
    ]


@pytest.mark.filterwarnings("ignore")
def test_together_with_fsdp2() -> None:
    def work(rank: int) -> dict[Any, tuple[float, ...]]:
        mesh, errors = init_device_mesh("cpu", (2, 2), mesh_dim_names=("weights", "tensor")), {}
        for name in CONFIGS:
            for sequence in (True, False):
                plain, model = pair(name, mesh["tensor"], sequence)
                shard(model, mesh["weights"])
                data = batch(CONFIGS[name].vocabulary)
                expected = step(plain, data)
                loss = step(model, {key: value.chunk(2)[rank // 2] for key, value in data.items()})
                dist.all_reduce(loss, group=mesh["weights"].get_group())
                norm = clip_divided_(model.parameters(), None, 4, set())
                right = torch.stack([p.grad.norm() for p in plain.parameters()]).norm()
                errors[name, sequence] = float(abs(loss / expected - 1)), worst(model, plain), float(norm / right - 1)
        return errors

    assert_exact(run_ranks(4, work), 2 * len(CONFIGS))


@pytest.mark.parametrize("how", ["recompute", "recompute-keep-products", "compile", "regather", "regather-recompute"])
def test_recomputed_and_compiled_blocks(how: str) -> None:
    names = ("qwen",) if how == "compile" else ("qwen", "gpt2")

    def work(rank: int) -> dict[Any, tuple[float, ...]]:
        mesh, errors = init_device_mesh("cpu", (2,)), {}
        for name in names:
            for sequence in (True, False):
                plain, model = pair(name, mesh, sequence, regather="regather" in how)
                if how == "compile":
                    for block in model.blocks:
                        block.compile(fullgraph=True, backend="aot_eager")
                if "recompute" in how:
                    keep: Any = "products" if "products" in how else "nothing"
                    replace_blocks(model.blocks, lambda block, keep=keep: RecomputedBlock(block, keep), "test")
                data = batch(CONFIGS[name].vocabulary)
                expected, loss = step(plain, data), step(model, data)
                errors[name, sequence] = float(abs(loss / expected - 1)), worst(model, plain)
        return errors

    assert_exact(run_ranks(2, work), 2 * len(names))


@pytest.mark.parametrize("how", ["streambp", "memo"])
def test_methods_that_take_blocks_apart_work_where_every_rank_has_all_tokens(how: str) -> None:
    def work(rank: int) -> dict[Any, tuple[float, ...]]:
        mesh, errors = init_device_mesh("cpu", (2,)), {}
        for name in ("qwen", "gpt2"):
            plain, model = (build_model(CONFIGS[name].model_copy(update={"layers": 3}), 0).double() for _ in range(2))
            tensor_parallel(model, mesh, sequence=False)
            if how == "streambp":
                stream_backward(model.blocks, 4)
            data = batch(CONFIGS[name].vocabulary)
            expected = step(plain, data)
            with memo_activations(model.blocks, 0.5) if how == "memo" else nullcontext():
                errors[name] = float(abs(step(model, data) / expected - 1)), worst(model, plain)
        return errors

    assert_exact(run_ranks(2, work), 2)


@pytest.mark.parametrize("world", [2, 4])
def test_logits_and_generation_without_gradients(world: int) -> None:
    def work(rank: int) -> dict[Any, tuple[float, ...]]:
        mesh, errors = init_device_mesh("cpu", (world,)), {}
        for name, config in CONFIGS.items():
            for sequence in (True, False):
                plain, model = pair(name, mesh, sequence)
                tokens = batch(config.vocabulary)["tokens"]
                with torch.inference_mode():
                    caches = plain.new_cache(2, 20), model.new_cache(2, 20)
                    assert caches[1].nbytes < caches[0].nbytes
                    pieces = [(tokens, None)]  # a number of tokens that the ranks can share, and some that they cannot
                    pieces += [(tokens[:, i:j], caches) for i, j in ((0, 8), (8, 9), (9, 12), (12, 16))]
                    gaps = [model(x, cache=both and both[1]) - plain(x, cache=both and both[0]) for x, both in pieces]
                errors[name, sequence] = tuple(float(gap.abs().max()) for gap in gaps)
                plain(tokens).square().sum().backward()
                model(tokens).square().sum().backward()  # the same on all ranks: the gradient is not summed again
                errors[name, sequence] += (worst(model, plain),)
        return errors

    assert_exact(run_ranks(world, work), 2 * len(CONFIGS))


@pytest.mark.parametrize("vocabulary", [5, 37])
def test_the_loss_of_a_divided_vocabulary(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(13, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, 8, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (13,), generator=generator)
    targets[2::5] = -100

    def work(rank: int) -> list[float]:
        place, errors = Place(init_device_mesh("cpu", (4,)), True), []
        part = slice(*place.bounds(vocabulary))
        for options in ({}, {"label_smoothing": 0.2}, {"z_loss": 0.3}, {"logit_scale": 2.5}, {"chunk": 4}):
            x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            loss, count = linear_cross_entropy(x, w, targets, **options)
            loss.backward()
            x2, w2 = hidden.clone().requires_grad_(), weight[part].clone().requires_grad_()
            loss2, count2 = VocabularyHead(place, vocabulary).loss(x2, w2, targets, **options)
            (3 * loss2).backward()
            assert count2 == count
            errors += [float(abs(loss2 / loss - 1)), float((x2.grad / 3 - x.grad).abs().max())]
            errors += [float((w2.grad / 3 - w.grad[part]).abs().sum())]
            with torch.no_grad():
                errors.append(float(abs(VocabularyHead(place, vocabulary).loss(x2, w2, targets, **options)[0] - loss)))
        return errors

    assert all(max(errors) < 1e-10 for errors in run_ranks(4, work))


class Whole(Llama):
    """Its feed-forward blocks are on every rank, as experts are, and work on the rank's tokens."""

    tensor_plan = {k: v for k, v in Llama.tensor_plan.items() if ".mlp" not in k} | {
        "blocks.*.mlp_norm": "tokens", "blocks.*.mlp.gate": "tokens", "blocks.*.mlp.up": "tokens",
        "blocks.*.mlp.down": "tokens",
    }  # fmt: skip


def test_modules_that_stay_whole() -> None:
    def work(rank: int) -> dict[Any, tuple[float, ...]]:
        mesh, errors = init_device_mesh("cpu", (2,)), {}
        for sequence in (True, False):
            plain, model = (build_model(CONFIGS["qwen"], 0).double() for _ in range(2))
            model.__class__ = Whole
            tensor_parallel(model, mesh, sequence=sequence)
            assert type(model.blocks[0].mlp.up) is not nn.Linear and isinstance(model.blocks[0].mlp.up, nn.Linear)
            data = batch(50)
            expected, loss = step(plain, data), step(model, data)
            errors[sequence] = float(abs(loss / expected - 1)), worst(model, plain)
        model = build_model(CONFIGS["qwen"], 0)
        model.__class__ = Whole
        tensor_parallel(model, mesh, apart=["blocks.*.mlp.up"])
        assert type(model.blocks[0].mlp.up.weight) is nn.Parameter
        return errors

    assert_exact(run_ranks(2, work), 2)


def test_bf16_is_as_near_as_it_is_on_one_process() -> None:
    def work(rank: int) -> list[float]:
        mesh = init_device_mesh("cpu", (2,))
        data, found = batch(50), []
        for sequence in (True, False):
            exact, model = pair("qwen", mesh, sequence)
            model.bfloat16()
            expected, loss = step(exact, data), step(model, data)
            assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())
            assert abs(loss / expected - 1) < 2e-3
            found.append(float(loss))
        return found

    first, second = run_ranks(2, work)
    assert first == second
