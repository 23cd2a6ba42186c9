"""Forks the processes of a distributed training that save and load together; prints one JSON line.

A process of its own, so that torch is imported once. Arguments: a folder, a scenario.
"""

import errno
import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from headway.core.errors import CheckpointError
from headway.core.fallback import FallbackLog, use_log
from headway.resilience import pipeline
from headway.resilience.lazy import LazyCheckpointer
from headway.resilience.reading import SavedStates
from headway.resilience.shards import Shards
from tests.resilience.states import same

pipeline.TINY_STATE, pipeline.SMALL, pipeline.CHUNK = 0, 256, 4 << 10


def together(world, work, name):
    """Run ``work(rank)`` in ``world`` forked processes with a gloo group; all must end well."""
    rendezvous = Path(sys.argv[1]) / f"rendezvous-{name}"
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
                use_log(FallbackLog())
                work(rank)
                dist.barrier()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert statuses == [0] * world, f"{name}: {statuses}"


def lazy(folder, **options):
    return LazyCheckpointer(LazyCheckpointer.Options(keep=9, host_cache=64 << 10, **options), folder, timeout=30)


def value(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def two(folder):
    """Two processes: what each has, who fails, and that nothing is published before all is durable."""

    def work(rank):
        mesh = init_device_mesh("cpu", (2,))
        state = {
            "model": {"w": distribute_tensor(value(1, 37, 50), mesh, [Shard(0)]), "shared": value(2, 999)},
            "rank": {f"only{rank}": value(10 + rank, 500)},
            "copied": distribute_tensor(value(3, 700), mesh, [Replicate()]),
            "rng": torch.full((16,), rank),
            "step": 1,
        }
        saver = lazy(folder)
        saver.save(1, state)
        saver.wait()
        # A slow process: its files are not durable yet, so nothing may be published.
        close = Shards.close
        if rank == 1:
            Shards.close = lambda self: (time.sleep(0.3), close(self))[1]
        start = time.monotonic()
        path = saver.save(2, state)
        saver.wait("persisted")
        if rank == 0:
            assert time.monotonic() - start < 0.25 and not path.exists()
        saver.wait()
        assert time.monotonic() - start > 0.29 and path.exists()
        Shards.close = close
        # Process 1's disk is full.
        write = Shards.write
        if rank == 1:
            Shards.write = lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        saver.save(3, state)
        try:
            saver.wait()
            raise AssertionError("step 3 cannot have been saved")
        except CheckpointError as error:
            assert "rank 1" in str(error) and "No space left" in str(error), error
        Shards.write = write
        # Process 0 cannot make the folder.
        if rank == 0:
            make, saver_folder = saver._made._commits.folder, folder / "step-00000001" / "manifest.json"
            saver._made._commits.folder = saver_folder
        saver.save(4, state)
        try:
            saver.wait()
            raise AssertionError("step 4 cannot have been saved")
        except CheckpointError as error:
            assert "rank 0" in str(error), error
        if rank == 0:
            saver._made._commits.folder = make
        # Process 1's tensor changes too early.
        saver.save(5, state)
        if rank == 1:
            state["rank"]["only1"].add_(1)
        saver.fence()
        saver._made.drain()
        if rank == 1:
            assert saver._made._last.error is not None
        dist.barrier()
        saver.save(6, state)
        saver.wait()
        dist.barrier()
        names = sorted(p.name for p in folder.iterdir())
        good = [f"step-0000000{n}" for n in (1, 2, 6)]
        assert names in (good, sorted([*good, "step-00000005"])) and not any(n.startswith(".") for n in names), names
        loaded = saver.load(into=state)
        assert loaded["step"] == 1 and loaded["rng"].data_ptr() == state["rng"].data_ptr() and int(state["rng"][0]) == 0
        saver.close()
        keys = [key for key in saver._ranks._store.list_keys()] if hasattr(saver._ranks._store, "list_keys") else []
        assert len(keys) < 40, keys

    together(2, work, "two")
    state = SavedStates(folder).load_from(folder / "step-00000002")
    assert same(state["model"]["w"], value(1, 37, 50)) and same(state["model"]["shared"], value(2, 999))
    assert same(state["rank"]["only0"], value(10, 500)) and same(state["copied"], value(3, 700))
    assert (state["rng"] == 0).all() and state["step"] == 1
    return {"files": sorted(p.name for p in (folder / "step-00000002").iterdir())}


def four(folder):
    """Four processes train with FSDP2 and save every step; two others with another layout, then one, load it."""

    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(33, 70), torch.nn.ReLU(), torch.nn.Linear(70, 5))

    def state_of(net, optimizer, mesh, step):
        names = {p: n for n, p in net.named_parameters()}
        return {
            "model": dict(net.state_dict()),
            "optimizer": {names[p]: dict(values) for p, values in optimizer.state.items()},
            "tp": distribute_tensor(value(7, 40, 21), mesh, [Shard(0), Shard(1)]),
            "hsdp": distribute_tensor(value(8, 31, 6), mesh, [Replicate(), Shard(0)]),
            "step": step,
        }

    def whole(state):
        if isinstance(state, DTensor):
            return state.full_tensor().clone()
        if isinstance(state, torch.Tensor):
            return state.clone()
        return {k: whole(v) for k, v in state.items()} if isinstance(state, dict) else state

    def train(rank):
        mesh = init_device_mesh("cpu", (2, 2))
        net = fully_shard(model(), mesh=init_device_mesh("cpu", (4,)))
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        saver = lazy(folder)
        saver.attach(optimizer)
        for step in range(3):
            net(value(100 + step * 4 + rank, 8, 33)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            state = state_of(net, optimizer, mesh, step)
            expected = whole(state)
            saver.save(step, state)
        saver.wait()
        if rank == 0:
            torch.save(expected, folder.parent / "expected.pt")
        saver.close()

    def load(rank):
        mesh = init_device_mesh("cpu", (2,))
        expected = torch.load(folder.parent / "expected.pt")
        layouts = {"tp": [Shard(1)], "hsdp": [Shard(0)]}

        def empty(value, name=""):
            if isinstance(value, dict):
                return {k: empty(v, k) for k, v in value.items()}
            if not isinstance(value, torch.Tensor):
                return value
            placement = layouts.get(name, [Shard(0) if value.dim() else Replicate()])
            return distribute_tensor(torch.zeros_like(value), mesh, placement)

        into = empty(expected)
        saver = lazy(folder)
        loaded = saver.load(into)
        assert loaded["step"] == 2 and same(whole(loaded), expected)
        saver.save(3, into)  # and back again, with half the processes
        saver.wait()
        saver.close()

    together(4, train, "four")
    sizes = {p.name: p.stat().st_size for p in (folder / "step-00000002").glob("*.distcp")}
    assert len(sizes) == 4 and max(sizes.values()) < 2.5 * min(sizes.values()), sizes
    expected = torch.load(folder.parent / "expected.pt")
    assert same(SavedStates(folder).load(), expected)
    together(2, load, "half")
    assert same(SavedStates(folder).load(), {**expected, "step": 2})
    return {"files": sizes}


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    (root / "c").mkdir()
    print(json.dumps({"two": two, "four": four}[sys.argv[2]](root / "c")))
