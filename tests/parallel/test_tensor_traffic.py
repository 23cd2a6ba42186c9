"""What the ranks of a tensor group send each other, counted in elements, against the formulas of the papers."""

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


def sent(world: int, layers: int, sequence: bool) -> list[float]:
    config = LlamaConfig(hidden=D, layers=layers, heads=4, vocab=V, context=64, intermediate=64)

    def work(rank: int) -> list[float]:
        model = build_model(config, 0)
        tensor_parallel(model, init_device_mesh("cpu", (world,)), sequence=sequence)
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
