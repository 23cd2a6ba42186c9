"""The streamed block: forward without a graph, backward chunk by chunk.

Source: StreamBP (arXiv 2506.03077), section 3. The Jacobian-vector product of a block is a sum over output
positions, so it can be taken a chunk of positions at a time: exact, with the activations of one chunk instead of the
whole sequence. Keys and values are computed once more for the whole sequence and collect their gradient over the
chunks; the published code computes them anew for the prefix of every chunk.

Weights' gradients are summed inside and returned once, so that whatever listens for a gradient (a reduction over
ranks, fp32 accumulation) sees one per weight and backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from headway.core.errors import HeadwayError
from headway.core.surgery import Shell, replace_blocks
from headway.memory.streambp.parts import Parts, Shared, TransformersParts, parts_of


class StreamedBlock(Shell):
    """A block whose backward pass streams.

    Args:
        block: a causal block that `parts_of` can take apart.
        chunk: positions per chunk; None takes a third of each sequence, which the paper recommends.
    """

    def __init__(self, block: nn.Module, chunk: int | None = None) -> None:
        super().__init__(block)
        self.parts: Parts = parts_of(block)
        self.chunk = chunk
        self._proved = not isinstance(self.parts, TransformersParts)

    def forward(self, x: Tensor, *args: Any, **shared: Any) -> Any:
        """As the block; where no gradient is wanted, or a cache is filled, the block itself."""
        block = self.original
        cache = shared.get("cache", shared.get("past_key_values"))
        weights = [p for p in block.parameters() if p.requires_grad]
        if cache is not None or not torch.is_grad_enabled() or not (x.requires_grad or weights):
            return block(x, *args, **shared)
        if args:
            raise TypeError("a streamed block takes what it shares with others by keyword")
        if not self._proved:
            self._prove(x, shared)
        return _Stream.apply(x, self.parts, shared, self.chunk_of(x.shape[1]), len(weights), *weights)

    def chunk_of(self, length: int) -> int:
        """Positions per chunk in a sequence of ``length``."""
        return min(length, self.chunk or -(-length // 3))

    @torch.no_grad()
    def _prove(self, x: Tensor, shared: Shared) -> None:
        """Compare once with a block whose wiring was guessed from its parts.

        Raises:
            HeadwayError: the block computes something else.
        """
        block = self.original
        training = block.training
        block.eval()
        right = block(x, **shared)
        right = right[0] if isinstance(right, tuple) else right
        ours = torch.cat([y for _, y in _chunks(self.parts, x, shared, self.chunk_of(x.shape[1]))], dim=1)
        block.train(training)
        tolerance = 1e-4 if x.dtype in (torch.float32, torch.float64) else 5e-2
        if not torch.allclose(ours, right, rtol=tolerance, atol=tolerance * float(right.abs().max())):
            raise HeadwayError(
                "methods.streambp", f"a {type(block).__name__} does more than its parts tell: its output is another"
            )
        self._proved = True


def stream_backward(blocks: nn.ModuleList, chunk: int | None = None) -> dict[nn.Module, nn.Module]:
    """Replace every block of a model by its streamed form, in place.

    Args:
        blocks: the model's list of blocks, as `structure(model).blocks` gives it.
        chunk: positions per chunk; None takes a third of each sequence.

    Returns:
        Old -> new. ``core.surgery.restore_blocks`` puts the old ones back. Names of parameters do not change.

    Raises:
        MethodError: a block cannot be taken apart; none is replaced then.
    """
    return replace_blocks(blocks, lambda block: StreamedBlock(block, chunk), "methods.streambp")


def _chunks(parts: Parts, x: Tensor, shared: Shared, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """Start and output of every chunk, in order."""
    k, v = parts.keys_values(x, shared)
    for start in range(0, x.shape[1], chunk):
        end = min(start + chunk, x.shape[1])
        yield start, parts.rest(x[:, start:end], k[:, :, :end], v[:, :, :end], start, shared)


class _Stream(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Parts, shared: Shared, chunk: int, count: int, *weights: Tensor) -> Tensor:
        ctx.parts, ctx.shared, ctx.chunk, ctx.weights = parts, shared, chunk, weights
        ctx.save_for_backward(x)
        ctx.rng = _rng_state(x.device)
        y = torch.empty_like(x)
        for start, out in _chunks(parts, x, shared, chunk):
            y[:, start : start + out.shape[1]] = out
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        parts, shared, weights = ctx.parts, ctx.shared, ctx.weights
        sums = _Sums(weights)
        grad_x = torch.empty_like(x)
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.enable_grad():
            _set_rng_state(ctx.rng, x.device)  # dropout draws again what it drew in the forward pass
            whole = x.detach().requires_grad_()
            k, v = parts.keys_values(whole, shared)  # [B, Hkv, T, hd], with their graph
            grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
            for start in range(0, x.shape[1], ctx.chunk):
                end = min(start + ctx.chunk, x.shape[1])
                inputs = [
                    x[:, start:end].detach().requires_grad_(),
                    k[:, :, :end].detach().requires_grad_(),
                    v[:, :, :end].detach().requires_grad_(),
                ]
                y = parts.rest(*inputs, start, shared)
                grads = torch.autograd.grad(y, [*inputs, *weights], grad_y[:, start:end], allow_unused=True)
                del y
                grad_x[:, start:end] = grads[0]
                grad_k[:, :, :end] += grads[1]
                grad_v[:, :, :end] += grads[2]
                sums.add(grads[3:])
            grads = torch.autograd.grad([k, v], [whole, *weights], [grad_k, grad_v], allow_unused=True)
            grad_x += grads[0]
            sums.add(grads[1:])
        return (grad_x, None, None, None, None, *sums.totals())


class _Sums:
    """Sums of the chunks' weight gradients, in fp32 where the weights are coarser."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = weights
        self.sums: list[Tensor | None] = [None] * len(weights)

    def add(self, grads: Sequence[Tensor | None]) -> None:
        for index, grad in enumerate(grads):
            if grad is None:
                continue
            total = self.sums[index]
            if total is None:
                wide = torch.promote_types(grad.dtype, torch.float32)
                self.sums[index] = grad.to(wide) if grad.dtype != wide else grad.clone()
            else:
                total += grad

    def totals(self) -> list[Tensor | None]:
        return [None if s is None else s.to(w.dtype) for s, w in zip(self.sums, self.weights, strict=True)]


def _rng_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_rng_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
