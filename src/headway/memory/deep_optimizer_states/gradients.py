"""Gradients on their way: to the host during the backward pass, or kept on the device in fp32."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headway.core.errors import HeadwayError
from headway.memory.backends import side_stream
from headway.memory.host import host_empty
from headway.memory.lanes import Job, Lane


class Gradients:
    """Moves each gradient, as soon as autograd has made it, to where its parameter will be updated.

    A parameter's gradient is gathered in the ``.grad`` of a tensor of its own (``gathered``): in host memory where it
    is updated there, else on the device. Micro-batches are summed in fp32, in their order: the same bits as those of
    an optimizer that keeps fp32 gradients on the device.

    Args:
        params: the model's parameters.
        gathered: for each, the tensor whose ``.grad`` gathers its gradient; itself where autograd does it.
        on_host: for each, whether that is in host memory.
        lane: of the link, device to host.
        asynchronous: do not wait for a gradient to be on the host before the backward pass goes on.

    Raises:
        HeadwayError: the lane has several workers: a micro-batch's gradient is copied before the next one's is added.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        gathered: Sequence[Tensor],
        on_host: Sequence[bool],
        lane: Lane,
        asynchronous: bool = True,
    ) -> None:
        if lane.workers > 1:
            raise HeadwayError(f"lane {lane.name}", f"has {lane.workers} workers, and gradients would lose their order",
                               expected="one worker")  # fmt: skip
        self.params, self.gathered, self.on_host = list(params), list(gathered), list(on_host)
        self.lane, self.asynchronous = lane, asynchronous
        self.shipped_bytes = 0
        self.fresh = True
        """Whether a gradient has come since this was set to False."""
        # Memory is made and freed in the caller's thread: torch counts the CPU's by thread.
        self._moving: deque[tuple[Job, Tensor]] = deque()
        self._lock = threading.RLock()  # hooks run in autograd's threads
        device = self.params[0].device if self.params else torch.device("cpu")
        sizes = [p.numel() if host else 0 for p, host in zip(self.params, self.on_host, strict=True)]
        flat = host_empty(sum(sizes), torch.float32, device)
        self._buffers = [
            part.view(p.shape) if size else None
            for part, size, p in zip(flat.split(sizes), sizes, self.params, strict=True)
        ]
        self._hooks: list[Any] = []
        for index, param in enumerate(self.params):
            if self.gathered[index] is not param and param.requires_grad:
                self._hooks.append(param.register_post_accumulate_grad_hook(partial(self._take, index)))

    def _take(self, index: int, param: Tensor) -> None:
        grad, target = param.grad, self.gathered[index]
        if grad is None:
            return
        if grad.layout != torch.strided:
            raise HeadwayError(f"gradient of parameter {index}", "is sparse; subgroups are flat runs of elements",
                               hint="sparse=False in the embedding")  # fmt: skip
        param.grad = None
        self.fresh = True
        with self._lock:
            if not self.on_host[index]:
                if target.grad is None:
                    target.grad = grad if grad.dtype == torch.float32 and grad.is_contiguous() else _wide(grad)
                else:
                    target.grad.add_(grad)
                return
            first = target.grad is None
            if first:
                target.grad = self._buffers[index] if self._buffers[index] is not None else torch.zeros_like(target)
            job = self._ship(grad, target.grad, first)  # type: ignore[arg-type]
        if not self.asynchronous:
            job.result()
        self._sweep()

    def _ship(self, grad: Tensor, into: Tensor, first: bool) -> Job:
        """Queue a gradient's trip: fp32 on the link, as it is cast where casting is quick."""
        nbytes = 4 * grad.numel()
        work: Callable[[], None]
        if grad.is_cuda:
            event = torch.cuda.Event()
            event.record()
            work = partial(_from_gpu, grad, into, first, event)
        else:
            work = partial(_move, grad, into, first)
        job = self.lane.submit(work, nbytes, "gradient")
        self._moving.append((job, grad))
        self.shipped_bytes += nbytes
        return job

    def _sweep(self) -> None:
        with self._lock:
            while self._moving and self._moving[0][0].done:
                self._moving.popleft()[0].result()

    def wait(self) -> None:
        """Return once every gradient is where it is gathered.

        Raises:
            HeadwayError: one could not be moved.
        """
        for index, param in enumerate(self.params):  # what was put into ``.grad`` without autograd
            if param.grad is not None and self.gathered[index] is not param:
                self._take(index, param)
        try:
            while True:
                with self._lock:
                    if not self._moving:
                        return
                    job, _ = self._moving[0]
                job.result()
                self._sweep()
        except Exception as error:
            self.forget()
            if isinstance(error, HeadwayError):
                raise
            raise HeadwayError("gradients", f"could not be moved to the host ({error})") from error

    def forget(self) -> None:
        """Drop all gradients, also those on their way."""
        with self._lock:
            while self._moving:
                job, _ = self._moving.popleft()
                if not job.cancel():
                    job.wait()
            for param, target in zip(self.params, self.gathered, strict=True):
                param.grad = target.grad = None

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.forget()


def _wide(grad: Tensor) -> Tensor:
    return grad.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


@torch.no_grad()
def _move(grad: Tensor, into: Tensor, first: bool) -> None:
    into.copy_(grad) if first else into.add_(grad)


@torch.no_grad()
def _from_gpu(grad: Tensor, into: Tensor, first: bool, made: torch.cuda.Event) -> None:
    """Cast on the GPU, cross the link in fp32, and add on the host if there is something already."""
    with side_stream(grad.device) as stream:
        stream.wait_event(made)
        wide = grad.float()
        if first:
            into.copy_(wide, non_blocking=True)
            stream.synchronize()
        else:
            into.add_(wide.cpu())
