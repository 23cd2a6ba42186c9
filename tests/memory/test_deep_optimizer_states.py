"""Interleaved offloading: the bits of plain AdamW at every stride, type and delay; state, memory, failures.

Needs nothing. Run: pytest tests/memory/test_deep_optimizer_states.py
"""

from __future__ import annotations

import copy
import gc
import pickle
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headway.core.clip import clip_
from headway.core.errors import HeadwayError
from headway.core.fallback import FallbackLog, use_log
from headway.core.meters import live_bytes, live_peak
from headway.core.state import load_model_state, load_optimizer_state, model_state, optimizer_state
from headway.memory.deep_optimizer_states import InterleavedOffload, Lanes, Rates, Workers
from headway.memory.deep_optimizer_states import update as update_module
from headway.memory.deep_optimizer_states.update import Update
from headway.optim.adamw import build_adamw, param_groups
from headway.optim.master import MasterOptimizer, lower_precision
from headway.plan.dissect.memory import memory_breakdown

OPTIONS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[FallbackLog]:
    log = FallbackLog()
    use_log(log)
    yield log
    use_log(None)


def make_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Layers of odd sizes, so that cuts fall inside of parameters and the last subgroup is short."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(23, 37), nn.Linear(37, 51), nn.Tanh(), nn.LayerNorm(51), nn.Linear(51, 23))
    return model.to(dtype)


def batches(steps: int, micro: int = 1) -> list[list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda: torch.randint(23, (16,), generator=generator)  # noqa: E731
    return [[(draw(), draw()) for _ in range(micro)] for _ in range(steps)]


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    return param_groups(model, 0.1)


def train(model: nn.Module, optimizer: Any, data: Any, clip: float | None = 1.0) -> list[float]:
    losses = []
    for micro in data:
        for tokens, targets in micro:
            loss = nn.functional.cross_entropy(model(tokens).float(), targets) / len(micro)
            loss.backward()
            losses.append(loss.item())
        if isinstance(optimizer, InterleavedOffload):
            optimizer.clip_grad_norm_(clip if clip is not None else float("inf"))
        else:
            clip_([p for group in optimizer.param_groups for p in group["params"]], clip)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def plain(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """What the product trains with when the method is off."""
    model = make_model()
    inner: Callable[[Any], Any] = lambda groups: build_adamw(groups, **OPTIONS)  # noqa: E731
    if dtype == torch.float32:
        return model, inner(groups_of(model))
    masters = lower_precision(model, dtype)
    return model, MasterOptimizer(groups_of(model), inner, masters)


def offloaded(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, InterleavedOffload]:
    model = make_model()
    masters = lower_precision(model, dtype) if dtype != torch.float32 else {}
    options = {"stride": 2, "subgroup": 640, **options}
    return model, InterleavedOffload(groups_of(model), masters=masters, **OPTIONS, **options)


def everything(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Masters, moments and steps by name, and the training weights."""
    flat = {f"master {n}": t.detach().clone() for n, t in model_state(model, optimizer).items()}
    for name, values in optimizer_state(model, optimizer).items():
        flat |= {f"{key} {name}": value.clone() for key, value in values.items()}
    return flat | {f"weight {n}": p.detach().clone() for n, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


STRIDES = [1, 2, 3, 5, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stride", STRIDES)
def test_bits_of_plain_adamw(stride: int | None, dtype: torch.dtype) -> None:
    data = batches(20)
    reference = plain(dtype)
    expected = train(*reference, data)
    own = offloaded(dtype, stride=stride)
    assert train(*own, data) == expected
    assert same(everything(*own), everything(*reference))
    staged = len(own[1].arrangement.staged)
    assert staged == (0 if stride is None else len(own[1].arrangement.layout) // stride)


@pytest.mark.parametrize("subgroup", [64, 500, 1000, 10**9])
def test_any_size_of_subgroup(subgroup: int) -> None:
    data = batches(6)
    reference = plain(torch.bfloat16)
    train(*reference, data)
    own = offloaded(torch.bfloat16, subgroup=subgroup)
    train(*own, data)
    assert same(everything(*own), everything(*reference))
    layout = own[1].arrangement.layout
    assert len(layout) >= 8
    assert any(p.start for s in layout for p in s.pieces)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [1, 2, None])
def test_accumulation_and_clipping(stride: int | None, dtype: torch.dtype) -> None:
    data = batches(8, micro=4)
    reference = plain(dtype)
    expected = train(*reference, data, clip=0.3)
    own = offloaded(dtype, stride=stride)
    assert train(*own, data, clip=0.3) == expected
    assert same(everything(*own), everything(*reference))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fraction", [0.25, 0.7, 0.99])
def test_resident_share(fraction: float, dtype: torch.dtype) -> None:
    data = batches(8, micro=2)
    reference = plain(dtype)
    expected = train(*reference, data)
    own = offloaded(dtype, resident_fraction=fraction)
    assert train(*own, data) == expected
    assert same(everything(*own), everything(*reference))
    resident = own[1].report()["resident_parameters"]
    total = sum(p.numel() for p in own[0].parameters())
    assert 0.1 * total < resident <= fraction * total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("saved_after", [1, 2, 3])
def test_save_and_load_at_another_stride(saved_after: int, dtype: torch.dtype) -> None:
    data = batches(6)
    undisturbed = offloaded(dtype, stride=2)
    train(*undisturbed, data)
    first = offloaded(dtype, stride=2)
    train(*first, data[:saved_after])
    state = pickle.loads(pickle.dumps(first[1].state_dict()))
    weights = copy.deepcopy(first[0].state_dict())
    for stride, subgroup in ((3, 640), (None, 200), (1, 1000)):
        model, second = offloaded(dtype, stride=stride, subgroup=subgroup)
        train(model, second, data[:1])  # it has a state of its own to lose
        model.load_state_dict(weights)
        second.load_state_dict(state)
        assert second.updates == saved_after
        train(model, second, data[saved_after:])
        assert same(everything(model, second), everything(*undisturbed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_of_plain_and_offloaded_training_are_the_same(dtype: torch.dtype) -> None:
    data = batches(6)
    undisturbed = plain(dtype)
    train(*undisturbed, data)
    for make_first, make_second in ((plain, offloaded), (offloaded, plain)):
        first, second = make_first(dtype), make_second(dtype)
        train(*first, data[:3])
        model, optimizer = pickle.loads(pickle.dumps((model_state(*first), optimizer_state(*first))))
        load_model_state(*second, model)
        load_optimizer_state(*second, optimizer)
        train(*second, data[3:])
        assert same(everything(*second), everything(*undisturbed))


LANES = ["host", "cast", "to_device", "to_host", "device"]


@pytest.mark.parametrize("lane", LANES)
def test_a_late_lane_changes_nothing(lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = batches(5, micro=2)
    reference = plain(torch.bfloat16)
    train(*reference, data)
    own = offloaded(torch.bfloat16, stride=2)
    target = own[1].workers.all[lane]
    submit, jobs = target.submit, 0

    def late(work: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal jobs
        jobs += 1

        def slow(number: int = jobs) -> Any:
            time.sleep(0.003 * (number % 3))
            return work()

        return submit(slow, *args, **kwargs)

    monkeypatch.setattr(target, "submit", late)
    train(*own, data)
    assert jobs
    assert same(everything(*own), everything(*reference))


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    data = batches(4)
    results = []
    for model, optimizer in (plain(torch.float32), offloaded(stride=2)):
        for step, ((tokens, targets),) in enumerate(data):
            hidden = model[1](model[0](tokens))
            logits = model[4](model[3](hidden) if step % 2 else hidden)
            nn.functional.cross_entropy(logits, targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(everything(model, optimizer))
    assert results[0]["step 3.weight"] == 2
    assert same(*results)


def test_adam_with_coupled_decay_and_closure() -> None:
    data = batches(5)
    model, other = make_model(), make_model()
    reference = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    own = InterleavedOffload(other.parameters(), torch.optim.Adam, lr=1e-2, weight_decay=0.1, stride=2, subgroup=640)
    for ((tokens, targets),) in data:
        for m, o in ((model, reference), (other, own)):

            def closure(m: Any = m, o: Any = o, x: Tensor = tokens, y: Tensor = targets) -> Tensor:
                o.zero_grad()
                loss = nn.functional.cross_entropy(m(x), y)
                loss.backward()
                return loss

            assert o.step(closure) > 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_schedulers_and_names() -> None:
    model = make_model()
    optimizer = InterleavedOffload(model.named_parameters(), lr=1.0, stride=2, subgroup=640)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    rates = []
    for ((tokens, targets),) in batches(3):
        nn.functional.cross_entropy(model(tokens), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.5, 0.25, 0.125]
    state = optimizer.state_dict()
    assert set(state["masters"]) == {name for name, _ in model.named_parameters()} == set(state["steps"])
    assert optimizer.state_dict()["steps"]["0.weight"] == 3
    with pytest.raises(HeadwayError, match="once it is made"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def test_fp16_with_a_gradient_scaler() -> None:
    data = batches(6)
    results = []
    for make in (plain, offloaded):
        model, optimizer = make(torch.float16)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=1000)
        steps = 0
        for ((tokens, targets),) in data:
            loss = nn.functional.cross_entropy(model(tokens).float(), targets)
            scaler.scale(loss).backward()
            scale = scaler.get_scale()
            inner = getattr(optimizer, "inner", optimizer)
            scaler.unscale_(inner)
            if isinstance(optimizer, InterleavedOffload):
                scaler.step(optimizer)
            elif all(p.grad.isfinite().all() for g in inner.param_groups for p in g["params"]):
                optimizer.step()
            scaler.update()
            steps += scaler.get_scale() >= scale
            optimizer.zero_grad()
        results.append((everything(model, optimizer), steps))
    assert 0 < results[0][1] < 6, "the scale is meant to be too large at first"
    assert results[0][1] == results[1][1]
    assert same(results[0][0], results[1][0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, -1])
def test_a_gradient_that_is_not_finite_skips_the_whole_step(bad: float, where: int, _own_log: FallbackLog) -> None:
    model, optimizer = offloaded(torch.bfloat16)
    train(model, optimizer, batches(2))
    before = everything(model, optimizer)
    ((tokens, targets),) = batches(1)[0]
    nn.functional.cross_entropy(model(tokens).float(), targets).backward()
    optimizer.wait()
    next(iter(list(optimizer.gathered.values())[where : where + 1 or None])).grad.view(-1)[-1] = bad
    optimizer.step()
    optimizer.zero_grad()
    assert same(everything(model, optimizer), before)
    assert (optimizer.skipped, optimizer.updates) == (1, 2)
    assert "gradient norm" in _own_log.entries[0]["why"]


def test_a_gradient_that_comes_after_the_norm_is_looked_at() -> None:
    model, optimizer = offloaded()
    ((tokens, targets),) = batches(1)[0]
    nn.functional.cross_entropy(model(tokens), targets).backward()
    assert optimizer.clip_grad_norm_(1.0).isfinite()
    (float("nan") * nn.functional.cross_entropy(model(tokens), targets)).backward()
    optimizer.step()
    assert (optimizer.skipped, optimizer.updates) == (1, 0)


def test_several_threads_give_the_same_bits() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.manual_seed(0)
        values, grad = torch.randn(300_007), torch.randn(300_007)
        alone, away = nn.Parameter(values.clone()), nn.Parameter(values.clone())
        plain_optimizer = torch.optim.AdamW([alone], lr=1e-2, fused=True)
        own = InterleavedOffload([away], lr=1e-2, stride=2)
        for _ in range(3):
            alone.grad, away.grad = grad.clone(), grad.clone()
            plain_optimizer.step()
            own.step()
            own.zero_grad()
        assert torch.equal(alone, away)
        assert torch.equal(plain_optimizer.state[alone]["exp_avg_sq"], own.state_dict()["state"]["0"]["exp_avg_sq"])
    finally:
        torch.set_num_threads(before)


def test_moments_begin_at_zero_and_a_new_optimizer_has_no_state() -> None:
    model, optimizer = offloaded()
    assert len(optimizer.state) == 0
    assert optimizer_state(model, optimizer) == {}
    tensors = optimizer._tensors
    assert all(not flat.any() for flat in tensors.flats[1:])
    train(model, optimizer, batches(1))
    assert len(optimizer.state) == len(list(model.parameters()))
    key = next(iter(optimizer.state))
    del optimizer.state[key]
    assert key not in optimizer.state
    with pytest.raises(KeyError):
        optimizer.state[key]


# Memory.


def big(dtype: torch.dtype, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(16)))
    masters = lower_precision(model, dtype) if dtype != torch.float32 else {}
    if options.pop("plain", False):
        inner: Callable[[Any], Any] = lambda groups: build_adamw(groups, **OPTIONS)  # noqa: E731
        return model, MasterOptimizer(groups_of(model), inner, masters) if masters else inner(groups_of(model))
    return model, InterleavedOffload(groups_of(model), masters=masters, **OPTIONS, **options)


def peak(dtype: torch.dtype, **options: Any) -> int:
    """Bytes of the device in a step, for each parameter."""
    gc.collect()
    before = live_bytes(CPU)
    if "plain" not in options:
        options["workers"] = Workers(Lanes(queue_bytes=1 << 18))  # one gradient waits for the link
    model, optimizer = big(dtype, **options)
    x = torch.randn(4, 256, dtype=dtype)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    gc.collect()
    _, top = live_peak(step)
    return (top - before) / (16 * 256 * 256)  # type: ignore[return-value]


@pytest.mark.parametrize(("dtype", "whole"), [(torch.float32, 16), (torch.bfloat16, 18)], ids=["fp32", "bf16"])
def test_bytes_of_the_device_for_each_parameter(dtype: torch.dtype, whole: int) -> None:
    assert peak(dtype, plain=True) == pytest.approx(whole, rel=0.15)
    width = dtype.itemsize
    # Nothing staged: the weights, and a few gradients on their way.
    assert peak(dtype, stride=None) < width + 1.5
    # Half of the gradients stay in fp32; two buffers of an eighth each, of three words and a gradient.
    assert peak(dtype, stride=2) == pytest.approx(width + 4 / 2 + 2 * 16 / 8, rel=0.15)


def test_staging_keeps_to_the_limit_it_is_given() -> None:
    total = 16 * 256 * 256
    limit = 4 * total // 2 + total  # the kept gradients of stride 2, and one byte a parameter
    _, optimizer = big(torch.bfloat16, stride=2, max_device_extra=limit)
    report = optimizer.report()
    assert report["shrunk_from"] == total // 8
    assert report["subgroup"] < total // 8
    assert report["device_extra_bytes"] <= limit
    assert peak(torch.bfloat16, stride=2, max_device_extra=limit) < 2 + 2 + 1 + 0.5
    with pytest.raises(HeadwayError, match=r"max_device_extra: .* more"):
        big(torch.bfloat16, stride=2, max_device_extra=4 * total // 2)
    _, automatic = big(torch.bfloat16, stride="auto", max_device_extra=4 * total // 4, rates=FAST)
    assert automatic.report()["device_extra_bytes"] <= 4 * total // 4
    assert automatic.k is None or automatic.k > 4


FAST = Rates(to_device=1e9, to_host=1e9, host=1e7, device=1e9, cast=1e9)


def test_auto_takes_the_stride_of_the_model_and_measures_where_no_rates_are_given() -> None:
    _, fast = offloaded(torch.bfloat16, stride="auto", rates=FAST)
    assert fast.k == 1
    _, slow = offloaded(torch.bfloat16, stride="auto", rates=Rates(1e4, 1e4, 1e7, 1e9, 1e9))
    assert slow.k is None
    start = time.perf_counter()
    model, measured = offloaded(torch.bfloat16, stride="auto")
    assert time.perf_counter() - start < 3
    assert measured.plan is not None
    train(model, measured, batches(3))
    report = measured.report()
    assert report["predicted_over_measured"] > 0
    assert set(report["plan"]["candidates"]) >= {"1", "2", "inf"}
    assert set(report["lanes"]) == set(LANES)


def test_more_stride_than_subgroups_is_said(_own_log: FallbackLog) -> None:
    _, optimizer = offloaded(stride=40)
    assert not optimizer.arrangement.staged
    assert "subgroups of up to" in _own_log.entries[0]["cost"]


# Lanes.


def test_lanes_carry_what_the_method_says() -> None:
    model, optimizer = offloaded(torch.bfloat16, stride=2)
    for _ in range(2):
        train(model, optimizer, batches(1))
    total = sum(p.numel() for p in model.parameters())
    staged = sum(s.numel for s in optimizer.arrangement.staged)
    lanes = optimizer.report()["lanes"]
    shipped = optimizer.report()["grad_bytes"]
    away = sum(p.numel for s in optimizer.arrangement.staged for p in s.pieces if optimizer._tensors.on_host(p))
    assert lanes["to_device"]["bytes"] == 2 * (12 * staged + 4 * away + 2 * (total - staged))
    assert lanes["to_host"]["bytes"] == 2 * 12 * staged + shipped
    assert lanes["host"]["bytes"] == 2 * (total - staged)
    assert lanes["device"]["bytes"] == 2 * staged
    assert lanes["cast"]["bytes"] == 2 * (total - staged)
    assert shipped < 2 * 4 * total, "gradients of what the device updates stay there"


def test_gradients_cross_while_the_backward_pass_goes_on() -> None:
    times = {}
    for asynchronous in (True, False):
        lanes = Lanes(rates={"device_to_host": 2e6})
        model, optimizer = big(torch.float32, stride=None, async_grads=asynchronous, workers=Workers(lanes))
        loss = model(torch.randn(4, 256)).square().mean()
        start = time.perf_counter()
        loss.backward()
        times[asynchronous] = time.perf_counter() - start
        optimizer.zero_grad()
        lanes.close(cancel=True)
        optimizer.close()
    assert times[False] > 1.5
    assert times[True] < times[False] / 2


def test_pretended_rates_hold() -> None:
    total = 16 * 256 * 256
    workers = Workers(host_rate=total / 0.2, device_rate=total / 0.4)
    model, optimizer = big(torch.float32, stride=2, workers=workers)
    model(torch.randn(4, 256)).square().mean().backward()
    optimizer.step()
    busy = workers.busy()
    assert busy["host"] == pytest.approx(0.1, rel=0.3)
    assert busy["device"] == pytest.approx(0.2, rel=0.3)
    assert optimizer.update_seconds[-1] < 0.3
    workers.close()


# Failures.


@pytest.mark.parametrize("lane", LANES)
def test_a_failing_lane_fails_the_step_and_nobody_gets_the_mixed_state(
    lane: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = offloaded(torch.bfloat16, stride=2)
    train(model, optimizer, batches(1))
    state = pickle.loads(pickle.dumps(optimizer.state_dict()))
    ((tokens, targets),) = batches(1)[0]
    nn.functional.cross_entropy(model(tokens).float(), targets).backward()
    optimizer.clip_grad_norm_(1.0)
    target = optimizer.workers.all[lane]
    submit = target.submit

    def failing(work: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        def fail() -> None:
            raise OSError("the lane is broken")

        return submit(fail, *args, **kwargs)

    monkeypatch.setattr(target, "submit", failing)
    with pytest.raises(HeadwayError, match=r"failed halfway: the lane is broken.*last checkpoint"):
        optimizer.step()
    for read in (optimizer.state_dict, lambda: optimizer.masters, lambda: optimizer.state, optimizer.step,
                 lambda: optimizer_state(model, optimizer), lambda: model_state(model, optimizer)):  # fmt: skip
        with pytest.raises(HeadwayError, match="mix of old and new subgroups"):
            read()
    monkeypatch.undo()
    optimizer.load_state_dict(state)  # a whole state heals it
    train(model, optimizer, batches(2)[1:])
    assert optimizer.updates == 2


def test_a_gradient_that_cannot_be_moved_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = offloaded()

    def fail(*args: Any) -> None:
        raise OSError("no link")

    monkeypatch.setattr("headway.memory.deep_optimizer_states.gradients._move", fail)
    ((tokens, targets),) = batches(1)[0]
    with pytest.raises((HeadwayError, OSError), match="no link"):
        nn.functional.cross_entropy(model(tokens), targets).backward()
        optimizer.step()


def test_a_state_read_in_the_middle_of_an_update_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = offloaded(stride=2)
    seen: list[str] = []
    kernel = update_module.adam_

    def peeking(*args: Any) -> None:
        try:
            optimizer.state_dict()
        except HeadwayError as error:
            seen.append(str(error))
        kernel(*args)

    monkeypatch.setattr(update_module, "adam_", peeking)
    train(model, optimizer, batches(1))
    assert seen
    assert "update 1 is under way" in seen[0]


def test_an_interrupt_waits_for_the_end_of_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, own = offloaded(), offloaded()
    train(*reference, batches(1))
    drain, first = own[1].workers.drain, True

    def interrupted() -> None:
        nonlocal first
        if first:
            first = False
            raise KeyboardInterrupt
        drain()

    monkeypatch.setattr(own[1].workers, "drain", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(*own, batches(1))
    own[1].zero_grad()
    assert same(everything(*own), everything(*reference))


def test_a_state_that_mixes_two_steps_is_refused() -> None:
    model, optimizer = offloaded()
    train(model, optimizer, batches(1))
    old = pickle.loads(pickle.dumps(optimizer.state_dict()))
    train(model, optimizer, batches(2)[1:])
    new = optimizer.state_dict()
    new["state"] = {**new["state"], "2": old["state"]["2"]}
    _, other = offloaded()
    with pytest.raises(HeadwayError, match="state of step 1 where its subgroup was at step 2"):
        other.load_state_dict(new)
    with pytest.raises(HeadwayError, match="other parameters"):
        other.load_state_dict({**new, "masters": {}})
    with pytest.raises(HeadwayError, match="not Adam's"):
        other.state[next(iter(other.masters.values()))] = {"step": torch.ones(()), "momentum_buffer": torch.ones(1)}


def test_a_state_of_another_optimizer_is_refused_before_anything_is_loaded() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3)))
    optimizer = InterleavedOffload(model.named_parameters(), stride=2, subgroup=4096, lr=0.1)

    def step() -> None:
        model(torch.ones(1, 64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    saved = copy.deepcopy(optimizer.state_dict())
    step()
    before = [p.detach().clone() for p in model.parameters()]
    saved["state"]["2.weight"]["max_exp_avg_sq"] = torch.zeros(())
    with pytest.raises(HeadwayError, match="is not Adam's"):
        optimizer.load_state_dict(saved)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.close()


def test_a_lane_that_would_mix_up_gradients_is_refused() -> None:
    lanes = Lanes(workers={"device_to_host": 2})
    with pytest.raises(HeadwayError, match="2 workers, and gradients would lose their order"):
        InterleavedOffload(nn.Linear(64, 64).parameters(), stride=None, workers=Workers(lanes))
    lanes.close()


def test_subgroups_of_one_parameter_that_disagree_are_found() -> None:
    model, optimizer = offloaded(subgroup=64)
    train(model, optimizer, batches(1))
    optimizer._tensors.counts(optimizer.arrangement.layout[0])[0].add_(1)
    with pytest.raises(HeadwayError, match=r"subgroups that have done \[1, 2\] steps"):
        optimizer.state_dict()


class Halved(torch.optim.AdamW):
    """Not torch's own: who knows what it does."""


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        (torch.optim.Adafactor, {}, "element by element"),
        (torch.optim.SGD, {}, "element by element"),
        (Halved, {}, "element by element"),
        (torch.optim.AdamW, {"amsgrad": True}, "amsgrad"),
    ],
)
def test_optimizers_that_are_refused(optimizer: Any, options: Any, message: str) -> None:
    with pytest.raises(HeadwayError, match=message):
        InterleavedOffload(make_model().parameters(), optimizer, lr=1e-3, stride=2, **options)


def test_parameters_that_are_refused() -> None:
    with pytest.raises(HeadwayError, match="float64"):
        InterleavedOffload([nn.Parameter(torch.ones(3, dtype=torch.float64))], stride=2)
    with pytest.raises(HeadwayError, match="contiguous"):
        InterleavedOffload([nn.Parameter(torch.ones(3, 4).t())], stride=2)
    with pytest.raises(HeadwayError, match="stride 0"):
        InterleavedOffload([nn.Parameter(torch.ones(3))], stride=0)
    table = nn.Embedding(10, 10, sparse=True)
    optimizer = InterleavedOffload(table.parameters(), stride=None)
    with pytest.raises((HeadwayError, RuntimeError), match="sparse"):
        table(torch.tensor([1])).sum().backward()
    optimizer.close()


def test_a_device_without_room_for_staging_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, own = offloaded(), offloaded()
    train(*reference, batches(1))

    def refuse(*args: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr("headway.memory.deep_optimizer_states.offload.Slot.make", refuse)
        with pytest.raises(HeadwayError, match=r"no room to stage.*are needed at once. Nothing was updated"):
            train(*own, batches(1))
    own[1].step()
    own[1].zero_grad()
    assert same(everything(*own), everything(*reference))


def test_a_device_with_little_free_memory_gets_smaller_subgroups(monkeypatch: pytest.MonkeyPatch) -> None:
    total = 16 * 256 * 256
    monkeypatch.setattr("headway.memory.deep_optimizer_states.offload.free_bytes", lambda device: 3 * total)
    _, optimizer = big(torch.bfloat16, stride=2)
    assert optimizer.report()["shrunk_from"] == total // 8
    assert optimizer.report()["device_extra_bytes"] <= 3 * total


def test_scalars_and_parameters_that_are_frozen_for_a_while() -> None:
    results = []
    for offload in (False, True):
        torch.manual_seed(0)
        scale, layer = nn.Parameter(torch.ones(())), nn.Linear(64, 64)
        params = [scale, *layer.parameters()]
        layer.weight.requires_grad_(False)
        options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
        optimizer = (InterleavedOffload(params, stride=1, subgroup=64, **options) if offload
                     else torch.optim.AdamW(params, fused=True, **options))  # fmt: skip
        for step in range(4):
            if step == 2:
                layer.weight.requires_grad_(True)
            (layer(torch.ones(2, 64)) * scale).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach().clone() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_breakdown_of_a_steps_memory_knows_the_host_from_the_device() -> None:
    model, optimizer = offloaded(torch.bfloat16, stride=None)

    def step() -> None:
        train(model, optimizer, batches(1))

    report = memory_breakdown(step, model, optimizer)
    weights = 2 * sum(p.numel() for p in model.parameters())
    assert report.before.parameters == weights
    assert report.before.optimizer < 200, "no more than the counters of steps"
    assert report.before.gradients == 0
    assert report.peak.total < report.before.total + 4 * weights


def test_close_leaves_the_model_to_others() -> None:
    model, optimizer = offloaded()
    train(model, optimizer, batches(1))
    optimizer.close()
    ((tokens, targets),) = batches(1)[0]
    nn.functional.cross_entropy(model(tokens), targets).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_ring_of_rounded_results_is_used_again() -> None:
    """With more subgroups than buffers, and a link so slow that the host has to wait for one."""
    data = batches(2)
    reference = plain(torch.bfloat16)
    train(*reference, data)
    lanes = Lanes(rates={"host_to_device": 1e6})
    own = offloaded(torch.bfloat16, stride=None, subgroup=256, workers=Workers(lanes))
    assert len(own[1].arrangement.own) > 2 * len(own[1]._tensors.ring)
    train(*own, data)
    assert same(everything(*own), everything(*reference))
    lanes.close()


def test_update_runs_nothing_where_there_is_nothing() -> None:
    _, optimizer = offloaded()
    Update(optimizer._tensors, optimizer.workers, [], []).run([], [])
    optimizer.step()  # no gradients at all
    assert len(optimizer.state) == 0
