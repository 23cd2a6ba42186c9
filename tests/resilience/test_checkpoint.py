"""Checkpoints, plain and lazy: round trip, what is kept, what is damaged, what happens when the disk is full.

The lazy ones are waited for after each save; what they do meanwhile is tested in test_lazy.py.

Needs: torch, hypothesis; a small tmpfs where mounting is allowed (skipped elsewhere).
Run: pytest tests/resilience/test_checkpoint.py
"""

import errno
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from headway.core import fallback as fallback_module
from headway.core.errors import CheckpointError, HeadwayError, RecipeError
from headway.core.options import parse_options
from headway.resilience import manifest
from headway.resilience.checkpoint import PlainCheckpointer
from headway.resilience.lazy import LazyCheckpointer
from headway.resilience.reading import SavedStates
from tests.resilience.states import same, states


def state_of(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"w": torch.randn(5, 3, generator=generator), "b": torch.randn(7, generator=generator).bfloat16()},
        "optimizer": {"w": {"step": torch.tensor(float(step)), "exp_avg": torch.randn(5, 3, generator=generator)}},
        "counters": {"step": step, "seconds": step / 3, "none": None, "names": ["x", "y"]},
        "rng": torch.get_rng_state(),
    }


class Waited(LazyCheckpointer):
    """Saves lazily and waits for it."""

    def save(self, step, state):
        path = super().save(step, state)
        self.wait()
        return path


MODES = {"plain": PlainCheckpointer, "lazy": Waited}


@pytest.fixture(params=MODES, scope="module")
def mode(request):
    return MODES[request.param]


@pytest.fixture(scope="module")
def checkpointer(mode):
    return lambda folder, **options: mode(mode.Options(**options), folder)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def log():
    log = fallback_module.FallbackLog()
    fallback_module.use_log(log)
    yield log
    fallback_module.use_log(fallback_module.FallbackLog())


@pytest.fixture(scope="module")
def folder_for_examples(tmp_path_factory):
    return tmp_path_factory.mktemp("examples")


@settings(max_examples=30, deadline=None)
@given(state=states)
def test_round_trip(folder_for_examples, state, checkpointer):
    saver = checkpointer(folder_for_examples)
    saver.save(1, {"state": state})
    assert same(checkpointer(folder_for_examples).load(), {"state": state})


def test_round_trip_over_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr("headway.resilience.tensors._FILE_BYTES", 1000)
    state = {"m": {str(i): torch.randn(100 + i) for i in range(9)}}
    saver = PlainCheckpointer(PlainCheckpointer.Options(), tmp_path)
    path = saver.save(1, state)
    assert len(list(path.glob("*.distcp"))) == min(8, os.cpu_count() or 1)
    assert same(saver.load(), state)


@pytest.mark.parametrize("state", [{}, {"only": "plain"}, {"t": torch.empty(0)}])
def test_nearly_empty_states(tmp_path, state, checkpointer):
    checkpointer(tmp_path).save(0, state)
    assert same(checkpointer(tmp_path).load(), state)


def test_views_are_saved_without_their_storage(tmp_path, checkpointer):
    whole = torch.arange(1 << 20)
    path = checkpointer(tmp_path).save(1, {"row": whole[:4], "column": whole.view(1024, 1024).t()[1, :3]})
    assert sum(file.stat().st_size for file in path.iterdir()) < 10_000
    assert same(checkpointer(tmp_path).load(), {"row": whole[:4], "column": torch.tensor([1, 1025, 2049])})


def test_nothing_there(tmp_path, checkpointer):
    saver = checkpointer(tmp_path / "none")
    assert saver.load() is None and not (tmp_path / "none").exists()
    saver.close()


def test_the_tools_of_torch_read_it(tmp_path, checkpointer):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    model = torch.nn.Linear(3, 2)
    path = checkpointer(tmp_path).save(1, {"model": model.state_dict(), "step": 1})
    other = torch.nn.Linear(3, 2)
    dcp.load({"model": other.state_dict()}, checkpoint_id=path, no_dist=True)
    assert same(other.state_dict()["weight"], model.state_dict()["weight"])
    dcp_to_torch_save(path, tmp_path / "flat.pt")
    assert same(torch.load(tmp_path / "flat.pt")["model.bias"], model.state_dict()["bias"])


def test_no_path_of_this_machine_is_stored(tmp_path, checkpointer):
    path = checkpointer(tmp_path).save(1, state_of(1))
    for file in path.iterdir():
        assert os.fsencode(tmp_path) not in file.read_bytes() and tmp_path.name.encode() not in file.read_bytes()


def test_the_newest_are_kept(tmp_path, checkpointer):
    saver = checkpointer(tmp_path, keep=3)
    for step in range(10, 60, 10):
        assert saver.save(step, state_of(step)).name == f"step-{step:08d}"
    assert names(tmp_path) == ["step-00000030", "step-00000040", "step-00000050"]
    assert same(checkpointer(tmp_path).load(), state_of(50))
    assert same(saver.load_from(tmp_path / "step-00000030"), state_of(30))


def test_the_new_one_is_complete_before_an_old_one_goes(tmp_path, monkeypatch, checkpointer):
    saver = checkpointer(tmp_path, keep=1)
    saver.save(1, state_of(1))
    seen = []
    for module in ("checkpoint", "commit"):
        monkeypatch.setattr(
            f"headway.resilience.{module}.prune",
            lambda *_: seen.append(same(SavedStates(tmp_path).load(), state_of(2))),
        )
    saver.save(2, state_of(2))
    assert seen == [True] and (tmp_path / "step-00000001").exists()


def test_saving_a_step_again_replaces_it(tmp_path, checkpointer):
    saver = checkpointer(tmp_path)
    saver.save(5, state_of(5))
    saver.save(5, state_of(6))
    assert names(tmp_path) == ["step-00000005"] and same(saver.load(), state_of(6))


def test_a_half_replaced_checkpoint_counts_and_gets_its_name_back(tmp_path, checkpointer):
    reader = checkpointer(tmp_path)
    reader.save(4, state_of(4))
    reader.save(5, state_of(5)).rename(tmp_path / ".step-00000005.replaced-1")
    assert same(reader.load(), state_of(5))
    checkpointer(tmp_path)
    assert names(tmp_path) == ["step-00000004", "step-00000005"]


def test_rests_of_killed_writers_go_and_those_of_living_ones_stay(tmp_path, checkpointer):
    checkpointer(tmp_path).save(1, state_of(1))
    code = (
        "import sys, time; from pathlib import Path; from headway.resilience.folders import new_folder\n"
        "with new_folder(Path(sys.argv[1]), 7) as path: (path / 'x').write_text('x'); print(flush=True); time.sleep(60)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        writer.stdout.readline()
        living = f".step-00000007.tmp-{writer.pid}"
        (tmp_path / f".step-00000006.tmp-{os.getpid()}").mkdir()  # a process id used again
        (tmp_path / ".step-00000006.removed-1").mkdir()
        checkpointer(tmp_path)
        assert names(tmp_path) == [".step-00000006.removed-1", living, "step-00000001"]
    finally:
        writer.kill()
        writer.wait()
    checkpointer(tmp_path)
    assert names(tmp_path) == ["step-00000001"]


# Damage.


def damage_cases():
    path = ["manifest.json", "state.json", ".metadata", "__0_0.distcp"]
    return [
        (file, kind) for file in path for kind in ("missing", "empty", "truncated", "longer", "folder", "unreadable")
    ]


def damage(path, kind, monkeypatch):
    data = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "unreadable":  # simulated: root reads everything
        opened = io.open

        def refuse(file, *args, **kwargs):
            if str(file) == str(path):
                raise PermissionError(errno.EACCES, "Permission denied", str(file))
            return opened(file, *args, **kwargs)

        monkeypatch.setattr(io, "open", refuse)
    else:
        path.write_bytes({"empty": b"", "truncated": data[:-1], "longer": data + b"\n"}[kind])


@pytest.mark.parametrize(("file", "kind"), damage_cases())
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path, monkeypatch, capsys, log, file, kind, checkpointer):
    saver = checkpointer(tmp_path)
    saver.save(10, state_of(10))
    damage(saver.save(20, state_of(20)) / file, kind, monkeypatch)
    assert same(checkpointer(tmp_path).load(), state_of(10))
    assert len(log.entries) == 1 and f"step-00000020/{file}" in log.entries[0]["why"]
    assert "10 steps of training" in log.entries[0]["cost"] and "fallback" in capsys.readouterr().err


def test_every_flipped_bit_is_found(tmp_path, checkpointer):
    saver = checkpointer(tmp_path)
    path = saver.save(1, {"w": torch.randn(2), "step": 1})
    count = 0
    for file in sorted(path.iterdir()):
        data = bytearray(file.read_bytes())
        stride = max(1, len(data) // 150)
        for position in range(0, len(data), stride):
            data[position] ^= 1 << (position % 8)
            file.write_bytes(data)
            with pytest.raises(CheckpointError, match=str(file)):
                manifest.verify(path)
            data[position] ^= 1 << (position % 8)
            count += 1
        file.write_bytes(data)
    assert count > 400 and same(saver.load(), {"w": saver.load()["w"], "step": 1})


def test_all_damaged(tmp_path, log, checkpointer):
    saver = checkpointer(tmp_path)
    for step in (1, 2):
        (saver.save(step, state_of(step)) / "state.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint that can be read .*step-00000002.*step-00000001.*--fresh"
    ):
        saver.load()
    assert not log.entries


def test_strict_runs_do_not_fall_back(tmp_path, log, checkpointer):
    log.strict = True
    saver = checkpointer(tmp_path)
    saver.save(1, state_of(1))
    (saver.save(2, state_of(2)) / "state.json").unlink()
    with pytest.raises(HeadwayError, match="strict"):
        saver.load()


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path, log, checkpointer):
    saver = checkpointer(tmp_path)
    for step in (50, 100):
        saver.save(step, state_of(step))
    (tmp_path / "step-00000100" / "state.json").unlink()
    saver = checkpointer(tmp_path)
    saver.load()
    saver.save(60, state_of(60))
    assert names(tmp_path) == ["step-00000050", "step-00000060", "step-00000100"]
    saver.save(100, state_of(100))
    assert names(tmp_path) == ["step-00000060", "step-00000100"] and same(saver.load(), state_of(100))


def test_a_newer_format_is_refused_rather_than_passed_over(tmp_path, monkeypatch, checkpointer):
    saver = checkpointer(tmp_path)
    saver.save(1, state_of(1))
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "FORMAT", 2)
        saver.save(2, state_of(2))
    with pytest.raises(CheckpointError, match="has format 2, expected 1"):
        saver.load()


def test_load_from_names_what_is_not_there(tmp_path, checkpointer):
    with pytest.raises(CheckpointError, match="there is no such checkpoint"):
        checkpointer(tmp_path).load_from(tmp_path / "step-00000001")


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def test_no_code_in_the_index_is_run(tmp_path, monkeypatch, checkpointer):
    monkeypatch.chdir(tmp_path)
    saver = checkpointer(tmp_path / "c")
    path = saver.save(1, state_of(1))
    (path / ".metadata").write_bytes(pickle.dumps(Bomb()))
    entry = json.loads((path / "manifest.json").read_text())
    for name in entry["files"]:  # a forger makes the checksums right
        entry["files"][name] = {"bytes": (path / name).stat().st_size, "blake2b": manifest.checksum(path / name)}
    entry.pop("checksum")
    (path / "manifest.json").write_bytes(manifest._render(entry))
    with pytest.raises(CheckpointError, match="does not belong there"):
        saver.load()
    assert not (tmp_path / "exploded").exists()


# A disk that is full.


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("limit", [0, 100, 2000, 20_000, 60_000, 80_000])
def test_a_full_disk_leaves_everything_as_it_was(tmp_path, monkeypatch, capfd, limit, checkpointer):
    state = {"m": {str(i): torch.randn(1000) for i in range(20)}}
    saver = checkpointer(tmp_path)
    saver.save(1, state)
    before = files_of(tmp_path)
    left = [limit]

    class FullDisk(io.FileIO):
        def write(self, data):
            if len(data) > left[0]:  # a smaller file may still fit afterwards
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left[0] -= len(data)
            return super().write(data)

    opened = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda path, mode="r", *args, **options: (
            io.BufferedWriter(FullDisk(path, mode), 512) if mode == "wb" else opened(path, mode, *args, **options)
        ),
    )
    with pytest.raises(HeadwayError, match=r"step-00000002: cannot be written \(No space left on device\)\. Make room"):
        saver.save(2, state)
    monkeypatch.undo()
    assert files_of(tmp_path) == before and names(tmp_path) == ["step-00000001"]
    assert "Traceback" not in capfd.readouterr().err
    saver.save(2, state)
    assert same(saver.load(), state)


@pytest.fixture
def tiny_disk(tmp_path):
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("needs root and mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(disk)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_really_full_disk(tiny_disk, checkpointer):
    saver = checkpointer(tiny_disk / "run", keep=5)
    state = {"w": torch.randn(100_000)}
    saver.save(1, state)
    saver.save(2, state)
    before = files_of(tiny_disk)
    with pytest.raises(HeadwayError, match="No space left on device"):
        saver.save(3, state)
    assert files_of(tiny_disk) == before and names(tiny_disk / "run") == ["step-00000001", "step-00000002"]
    assert same(checkpointer(tiny_disk / "run").load(), state)


def test_a_state_that_cannot_be_saved_leaves_no_folder(tmp_path, checkpointer):
    saver = checkpointer(tmp_path / "c")
    with pytest.raises(CheckpointError, match="is a set"):
        saver.save(1, {"a": set()})
    assert not (tmp_path / "c").exists()


def test_an_interrupt_while_saving_leaves_no_folder(tmp_path, monkeypatch):
    saver = PlainCheckpointer(PlainCheckpointer.Options(), tmp_path)
    saver.save(1, state_of(1))

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("headway.resilience.manifest.HashedFile.write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        saver.save(2, state_of(2))
    assert names(tmp_path) == ["step-00000001"]


def test_each_mode_reads_the_other(tmp_path, mode):
    other = next(m for m in MODES.values() if m is not mode)
    path = mode(mode.Options(), tmp_path).save(3, state_of(3))
    assert same(other(other.Options(), tmp_path).load(), state_of(3))
    other(other.Options(), tmp_path).save(4, state_of(4))
    assert same(mode(mode.Options(), tmp_path).load(), state_of(4))
    files = {"manifest.json", "state.json", ".metadata", "__0_0.distcp"}
    assert {p.name for p in path.iterdir()} == files


def test_options(mode):
    parsed = parse_options(mode.Options, {"every": "2k"}, "checkpoint")
    assert (parsed.every, parsed.keep, MODES[parsed.mode]) == (2000, 2, mode)
    for raw, message in [({"keep": 0}, "checkpoint.keep"), ({"every": 0}, "checkpoint.every"), ({"evry": 1}, "every")]:
        with pytest.raises(RecipeError, match=message):
            parse_options(mode.Options, raw, "checkpoint")


def test_the_modules_of_the_options_do_not_import_torch():
    code = "import sys, headway.resilience.checkpoint, headway.resilience.lazy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
