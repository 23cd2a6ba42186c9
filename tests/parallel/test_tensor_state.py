"""Divided models: saved in one layout and loaded in another, and what is refused.

Needs gloo. Run: pytest tests/parallel/test_tensor_state.py
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from headway.core.errors import ModelError
from headway.core.surgery import Absent, replace_blocks
from headway.memory.recompute import RecomputedBlock
from headway.models.build import build_model
from headway.models.config import GPT2Config, LlamaConfig
from headway.models.llama import Llama
from headway.parallel.local import run_ranks
from headway.parallel.tensor import tensor_parallel
from headway.resilience.lazy import LazyCheckpointer
from tests.parallel.tensors import CONFIGS, batch, shard, step, whole

LAYOUTS = {"tensor 4": (1, 4), "shard 2 x tensor 2": (2, 2), "shard 4": (4, 1)}


def laid_out(name: str, layout: tuple[int, int], seed: int) -> tuple[Any, torch.optim.Optimizer]:
    shards, ranks = layout
    mesh = init_device_mesh("cpu", layout, mesh_dim_names=("weights", "tensor"))
    model = build_model(CONFIGS[name], seed).double()
    if ranks > 1:
        tensor_parallel(model, mesh["tensor"])
    if shards > 1:
        shard(model, mesh["weights"])
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def state_of(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["untied", "tiny-vocabulary"])
def test_what_one_layout_saves_another_loads(name: str, tmp_path: Path) -> None:
    def work(rank: int) -> dict[Any, float]:
        data, gaps = batch(CONFIGS[name].vocabulary), {}
        for source, layout in LAYOUTS.items():
            model, optimizer = laid_out(name, layout, 0)
            step(model, data)
            optimizer.step()
            saved = LazyCheckpointer(LazyCheckpointer.Options(), tmp_path / source)
            saved.save(1, state_of(model, optimizer))
            saved.wait()
            right = {key: whole(value) for key, value in model.state_dict().items()}
            moment = [whole(optimizer.state[p]["exp_avg"]) for p in model.parameters()]
            for target, other in LAYOUTS.items():
                fresh, adam = laid_out(name, other, 1)
                for p in fresh.parameters():
                    p.grad = torch.zeros_like(p)
                adam.step()
                saved.load(into=state_of(fresh, adam))
                gap = [float((whole(v) - right[key]).abs().max()) for key, v in fresh.state_dict().items()]
                gap += [float((whole(adam.state[p]["exp_avg"]) - m).abs().max())
                        for p, m in zip(fresh.parameters(), moment, strict=True)]  # fmt: skip
                gaps[source, target] = max(gap)
            saved.close()
        return gaps

    for gaps in run_ranks(4, work):
        assert len(gaps) == 9 and max(gaps.values()) == 0.0, gaps


class Incomplete(Llama):
    tensor_plan = {k: v for k, v in Llama.tensor_plan.items() if k != "blocks.*.mlp.up"}  # noqa: RUF012


class Misspelt(Llama):
    tensor_plan = Llama.tensor_plan | {"norm": "leaves"}


def llama(**options: Any) -> LlamaConfig:
    shape: dict[str, Any] = {"hidden": 48, "layers": 1, "heads": 4, "vocab": 11, "intermediate": 24}
    return LlamaConfig(**(shape | options))


REFUSED = {
    "heads": (llama(heads=8, kv_heads=4, hidden=64), 3, r"of 3 cannot divide 8 heads, 4 key and value heads.*2 or 4"),
    "kv heads": (llama(heads=12, kv_heads=6), 4, r"of 4 cannot divide 12 heads, 6 key.*Take 3 or 6"),
    "channels": (llama(heads=4, intermediate=30), 4, r"of 4 cannot divide.* 30 channels.*Take 2"),
    "gpt2 heads": (GPT2Config(hidden=32, layers=1, heads=2, vocab=11), 4, r"of 4 cannot divide 2 heads.*Take 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_degrees_that_do_not_fit_are_refused_with_those_that_do(case: str) -> None:
    config, world, message = REFUSED[case]

    def work(rank: int) -> str:
        with pytest.raises(ModelError, match=message) as refused:
            tensor_parallel(build_model(config, 0), init_device_mesh("cpu", (world,)))
        return str(refused.value)

    assert len(set(run_ranks(world, work))) == 1


def test_models_that_cannot_be_divided_are_left_as_they_are() -> None:
    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2,))

        def refuse(model: Any, message: str) -> None:
            before = [(type(module), id(module)) for module in model.modules()]
            with pytest.raises(ModelError, match=message):
                tensor_parallel(model, mesh)
            assert [(type(module), id(module)) for module in model.modules()] == before

        refuse(nn.Sequential(nn.Linear(2, 2)), "Sequential: declares no tensor_plan.*llama")
        for kind, message in ((Incomplete, r"says nothing about blocks.0.mlp.up.weight"), (Misspelt, r"'leaves'")):
            model = build_model(llama(), 0)
            model.__class__ = kind
            refuse(model, message)
        model = build_model(llama(), 0)
        replace_blocks(model.blocks, RecomputedBlock, "test")
        refuse(model, r"blocks.0: is wrapped by RecomputedBlock already.*before methods")
        model = build_model(llama(), 0)
        model.blocks[0].mlp.up.__class__ = type("Quantised", (nn.Linear,), {})
        refuse(model, r"blocks.0.mlp.up: is a Quantised, which cannot be divided \(as column\)")
        model = build_model(llama(), 0)
        if rank == 1:
            with torch.no_grad():
                model.blocks[0].mlp.up.weight[3, 4] += 0.01
        refuse(model, r"blocks.0.mlp.up.weight: differs between ranks 0 and 1.*same seed")
        model = build_model(llama(), 0)
        tensor_parallel(model, mesh)
        refuse(model, r"is divided already|cannot be divided")

    run_ranks(2, work)


def test_the_blocks_of_other_pipeline_ranks_are_passed_over() -> None:
    def work(rank: int) -> list[str]:
        model = build_model(llama(layers=2), 0)
        model.embedding, model.blocks[0], model.head = Absent(), Absent(), nn.Linear(48, 11, bias=False)
        tensor_parallel(model, init_device_mesh("cpu", (2,)))
        assert isinstance(model.embedding, Absent)
        return [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]

    assert run_ranks(2, work) == [[], []]


def test_tokens_that_cannot_be_shared_are_refused_and_tokens_out_of_the_vocabulary_too() -> None:
    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2,))
        shared, common = (build_model(llama(), 0) for _ in range(2))
        tensor_parallel(shared, mesh)
        tensor_parallel(common, mesh, sequence=False)
        tokens = torch.zeros(1, 7, dtype=torch.int64)
        with pytest.raises(ModelError, match=r"7 tokens cannot be shared by 2 ranks.*Take sequences of 6 or 8"):
            shared(tokens)
        with torch.no_grad():
            torch.testing.assert_close(shared(tokens), common(tokens))
        shared(tokens[:, :6]).sum().backward()
        with pytest.raises(IndexError, match="token 11 is not in a vocabulary of 11"):
            common(tokens + 11)

    run_ranks(2, work)
