"""The optimizer whose states are on disk: equal to the one in memory bit for bit, and never silently wrong.

Needs a folder that can be written. Run: pytest tests/memory/test_fuyou.py
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headway.core import state as run_state
from headway.core.errors import HeadwayError, MethodError
from headway.core.meters import live_bytes, live_peak
from headway.memory.fuyou import Group, GroupFiles, TieredOptimizer, WeightsOnDisk, block_groups, groups_of
from headway.memory.fuyou.groups import Layout
from headway.memory.lanes import Lanes
from headway.models.build import build_model
from headway.models.config import LlamaConfig
from headway.optim.adamw import AdamW
from headway.optim.options import OptimizerOptions

VOCAB = 61


def tiny(tied: bool = True, layers: int = 3) -> Any:
    return build_model(LlamaConfig(hidden=32, layers=layers, heads=2, vocab=VOCAB, context=16, tied=tied), seed=0)


def plain(model: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    return AdamW.build(model, OptimizerOptions(lr=0.01), dtype)


def loss_of(model: nn.Module, number: int) -> Tensor:
    x = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(number))
    return nn.functional.cross_entropy(model(x).flatten(0, 1).float(), x.flatten())


def train(model: nn.Module, optimizer: Any, steps: int, micro: int = 1, overlap: bool = True, first: int = 0) -> None:
    for step in range(first, first + steps):
        for part in range(micro):
            if overlap and part == micro - 1 and isinstance(optimizer, TieredOptimizer):
                optimizer.arm()
            loss_of(model, step * micro + part).backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Weights, masters and states by name, as a checkpoint has them."""
    found = {f"weight {k}": p.detach().clone() for k, p in model.named_parameters()}
    found |= {f"master {k}": v.clone() for k, v in run_state.master_weights(model, optimizer).items()}
    for name, values in run_state.optimizer_state(model, optimizer).items():
        found |= {f"{key} {name}": value.clone() for key, value in values.items()}
    return found


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("delay", [0, 1, 2])
@pytest.mark.parametrize(
    ("dtype", "tied", "micro"),
    [(torch.float32, True, 1), (torch.float32, False, 2), (torch.bfloat16, True, 2), (torch.bfloat16, False, 1)],
)
def test_equal_to_the_optimizer_in_memory_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, tied: bool, micro: int, delay: int, overlap: bool
) -> None:
    model = tiny(tied)
    reference = plain(model, dtype)
    train(model, reference, 8, micro)
    expected = everything(model, reference)

    model = tiny(tied)
    optimizer = TieredOptimizer(plain(model, dtype), block_groups(model), tmp_path, buffers=delay + 2, delay=delay)
    train(model, optimizer, 8, micro, overlap)
    assert_same(everything(model, optimizer), expected)
    report = optimizer.report()
    assert report["updates_during_backward"] == (8 * len(optimizer.groups) if overlap else 0)
    assert report["host_bytes"] <= (delay + 2) * optimizer.buffer_bytes
    assert report["bytes_read"] == 8 * optimizer.state_bytes
    assert report["bytes_written"] == 9 * optimizer.state_bytes  # the first generation, then one a step
    optimizer.close()


def test_twenty_steps_with_groups_of_uneven_size_and_the_fewest_buffers(tmp_path: Path) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        sizes = (7, 65, 3, 128, 16, 1)
        return nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(sizes)))

    def steps(model: nn.Module, optimizer: Any) -> None:
        for step in range(20):
            if isinstance(optimizer, TieredOptimizer):
                optimizer.arm()
            x = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    reference = net()
    steps(reference, torch.optim.AdamW(reference.parameters(), lr=0.01, fused=True))
    for delay in (0, 1, 2):
        model = net()
        inner = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        groups = groups_of(list(model.parameters()), elements=200)
        assert len({sum(p.numel() for p in group.params) for group in groups}) > 2
        optimizer = TieredOptimizer(inner, groups, tmp_path, buffers=delay + 1, delay=delay)
        steps(model, optimizer)
        for a, b in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.equal(a, b)
        assert optimizer.host_bytes == (delay + 1) * optimizer.buffer_bytes
        optimizer.close()


def test_parameters_without_gradients_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
    before = [p.detach().clone() for p in model[1].parameters()]
    inner = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    groups = groups_of(list(model.parameters()), elements=20)
    optimizer = TieredOptimizer(inner, groups, tmp_path)
    for _ in range(3):
        optimizer.arm()
        model[2](model[0](torch.ones(2, 4))).sum().backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model[1].parameters(), before, strict=True))
    assert len(optimizer.named_states()) == 4
    optimizer.close()


def test_norm_of_gradients_that_are_gone_is_that_of_all(tmp_path: Path) -> None:
    model = tiny()
    optimizer = TieredOptimizer(plain(model), block_groups(model), tmp_path)
    other = tiny()
    loss_of(other, 0).backward()
    params = [p for group in plain(other).param_groups for p in group["params"]]
    expected = torch.nn.utils.get_total_norm([p.grad for p in params])
    optimizer.arm()
    loss_of(model, 0).backward()
    assert optimizer.is_updating
    assert torch.equal(optimizer.grad_norm, expected)
    optimizer.step()
    assert not any(p.grad is not None for p in model.parameters())
    optimizer.close()


def test_norm_does_not_wait_for_buffers_of_groups_whose_gradients_do_not_come(tmp_path: Path) -> None:
    """Read ahead as in the step before, while other groups complete in this one: more than there are buffers."""

    def step(layers: list[nn.Linear], optimizer: Any, used: list[int]) -> Tensor:
        if isinstance(optimizer, TieredOptimizer):
            optimizer.arm()
        x = torch.ones(2, 8)
        for i in used:
            x = layers[i](x)
        x.sum().backward()
        if isinstance(optimizer, TieredOptimizer):
            worker = threading.Thread(target=lambda: found.append(optimizer.grad_norm), daemon=True)
            worker.start()
            worker.join(20)
            assert not worker.is_alive()
        optimizer.step()
        optimizer.zero_grad()
        return torch.cat([p.detach().flatten() for layer in layers for p in layer.parameters()])

    def layers() -> list[nn.Linear]:
        torch.manual_seed(0)
        return [nn.Linear(8, 8) for _ in range(5)]

    def adamw(layers: list[nn.Linear]) -> Any:
        return torch.optim.AdamW([p for layer in layers for p in layer.parameters()], fused=True)

    found: list[Tensor] = []
    own, others = layers(), layers()
    groups = [Group(f"layer {i}", ("weight", "bias"), (layer.weight, layer.bias)) for i, layer in enumerate(own)]
    optimizer, reference = TieredOptimizer(adamw(own), groups, tmp_path, buffers=3, delay=1), adamw(others)
    for used in ([2, 1, 0], [4, 3], [0, 1, 2, 3, 4], [4]):
        assert torch.equal(step(own, optimizer, used), step(others, reference, used))
    assert len(found) == 4
    optimizer.close()


def test_rollback_takes_a_half_made_step_back(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny()
        optimizer = TieredOptimizer(plain(model, dtype), block_groups(model), tmp_path, delay=0, buffers=2)
        train(model, optimizer, 2)
        before = everything(model, optimizer)
        optimizer.arm()
        loss_of(model, 2).backward()
        time.sleep(0.05)
        optimizer.rollback()
        assert_same(everything(model, optimizer), before)
        train(model, optimizer, 2, first=2)
        after = everything(model, optimizer)
        optimizer.close()
        model = tiny()
        reference = plain(model, dtype)
        train(model, reference, 4)
        assert_same(everything(model, reference), after)


def test_a_gradient_after_the_update_is_an_error(tmp_path: Path) -> None:
    model = tiny()
    optimizer = TieredOptimizer(plain(model), block_groups(model), tmp_path)
    optimizer.arm()
    loss_of(model, 0).backward()
    with pytest.raises(HeadwayError, match="after its group was updated"):
        loss_of(model, 1).backward()


def test_a_checkpoint_is_the_same_with_and_without_it(tmp_path: Path) -> None:
    """At the level of core/state.py: each loads what the other saves, and goes on alike."""
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny()
        reference = plain(model, dtype)
        train(model, reference, 3)
        saved = (run_state.model_state(model, reference), run_state.optimizer_state(model, reference))
        saved = tuple({k: _clone(v) for k, v in part.items()} for part in saved)  # type: ignore[assignment]
        train(model, reference, 3, first=3)
        expected = everything(model, reference)

        tiered_model = tiny()
        optimizer: Any = TieredOptimizer(plain(tiered_model, dtype), block_groups(tiered_model), tmp_path)
        run_state.load_model_state(tiered_model, optimizer, saved[0])
        run_state.load_optimizer_state(tiered_model, optimizer, saved[1])
        back = (run_state.model_state(tiered_model, optimizer), run_state.optimizer_state(tiered_model, optimizer))
        train(tiered_model, optimizer, 3, first=3)
        assert_same(everything(tiered_model, optimizer), expected)
        optimizer.close()

        again = tiny()  # `back` was read from files that are gone by now: whoever holds it keeps it
        inner = plain(again, dtype)
        run_state.load_model_state(again, inner, back[0])
        run_state.load_optimizer_state(again, inner, back[1])
        train(again, inner, 3, first=3)
        assert_same(everything(again, inner), expected)


def _clone(value: Any) -> Any:
    return {k: v.clone() for k, v in value.items()} if isinstance(value, dict) else value.clone()


def test_state_dict_round_trip(tmp_path: Path) -> None:
    model = tiny()
    optimizer = TieredOptimizer(plain(model), block_groups(model), tmp_path)
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    train(model, optimizer, 2, first=2)
    expected = everything(model, optimizer)
    optimizer.load_state_dict(saved)
    train(model, optimizer, 2, first=2)
    assert_same(everything(model, optimizer), expected)
    optimizer.close()


class NotedFiles(GroupFiles):
    """Files on a drive that serves one request at a time, and what it was asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.write_lane = self.read_lane
        self.order: list[tuple[str, int]] = []

    def read(self, layout: Layout, *rest: Any) -> None:
        self.order.append(("read", id(layout)))
        super().read(layout, *rest)

    def write(self, layout: Layout, *rest: Any) -> Any:
        self.order.append(("write", id(layout)))
        return super().write(layout, *rest)


@pytest.mark.parametrize("delay", [0, 1])
def test_write_back_is_delayed_so_that_reads_come_first(tmp_path: Path, delay: int) -> None:
    """With a delay of one, a group is written after the next one is read; without, before."""
    model = tiny(layers=4)
    files = NotedFiles(tmp_path)
    optimizer = TieredOptimizer(plain(model), block_groups(model), files, delay=delay, buffers=delay + 1)
    files.order.clear()
    train(model, optimizer, 1)
    optimizer.named_masters()
    for layout, following in pairwise(optimizer.layouts):
        wrote, read = files.order.index(("write", id(layout))), files.order.index(("read", id(following)))
        assert (wrote < read) == (delay == 0)
    optimizer.close()


def test_kept_files_go_on_from_the_last_complete_step(tmp_path: Path) -> None:
    model = tiny()
    optimizer = TieredOptimizer(plain(model), block_groups(model), GroupFiles(tmp_path, keep=True))
    train(model, optimizer, 3)
    expected = everything(model, optimizer)
    with pytest.raises(HeadwayError, match="that is running"):
        GroupFiles(tmp_path, keep=True)
    optimizer.close()
    fresh = tiny()
    with torch.no_grad():
        fresh.embedding.weight.zero_()
    again = TieredOptimizer(plain(fresh), block_groups(fresh), GroupFiles(tmp_path, keep=True))
    assert again.steps_done == 3
    assert_same(everything(fresh, again), expected)
    again.close()


SCRIPT = """
import sys, threading
import torch
from itertools import pairwise
from pathlib import Path
from tests.memory.test_fuyou import *
torch.set_num_threads(1)
model = tiny()
files = GroupFiles(Path(sys.argv[1]), keep=True)
optimizer = TieredOptimizer(plain(model), block_groups(model), files, lanes=Lanes(rates={"disk_write": 1e7}))
print(optimizer.steps_done, flush=True)
for step in range(optimizer.steps_done, 1000):
    train(model, optimizer, 1, first=step)
    print(step + 1, flush=True)
"""


@pytest.mark.parametrize("other", ["wider", "narrower", "renamed", "in another order"])
def test_kept_files_of_another_model_are_refused(tmp_path: Path, other: str) -> None:
    def optimizer(width: int, names: tuple[str, ...], reverse: bool = False) -> TieredOptimizer:
        params = [nn.Parameter(torch.full((width,), float(i))) for i in range(2)]
        params = params[::-1] if reverse else params
        groups = [Group("all", names, tuple(params))]
        return TieredOptimizer(torch.optim.AdamW(params, fused=True), groups, GroupFiles(tmp_path, keep=True))

    optimizer(64, ("a", "b")).close()
    optimizer(64, ("a", "b")).close()
    changed: dict[str, Any] = {"wider": (2048, ("a", "b")), "narrower": (32, ("a", "b")), "renamed": (64, ("a", "c")),
                               "in another order": (64, ("b", "a"), True)}  # fmt: skip
    with pytest.raises(HeadwayError, match="another model"):
        optimizer(*changed[other])


def test_killed_at_any_moment_the_next_run_goes_on_from_a_complete_step(tmp_path: Path) -> None:
    """SIGKILL between read, update and write-back; what is found is bit for bit some step of the undisturbed run."""
    model = tiny()
    reference = plain(model)
    states = {0: everything(model, reference)}
    for step in range(1, 40):
        train(model, reference, 1, first=step - 1)
        states[step] = everything(model, reference)
    seen = 0
    for wait in (0.03, 0.11, 0.2):
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], stdout=subprocess.PIPE, text=True,
                                   cwd=Path(__file__).parents[2])  # fmt: skip
        assert process.stdout is not None
        first = int(process.stdout.readline())
        assert first >= seen
        for _ in range(2):  # when the second step begins to update, the first is complete on disk
            process.stdout.readline()
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        said = [int(line) for line in process.stdout.read().split()]
        process.wait()
        fresh = tiny()
        optimizer = TieredOptimizer(plain(fresh), block_groups(fresh), GroupFiles(tmp_path, keep=True))
        seen = optimizer.steps_done
        assert seen > first
        assert seen >= max(said, default=0) - 1  # of the last step it may still have been writing
        assert_same(everything(fresh, optimizer), states[seen])
        optimizer.close()


# Faults.


def test_other_optimizers_and_too_few_buffers_are_refused(tmp_path: Path) -> None:
    model = tiny()
    with pytest.raises(MethodError, match="not of SGD"):
        TieredOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), block_groups(model), tmp_path)
    with pytest.raises(MethodError, match="amsgrad"):
        TieredOptimizer(torch.optim.AdamW(model.parameters(), amsgrad=True), block_groups(model), tmp_path)
    with pytest.raises(MethodError, match="at least 3"):
        TieredOptimizer(plain(model), block_groups(model), tmp_path, buffers=2, delay=2)
    with pytest.raises(MethodError, match="not the optimizer's parameters"):
        TieredOptimizer(plain(model), block_groups(model)[1:], tmp_path)


def test_a_disk_too_small_is_refused_with_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(HeadwayError, match=r"has 1000B free; two generations of the optimizer's states take 1\.\d+MiB"):
        TieredOptimizer(plain(model), block_groups(model), tmp_path)


def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = tiny()
    with pytest.raises(HeadwayError, match="cannot hold"):
        TieredOptimizer(plain(model), block_groups(model), tmp_path / "file")


def test_a_disk_that_fills_up_stops_the_run_and_leaves_the_last_step_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    optimizer = TieredOptimizer(plain(model), block_groups(model), GroupFiles(tmp_path, keep=True))
    train(model, optimizer, 2)
    expected = everything(model, optimizer)
    calls = 0

    def full(descriptor: int, data: memoryview) -> None:
        nonlocal calls
        calls += 1
        if calls > 2:
            os.pwrite(descriptor, data[:4096], 0)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.pwrite(descriptor, data, 0)

    with monkeypatch.context() as patch:
        patch.setattr("headway.memory.fuyou.files.write_all", full)
        with pytest.raises(HeadwayError, match="No space left") as caught:
            train(model, optimizer, 3, first=2)
        assert isinstance(caught.value.__cause__, OSError)
        with pytest.raises(HeadwayError, match="No space left"):
            optimizer.arm()  # and never goes on
    optimizer.close()
    fresh = tiny()
    again = TieredOptimizer(plain(fresh), block_groups(fresh), GroupFiles(tmp_path, keep=True))
    assert again.steps_done == 2
    assert_same(everything(fresh, again), expected)
    again.close()


@pytest.mark.parametrize("damage", ["torn", "flipped"])
def test_a_damaged_file_is_an_error_and_never_an_update(tmp_path: Path, damage: str) -> None:
    model = tiny()
    optimizer = TieredOptimizer(plain(model), block_groups(model), tmp_path)
    train(model, optimizer, 1)
    optimizer.named_masters()  # all is written
    path = optimizer._current[1].path
    content = bytearray(path.read_bytes())
    path.write_bytes(content[: len(content) // 2] if damage == "torn" else bytes([content[0] ^ 4]) + content[1:])
    message = r"holds \d+ bytes of" if damage == "torn" else "other bytes in master"
    with pytest.raises(HeadwayError, match=message):
        train(model, optimizer, 1)
    with pytest.raises(HeadwayError, match=message):
        optimizer.named_masters()
    optimizer.close()


def test_a_worker_that_raises_stops_the_run_with_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    optimizer = TieredOptimizer(plain(model), block_groups(model), tmp_path)

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("kernel broke in " + threading.current_thread().name)

    monkeypatch.setattr("headway.memory.fuyou.pipeline.adam", broken)
    with pytest.raises(HeadwayError, match="kernel broke in headway-compute") as caught:
        train(model, optimizer, 1)
    assert caught.value.__cause__ is not None
    assert caught.value.__cause__.__traceback__ is not None
    with pytest.raises(HeadwayError, match="kernel broke"):
        optimizer.arm()  # before the next forward pass
    optimizer.close()


def test_a_slow_disk_only_takes_longer(tmp_path: Path) -> None:
    model = tiny()
    reference = plain(model)
    train(model, reference, 3)
    expected = everything(model, reference)
    model = tiny()
    lanes = Lanes(rates={"disk_read": 5e6, "disk_write": 5e6})
    optimizer = TieredOptimizer(plain(model), block_groups(model), tmp_path, lanes=lanes)
    start = time.perf_counter()
    train(model, optimizer, 3)
    assert_same(everything(model, optimizer), expected)
    assert time.perf_counter() - start > 3 * optimizer.state_bytes / 5e6
    assert optimizer.stall_seconds > 0
    optimizer.close()
    lanes.close()


def test_host_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    taken = []
    for layers in (2, 6):
        model = tiny(layers=layers)
        optimizer = TieredOptimizer(plain(model), block_groups(model), tmp_path, buffers=3)
        train(model, optimizer, 2)
        taken.append(optimizer.host_bytes)
        optimizer.close()
    assert taken[0] == taken[1] == 3 * optimizer.buffer_bytes


def test_files_leave_nothing_behind(tmp_path: Path) -> None:
    model = tiny()
    optimizer = TieredOptimizer(plain(model), block_groups(model), tmp_path)
    train(model, optimizer, 3)
    optimizer.named_masters()
    files = [p for p in optimizer.files.folder.iterdir() if p.name != "lock"]
    assert len(files) == len(optimizer.groups)  # one generation each, once a step is complete
    optimizer.close()
    assert not list(tmp_path.iterdir())


def test_the_index_is_flipped_only_when_all_groups_are_written(tmp_path: Path) -> None:
    model = tiny()
    files = GroupFiles(tmp_path, keep=True)
    optimizer = TieredOptimizer(plain(model), block_groups(model), files)
    commits: list[tuple[int, bool]] = []
    commit = files.commit

    def noting(step: int, groups: Any, note: Any) -> None:
        commits.append((step, all(g.path.exists() for g in groups.values())))
        commit(step, groups, note)

    files.commit = noting  # type: ignore[method-assign]
    train(model, optimizer, 3)
    optimizer.named_masters()
    assert commits == [(1, True), (2, True), (3, True)]
    assert json.loads((files.folder / "index.json").read_text())["step"] == 3
    optimizer.close()


def test_layout_keeps_parameters_on_cache_lines_and_regions_on_pages() -> None:
    layout = Layout([torch.Size((3, 5)), torch.Size((7,)), torch.Size(())], torch.bfloat16)
    assert layout.starts == (0, 16, 32)
    whole = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for region, (start, nbytes) in layout.regions.items():
        assert start % 4096 == nbytes % 4096 == 0
        for view, shape in zip(layout.views(whole, region), layout.shapes, strict=True):
            assert view.shape == shape
            view.fill_(1)
    assert layout.views(whole, "weights")[0].dtype is torch.bfloat16
    assert whole.count_nonzero() > 0


def test_reading_states_by_name_takes_no_memory_before_they_are_looked_at(tmp_path: Path) -> None:
    model = tiny()
    optimizer = TieredOptimizer(plain(model), block_groups(model), tmp_path)
    train(model, optimizer, 1)
    before = live_bytes(torch.device("cpu"))
    found, peak = live_peak(optimizer.named_states)
    assert len(found) == len(list(model.parameters()))
    assert peak - before < optimizer.state_bytes / 10
    optimizer.close()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_equal_to_rounding(tmp_path: Path, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    models = [tiny().cuda() for _ in range(2)]
    reference = plain(models[0], dtype)
    groups = block_groups(models[1])
    chosen = frozenset(i for i, group in enumerate(groups) if group.block is not None)
    optimizer = TieredOptimizer(plain(models[1], dtype), groups, tmp_path, weights_on_disk=chosen)
    WeightsOnDisk(list(models[1].blocks), optimizer)
    for step in range(10):
        x = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(step)).cuda()
        for model, inner in zip(models, (reference, optimizer), strict=True):
            if inner is optimizer:
                optimizer.arm()
            nn.functional.cross_entropy(model(x).flatten(0, 1).float(), x.flatten()).backward()
            inner.step()
            inner.zero_grad()
    masters = run_state.master_weights(models[1], optimizer)  # type: ignore[arg-type]
    for name, value in run_state.master_weights(models[0], reference).items():
        assert torch.allclose(value.cpu(), masters[name], rtol=1e-3, atol=1e-4), name
    optimizer.close()
