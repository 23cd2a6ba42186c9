"""What the ranks of a tensor group send each other, counted in elements, against the formulas of the papers.

Needs gloo. Run: pytest tests/parallel/test_tensor_traffic.py
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from headway.models.build import build_model
from headway.models.config import LlamaConfig
from headway.parallel.local import run_ranks
from headway.parallel.tensor import tensor_parallel

B, T, D, V = 2, 16, 32, 4096


class Traffic(TorchDispatchMode):
    """Elements that a rank sends in each collective operation, by rings."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.sent = size, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, share = str(func), (self.size - 1) / self.size
        if "all_reduce" in name:
            self.sent.append(2 * share * args[0].numel())
        elif "allreduce_" in name:
            self.sent.append(2 * share * args[0][0].numel())
        elif "all_gather_into_tensor" in name:
            self.sent.append(share * out.numel())
        elif "reduce_scatter_tensor" in name:
            self.sent.append(share * args[0].numel())
        elif "c10d" in name and "wait" not in name:
            raise AssertionError(f"{name} is not counted")
        return out


def sent(world: int, layers: int, sequence: bool, regather: bool = False) -> list[float]:
    config = LlamaConfig(hidden=D, layers=layers, heads=4, vocab=V, context=64, intermediate=64)

    def work(rank: int) -> list[float]:
        model = build_model(config, 0)
        tensor_parallel(model, init_device_mesh("cpu", (world,)), sequence=sequence, regather=regather)
        tokens = torch.zeros(B, T, dtype=torch.int64)
        with Traffic(world) as traffic:
            loss, _ = model.head_loss(model.hidden(tokens).flatten(0, 1), model.head_weight, tokens.flatten())
            loss.backward()
        return traffic.sent

    return run_ranks(world, work)[0]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("sequence", [True, False])
def test_a_layer_sends_what_the_paper_says(world: int, sequence: bool) -> None:
    share = (world - 1) / world
    one, three = (sent(world, layers, sequence) for layers in (1, 3))
    norms = 2 * 2 * share * D if sequence else 0  # each norm saw a part of the tokens: its gradient is summed
    assert (sum(three) - sum(one)) / 2 == pytest.approx(8 * share * B * T * D + norms)
    count: Callable[[list[float]], int] = lambda messages: sum(n > share * 4 * D for n in messages)  # noqa: E731
    assert (count(three) - count(one)) / 2 == (8 if sequence else 4), "2 all-reduces each way, or their halves"


@pytest.mark.parametrize("sequence", [True, False])
def test_no_logits_are_sent(sequence: bool) -> None:
    messages, share = sent(2, 1, sequence), 1 / 2
    ends = 3 + 2 if sequence else 2 + 2  # embedding and final norm, and the gradient of what goes into the head
    norms = 3 * 2 * share * D if sequence else 0
    three_numbers = 3 * B * T * 2 * share
    assert sum(messages) == pytest.approx((8 + ends) * share * B * T * D + norms + three_numbers)
    assert max(messages) <= 2 * share * B * T * D < B * T * V / 2


def test_gathering_again_costs_a_quarter_more() -> None:
    share = 3 / 4
    one, three = (sent(4, layers, True, regather=True) for layers in (1, 3))
    assert (sum(three) - sum(one)) / 2 == pytest.approx(10 * share * B * T * D + 4 * share * D)


def test_gathering_again_keeps_a_share_of_every_activation() -> None:
    config = LlamaConfig(hidden=D, layers=2, heads=4, vocab=8, context=64, intermediate=64)

    def kept(rank: int, world: int, regather: bool) -> int:
        model = build_model(config, 0)
        if world > 1:
            tensor_parallel(model, init_device_mesh("cpu", (world,)), regather=regather)
        owned = {p.to_local().data_ptr() if hasattr(p, "to_local") else p.data_ptr() for p in model.parameters()}
        saved: dict[int, int] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in owned:
                saved[storage.data_ptr()] = storage.nbytes()
            return x

        x, shared = model.embed(torch.zeros(B, 4 * T, dtype=torch.int64))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            for block in model.blocks:
                x = block(x, **shared)
        return sum(saved.values())

    whole = run_ranks(1, kept, 1, False)[0]
    keeping, again = (run_ranks(4, kept, 4, regather)[0] for regather in (False, True))
    rope = 2 * 4 * T * 4 * 4  # bytes: two tables of four angles for each token, which every rank has
    assert again - rope == (whole - rope) / 4
    gathered = 2 * 2 * B * 4 * T * D * 4  # bytes: two regions in each of two layers
    assert keeping - again == gathered * 3 / 4
