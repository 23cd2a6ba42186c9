"""Lazy checkpoints: exact while training goes on, and known to be torn where nobody fenced.

What is on disk afterwards is tested for both modes in test_checkpoint.py. Needs: torch.
Run: pytest tests/resilience/test_lazy.py
"""

import errno
import gc
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from headway.core import fallback as fallback_module
from headway.core.errors import CheckpointError, HeadwayError, RecipeError
from headway.core.meters import live_bytes, live_peak
from headway.core.options import parse_options
from headway.memory.lanes import Lanes
from headway.resilience import lazy as lazy_module
from headway.resilience import limits, pipeline
from headway.resilience.lazy import LazyCheckpointer
from headway.resilience.reading import SavedStates
from headway.resilience.staging import _sample as staging_sample
from headway.resilience.staging import boxes
from headway.resilience.version import Version
from tests.resilience.states import same

MB = 1 << 20
LARGE = 400_000  # elements of fp32: beyond what is copied at once


def lazy(folder, rates=None, **options):
    options = {"host_cache": 4 * MB, **options}
    return LazyCheckpointer(LazyCheckpointer.Options(**options), folder, Lanes(rates=rates))


def clone(state):
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: clone(value) for key, value in state.items()}
    return [clone(value) for value in state] if isinstance(state, list) else state


def saved(folder):
    return SavedStates(folder).load()


@pytest.fixture
def log():
    log = fallback_module.FallbackLog()
    fallback_module.use_log(log)
    yield log
    fallback_module.use_log(fallback_module.FallbackLog())


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(pipeline, "CHUNK", 256 << 10)


def test_save_returns_at_once_and_the_fence_keeps_it_exact(tmp_path):
    saver = lazy(tmp_path, rates={"device_to_host": 20 * MB})
    state = {"w": torch.randn(LARGE * 5), "small": torch.randn(10), "step": 1}
    expected = clone(state)
    start = time.perf_counter()
    path = saver.save(1, state)
    assert time.perf_counter() - start < 0.15 and not path.exists()
    assert saver.status() == {1: "staging"}
    state["small"].zero_()  # copied already
    saver.fence()
    assert time.perf_counter() - start > 0.3
    state["w"].zero_()
    saver.wait()
    assert same(saved(tmp_path), expected) and saver.status() == {1: "committed"}
    assert saver.report()["fence_seconds"] > 0.2
    saver.close()


def test_stages_can_be_waited_for_one_by_one(tmp_path):
    saver = lazy(tmp_path, rates={"disk_write": 10 * MB})
    path = saver.save(1, {"w": torch.randn(LARGE * 2)})
    saver.wait("staged")
    assert saver.status() == {1: "staged"} and not path.exists()
    saver.wait("persisted")
    assert saver.status()[1] in ("persisted", "committed")
    saver.wait("committed")
    assert path.exists()
    saver.close()


def change_in_place(tensor):
    tensor.add_(1)


def change_unseen(tensor):
    tensor.data.add_(1)  # raises no counter, as fused optimizers raise none


@pytest.mark.parametrize("change", [change_in_place, change_unseen])
def test_without_a_fence_it_is_torn_and_found_out(tmp_path, log, capsys, change):
    saver = lazy(tmp_path, rates={"device_to_host": 10 * MB})
    state = {"model": {"a": torch.randn(LARGE), "b": torch.randn(LARGE * 2)}}
    saver.save(1, state)
    saver.wait()
    before = clone(state)
    saver.save(2, state)
    change(state["model"]["b"])
    saver.fence()
    saver._made.drain()
    assert same(saved(tmp_path), before) and not (tmp_path / "step-00000002").exists()
    assert saver.status()[2].startswith("failed: model.b: was changed in place before it had been copied")
    expected = clone(state)
    saver.save(3, state)  # from now on that one is copied at once
    assert "model.b: was changed" in log.entries[0]["why"] and "step 1" in log.entries[0]["cost"]
    assert "no checkpoint of step 2" in capsys.readouterr().err
    change(state["model"]["b"])
    saver.wait()
    assert same(saved(tmp_path), expected)
    saver.close()


def test_a_change_seen_only_after_the_commit_withdraws_it(tmp_path, log):
    saver = lazy(tmp_path, keep=1)
    state = {"w": torch.randn(LARGE)}
    saver.save(1, state)
    saver.wait()
    before = clone(state)
    saver.save(2, state)
    saver._made.drain()
    assert (tmp_path / "step-00000002").exists()
    state["w"].add_(1)  # perhaps it was under way while it was being copied: nobody can know
    saver.fence()
    assert same(saved(tmp_path), before), "with keep: 1 the one before must still be there"
    assert "w: was changed" in log.entries[0]["why"]
    saver.close()


def test_a_change_seen_in_the_middle_of_the_commit(tmp_path, monkeypatch, log):
    saver = lazy(tmp_path, keep=1)
    state = {"w": torch.randn(LARGE)}
    saver.save(1, state)
    saver.wait()
    before, seen = clone(state), threading.Event()
    let_go, publish = Version.let_go, saver._made._commits._publish

    def change_late(version):
        state["w"].add_(1)
        error = let_go(version)
        seen.set()
        version.done.wait(10)  # the commit goes on in between
        return error

    def publish_late(version):
        seen.wait(10)
        publish(version)

    monkeypatch.setattr(saver._made._commits, "_publish", publish_late)
    saver.save(2, state)
    with monkeypatch.context() as patch:
        patch.setattr(Version, "let_go", change_late)
        saver.fence()
    saver._made.drain()
    saver.close()
    assert same(saved(tmp_path), before), "with keep: 1 the one before must still be there"
    assert "w: was changed" in log.entries[0]["why"]


def test_two_hundred_random_interleavings(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "TINY_STATE", 0)
    monkeypatch.setattr(pipeline, "SMALL", 1000)
    monkeypatch.setattr("os.fsync", lambda _: None)
    rng = random.Random(0)
    state = {
        "a": torch.randn(100, 300), "b": torch.randn(300, 100).t(), "c": torch.randn(30_000).bfloat16(),
        "small": [torch.tensor(1.0), torch.randn(30)], "n": 0,
    }  # fmt: skip
    savers = [
        lazy(tmp_path / str(i), rates, host_cache=cache, keep=1)
        for i, (rates, cache) in enumerate(
            [(None, 4 * MB), (None, 64 << 10), ({"device_to_host": 90 * MB}, MB), ({"disk_write": 90 * MB}, 128 << 10)]
        )
    ]
    for round_ in range(200):
        number = rng.randrange(4)
        saver = savers[number]
        expected = clone(state)
        saver.save(round_, state)
        for _ in range(rng.randrange(3)):
            time.sleep(rng.uniform(0, 0.002))
            state["small"][1].add_(1)  # may change at any time
        saver.fence()
        for key in ("a", "b", "c"):
            state[key].mul_(-1.01) if rng.random() < 0.7 else state[key].data.add_(0.5)
        state["n"] += 1
        if rng.random() < 0.3 or round_ > 190:
            saver.wait()
            assert same(saved(tmp_path / str(number)), expected), round_
    for saver in savers:
        saver.wait()
        report = saver.report()
        assert report["failed"] == 0 and report["committed"] == report["saved"] > 20
        saver.close()


def test_objects_that_are_replaced_before_they_were_copied(tmp_path):
    saver = lazy(tmp_path, rates={"device_to_host": 20 * MB})
    state = {"w": torch.randn(LARGE), "opt": {"m": torch.randn(LARGE)}}
    expected = clone(state)
    saver.save(1, state)
    state["opt"]["m"] = torch.zeros(LARGE)
    del state["w"]
    gc.collect()
    torch.full((LARGE * 2,), 7.0)  # would lie where the freed ones were
    saver.wait()
    assert same(saved(tmp_path), expected)
    saver.close()


def test_the_same_memory_is_saved_once(tmp_path):
    saver = lazy(tmp_path)
    w = torch.randn(LARGE)
    state = {"embedding": w, "head": w.view(LARGE), "half": w[: LARGE // 2], "other": w.clone()}
    path = saver.save(1, state)
    saver.wait()
    size = sum(file.stat().st_size for file in path.glob("*.distcp"))
    assert size < 2.6 * w.nbytes and same(saved(tmp_path), state)
    saver.close()


def test_a_ring_smaller_than_the_state_and_than_any_tensor(tmp_path):
    saver = lazy(tmp_path, host_cache=64 << 10)
    state = {"w": torch.randn(3, 1, LARGE), "t": torch.randn(2, LARGE).t(), "row": torch.randn(1, 1, LARGE),
             "z": torch.randn(LARGE, dtype=torch.complex128), "flags": torch.rand(LARGE) > 0.5}  # fmt: skip
    saver.save(1, state)
    saver.wait()
    assert same(saved(tmp_path), state) and saver.report()["ring_bytes"] == 64 << 10
    saver.close()


@pytest.mark.parametrize(
    ("shape", "limit"),
    [((), 1), ((0, 3), 4), ((5,), 8), ((2, 3, 5), 8), ((1, 1, 9), 12), ((7, 1, 3), 1000), ((4, 6), 24), ((3, 2, 2), 4)],
)
def test_boxes_tile_the_tensor(shape, limit):
    tensor, count = torch.zeros(shape), 0
    for offsets, sizes in boxes(shape, 4, limit):
        view = tensor
        for dim, (start, length) in enumerate(zip(offsets, sizes)):
            view = view.narrow(dim, start, length)
        view += 1
        assert view.is_contiguous() and view.numel() * 4 <= max(limit, 4)
        count += 1
    assert (tensor == 1).all() and count


def test_a_tiny_state_needs_no_ring_and_leaves_no_thread(tmp_path):
    before = set(threading.enumerate())
    saver = LazyCheckpointer(LazyCheckpointer.Options(), tmp_path)
    assert saver._made is None
    saver.save(1, {"w": torch.randn(1000), "b": torch.randn(3)})
    assert saver.status()[1] != "staging"
    saver.wait()
    started = {thread.name for thread in set(threading.enumerate()) - before}
    assert started <= {"headway-disk_write"} and saver.report()["ring_bytes"] == 0
    saver.close()
    assert set(threading.enumerate()) <= before


def test_a_closed_one_that_saved_nothing_never_started_anything(tmp_path):
    saver = LazyCheckpointer(LazyCheckpointer.Options(), tmp_path / "none")
    saver.fence(), saver.wait(), saver.close()
    assert saver._made is None and not (tmp_path / "none").exists()


def test_the_ring_is_no_larger_than_the_state(tmp_path):
    saver = lazy(tmp_path, host_cache=2 << 30)
    saver.save(1, {"w": torch.randn(LARGE)})
    assert saver.report()["ring_bytes"] < 2.5 * LARGE * 4
    saver.fence()
    saver.save(2, {"w": torch.randn(LARGE), "m": torch.randn(3 * LARGE)})  # the optimizer's state is there now
    assert 4 * LARGE * 4 <= saver.report()["ring_bytes"] < 6 * LARGE * 4
    saver.wait()
    saver.close()


def test_meters_do_not_see_the_copies(tmp_path):
    saver = lazy(tmp_path, rates={"device_to_host": 40 * MB})
    state = {"w": torch.randn(LARGE), "b": torch.randn(5)}
    cpu, samples = torch.device("cpu"), 64 * 8 * 20
    before, seen = live_bytes(cpu), []
    saver.save(1, state)
    for _ in range(3):
        seen.append(live_bytes(cpu))
    saver.wait()
    assert max(seen) - before < samples

    def step():
        saver.save(2, state)
        saver.fence()

    assert live_peak(step)[1] - before < 2 * samples
    saver.wait()
    saver.close()


def test_attached_to_an_optimizer(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(600, 700)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    saver = lazy(tmp_path, rates={"device_to_host": 100 * MB}, keep=9)
    handle = saver.attach(optimizer)
    expected = {}
    for step in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, 600)).square().mean().backward()
        optimizer.step()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        expected[step] = clone(state)
        saver.save(step, state)
    saver.wait()
    for step in range(4):
        assert same(saver.load_from(tmp_path / f"step-{step:08d}"), expected[step])
    handle.remove()
    optimizer.step()
    saver.close()


# Failures.


def full_after(monkeypatch, count):
    """A disk that takes so many files and then is full."""
    opened, left = Path.open, [count]

    def open_(path, mode="r", *args, **kwargs):
        if mode == "wb" and "step-" in str(path):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_)


@pytest.mark.parametrize("count", range(4))
def test_a_full_disk_does_not_stop_training(tmp_path, monkeypatch, log, count):
    saver = lazy(tmp_path)
    state = {"w": torch.randn(LARGE)}
    saver.save(1, state)
    saver.wait()
    before = clone(state)
    with monkeypatch.context() as patch:
        full_after(patch, count)
        saver.save(2, state)
        saver.fence()
        state["w"].add_(1)
        saver._made.drain()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"] and same(saved(tmp_path), before)
    saver.save(3, state)
    assert "No space left on device" in log.entries[0]["why"] and "Make room" in log.entries[0]["why"]
    assert log.entries[0]["what"] == "no checkpoint of step 2"
    saver.wait()  # the last one is there: no error
    assert same(saved(tmp_path), state) and saver.report()["failed"] == 1
    saver.close()


def test_the_last_checkpoint_that_fails_is_an_error_at_the_end(tmp_path, monkeypatch, log):
    saver = lazy(tmp_path)
    with monkeypatch.context() as patch:
        full_after(patch, 0)
        saver.save(1, {"w": torch.randn(LARGE)})
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"step-00000001: cannot be written \(No space left on device\)"):
                saver.wait()
    saver.close()
    assert not log.entries, "told once, by the error"


def test_strict_runs_stop_at_the_next_save(tmp_path, monkeypatch, log):
    log.strict = True
    saver = lazy(tmp_path)
    with monkeypatch.context() as patch:
        full_after(patch, 0)
        saver.save(1, {"w": torch.randn(LARGE)})
        saver._made.drain()
    with pytest.raises(HeadwayError, match="no checkpoint of step 1: is a fallback"):
        saver.save(2, {"w": torch.randn(LARGE)})
    saver.close()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    saver = lazy(tmp_path / "file" / "checkpoints")
    saver.save(1, {"w": torch.randn(LARGE)})
    saver.fence()
    with pytest.raises(CheckpointError, match=r"cannot be written \(Not a directory"):
        saver.wait()
    saver.close()


@pytest.mark.parametrize("where", ["shards.torch.save", "staging._sample", "commit.write_index"])
def test_a_worker_that_raises_does_not_stop_training(tmp_path, monkeypatch, log, where):
    saver = lazy(tmp_path)
    state = {"w": torch.randn(LARGE)}
    saver.save(1, state)
    saver.wait()
    with monkeypatch.context() as patch:
        caller = threading.current_thread()

        def boom(*arguments):
            if threading.current_thread() is not caller:
                raise RuntimeError("a cosmic ray")
            return staging_sample(*arguments)

        patch.setattr(f"headway.resilience.{where}", boom)
        saver.save(2, state)
        saver.fence()
        saver._made.drain()
    saver.save(3, state)
    assert "RuntimeError: a cosmic ray" in log.entries[0]["why"]
    saver.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]
    assert same(saved(tmp_path), state)
    saver.close()


def test_no_thread_to_be_had(tmp_path, monkeypatch, log):
    saver = lazy(tmp_path)
    state = {"w": torch.randn(LARGE)}
    with monkeypatch.context() as patch:

        def refuse(_):
            raise RuntimeError("can't start new thread")

        patch.setattr(threading.Thread, "start", refuse)
        saver.save(1, state)
        saver.fence()
    assert "can't start new thread" in log.entries[0]["why"]
    saver.save(2, state)
    saver.wait()
    assert same(saved(tmp_path), state)
    saver.close()


def test_no_thread_to_write_gives_the_ring_back(tmp_path, monkeypatch, log):
    saver = lazy(tmp_path, host_cache=MB)
    state = {"w": torch.randn(LARGE)}
    saver.save(1, state)
    saver.wait()
    lane, calls = saver._made.lanes["disk_write"], []
    submit = lane.submit

    def refuse_once(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("can't start new thread")
        return submit(*arguments, **options)

    monkeypatch.setattr(lane, "submit", refuse_once)
    saver.save(2, state)
    saver.fence()
    saver._made.drain()
    assert saver._made._ring.empty, "who comes next waits for it for ever"
    saver.save(3, state)
    saver.wait()
    assert same(saved(tmp_path), state) and "can't start new thread" in log.entries[0]["why"]
    saver.close()


def test_interrupted_while_saving(tmp_path, monkeypatch):
    saver = lazy(tmp_path)
    state = {"w": torch.randn(LARGE)}
    saver.save(1, state)
    saver.wait()
    submit, calls = saver._made.lanes["device_to_host"].submit, []

    def interrupt(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return submit(*arguments, **options)

    monkeypatch.setattr(saver._made.lanes["device_to_host"], "submit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        saver.save(2, {**state, "v": torch.randn(LARGE)})
    saver.close()
    assert same(saved(tmp_path), state) and [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_giving_up_at_close_is_told(tmp_path, capsys, monkeypatch):
    saver = lazy(tmp_path, rates={"disk_write": 2 * MB})
    saver.save(1, {"w": torch.randn(LARGE)})

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(saver._made, "drain", interrupt)
    with pytest.raises(KeyboardInterrupt):
        saver.close()
    assert "gave up the checkpoints of steps [1]" in capsys.readouterr().err


def test_little_memory_makes_a_smaller_ring_and_says_so(tmp_path, monkeypatch, log):
    monkeypatch.setattr(pipeline, "host_memory_left", lambda: 512 << 10)
    saver = lazy(tmp_path)
    state = {"w": torch.randn(LARGE)}
    saver.save(1, state)
    saver.wait()
    assert saver.report()["ring_bytes"] == 256 << 10 and same(saved(tmp_path), state)
    assert "256.0KiB of host memory" in log.entries[0]["what"]
    saver.close()


def test_limits_of_the_address_space_and_the_control_group(tmp_path):
    code = (
        "import resource; from headway.resilience.limits import host_memory_left as left\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)); assert 0 < left() < 1 << 30, left()"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 100\n")
    assert limits._control_group(tmp_path) == 400
    (tmp_path / "memory.max").write_text("max\n")
    assert limits._control_group(tmp_path) is None and limits._control_group(tmp_path / "none") is None


def test_close_finishes_what_was_copied(tmp_path):
    saver = lazy(tmp_path, rates={"disk_write": 20 * MB})
    state = {"w": torch.randn(LARGE * 2)}
    saver.save(1, state)
    saver.close()
    assert same(saved(tmp_path), state)


def test_a_process_that_ends_without_closing_still_writes(tmp_path):
    code = (
        "import sys, torch; from headway.resilience.lazy import LazyCheckpointer\n"
        "from headway.memory.lanes import Lanes\n"
        "saver = LazyCheckpointer(LazyCheckpointer.Options(), sys.argv[1], Lanes(rates={'disk_write': 2 << 20}))\n"
        "saver.save(1, {'w': torch.ones(400_000)})\n"
        "assert not (saver.folder / 'step-00000001').exists()"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 0
    assert same(saved(tmp_path), {"w": torch.ones(400_000)})


def test_a_process_that_ends_without_closing_says_what_was_not_written(tmp_path):
    code = (
        "import sys, torch; from headway.resilience import lazy, shards\n"
        "def full(*_): raise OSError(28, 'No space left on device')\n"
        "shards.Shards.write = full\n"
        "saver = lazy.LazyCheckpointer(lazy.LazyCheckpointer.Options(), sys.argv[1])\n"
        "saver.save(1, {'w': torch.ones(400_000)})"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert "no checkpoint of step 1" in done.stderr and "No space left on device" in done.stderr


def test_loading_waits_for_what_is_being_saved(tmp_path):
    saver = lazy(tmp_path, rates={"disk_write": 20 * MB})
    state = {"w": torch.randn(LARGE)}
    saver.save(1, state)
    assert same(saver.load(), state)
    saver.close()


def test_loading_in_place(tmp_path):
    saver = lazy(tmp_path)
    saver.save(1, {"w": torch.randn(LARGE), "n": 3, "left": torch.ones(2)})
    mine = {"w": torch.zeros(LARGE)}
    loaded = saver.load(into=mine)
    assert loaded["w"] is not None and same(mine["w"], saver.load()["w"]) and (loaded["n"], loaded["left"]) == (3, None)
    with pytest.raises(CheckpointError, match="does not hold v"):
        saver.load(into={"v": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="holds w in another shape"):
        saver.load(into={"w": torch.zeros(3)})
    saver.close()


def test_no_more_than_two_are_under_way(tmp_path):
    saver = lazy(tmp_path, rates={"disk_write": 4 * MB}, keep=9)
    state = {"w": torch.randn(100_000)}
    for step in range(4):
        saver.save(step, state)
        assert sum(status != "committed" for status in saver.status().values()) <= 2
    saver.save(3, state)
    saver.wait()
    assert len(list(tmp_path.iterdir())) == 4 and saver.report()["committed"] == 5
    saver.close()


def test_without_a_host_tier_the_copies_take_little_memory(tmp_path):
    saver = lazy(tmp_path, tiers=("disk",))
    state = {"w": torch.randn(LARGE * 4)}
    saver.save(1, state)
    saver.wait()
    assert saver.report()["ring_bytes"] == 2 * pipeline.CHUNK and same(saved(tmp_path), state)
    saver.close()


def test_several_writers_share_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    saver = LazyCheckpointer(LazyCheckpointer.Options(keep=9), tmp_path)
    for step in range(3):
        state = {"w": torch.randn(LARGE * 8), "v": torch.randn(LARGE)}
        path = saver.save(step, state)
        saver.fence()
        saver.wait() if step == 2 else None
    assert 1 <= len(list(path.glob("*.distcp"))) <= 4 and same(saved(tmp_path), state)
    saver.close()


def test_automatic_interval(tmp_path):
    saver = lazy(tmp_path, every="auto", overhead=0.1, keep=1)
    state, saves = {"w": torch.randn(1000)}, []
    for step in range(1, 61):
        time.sleep(0.002)
        saver.fence()
        if saver.every and step % saver.every == 0:
            saves.append(step)
            saver.save(step, state)
    saver.wait()
    assert saves[0] == 20 and saver.every >= 1
    saver.close()


def test_several_processes_do_not_choose_an_interval_each(tmp_path, monkeypatch):
    monkeypatch.setattr(lazy_module.Ranks, "__init__", lambda self, *_: setattr(self, "world", 2))
    with pytest.raises(CheckpointError, match=r"checkpoint\.every: is auto"):
        lazy(tmp_path, every="auto")


@pytest.mark.parametrize(
    ("raw", "message"),
    [({"every": "sometimes"}, "checkpoint.every"), ({"every": True}, "checkpoint.every"),
     ({"tiers": ["host"]}, r"checkpoint.tiers.*\[host, disk\] or \[disk\]"), ({"host_cache": "1kB"}, "host_cache"),
     ({"overhead": 0}, "checkpoint.overhead"), ({"mode": "plain"}, "checkpoint.mode")],
)  # fmt: skip
def test_bad_options(raw, message):
    with pytest.raises(RecipeError, match=message):
        parse_options(LazyCheckpointer.Options, raw, "checkpoint")


def test_options_of_the_issue():
    raw = {"every": 1, "mode": "lazy", "host_cache": "2GiB", "keep": 3, "tiers": ["host", "disk"]}
    options = parse_options(LazyCheckpointer.Options, raw, "checkpoint")
    assert options.host_cache == 2 << 30 and options.every == 1
    assert parse_options(LazyCheckpointer.Options, {"every": "auto"}, "checkpoint").every == "auto"
