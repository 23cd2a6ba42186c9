"""A Llama of 1B parameters on one GPU: tokens per second eager, compiled and recomputed, beside transformers."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from headway.core.build import build_trainer
from headway.core.errors import require
from headway.core.meters import matmul_peak, synchronize
from headway.core.recipe import Recipe, merge
from headway.models.build import empty_model
from headway.models.config import LlamaConfig

WAYS = ("transformers", "eager", "compiled", "recompute")
SIZE: dict[str, Any] = {"hidden": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "intermediate": 8192,
                        "vocab": 32_000, "context": 2048}  # fmt: skip
BATCH = 8
CHANGES: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {"train": {"compile": True}},
    "recompute": {"methods": {"recompute": {}}},
}


def tokens_per_second(way: str, steps: int, size: dict[str, Any] = SIZE, device: str = "cuda") -> float:
    """Of ``steps`` training steps after three that are not counted, AdamW, bf16.

    Args:
        way: one of `WAYS`.
    """
    where = torch.device(device)
    step = _transformers(size, where) if way == "transformers" else _headway(way, size, device)
    for _ in range(3):
        step()
    synchronize(where)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(where)
    rate = steps * BATCH * size["context"] / (time.perf_counter() - start)
    del step
    gc.collect()
    if where.type == "cuda":
        torch.cuda.empty_cache()
    return rate


def utilization(rates: dict[str, float], size: dict[str, Any] = SIZE, device: str = "cuda") -> dict[str, float]:
    """By way: arithmetic of the model at that rate over the measured peak of the device's products in bf16.

    Args:
        rates: tokens per second.
    """
    with torch.device("meta"):
        model: Any = empty_model(LlamaConfig(**size))
    per_token = model.flops_per_token(size["context"])
    peak = matmul_peak(torch.bfloat16, torch.device(device))
    return {way: rate * per_token / peak for way, rate in rates.items()}


def _headway(way: str, size: dict[str, Any], device: str) -> Callable[[], Any]:
    recipe = {
        "model": {"family": "llama", **size},
        "data": {"source": "python-stdlib", "tokenizer": "byte", "sequence": size["context"]},
        "train": {"steps": 10**6, "batch": BATCH, "precision": "bf16", "device": device},
    }
    return build_trainer(Recipe.load(merge(recipe, CHANGES[way]))).train_step


def _transformers(size: dict[str, Any], device: torch.device) -> Callable[[], Any]:
    transformers = require("transformers", "hf", "the arm `transformers`")
    config = transformers.LlamaConfig(
        vocab_size=size["vocab"], hidden_size=size["hidden"], intermediate_size=size["intermediate"],
        num_hidden_layers=size["layers"], num_attention_heads=size["heads"], num_key_value_heads=size["kv_heads"],
        max_position_embeddings=size["context"], tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    tokens = torch.randint(256, (BATCH, size["context"]), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
