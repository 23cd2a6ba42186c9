"""The devices of a cluster and the links between them, by name: ``h100x64``, ``here``, or a file of one's own."""

from __future__ import annotations

import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from headway.core.errors import HeadwayError, nearest
from headway.core.options import Options, parse_options
from headway.core.units import Bytes

HERE = "here"


class Device(Options):
    """One accelerator, or one rank's share of a machine."""

    peak: dict[str, float]
    """FLOP/s of dense matrix products by number format: `bf16`, `fp32`."""
    memory: Bytes
    """Bytes."""
    memory_bandwidth: float = Field(gt=0)
    """Bytes read or written per second."""
    launch: float = Field(5e-6, ge=0)
    """Seconds that starting an operation takes."""


class Reach(Options):
    """The share of the peak that a product of width `x` per rank reaches: `most * x / (x + half)`."""

    most: float = Field(0.64, gt=0, le=1)
    """Of an endlessly wide product."""
    half: float = Field(0.0, ge=0)
    """Width at which half of that is reached, channels."""


class Link(Options):
    """What joins two devices."""

    kind: str
    """Its name: `nvlink`, `infiniband` ..."""
    bandwidth: float = Field(gt=0)
    """Bytes per second that one device sends over it, all its peers together."""
    latency: float = Field(0.0, ge=0)
    """Seconds before the first byte arrives."""


class Cluster(Options):
    """Equal devices in nodes of equal size."""

    name: str = "cluster"
    """For tables."""
    device: Device
    """Each of them."""
    reach: Reach = Field(default_factory=Reach)
    """How much of the peak is reached."""
    node: int = Field(8, ge=1)
    """Devices in a node; neighbours in rank share one."""
    inside: Link
    """Between devices of a node."""
    between: Link
    """Between nodes."""
    devices: int = Field(1, ge=1)
    """How many there are in all."""

    def rate(self, width: float, precision: str = "bf16") -> float:
        """FLOP/s of a product of ``width`` channels per rank."""
        return self.peak(precision) * self.reach.most * width / (width + self.reach.half)

    def peak(self, precision: str) -> float:
        """FLOP/s on paper; formats without products of their own run as fp32.

        Raises:
            HeadwayError: the profile knows neither.
        """
        peak = self.device.peak.get(precision, self.device.peak.get("fp32"))
        if peak is None:
            raise HeadwayError(f"{self.name}: device.peak", f"has no {precision} and no fp32")
        return peak

    def link(self, span: int) -> Link:
        """What a group of ranks that lie within ``span`` neighbours talks over."""
        return self.inside if span <= self.node and self.node % span == 0 else self.between


def cluster(name: str) -> Cluster:
    """``h100x64``: 64 devices of the profile ``h100``; ``here``: this machine as measured; or a YAML file's profile.

    Args:
        name: of a profile or a file, with ``xN`` for N devices.

    Raises:
        HeadwayError: there is no such profile or file, or it is not right.
    """
    if match := re.fullmatch(r"(.+\.ya?ml)(?:x(\d+))?", name):
        return _from_file(Path(match[1]), match[2])
    match = re.fullmatch(r"(.*?)(?:x(\d+))?", name)
    base, count = (match[1], match[2]) if match else (name, None)
    if base == HERE:
        return measured(int(count or 1))
    known = profiles()
    if base not in known:
        listed = [*known, HERE]
        raise HeadwayError(
            "--on", f"there is no profile {base!r}", hint=f"{nearest(base, listed)} A YAML file of your own does too"
        )
    return _sized(known[base] | {"name": name}, count, base)


def profiles() -> dict[str, dict[str, Any]]:
    """The named profiles, as plain data."""
    text = (files(__package__) / "profiles.yaml").read_text(encoding="utf-8")
    return {name: _numbers(profile) for name, profile in yaml.safe_load(text).items()}


def measured(ranks: int) -> Cluster:
    """This machine as ``ranks`` equal devices on one node; takes a second the first time."""
    import psutil
    import torch

    from headway.core.meters import matmul_peak
    from headway.plan.machine import memory_rate

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Ranks on a processor share its cores, its memory and the copies through it; GPUs are each their own.
    share = 1 if device.type == "cuda" else ranks
    copied = memory_rate(device)
    memory = torch.cuda.mem_get_info()[1] if device.type == "cuda" else psutil.virtual_memory().total
    peak = {"bf16": matmul_peak(torch.bfloat16, device), "fp32": matmul_peak(torch.float32, device)}
    link = {"kind": "memory", "bandwidth": copied / share / 4, "latency": 1e-4}  # sent, received, and each copied
    return parse_options(Cluster, {
        "name": f"{HERE}x{ranks}", "devices": ranks, "node": max(ranks, os.cpu_count() or 1),
        "device": {"peak": {key: rate / share for key, rate in peak.items()}, "memory": memory // share,
                   "memory_bandwidth": copied / share, "launch": 1e-5},
        "reach": {"most": 1.0, "half": 0.0}, "inside": link, "between": link}, HERE)  # fmt: skip


def _from_file(path: Path, count: str | None) -> Cluster:
    if not path.is_file():
        raise HeadwayError("--on", f"there is no file {path}")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise HeadwayError(str(path), f"is not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(raw, dict):
        raise HeadwayError(str(path), "holds no mapping", expected="device, node, inside, between and devices")
    return _sized({"name": path.stem} | _numbers(raw), count, str(path))


def _sized(raw: dict[str, Any], count: str | None, where: str) -> Cluster:
    if count is not None:
        raw = raw | {"devices": int(count)}
    found: Cluster = parse_options(Cluster, raw, where)
    # Fewer devices than a node holds are one smaller node.
    return found.model_copy(update={"node": min(found.node, found.devices)})


def _numbers(value: Any) -> Any:
    """YAML reads 312e12 as text, because it has no dot."""
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    if isinstance(value, str) and re.fullmatch(r"[0-9.]+e[+-]?[0-9]+", value):
        return float(value)
    return value
