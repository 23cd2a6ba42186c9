"""SSDTrain: bit-identical gradients, identity of storages, what stays, forwarding, the plan, failures, the method.

Needs nothing. Run: pytest tests/memory/test_ssdtrain.py
"""

from __future__ import annotations

import copy
import errno
import gc
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from headway.core.build import build_trainer
from headway.core.errors import HeadwayError, MethodError
from headway.core.fallback import FallbackLog, use_log
from headway.core.meters import live_peak
from headway.core.recipe import Recipe
from headway.core.run import Run
from headway.core.train import train
from headway.memory.backends import DryBackend, FileBackend, HostBackend, Stored
from headway.memory.lanes import Lanes
from headway.memory.saved import stamp
from headway.memory.ssdtrain import ActivationStore, Plan, drive_life_days, needed_rates, plan_amount
from tests.conftest import tiny_recipe

D = 16


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    use_log(FallbackLog())
    yield
    use_log(None)


class SeparateProjections(nn.Module):
    """Attention as in most codebases: q, k and v each from the same input, fewer keys than queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(D, D), nn.Linear(D, D // 2), nn.Linear(D, D // 2)
        self.o = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x + self.o(y.transpose(1, 2).flatten(2))


class FusedChunk(nn.Module):
    """Three views of equal shape and stride of one storage: only their offsets tell them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.o(torch.softmax(q @ k.transpose(1, 2), -1) @ v)


class Experts(nn.Module):
    """A gate and two experts, each on some of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(D, 2), nn.ModuleList(nn.Linear(D, D) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            chosen = weights.argmax(-1) == index
            y[chosen] = F.gelu(expert(x[chosen])) * weights[..., index][chosen][:, None]
        return x + y


class Recurrent(nn.Module):
    """The same cell again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(D, D)

    def forward(self, x: Tensor) -> Tensor:
        state, states = torch.zeros(x.shape[0], D), []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            states.append(state)
        return torch.stack(states, 1)


class Checkpointed(nn.Module):
    """A recomputed region between others."""

    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Dropout(0.3), nn.Linear(4 * D, D), nn.ReLU(inplace=True))


class Tied(nn.Module):
    """Embedding and head are one matrix."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(11, D), nn.ModuleList(blocks)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return F.linear(x, self.embedding.weight)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: Tied(mlp(), mlp()),
    "separate": lambda: Tied(SeparateProjections(), mlp(), SeparateProjections()),
    "fused": lambda: Tied(FusedChunk(), FusedChunk()),
    "experts": lambda: Tied(Experts(), Experts()),
    "recurrent": lambda: Tied(mlp(), Recurrent(), Recurrent()),
    "checkpoint": lambda: Tied(mlp(), Checkpointed(SeparateProjections(), False), mlp()),
    "reentrant": lambda: Tied(mlp(), Checkpointed(mlp(), True), mlp()),
}
TOKENS = torch.randint(0, 11, (3, 8), generator=torch.Generator().manual_seed(0))


def gradients(model: nn.Module, autocast: bool = False, twice: bool = False) -> tuple[Tensor, list[Tensor]]:
    """The loss and all gradients of a step with fixed random numbers."""
    torch.manual_seed(1)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = F.cross_entropy(model(TOKENS).flatten(0, 1).float(), TOKENS.flatten())
    if twice:
        loss.backward(retain_graph=True)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def same(a: tuple[Tensor, list[Tensor]], b: tuple[Tensor, list[Tensor]]) -> bool:
    return torch.equal(a[0], b[0]) and all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


class Erratic(HostBackend):
    """Random delays."""

    rng = random.Random(0)

    def write(self, tensor: Tensor) -> Stored:
        time.sleep(self.rng.random() * 3e-3)
        return super().write(tensor)

    def read(self, stored: Stored, into: Tensor) -> None:
        time.sleep(self.rng.random() * 1e-3)
        super().read(stored, into)


@pytest.mark.parametrize("policy", ["all", "adaptive"])
@pytest.mark.parametrize("kind", ["disk", "erratic"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_bit_identical(name: str, kind: str, policy: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    expected = gradients(model)
    backend = FileBackend(tmp_path) if kind == "disk" else Erratic()
    with ActivationStore(model, backend, policy, min_bytes=1) as store:
        for _ in range(4):
            assert same(gradients(model), expected)
        report = store.report()
    assert report["passes"] == 4 and report["offloaded_bytes"] > 0
    assert not list(tmp_path.iterdir()), "files are left"
    assert same(gradients(model), expected), "something stayed behind"


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_prefetch_of_any_length(prefetch: int) -> None:
    torch.manual_seed(0)
    model = MODELS["separate"]()
    expected = gradients(model)
    with ActivationStore(model, Erratic(), "all", min_bytes=1, prefetch=prefetch) as store:
        assert same(gradients(model), expected) and same(gradients(model), expected)
        assert store.store.report.stored > 10


def test_reads_run_further_ahead_as_memory_is_freed() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(D, D), nn.Tanh()) for _ in range(8)))
    x = torch.randn(4, D)
    store = ActivationStore(model, HostBackend(), "all", min_bytes=1, prefetch=1)
    seen: dict[str, int] = {}
    reached = store._reached

    def watch(pass_: Any, segment: Any) -> None:
        reached(pass_, segment)
        seen.setdefault(segment.module, pass_.asked_bytes // x.nbytes)
        assert pass_.asked_bytes <= max(2 * x.nbytes, pass_.freed[segment.number + 1] + x.nbytes)

    with store:
        model(x).sum().backward()
        assert store._pass is not None
        cut = next(s.number for s in store._pass.segments if s.module == "4.0")  # the second half stays
        store.plan = Plan(cut, 0, 0, 1, 0.0, 0.0)
        store._reached = watch  # type: ignore[method-assign]
        loss = model(x).sum()
        store.store.drain()
        loss.backward()
    assert seen["7.1"] == 1, "at first two modules, which share one storage: nothing is freed yet"
    assert seen["4.1"] == 3, "three blocks that stayed are done with: room for three that left"
    assert seen["3.1"] == 4, "and all the rest is on its way when the first of them is needed"


def test_autocast_and_retained_graphs() -> None:
    torch.manual_seed(0)
    model = MODELS["separate"]()
    for settings in ({"autocast": True}, {"twice": True}):
        expected = gradients(model, **settings)
        with ActivationStore(model, HostBackend(), "all", min_bytes=1):
            assert same(gradients(model, **settings), expected)


def test_second_derivatives() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.Tanh())

    def penalty() -> Tensor:
        x = torch.ones(2, D, requires_grad=True)
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        model.zero_grad()
        slope.square().sum().backward()
        weight = model[0].weight
        assert isinstance(weight, Tensor) and weight.grad is not None
        return weight.grad.clone()

    expected = penalty()
    with ActivationStore(model, HostBackend(), "all", min_bytes=1):
        assert torch.equal(penalty(), expected)


def test_two_micro_batches_interleaved() -> None:
    torch.manual_seed(0)
    model = MODELS["fused"]()

    def both() -> list[Tensor]:
        model.zero_grad()
        first, second = model(TOKENS).square().mean(), model(TOKENS + 0).mean()
        first.backward()
        second.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = both()
    with ActivationStore(model, Erratic(), "adaptive", min_bytes=1) as store:
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(both(), expected, strict=True))
        assert store.counts.passes == 6


def test_one_storage_leaves_once_and_offsets_are_kept() -> None:
    model = nn.Sequential(FusedChunk(), FusedChunk())
    x = torch.randn(2, 8, D, requires_grad=True)
    lanes = Lanes()
    store = ActivationStore(model, HostBackend(), "all", min_bytes=1, lanes=lanes)
    written: list[int] = []
    real = store.store.put

    def put(tensor: Tensor, label: str = "", source: Tensor | None = None) -> Any:
        written.append(stamp(source if source is not None else tensor))
        return real(tensor, label, source)

    store.store.put = put  # type: ignore[method-assign]
    with store:
        y = model(x)
        lanes.drain()
        y.square().sum().backward()
    assert len(written) == len(set(written)), "a storage was written twice"
    # The fused projection is one storage of 3 D a token; its transposed and cut views are saved three times.
    assert store.modules["0"] == 4 * 2 * 8 * (3 * D + 8), "qkv once, and the 8 weights of the softmax"
    assert store.counts.deduplicated >= 3
    parameters = {stamp(p) for p in model.parameters()}
    assert not parameters & set(written), "a parameter, or a view of one, was written"
    assert stamp(x) not in written or x.requires_grad
    lanes.close()


def test_a_tensor_that_three_projections_save_is_written_once() -> None:
    model = nn.Sequential(nn.Linear(D, D), SeparateProjections(), nn.Linear(D, D))
    x = torch.randn(2, 8, D)
    with ActivationStore(model, HostBackend(), "all", min_bytes=1) as store:
        model(x).sum().backward()
        report = store.report()
    assert report["modules"]["1.q"] == 4 * 2 * 8 * D
    assert "1.k" not in report["modules"] and "1.v" not in report["modules"]
    assert report["saved_bytes"] > 1.2 * report["offloaded_bytes"]
    assert "0" not in report["modules"], "the step's input was offloaded"


def test_stamps_outlive_python_objects_and_are_never_given_twice() -> None:
    tensor = torch.randn(8)
    number = stamp(tensor)
    gc.collect()
    assert stamp(tensor) == stamp(tensor.view(2, 4).t()) == stamp(tensor.detach()) == number
    seen = {number}
    for _ in range(50):
        tensor = torch.randn(8)  # the allocator gives the same address again
        assert stamp(tensor) not in seen
        seen.add(stamp(tensor))


def test_memory_is_given_back_and_read_back_in_time() -> None:
    blocks = [nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(10)]
    model = nn.Sequential(*blocks)
    x = torch.randn(512, 64)

    def step(store: ActivationStore | None = None) -> None:
        y = model(x)
        if store is not None:
            store.store.drain()
        y.sum().backward()
        model.zero_grad()

    def loop(policy: Any) -> int:
        with ActivationStore(model, HostBackend(), policy, min_bytes=1, lanes=lanes) as store:
            step(store)
            return live_peak(lambda: step(store))[1]

    # Torch meters a CPU's memory by thread: what a lane's thread frees or makes would be missed.
    lanes = Lanes(queue_bytes=1)
    resting = live_peak(lambda: None)[1]
    keep, away = loop("none") - resting, loop("all") - resting
    assert away < 0.4 * keep
    lanes.close()


def test_forwarded_on_a_slow_disk_and_queued_writes_cancelled(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS["mlp"]()
    expected = gradients(model)
    lanes = Lanes(rates={"disk_write": 1e5})
    with ActivationStore(model, FileBackend(tmp_path), "all", min_bytes=1, lanes=lanes) as store:
        assert same(gradients(model), expected)
        report = store.report()
    assert report["forwarded"] > 5 and report["cancelled"] > 0
    lanes.close()


def test_a_full_queue_makes_the_forward_pass_wait_and_it_is_counted() -> None:
    model = MODELS["mlp"]()
    lanes = Lanes(rates={"device_to_host": 2e5}, queue_bytes=4096)
    with ActivationStore(model, HostBackend(), "all", min_bytes=1, lanes=lanes) as store:
        gradients(model)
        assert store.report()["stall_seconds_queue"] > 0.01
    lanes.close()


# The plan.


def test_needed_rates_by_hand() -> None:
    # T = 6. Module 0: 2*10 / 18. Module 1: (10 + 2*20) / (18 - 2*1). Module 2: (30 + 2*30) / (18 - 2*3).
    assert needed_rates([10, 20, 30], [1, 2, 3]) == pytest.approx([20 / 18, 50 / 16, 90 / 12])
    assert needed_rates([0, 5], [0, 0]) == [0.0, float("inf")]
    assert needed_rates([], []) == []
    for bad in (([1], [1, 2]), ([-1], [1]), ([1], [float("nan")])):
        with pytest.raises(ValueError, match="times"):
            needed_rates(*bad)


@pytest.mark.parametrize(("bandwidth", "count"), [(1.0, 0), (1.2, 1), (3.0, 1), (3.2, 2), (7.4, 2), (7.5, 3)])
def test_plan_amount_by_hand(bandwidth: float, count: int) -> None:
    assert plan_amount([10, 20, 30], [1, 2, 3], bandwidth) == count


def test_plan_stops_at_the_first_module_that_is_too_much() -> None:
    assert plan_amount([1, 1000, 1], [1, 1, 1], 10) == 1, "the third would fit, but comes after one that does not"


def test_drive_life() -> None:
    assert drive_life_days(1e6, 86400e6 * 30) == pytest.approx(30)
    assert drive_life_days(0, 1e12) == float("inf")


def test_adaptive_offloads_less_on_a_slower_link() -> None:
    torch.manual_seed(0)
    model = MODELS["separate"]()
    shares = []
    for bandwidth in (1e12, 2e6, 1.0):
        with ActivationStore(model, HostBackend(), "adaptive", min_bytes=1, bandwidth=bandwidth) as store:
            for _ in range(4):
                gradients(model)
            assert store.plan is not None
            shares.append(store.plan.bytes / store.plan.of_bytes)
            before = store.counts.offloaded_bytes
            gradients(model)
            # What the last module saves stays on top of the plan.
            assert store.counts.offloaded_bytes - before <= store.plan.bytes
    assert shares[0] == 1.0 and shares[2] == 0.0 and shares[0] >= shares[1] >= shares[2]


def test_another_sequence_length_is_planned_anew() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.Tanh())
    with ActivationStore(model, HostBackend(), "adaptive", min_bytes=1) as store:
        for rows in (4, 4, 4, 4, 16, 16, 16):
            model(torch.randn(rows, D)).sum().backward()
        assert store.counts.plans == 2


def test_dry_moves_nothing_and_counts() -> None:
    model = MODELS["mlp"]()
    with ActivationStore(model, DryBackend(), "all", min_bytes=1) as store:
        gradients(model)
        assert store.report()["offloaded_bytes"] > 0


# Failures.


def test_a_full_disk_keeps_gradients_right_and_offloads_less_from_then_on(tmp_path: Path) -> None:
    class Small(FileBackend):
        room = 20

        def write(self, tensor: Tensor) -> Stored:
            if self.room <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.room -= 1
            return super().write(tensor)

        def delete(self, stored: Stored) -> None:
            self.room += 1
            super().delete(stored)

    torch.manual_seed(0)
    log = FallbackLog()
    use_log(log)
    model = Tied(*(mlp() for _ in range(8)))
    expected = gradients(model)
    backend = Small(tmp_path)
    with ActivationStore(model, backend, "all", min_bytes=1) as store:
        for _ in range(3):
            torch.manual_seed(1)
            model.zero_grad()
            loss = F.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten())
            store.store.drain()
            loss.backward()
            assert same((loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]), expected)
        kept = store.store.report.kept
        assert kept > 0
        assert len(log.entries) == 1
    assert not list(tmp_path.iterdir())


def test_damaged_files_fail_the_step_and_name_the_module(tmp_path: Path) -> None:
    model = MODELS["mlp"]()
    with ActivationStore(model, FileBackend(tmp_path), "all", min_bytes=1) as store:
        loss = model(TOKENS).sum()
        store.store.drain()
        for path in store.store.backend.folder.glob("0*"):  # type: ignore[attr-defined]
            raw = bytearray(path.read_bytes())
            raw[0] ^= 1
            path.write_bytes(raw)
        with pytest.raises(HeadwayError, match=r"blocks\.\d.*other bytes"):
            loss.backward()


def test_an_exception_in_the_forward_pass_leaves_nothing(tmp_path: Path) -> None:
    class Fails(nn.Module):
        fail = True

        def forward(self, x: Tensor) -> Tensor:
            if self.fail:
                raise KeyError("model bug")
            return x

    torch.manual_seed(0)
    bug = Fails()
    model = Tied(mlp(), bug, mlp())
    with ActivationStore(model, FileBackend(tmp_path), "all", min_bytes=1) as store:
        with pytest.raises(KeyError):
            gradients(model)
        assert store.scopes.stack == []
        gc.collect()
        store.store.drain()
        store.store.put(torch.ones(1))
        store.store.drain()
        assert len(list(store.store.backend.folder.iterdir())) <= 2, "the failed step's files are still there"  # type: ignore[attr-defined]
        bug.fail = False
        got = gradients(model)
    assert same(gradients(model), got)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("min_bytes", [1, 1 << 30])
def test_a_change_in_place_is_found_as_without_hooks(min_bytes: int) -> None:
    class Spoils(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.exp(x)  # saves its result
            y.add_(1)
            return y

    model = nn.Sequential(nn.Linear(D, D), Spoils(), nn.Linear(D, D))
    with pytest.raises(RuntimeError, match="inplace"):
        model(torch.ones(2, D)).sum().backward()
    lanes = Lanes(rates={"device_to_host": 1e3})  # still being written when it is changed
    with (
        ActivationStore(model, HostBackend(), "all", min_bytes=min_bytes, lanes=lanes),
        pytest.raises(HeadwayError, match="changed in place"),
    ):
        model(torch.ones(2, D)).sum().backward()
    lanes.close(cancel=True)


def test_a_backward_pass_after_the_end_is_an_error() -> None:
    model = MODELS["mlp"]()
    with ActivationStore(model, HostBackend(), "all", min_bytes=1):
        loss = model(TOKENS).sum()
    with pytest.raises(HeadwayError, match="dropped"):
        loss.backward()


def test_a_copy_of_the_model_can_be_made() -> None:
    model = MODELS["mlp"]()
    with ActivationStore(model, HostBackend(), "all", min_bytes=1):
        other = copy.deepcopy(model)
        assert same(gradients(other), gradients(model))


# The method.


def losses(recipe: Recipe, steps: int = 5) -> list[float]:
    trainer = build_trainer(recipe)
    return [trainer.train_step()["loss"] for _ in range(steps)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("others", [{}, {"streambp": {"chunk": 8}}, {"recompute": {}}])
def test_losses_of_a_run_are_bit_identical(others: dict[str, Any], precision: str) -> None:
    base = {"train": {"precision": precision, "micro_batch": 2}}
    plain = losses(Recipe.load(tiny_recipe(methods=others, **base)))
    ours = losses(Recipe.load(tiny_recipe(methods={"ssdtrain": {"min_bytes": 1}, **others}, **base)))
    assert ours == plain


def test_the_report_is_kept_with_the_run(tmp_path: Path) -> None:
    options = {"min_bytes": 1, "backend": "disk", "path": str(tmp_path / "offload"), "drive_rating": "600TB"}
    train(tiny_recipe(methods={"ssdtrain": options}, train={"steps": 4}), run=tmp_path / "run")
    report = Run(tmp_path / "run").summary["reports"]["ssdtrain"]
    assert report["passes"] == 4 and report["offloaded_bytes"] > 0 and report["tier"] == "disk"
    assert report["drive_life_days"] > 0 and report["plans"] == 1
    assert any(name.startswith("blocks.1") for name in report["modules"])
    plain = train(tiny_recipe(train={"steps": 2}), run=tmp_path / "plain")
    assert plain.summary["reports"] == {}


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"train\.compile.*hooks do not run"):
        build_trainer(Recipe.load(tiny_recipe(methods={"ssdtrain": {}}, train={"compile": True})))
    with pytest.raises(MethodError, match="of no use"):
        build_trainer(Recipe.load(tiny_recipe(methods={"ssdtrain": {"backend": "host", "path": "/x"}})))
    with pytest.raises(MethodError, match=r"nothing to offload.*min_bytes|nothing to offload.*Lower"):
        losses(Recipe.load(tiny_recipe(methods={"ssdtrain": {"min_bytes": "1GiB"}})), 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(HeadwayError, match="cannot hold offloaded tensors"):
        build_trainer(Recipe.load(tiny_recipe(methods={"ssdtrain": {"path": str(tmp_path / "file")}})))


def test_evaluation_is_not_touched() -> None:
    trainer = build_trainer(Recipe.load(tiny_recipe(methods={"ssdtrain": {"min_bytes": 1}})))
    trainer.train_step()
    (method,) = trainer.methods
    before = method.report()["saved"]
    trainer.evaluate()
    assert method.report()["saved"] == before
