"""Random masks on the ranks of a tensor group: common where the values are, each rank's own where they are not.

Needs gloo. Run: pytest tests/parallel/test_tensor_dropout.py
"""

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

from headway.core.surgery import replace_blocks
from headway.memory.recompute import RecomputedBlock
from headway.models.build import build_model
from headway.parallel.local import run_ranks
from headway.parallel.tensor import tensor_parallel
from headway.parallel.tensor.dropout import TokenDropout
from headway.parallel.tensor.place import Place
from tests.parallel.tensors import CONFIGS, batch, step, whole, worst

DROPS = {"dropout": 0.3}


def test_masks_are_common_for_common_tokens_and_own_for_own_ones() -> None:
    def work(rank: int) -> Any:
        mesh = init_device_mesh("cpu", (4,))
        masks: dict[str, list[Any]] = {}
        for name, sequence in (("common", False), ("own", True)):
            torch.manual_seed(5)
            drop, x = TokenDropout(Place(mesh, sequence)), torch.ones(2, 50, 40)
            masks[name] = [drop(x, 0.3, True).ne(0).tolist() for _ in range(2)]
            assert torch.equal(drop(x, 0.3, False), x) and torch.equal(drop(x, 0.0, True), x)
            masks[f"{name} state"] = torch.get_rng_state().tolist()
        return masks

    ranks = run_ranks(4, work)
    assert all(rank["common"] == ranks[0]["common"] for rank in ranks)
    assert all(rank["own state"] == ranks[0]["own state"] for rank in ranks), "the common numbers stay common"
    own = torch.tensor([mask for rank in ranks for mask in rank["own"]]).double().flatten(1)  # [8, n]
    assert abs(own.mean() - 0.7) < 0.01
    assert own.corrcoef().sub(torch.eye(8)).abs().max() < 0.08, "no two masks have to do with each other"


def test_with_all_tokens_everywhere_dropout_is_that_of_one_process() -> None:
    def work(rank: int) -> tuple[float, float]:
        mesh = init_device_mesh("cpu", (2,))
        plain, model = (build_model(CONFIGS["gpt2"].model_copy(update=DROPS), 0).double() for _ in range(2))
        tensor_parallel(model, mesh, sequence=False)
        data = batch(53)
        torch.manual_seed(3)
        expected = step(plain.train(), data)
        torch.manual_seed(3)
        return float(abs(step(model.train(), data) / expected - 1)), worst(model, plain)

    assert all(max(errors) < 1e-9 for errors in run_ranks(2, work))


def test_a_recomputed_block_draws_the_same_masks() -> None:
    def work(rank: int) -> float:
        mesh, config = init_device_mesh("cpu", (2,)), CONFIGS["qwen"].model_copy(update=DROPS)
        models = [build_model(config, 0).double().train() for _ in range(2)]
        for model in models:
            tensor_parallel(model, mesh)
        replace_blocks(models[1].blocks, RecomputedBlock, "test")
        losses = []
        for model in models:
            torch.manual_seed(3)
            losses.append(step(model, batch(50)))
            assert losses[-1] != step(model, batch(50)), "the next masks are others"
        assert losses[0] == losses[1]
        once, twice = ({name: whole(p.grad) for name, p in model.named_parameters()} for model in models)
        return max(float((once[name] - twice[name]).abs().max()) for name in once)

    assert max(run_ranks(2, work)) < 1e-12
