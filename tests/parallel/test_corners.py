"""Rare settings of trainings on many ranks: frozen weights, large seeds, resuming in the same layout.

Needs gloo; `pytest tests/parallel/test_corners.py`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.launcher import api

from headway.core import state
from headway.core.errors import RecipeError
from headway.core.run import Run
from headway.core.train import train
from headway.parallel.engine import ParallelEngine
from headway.parallel.launch import TO_SAVE, launch
from headway.parallel.local import run_ranks
from headway.parallel.parity import parity
from headway.workloads import language
from tests.parallel.recipes import recipe


def run_as(ranks: int, steps: int, run: Path, **changes: Any) -> None:
    """Train up to step ``steps``, saving every third."""
    base: dict[str, Any] = {"train": {}, "checkpoint": {}, **changes}
    base["train"] = {"steps": steps, **base["train"]}
    base["checkpoint"] = {"every": 3, **base["checkpoint"]}
    wanted = recipe(schedule={"name": "constant", "warmup": 0}, log={"every": 1}, **base)
    run_ranks(ranks, lambda rank: train(wanted, run=run) and None, timeout=60)


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in Run(run).metrics()]


@pytest.mark.parametrize(("ranks", "layout"), [(2, {"pipeline": 2}), (2, {"shard": 2}), (2, {"tensor": 2})], ids=str)
def test_a_tied_matrix_that_is_not_trained_stays(
    ranks: int, layout: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = language.build_model

    def frozen(*args: Any, **kwargs: Any) -> nn.Module:
        model = build(*args, **kwargs)
        model.embedding.weight.requires_grad_(False)  # type: ignore[union-attr]
        return model

    monkeypatch.setattr(language, "build_model", frozen)
    found = parity(recipe(parallel=layout), ranks)
    assert "embedding.weight" not in found.gradients
    assert found.loss_difference < 1e-9 and found.gradient_difference < 1e-9, found


def test_any_seed_will_do() -> None:
    found = parity(recipe(parallel={"shard": 2}, seed=2**63 - 1), 2, steps=2)
    assert found.loss_difference < 1e-9, found


def test_a_pipeline_resumes_its_own_checkpoint(tmp_path: Path) -> None:
    """Methods change other things on the last rank than on rank 0, whose changes are kept with the checkpoint."""
    methods: dict[str, Any] = {"ema": {"decay": 0.5}, "recompute": {}}
    changes: dict[str, Any] = {"methods": methods, "model": {"layers": 5}}
    run_as(1, 6, tmp_path / "whole", **changes)
    for steps in (3, 6):
        run_as(2, steps, tmp_path / "run", parallel={"pipeline": 2}, **changes)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-9)


def test_one_rank_alone_resumes_whatever_one_process_can(tmp_path: Path) -> None:
    for steps in (3, 6):
        run_as(1, steps, tmp_path / "run", checkpoint={"mode": "plain"})
    assert len(losses(tmp_path / "run")) == 6


def test_parameters_without_gradients_have_no_state_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = language.build_model

    def with_one_more(*args: Any, **kwargs: Any) -> nn.Module:
        model: Any = build(*args, **kwargs)
        model.blocks[1].unused = nn.Parameter(torch.ones(4, 4))
        return model  # type: ignore[no-any-return]

    monkeypatch.setattr(language, "build_model", with_one_more)
    run_as(1, 6, tmp_path / "whole")
    for layout in ("shard", "pipeline"):
        for steps in (3, 6):
            run_as(2, steps, tmp_path / layout, parallel={layout: 2})
        assert losses(tmp_path / layout) == pytest.approx(losses(tmp_path / "whole"), rel=1e-9)


def test_gpus_may_come_and_go_between_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their random states are in a checkpoint as far as there were GPUs; here they are made up."""
    of_cpu = state.rng_state
    run_as(2, 3, tmp_path, parallel={"shard": 2})
    for steps, gpus in ((6, 2), (9, 1), (12, 0)):
        found = {"cuda": [torch.get_rng_state()] * gpus} if gpus else {}
        monkeypatch.setattr(state, "rng_state", lambda found=found: {**of_cpu(), **found})
        run_as(2, steps, tmp_path, parallel={"shard": 2})
    assert len(losses(tmp_path)) == 12


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = object.__new__(ParallelEngine)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert engine.device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(RecipeError, match="this machine has 2 for 4 ranks"):
        engine.device(torch.device("cuda"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert engine.device(torch.device("cuda")) == torch.device("cuda", 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert engine.device(torch.device("cuda")) == torch.device("cuda", 1)


def test_ranks_have_time_to_save_when_they_are_asked_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher's own 30 seconds would kill a large run in the middle of its last checkpoint."""
    configs: list[Any] = []
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(api, "elastic_launch", lambda config, _: lambda *_: configs.append(config))
    assert launch(["train"], 2) == 0
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    assert configs[0].shutdown_timeout == TO_SAVE >= 300
