"""Linear attention over the ranks of a sequence against one process: values, gradients, messages, refusals.

Needs: nothing.
Run: pytest tests/parallel/test_all_scan.py
"""

from __future__ import annotations

import os
import time
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo  # before the ranks are forked: recomputation imports it
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from headway.core.errors import ModelError
from headway.core.surgery import replace_blocks
from headway.layers.linear_attention import linear_attention_reference
from headway.memory.recompute import RecomputedBlock
from headway.models.build import build_model
from headway.models.config import GLAConfig
from headway.parallel.local import RankFailed, run_ranks
from headway.parallel.sequence.all_scan import all_scan, row_blocks
from headway.parallel.sequence.linear import ScannedAttention, check_order, scan_parallel, sp_linear_attention
from headway.parallel.sequence.links import Links, NeighbourLost

B, H, T, DK, DV = 2, 2, 41, 6, 5
LENGTHS = {1: [41], 2: [13, 28], 4: [9, 1, 20, 11]}
"""Tokens per rank: uneven, one of them alone, none a multiple of the chunk."""
# Documents that end within ranks, on their borders, and run on over several.
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 8 + [2] * 28, [0] * 9 + [1] * 1 + [2] * 27 + [3] * 4])


def inputs(kind: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(B, H, T, d, generator=generator, dtype=torch.float64) for d in (DK, DK, DV, DV)]
    shape = {"vector": (B, H, T, DK), "scalar": (B, H, T), "none": None}[kind]
    if shape is not None:
        made.append(-torch.rand(shape, generator=generator, dtype=torch.float64))
    return made  # q, k, v, gradient of the output, decays


def results(function: Any, made: list[Tensor], segments: Tensor | None) -> list[Tensor]:
    q, k, v, grad, *decay = made
    leaves = [x.clone().requires_grad_() for x in (q, k, v, *decay)]
    y = function(*leaves, *([None] if not decay else []), segments=segments)
    return [y.detach(), *torch.autograd.grad((y * grad).sum(), leaves)]


def worst_of(rank: int, world: int) -> dict[str, float]:
    """Largest error of this rank's stretch, over decays, methods, blocks, with documents and without."""
    start = sum(LENGTHS[world][:rank])
    here = slice(start, start + LENGTHS[world][rank])
    worst: dict[str, float] = {}
    for kind in ("vector", "scalar", "none"):
        for segments in (None, DOCUMENTS):
            made = inputs(kind)
            expected = results(
                lambda *a, segments: linear_attention_reference(*a, segments=segments)[0], made, segments
            )
            mine = [x[:, :, here] for x in made]
            own_segments = None if segments is None else segments[:, here]
            for method, blocks in (("zeco", 1), ("zeco", 2), ("zeco", 4), ("zeco", 8), ("lasp1", 1), ("lasp2", 1)):
                function = partial(sp_linear_attention, group=None, method=method, blocks=blocks, chunk=8)
                for a, b in zip(results(function, mine, own_segments), expected, strict=True):
                    key = f"{method} {kind}"
                    worst[key] = max(worst.get(key, 0.0), float((a - b[:, :, here]).abs().max()))
    return worst


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_method_equals_the_recurrence(world: int) -> None:
    for found in run_ranks(world, worst_of, world):
        assert len(found) == 9 and max(found.values()) < 1e-10


def test_the_scan_itself_in_both_directions_and_beside_other_work() -> None:
    states = torch.randn(4, 3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    decays = torch.rand(4, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def work(rank: int) -> float:
        worst = 0.0
        for reverse in (False, True):
            order = [3, 2, 1, 0] if reverse else [0, 1, 2, 3]
            total = torch.zeros(3, 6, 5, dtype=torch.float64)
            for r in order:
                before, total = total, decays[r].unsqueeze(-1) * total + states[r]
                if r == rank:
                    expected = (before, total.clone())
            pending = all_scan(states[rank], decays[rank], blocks=4, reverse=reverse, async_op=True)
            for found in (pending.wait(), all_scan(states[rank], decays[rank], blocks=100, reverse=reverse)):
                worst = max(worst, *(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)))
        half = all_scan(states[rank].bfloat16(), decays[rank])
        return worst if half[0].dtype == torch.float32 else 1.0

    assert max(run_ranks(4, work)) < 1e-14
    assert [len(range(10)[b]) for b in row_blocks(10, 4)] == [2, 3, 2, 3] and len(row_blocks(3, 8)) == 3
    with pytest.raises(ValueError, match="blocks is 0"):
        row_blocks(8, 0)


def test_bytes_do_not_grow_with_the_ranks_but_for_lasp2() -> None:
    def work(rank: int, world: int) -> dict[str, tuple[int, int, int, int]]:
        counted = {}
        q, k, v, grad, g = (x.float()[:, :, :16] for x in inputs("vector"))
        for method in ("zeco", "lasp1", "lasp2"):
            links = Links()
            leaf = v.clone().requires_grad_()
            y = sp_linear_attention(q, k, leaf, g, links, method, blocks=3)
            forward, messages = links.received["state"], links.messages
            (y * grad).sum().backward()
            counted[method] = (forward, links.received["state"] - forward, messages, links.received["decay"])
        return counted

    size = DK * DV * H * B * 4
    for world in (2, 4):
        found = run_ranks(world, work, world)
        for rank, counted in enumerate(found):
            first, last = rank == 0, rank == world - 1
            for method in ("zeco", "lasp1"):  # one state from the left, one gradient from the right
                blocks = 3 if method == "zeco" else 1
                assert counted[method] == (0 if first else size, 0 if last else size, 0 if last else blocks, 0)
            assert counted["lasp2"][:2] == ((world - 1) * size, (world - 1) * size)
            assert counted["lasp2"][3] == 2 * (world - 1) * DK * H * B * 4


def test_finite_differences_of_a_decay_on_another_rank() -> None:
    """What the last rank's output gains from a decay of the first, by perturbing it."""
    q, k, v, grad, g = inputs("vector")
    g = g / 10  # so that much of the first rank is left on the last

    def loss_and_grad(rank: int, at: int, by: float) -> tuple[float, float]:
        leaf = g.clone()
        leaf[0, 0, at, 2] += by
        here = slice(10 * rank, 10 * rank + 10)
        leaf = leaf[:, :, here].requires_grad_()
        y = sp_linear_attention(q[:, :, here], k[:, :, here], v[:, :, here], leaf, chunk=4)
        loss = (y * grad[:, :, here]).sum() if rank == 3 else y.sum() * 0
        loss.backward()
        return float(loss), float(leaf.grad[0, 0, at, 2]) if rank == 0 else 0.0

    def work(rank: int) -> list[tuple[float, float]]:
        return [loss_and_grad(rank, at, by) for at in (3, 9) for by in (-1e-5, 1e-5, 0.0)]

    found = run_ranks(4, work)
    for first in (0, 3):
        difference = (found[3][first + 1][0] - found[3][first][0]) / 2e-5
        exact = found[0][first + 2][1]
        assert abs(exact) > 1e-3 and difference == pytest.approx(exact, rel=1e-5, abs=1e-9)


def test_earlier_ranks_do_not_see_later_ones() -> None:
    def work(rank: int) -> list[float]:
        q, k, v, _, g = (x[:, :, :10] for x in inputs("vector"))
        plain = sp_linear_attention(q, k, v, g)
        other = [x + 1.0 if rank == 2 else x for x in (k, v)]
        changed = sp_linear_attention(q, *other, g)
        return (plain - changed).abs().amax((0, 1, 3)).tolist()

    found = run_ranks(4, work)
    assert not any(found[0]) and not any(found[1]) and all(found[2]) and all(found[3])


def test_bf16_keeps_states_in_fp32() -> None:
    q, k, v, _, g = inputs("vector")
    exact = linear_attention_reference(q, k, v, g)[0]

    def work(rank: int) -> tuple[float, str]:
        here, links = slice(10 * rank, 10 * rank + 10), Links()
        y = sp_linear_attention(*(x[:, :, here].bfloat16() for x in (q, k, v)), g[:, :, here].float(), links)
        sizes = links.received["state"] + links.sent["state"]
        assert sizes % (DK * DV * H * B * 4) == 0
        return float((y.double() - exact[:, :, here]).norm() / exact[:, :, here].norm()), str(y.dtype)

    for error, dtype in run_ranks(4, work):
        assert error < 2e-2 and dtype == "torch.bfloat16"


def test_a_group_is_not_all_ranks() -> None:
    """Ranks 1 and 3 share one sequence and 0 and 2 another: messages go to numbers among all ranks."""
    made = inputs("vector")

    def work(rank: int) -> float:
        groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        group, part = groups[rank % 2], rank // 2
        rows = [x[rank % 2 : rank % 2 + 1] for x in made]
        q, k, v, _, g = (x[:, :, 20 * part : 20 * part + 20] for x in rows)
        y = sp_linear_attention(q, k, v, g, group)
        expected = linear_attention_reference(*(rows[i][:, :, :40] for i in (0, 1, 2, 4)))[0]
        return float((y - expected[:, :, 20 * part : 20 * part + 20]).abs().max())

    assert max(run_ranks(4, work)) < 1e-12


CONFIG = GLAConfig(hidden=16, layers=3, heads=2, vocab=31, context=64, chunk=4)
TOKENS = torch.randint(31, (2, 41), generator=torch.Generator().manual_seed(5))
SEGMENTS = torch.tensor([[0] * 7 + [1] * 33, [0] * 20 + [1] * 20])


def model_gradients(
    model: Any, here: slice, segments: bool, micro: int = 1, tokens: Tensor = TOKENS
) -> dict[str, Tensor]:
    """Gradients summed over both rows; ``micro`` forward passes before the one backward pass."""
    model.zero_grad()
    losses = []
    for rows in torch.arange(2).chunk(micro):
        x, y = tokens[rows, :-1][:, here], tokens[rows, 1:][:, here]
        positions = torch.arange(here.start, here.stop)
        hidden = model.hidden(x, positions=positions, segments=SEGMENTS[rows][:, here] if segments else None)
        losses.append(F.cross_entropy((hidden @ model.head_weight.T).flatten(0, 1), y.flatten(), reduction="sum"))
    torch.stack(losses).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_a_model_over_ranks_equals_one_process_with_recomputation_too() -> None:
    def work(rank: int) -> tuple[float, list[str], dict[str, int]]:
        mesh = init_device_mesh("cpu", (4,))
        plain = build_model(CONFIG, seed=0).double()
        here, worst, said, received = slice(10 * rank, 10 * rank + 10), 0.0, [], {}
        for method in ("all-scan", "lasp1", "lasp2"):
            for recompute in (False, True):
                model = build_model(CONFIG, seed=0).double()
                said = scan_parallel(model, mesh, method=method, blocks=3)
                if recompute:
                    replace_blocks(model.blocks, RecomputedBlock, "test")
                for segments, micro in ((False, 1), (True, 1), (False, 2)):
                    expected = model_gradients(plain, slice(0, 40), segments)
                    for name, grad in model_gradients(model, here, segments, micro).items():
                        dist.all_reduce(grad)
                        worst = max(worst, float((grad - expected[name]).abs().max()))
                attends = [
                    m.attend for m in model.modules() if isinstance(getattr(m, "attend", None), ScannedAttention)
                ]
                received[f"{method} {recompute}"] = sum(a.links.received["state"] for a in attends)
        return worst, said, received

    for worst, said, received in run_ranks(4, work):
        assert worst < 1e-10
        assert said == ["3 blocks of linear attention hand their state along 4 ranks by a gather (LASP-2)"]
        for method in ("all-scan", "lasp1", "lasp2"):  # nothing is sent again
            assert received[f"{method} True"] == received[f"{method} False"] > 0


def test_recomputation_tells_micro_batches_apart_that_are_alike_on_a_rank() -> None:
    """What a rank itself adds to the state is then the same for both, and what comes from the left is not."""
    alike = TOKENS.clone()
    alike[1, 10:] = alike[0, 10:]  # two rows that differ on rank 0 alone
    ends = TOKENS.clone()
    ends[:, 9::10] = 3  # each rank's last document is one token, the same in both rows
    documents = ((torch.arange(40) + 1) // 10).expand(2, -1)

    def gradients(model: Any, tokens: Tensor, segments: Tensor | None, here: slice, order: list[int]) -> list[Tensor]:
        model.zero_grad()
        losses = []
        for row in range(2):
            own = None if segments is None else segments[row : row + 1, here]
            x, y = tokens[row : row + 1, here], tokens[row, here.start + 1 : here.stop + 1]
            hidden = model.hidden(x, positions=torch.arange(here.start, here.stop), segments=own)
            losses.append((1 + row) * F.cross_entropy((hidden @ model.head_weight.T)[0], y, reduction="sum"))
            with torch.no_grad():  # an evaluation between forward and backward pass is none of them
                model.hidden(tokens[:1, here] * 0, positions=torch.arange(here.start, here.stop))
        for row in order:  # as pipelines do: several on their way, and in either order
            losses[row].backward()
        return [p.grad.clone() for p in model.parameters()]

    def work(rank: int) -> dict[str, float]:
        mesh, here, worst = init_device_mesh("cpu", (4,)), slice(10 * rank, 10 * rank + 10), {}
        for name, tokens, segments in (("alike", alike, None), ("ends", ends, documents)):
            for method in ("all-scan", "lasp2"):
                plain, model = (build_model(CONFIG, seed=0).double() for _ in range(2))
                scan_parallel(model, mesh, method=method)
                replace_blocks(model.blocks, RecomputedBlock, "test")
                for order in ([0, 1], [1, 0]):
                    expected = gradients(plain, tokens, segments, slice(0, 40), order)
                    found = gradients(model, tokens, segments, here, order)
                    for grad in found:
                        dist.all_reduce(grad)
                    error = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
                    worst[f"{name} {method} {order}"] = error
        return worst

    for found in run_ranks(4, work):
        assert len(found) == 8 and max(found.values()) < 1e-10, found


def test_documents_of_a_tensor_that_is_used_again() -> None:
    """A loop that copies each batch into one tensor: what was asked of the neighbour is asked anew."""

    def work(rank: int) -> float:
        model, plain = (build_model(CONFIG, seed=0).double() for _ in range(2))
        scan_parallel(model, init_device_mesh("cpu", (2,)))
        here, worst = slice(20 * rank, 20 * rank + 20), 0.0
        for inference in (False, True):
            with torch.inference_mode(inference):
                buffer = torch.empty(2, 20, dtype=torch.long)
                for segments in (SEGMENTS, (torch.arange(40) // 20).expand(2, -1), SEGMENTS):
                    buffer.copy_(segments[:, here])
                    found = model.hidden(TOKENS[:, :-1][:, here], segments=buffer)
                    expected = plain.hidden(TOKENS[:, :-1], segments=segments)[:, here]
                    worst = max(worst, float((found - expected).abs().max()))
        return worst

    assert max(run_ranks(2, work)) < 1e-10


def test_under_autocast_states_and_decays_stay_fp32() -> None:
    def work(rank: int) -> list[float]:
        q, k, v, _, g = (x[:, :, 20 * rank : 20 * rank + 20].float() for x in inputs("vector"))
        plain = sp_linear_attention(q, k, v, g)
        with torch.autocast("cpu", torch.bfloat16):
            return [float((sp_linear_attention(q, k, v, g) - plain).abs().max())]

    assert run_ranks(2, work) == [[0.0], [0.0]]


def test_wrong_orders_and_models_are_refused() -> None:
    def refused(work: Any) -> str:
        try:
            work()
        except ModelError as error:
            return str(error)
        return ""

    def work(rank: int) -> list[str]:
        mesh = init_device_mesh("cpu", (2,))
        turned = DeviceMesh("cpu", torch.tensor([1, 0]))
        hybrid = GLAConfig(hidden=16, layers=2, heads=2, vocab=31, softmax_layers=(1,))
        positions = torch.arange(5) + 5 * (1 - rank)
        zigzag = torch.tensor([0, 1, 6, 7]) if rank == 0 else torch.arange(2, 6)
        model = build_model(CONFIG, seed=0)
        scan_parallel(model, mesh)
        return [
            refused(lambda: scan_parallel(build_model(CONFIG, seed=0), turned)),
            refused(lambda: scan_parallel(torch.nn.Linear(2, 2), mesh)),
            refused(lambda: scan_parallel(build_model(hybrid, seed=0), mesh)),
            refused(lambda: check_order(positions, Links())),
            refused(lambda: model.hidden(TOKENS[:, :4], positions=zigzag)),
            refused(lambda: model(TOKENS[:, :4], cache=model.new_cache(2, 8))),
            refused(
                lambda: sp_linear_attention(*(torch.ones(1, 1, 4, 2) for _ in range(3)), torch.full((1, 1, 4), 0.5))
            ),
        ]

    for messages in run_ranks(2, work):
        for message, words in zip(messages, (
            r"ranks in the order [1, 0], and their group is [0, 1]", "no linear attention to divide in a Linear",
            "blocks.1.mixer attends with softmax", "gives rank 1 the tokens from 0, and rank 0 ends with 9",
            "gives rank 0 tokens that do not follow", "blocks.0.mixer: shares sequences among 2 ranks",
            "logarithmic decay of 0.5 at [0, 0, 0]",
        ), strict=True):  # fmt: skip
            assert words in message


def test_a_rank_that_dies_is_named_with_the_layer() -> None:
    def work(rank: int) -> str:
        links = Links(where="blocks.7.mixer")
        if rank == 0:
            time.sleep(0.3)
            os._exit(0)
        try:
            all_scan(torch.ones(2, 2), torch.ones(2), links)
        except NeighbourLost as error:
            raise ModelError("seen", str(error)) from error
        return ""

    with pytest.raises(RankFailed, match=r"rank 1, blocks.7.mixer: waited in vain for rank 0 to send a state"):
        run_ranks(2, work, timeout=5)
