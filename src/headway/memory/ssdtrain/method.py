"""The method `ssdtrain` of a recipe."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from headway.core.errors import MethodError
from headway.core.method import Card, ForwardBackward, Method
from headway.core.options import Options
from headway.core.recipe import Recipe
from headway.core.units import Bytes, human
from headway.memory.backends import Backend, HostBackend, offload_folder
from headway.memory.gpudirect import disk_backend
from headway.memory.lanes import LaneName, Lanes
from headway.memory.ssdtrain.activations import KEEP, ActivationStore


class SSDTrainOptions(Options):
    """Options of `ssdtrain`."""

    policy: Literal["adaptive", "all"] = "adaptive"
    """`adaptive` offloads as much as hides behind the computation, by what the first two passes measured; `all`
    everything it may."""
    backend: Literal["disk", "host"] = "disk"
    """Where to: files, or host memory."""
    path: str | None = None
    """Folder for the files, on a fast local drive; default: the system's temporary folder."""
    min_bytes: Bytes = Field(1 << 20, ge=1)
    """Smaller tensors stay."""
    prefetch: int = Field(2, ge=0)
    """Modules brought back at a time, ahead of the backward pass, and more as it frees memory; 0: only when needed."""
    keep: tuple[str, ...] = KEEP
    """Patterns of module names whose tensors stay."""
    queue: Bytes = Field(1 << 30, ge=1)
    """Bytes that may wait to be written before the forward pass waits for the drive."""
    rate: Bytes | None = Field(None, ge=1)
    """Bytes per second that each direction of the link pretends to be limited to, to try out a slower one."""
    bandwidth: Bytes | None = Field(None, ge=1)
    """Bytes per second to plan with; default: as measured."""
    drive_rating: Bytes | None = Field(None, ge=1)
    """What the drive is rated to take over its life, such as `600TB`, for the estimate of its life in the report."""
    verify: bool = True
    """Keep a checksum of everything that goes to disk, and check it on the way back."""


class SSDTrain(Method):
    """Activations on disk or in host memory between the forward and the backward pass."""

    card = Card(
        name="ssdtrain",
        title="Activation offloading",
        paper="Wu et al., SSDTrain: An Activation Offloading Framework to SSDs, 2024, arXiv 2408.10013",
        summary="Writes what autograd saves to disk or host memory during the forward pass and reads it back in time.",
        exact=True,
        approximates="",
        buys="about half of the memory of saved activations or more, without computing anything twice",
        costs="traffic on the drive or link, and wear of the drive; stalls where the link cannot keep up",
        after=("recompute", "streambp"),
        deviations="whole storages are stored and views restored; a storage is dropped when autograd lets go of its "
        "last view, not by hooks on the backward pass",
    )
    Options = SSDTrainOptions

    def __init__(self, options: Any, recipe: Recipe) -> None:
        super().__init__(options, recipe)
        self.store: ActivationStore | None = None

    def check(self, recipe: Recipe) -> None:
        """Compiled blocks save their tensors out of reach.

        Raises:
            MethodError: the recipe compiles, or gives a path that is not used.
        """
        if recipe.train.compile:
            raise MethodError(self.where, "cannot follow train.compile: a compiled block decides itself what it saves, "
                              "and module hooks do not run inside it", hint="switch one of the two off")  # fmt: skip
        if self.options.path is not None and self.options.backend != "disk":
            raise MethodError(f"{self.where}.path", f"is of no use with backend {self.options.backend!r}",
                              hint="leave it out, or set backend: disk")  # fmt: skip

    def model(self, model: nn.Module) -> nn.Module:
        """Follow which module runs."""
        o = self.options
        backend: Backend
        if o.backend == "disk":
            backend = disk_backend(offload_folder(o.path), verify=o.verify)
        else:
            backend = HostBackend()
        names: tuple[LaneName, LaneName] = (backend.write_lane, backend.read_lane)
        lanes = Lanes(rates={name: float(o.rate) for name in names} if o.rate else None, queue_bytes=o.queue)
        self.store = ActivationStore(
            model,
            backend,
            o.policy,
            min_bytes=o.min_bytes,
            prefetch=o.prefetch,
            keep=o.keep,
            bandwidth=o.bandwidth,
            lanes=lanes,
            rated_bytes=o.drive_rating or 0.0,
        )
        where = f"to {o.backend}, tensors of {human(o.min_bytes, 'B')} and more"
        self.changed("modules followed", self.store.scopes.modules, where)
        return model

    def forward_backward(self, forward_backward: ForwardBackward) -> ForwardBackward:
        """Offload between the two halves."""
        store = self.store
        if store is None:
            return forward_backward

        def offloaded(micro: dict[str, torch.Tensor], targets: int) -> torch.Tensor:
            with store.active():
                store.begin()
                loss = forward_backward(micro, targets)
            if store.counts.passes == 1 and not store.counts.saved:
                raise MethodError(self.where, f"has nothing to offload: the largest tensor that is saved has "
                                  f"{human(store.largest, 'B')}", hint="lower min_bytes, or remove it")  # fmt: skip
            store.store.check()
            return loss

        return offloaded

    def report(self) -> dict[str, Any]:
        """What was offloaded, deduplicated, forwarded and waited for."""
        return self.store.report() if self.store is not None else {}
