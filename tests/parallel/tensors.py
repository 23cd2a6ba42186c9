"""Models, batches and gradients for the tests of tensor parallelism."""

from typing import Any

import torch
import torch.distributed.tensor
from torch import Tensor
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from headway.models.config import GPT2Config, LlamaConfig, MoEConfig

SHAPE: dict[str, Any] = {"hidden": 32, "layers": 2, "context": 64, "intermediate": 48}
CONFIGS = {
    "qwen": LlamaConfig(**SHAPE, heads=8, kv_heads=4, vocab=50, qk_norm=True, qkv_bias=True, window=7,
                        window_layers=(1,)),
    "untied": LlamaConfig(**SHAPE, heads=4, kv_heads=2, vocab=51, tied=False),  # on 4 ranks: heads repeated
    "gpt2": GPT2Config(**SHAPE, heads=4, vocab=53),
    "tiny-vocabulary": LlamaConfig(**SHAPE, heads=4, vocab=5),  # on 4 ranks: 2, 2, 1 and none
    "moe": MoEConfig(**SHAPE, heads=4, vocab=50, experts=4, top_k=2, expert_width=16, dense_layers=1, shared_experts=1),
}  # fmt: skip
B, T = 2, 16
LOSS: dict[str, Any] = {"chunk": 7, "label_smoothing": 0.1, "z_loss": 1e-3, "logit_scale": 0.7}


def batch(vocab: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens, targets = (torch.randint(vocab, (B, T), generator=generator) for _ in range(2))
    targets[0, 3] = -100
    return {"tokens": tokens, "targets": targets, "segments": torch.tensor([[0] * 5 + [1] * 11, [0] * T])}


def step(model: Any, data: dict[str, Tensor], parts: int = 1, **options: Any) -> Tensor:
    """The loss of the batch, ``parts`` times as many micro-batches of it; gradients are left in the parameters."""
    total = torch.zeros((), dtype=torch.float64)
    for part in range(parts):
        mine = {name: value.chunk(parts)[part] for name, value in data.items()}
        hidden = model.hidden(mine["tokens"], segments=mine.get("segments")).flatten(0, 1)
        loss, _ = model.head_loss(hidden, model.head_weight, mine["targets"].flatten(), **(LOSS | options))
        loss.backward()
        total += loss.detach()
    return total


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def worst(model: Any, plain: Any) -> float:
    """The largest relative error of a gradient. (The true gradient of a bias of keys is zero.)"""
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}  # experts may lack tokens
    most = max(grad.norm() for grad in expected.values())
    got = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    return max(float((got[name] - e).norm() / e.norm().clamp(min=1e-6 * most)) for name, e in expected.items())


def shard(model: Any, mesh: Any) -> None:
    """FSDP2 as in a loop of one's own; gradients are summed."""
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(model, "hidden")
    for module in (*model.blocks, model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
