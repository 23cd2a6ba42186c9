"""Four ranks on shaped links: rates are real, and a layout pays for the bytes that it sends.

Needs gloo and network namespaces (skipped with the reason, where there are none); half a minute;
`pytest tests/parallel/test_network.py`.
"""

import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp

import headway.parallel.engine
import headway.parallel.pipeline  # noqa: F401  before ranks fork, or each imports it by itself
from headway.core.build import build_trainer
from headway.core.recipe import Recipe
from headway.parallel.local import run_ranks
from tests.cluster import BURST, Cluster, quantity, sent, unavailable
from tests.parallel.recipes import recipe

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=unavailable() or "")
RANKS = 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(RANKS) as made:
        yield made


def transfer(rank: int, links: dict[tuple[int, int], int]) -> dict[tuple[int, int], float]:
    """Seconds that so many bytes take from rank to rank, one link after the other, by the receiver."""
    seconds = {}
    for (source, to), size in links.items():
        message = torch.zeros(size, dtype=torch.uint8)
        for part in (message[:1], message):  # the first makes the connection
            dist.barrier()
            start = time.monotonic()
            if rank == source:
                dist.send(part, to)
            elif rank == to:
                dist.recv(part, source)
                seconds[source, to] = time.monotonic() - start
    return seconds


def test_links_have_the_rates_they_were_given(cluster: Cluster) -> None:
    cluster.shape("40MB/s", {(0, 1): "4MB/s", (2, 3): "8MB/s", (3, 2): "20MB/s"})
    rates = {(0, 1): 4e6, (1, 0): 4e6, (0, 2): 40e6, (2, 3): 8e6, (3, 2): 20e6, (3, 0): 40e6}
    sizes = {link: int(rate / 4) for link, rate in rates.items()}  # a quarter of a second each
    by_rank = run_ranks(RANKS, transfer, sizes, enter=cluster.enter)
    seconds = {link: took for found in by_rank for link, took in found.items()}
    for link, rate in rates.items():
        measured = (sizes[link] - 2 * BURST) / seconds[link]
        assert 0.3 * rate < measured < 1.1 * rate, (link, measured, seconds)


def test_commands_end_each_with_its_own_status_and_words(cluster: Cluster) -> None:
    results = cluster.run(["sh", "-c", "echo $RANK of $WORLD_SIZE at $MASTER_ADDR $MORE; exit $RANK"], {"MORE": "!"})
    assert [result.status for result in results] == [0, 1, 2, 3]
    assert [result.output for result in results] == [f"{rank} of 4 at 10.77.0.1 !\n" for rank in range(RANKS)]
    cluster.start(["sleep", "60"])
    cluster.kill(2)
    cluster.kill(1, signal.SIGTERM)
    ended = [result.status for result in cluster.wait(timeout=0.5)]
    assert ended[2] == ended[0] == -signal.SIGKILL and ended[1] == -signal.SIGTERM


def test_ranks_see_one_another_and_nothing_else(cluster: Cluster) -> None:
    reach = "import socket, sys; socket.create_connection((sys.argv[1], 9), 5)"
    for address, said in ((cluster.address(3), "refused"), ("10.78.0.1", "unreachable")):
        assert all(said in found.output for found in cluster.run([sys.executable, "-c", reach, address]))


def echo(rank: int) -> float:
    """Seconds that a byte takes to rank 1 and back, at best."""
    byte, seconds = torch.zeros(1, dtype=torch.uint8), []
    for _ in range(5):
        start = time.monotonic()
        for turn in (0, 1):
            dist.send(byte, 1 - rank) if turn == rank else dist.recv(byte, 1 - rank)
        seconds.append(time.monotonic() - start)
    return min(seconds)


def test_messages_are_on_their_way_for_the_latency(cluster: Cluster) -> None:
    cluster.shape(None)
    near = run_ranks(2, echo, enter=cluster.enter)[0]
    with Cluster(2, bandwidth="20MB/s", latency="15ms") as pair:
        far = run_ranks(2, echo, enter=pair.enter)[0]
        seconds = run_ranks(2, transfer, {(0, 1): 10_000_000}, enter=pair.enter)[1][0, 1]
    assert near < 0.03 <= far < 0.2, (near, far)
    assert 0.45 < seconds < 5, "and rates are as without"


def test_quantities() -> None:
    assert quantity("1.5MB/s") == 1.5e6 and quantity("2 ms") == 2e-3
    with pytest.raises(ValueError, match="MB/s"):
        quantity("50Mbit")


def crowd(rank: int, size: int) -> float:
    """Everybody sends to rank 0 at once."""
    messages = [torch.zeros(size, dtype=torch.uint8) for _ in range(RANKS)]
    dist.barrier()
    start = time.monotonic()
    if rank:
        dist.send(messages[rank], 0)
    else:
        for work in [dist.irecv(messages[other], other) for other in range(1, RANKS)]:
            assert work is not None
            work.wait()
    return time.monotonic() - start


def test_a_rank_receives_no_faster_than_its_own_link(cluster: Cluster) -> None:
    cluster.shape("20MB/s")
    size = 4_000_000
    seconds = run_ranks(RANKS, crowd, size, enter=cluster.enter)[0]
    assert 0.9 * 3 * size / 20e6 < seconds < 5 * 3 * size / 20e6, seconds


LAYOUTS: dict[str, dict[str, Any]] = {"weights": {"shard": 4}, "activations": {"pipeline": 4}}
RATE = "8MB/s"


def steps(_: int, run: Recipe) -> tuple[float, int]:
    """Seconds and bytes sent of a step: of three, the fastest."""
    trainer = build_trainer(run)
    trainer.train_step()
    found = []
    for _step in range(3):
        dist.barrier()
        before, start = sent(), time.monotonic()
        trainer.train_step()
        found.append((time.monotonic() - start, sent() - before))
    return min(found)


def test_a_layout_pays_for_the_bytes_it_sends(cluster: Cluster) -> None:
    """FSDP2 sends the weights three times a step, a pipeline the residual stream of a few tokens."""
    fast: dict[str, float] = {}
    slow: dict[str, float] = {}
    wire: dict[str, float] = {}
    for name, layout in LAYOUTS.items():
        run = recipe(model={"hidden": 128}, train={"precision": "fp32", "micro_batch": 1}, parallel=layout)
        for rate, times in ((None, fast), (RATE, slow)):
            cluster.shape(rate)
            found = run_ranks(RANKS, steps, run, enter=cluster.enter)
            times[name] = max(seconds for seconds, _ in found)
            wire[name] = max(size for _, size in found) / quantity(RATE)  # seconds that the busiest link needs
    print(f"unshaped {fast}, {RATE} {slow}, bytes / rate {wire}")
    assert wire["weights"] > 10 * wire["activations"]
    assert 0.85 * wire["weights"] < slow["weights"] < 2 * wire["weights"] + 2 * fast["weights"]
    assert slow["weights"] > 2 * slow["activations"], "more than twice as slow, and without shaping it is not"


@pytest.mark.slow
def test_a_rank_whose_neighbour_dies_ends_and_says_which(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    recipe(parallel={"pipeline": 2}, train={"steps": 100_000}, log={"every": 1}).save(path)
    command = [sys.executable, "-m", "headway.cli.main", "train", str(path), "--run", str(tmp_path / "run")]
    with Cluster(2, bandwidth="50MB/s", latency="1ms") as pair:
        pair.start(command)
        end = time.monotonic() + 90
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert time.monotonic() < end, pair.output(0)
            time.sleep(0.1)
        time.sleep(0.5)
        pair.kill(1)
        start = time.monotonic()
        first, second = pair.wait(timeout=60)
        assert time.monotonic() - start < 30
    assert second.status == -signal.SIGKILL
    assert first.status == 2 and "Traceback" not in first.output, first.output
    said = r"pipeline rank 0: .* pass of micro-batch \d .* pipeline rank 1|step \d+: another rank is gone or silent"
    assert re.search(said, first.output), first.output
