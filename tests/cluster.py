"""Ranks in network namespaces of their own, joined by shaped links: a cluster on one machine, for tests.

    with Cluster(ranks=4, bandwidth="50MB/s", slow_links={(0, 1): "5MB/s"}) as cluster:
        results = cluster.run([sys.executable, "-m", "headway.cli.main", "train", "recipe.yaml"])

Every rank is a real process that sees one interface, ``eth0``, and the others at 10.77.0.1 and so on. The kernel's
traffic control (htb) holds its traffic to the rates, both ways, as a network card and its switch would; with a latency,
a program (`tests/switch.py`) takes the place of the kernel's bridge between them. All is made in a user namespace: no
privileges, nothing left behind, no way to the real network. Ranks that are forked instead
(`headway.parallel.local.run_ranks`) join with ``enter=cluster.enter``.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

Link = tuple[int, int]
INTERFACE = "eth0"
PORT = 29_500
QUEUE_SECONDS = 0.05
"""What a full queue takes to drain: what does not fit is dropped, as switches do, and TCP slows down."""
BURST = 65_536
"""Bytes that may pass at once: the largest that the kernel hands on in one piece."""
UNITS = {"B/s": 1.0, "kB/s": 1e3, "MB/s": 1e6, "GB/s": 1e9, "s": 1.0, "ms": 1e-3, "us": 1e-6}


class NoCluster(Exception):
    """This machine cannot make one; the message is the reason."""


@dataclass(frozen=True)
class Result:
    """What became of one rank's command."""

    rank: int
    status: int
    """Its exit status; negative: the signal that ended it."""
    output: str
    """What it wrote, errors too."""


class Cluster:
    """Namespaces of ``ranks`` ranks, and the processes in them.

    Args:
        ranks: each with an address of its own.
        bandwidth: of every rank's link in either direction, such as ``50MB/s``; None for what the machine gives.
        latency: that a message takes longer on its way, such as ``2ms``.
        slow_links: (from, to) -> bandwidth of what goes that way, and back unless (to, from) is there too.

    Raises:
        NoCluster: the kernel or its settings do not allow it.
    """

    def __init__(
        self,
        ranks: int = 4,
        bandwidth: str | None = None,
        latency: str | None = None,
        slow_links: Mapping[Link, str] | None = None,
    ) -> None:
        if reason := unavailable():
            raise NoCluster(reason)
        self.ranks, self._latency = ranks, quantity(latency) if latency else None
        self._holders: list[subprocess.Popen[bytes]] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._outputs = tempfile.TemporaryDirectory(prefix="headway-cluster-")
        self._settings = bandwidth, slow_links or {}

    def __enter__(self) -> Cluster:
        try:
            hub = self._hold(["unshare", "--user", "--map-root-user", "--net"])
            _inside(hub, "ip link add hub type bridge; ip link set hub up")
            bridged = "" if self._latency else "master hub"
            for rank in range(self.ranks):
                own = self._hold([*_enter(hub), "unshare", "--net"])
                _inside(hub, f"ip link add port{rank} type veth peer name {INTERFACE} netns {own}; "
                        f"ip link set port{rank} {bridged} up")  # fmt: skip
                _inside(own, f"ip link set lo up; ip link set {INTERFACE} up; "
                        f"ip address add {self.address(rank)}/24 dev {INTERFACE}")  # fmt: skip
            if self._latency is not None:
                ports = [f"port{rank}" for rank in range(self.ranks)]
                switch = [sys.executable, str(Path(__file__).with_name("switch.py")), str(self._latency), *ports]
                self._start_holder([*_enter(hub), *switch])
            self.shape(*self._settings)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what runs, and with it the namespaces."""
        for process in self._processes:
            _end(process)
        for holder in reversed(self._holders):
            _end(holder)
        self._outputs.cleanup()

    def address(self, rank: int) -> str:
        """Where the others find a rank."""
        return f"10.77.0.{rank + 1}"

    def shape(self, bandwidth: str | None, slow_links: Mapping[Link, str] | None = None) -> None:
        """Set the links to other rates, also while ranks run."""
        every = quantity(bandwidth) if bandwidth else None
        both = {(b, a): rate for (a, b), rate in (slow_links or {}).items()} | dict(slow_links or {})
        slow = {link: quantity(rate) for link, rate in both.items()}
        for rank in range(self.ranks):
            mine = {to: rate for (source, to), rate in slow.items() if source == rank}
            to = {self.address(other): rate for other, rate in mine.items()}
            _inside(self._holders[rank + 1].pid, _rates(INTERFACE, every, to))
            _inside(self._holders[0].pid, _rates(f"port{rank}", every, {}))

    def start(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Start ``command`` as every rank, with what torch needs to find the others in its environment."""
        self._processes = [self._start(rank, command, env or {}) for rank in range(self.ranks)]

    def wait(self, timeout: float = 60) -> list[Result]:
        """The ranks' results once all have ended; after ``timeout`` seconds the rest are killed."""
        end = time.monotonic() + timeout
        for process in self._processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                _end(process)
        return [Result(rank, process.returncode, self.output(rank)) for rank, process in enumerate(self._processes)]

    def run(self, command: Sequence[str], env: Mapping[str, str] | None = None, timeout: float = 60) -> list[Result]:
        """`start` and `wait`."""
        self.start(command, env)
        return self.wait(timeout)

    def kill(self, rank: int, how: signal.Signals = signal.SIGKILL) -> None:
        """Send a rank's process a signal."""
        self._processes[rank].send_signal(how)

    def output(self, rank: int) -> str:
        """What a rank has written so far."""
        return (Path(self._outputs.name) / str(rank)).read_text(errors="replace")

    def enter(self, rank: int) -> None:
        """Move this process, a fork that has no threads yet, to a rank's namespace."""
        pid, libc = self._holders[rank + 1].pid, ctypes.CDLL(None, use_errno=True)
        for name, kind in (("user", 0x1000_0000), ("net", 0x4000_0000)):  # CLONE_NEWUSER, CLONE_NEWNET
            with Path(f"/proc/{pid}/ns/{name}").open() as namespace:
                if libc.setns(namespace.fileno(), kind):
                    raise NoCluster(f"rank {rank} cannot enter its {name} namespace: {os.strerror(ctypes.get_errno())}")
        os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE

    def sent(self, rank: int) -> int:
        """Bytes that a rank has sent so far, as its interface counts them: with TCP's headers and what it repeated."""
        return sent(self._holders[rank + 1].pid)

    def _start(self, rank: int, command: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        # Local ranks are numbered through: the ranks have networks of their own, but one disk.
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.ranks, "LOCAL_WORLD_SIZE": self.ranks,
                 "MASTER_ADDR": self.address(0), "MASTER_PORT": PORT, "GLOO_SOCKET_IFNAME": INTERFACE,
                 "OMP_NUM_THREADS": 1}  # fmt: skip
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}, **env}
        with (Path(self._outputs.name) / str(rank)).open("wb") as output:
            return subprocess.Popen([*_enter(self._holders[rank + 1].pid), *command], env=environment,
                                    stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)  # fmt: skip

    def _hold(self, command: Sequence[str]) -> int:
        """A process that keeps a new namespace alive, and ends with this one."""
        return self._start_holder([*command, "sh", "-c", "echo; exec cat"])

    def _start_holder(self, command: Sequence[str]) -> int:
        """A process that says so with an empty line when it is ready."""
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self._holders.append(holder)
        assert holder.stdout is not None
        if (said := holder.stdout.readline()) != b"\n":
            raise NoCluster(f"no namespaces: {said.decode().strip()}")
        return holder.pid


def sent(process: int | str = "self") -> int:
    """Bytes that the interface of a process's namespace has sent."""
    for line in Path(f"/proc/{process}/net/dev").read_text().splitlines():
        name, _, numbers = line.strip().partition(":")
        if name == INTERFACE:
            return int(numbers.split()[8])
    raise NoCluster(f"process {process} has no {INTERFACE}")


def quantity(text: str) -> float:
    """``50MB/s`` in bytes per second, ``2ms`` in seconds."""
    found = re.fullmatch(r"([\d.]+)\s*([A-Za-z/]+)", text)
    if not found or found[2] not in UNITS:
        raise ValueError(f"{text!r} is no number with one of {', '.join(UNITS)}")
    return float(found[1]) * UNITS[found[2]]


@cache
def unavailable() -> str | None:
    """Why this machine cannot make a cluster, or None if it can."""
    try:
        outside = subprocess.run(["unshare", "--user", "--map-root-user", "--net", "sh", "-c", _trial()],
                                 capture_output=True, text=True, timeout=20)  # fmt: skip
    except OSError as error:
        return f"no network namespaces: {error}"
    return f"no shaped network namespaces: {outside.stderr.strip()}" if outside.returncode else None


def _trial() -> str:
    made = "ip link add hub type bridge; ip link add port0 type veth peer name port1; "
    return f"set -e; {PATH}; {made}" + _rates("port0", 1e6, {"10.77.0.1": 1e6})


PATH = "PATH=$PATH:/usr/sbin:/sbin"


def _rates(device: str, every: float | None, to: Mapping[str, float]) -> str:
    """Commands that hold what leaves ``device`` to ``every`` bytes per second, and what goes to an address to less."""
    commands = [f"tc qdisc del dev {device} root 2>/dev/null || true"]
    if every is None and not to:
        return commands[0]
    unlimited = 12.5e9
    commands += [f"tc qdisc add dev {device} root handle 1: htb default 1",
                 _class(device, "1:", "1:9999", every or unlimited)]  # fmt: skip
    for index, (address, rate) in enumerate([("", every or unlimited), *to.items()], 1):
        commands.append(_class(device, "1:9999", f"1:{index}", min(rate, every or unlimited)))
        queue = f"bfifo limit {max(4 * BURST, int(rate * QUEUE_SECONDS))}"
        commands.append(f"tc qdisc add dev {device} parent 1:{index} {queue}")
        if address:
            commands.append(f"tc filter add dev {device} parent 1: protocol ip u32 match ip dst {address}/32 "
                            f"flowid 1:{index}")  # fmt: skip
    return "; ".join(commands)


def _class(device: str, parent: str, name: str, rate: float) -> str:
    return (f"tc class add dev {device} parent {parent} classid {name} htb rate {rate * 8:.0f}bit "
            f"burst {BURST} cburst {BURST} quantum {BURST}")  # fmt: skip


def _enter(pid: int) -> list[str]:
    return ["nsenter", "--target", str(pid), "--user", "--net", "--preserve-credentials"]


def _inside(pid: int, script: str) -> None:
    done = subprocess.run([*_enter(pid), "sh", "-ec", f"{PATH}; {script}"], capture_output=True, text=True)
    if done.returncode:
        raise NoCluster(f"{done.stderr.strip() or done.returncode} (in: {script})")


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
