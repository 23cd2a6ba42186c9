"""Sequence parallelism for linear attention: each rank holds a stretch of the sequence and is handed one state.

    y = sp_linear_attention(q, k, v, log_decay, group)          # in a model of your own
    scan_parallel(model, mesh)                                  # every mixer of a GLA

Source: Chou et al., ZeCO: Zero Communication Overhead Sequence Parallelism for Linear Attention, arXiv 2507.01004.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from headway.core.errors import ModelError
from headway.layers.attention import attention
from headway.layers.chunks import check_log_decay
from headway.layers.linear_attention import CHUNK, linear_attention
from headway.models.gla import GatedLinearAttention
from headway.models.llama import Attention
from headway.parallel.order import rising_group
from headway.parallel.sequence.lasp import ScanMethod, StateCarry
from headway.parallel.sequence.links import Links, document_before, links_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

WORDS = {"zeco": "All-Scan in {blocks} blocks", "lasp1": "a ring (LASP-1)", "lasp2": "a gather (LASP-2)"}


def sp_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    group: dist.ProcessGroup | Links | None = None,
    method: ScanMethod = "zeco",
    segments: Tensor | None = None,
    *,
    blocks: int = 4,
    chunk: int = CHUNK,
) -> Tensor:
    """Causal linear attention over a sequence whose stretches lie on the ranks of a group, in their order.

    Args:
        q: [B, H, T, dk], this rank's stretch; T may differ from rank to rank.
        k: [B, H, T, dk].
        v: [B, H, T, dv].
        log_decay: [B, H, T, dk] or [B, H, T], at most 0; ``None`` for no decay.
        group: by default all ranks.
        method: how the state travels; the result is the same.
        segments: integer [B, T], the document of each token; a document may run on over ranks.
        blocks: of All-Scan, see ``all_scan``.
        chunk: tokens per chunk, a power of two.

    Returns:
        [B, H, T, dv]; gradients are exact, through one message more per rank in the backward pass.

    Raises:
        ModelError: a logarithmic decay is positive or no finite number, with its place.
        NeighbourLost: a rank beside this one did not answer.
    """
    links = links_of(group)
    if log_decay is not None:
        check_log_decay(log_decay.detach(), "log_decay")
    before = None if segments is None else document_before(segments, links)
    carry = StateCarry(links, method, blocks)
    return linear_attention(q, k, v, log_decay, segments=segments, before=before, chunk=chunk, carry=carry)[0]


class ScannedAttention:
    """Stands in a mixer for ``linear_attention``: the state comes from the rank to the left."""

    def __init__(self, links: Links, method: ScanMethod, blocks: int, documents: WeakIdKeyDictionary) -> None:
        self.links, self._documents = links, documents
        self._carry = StateCarry(links, method, blocks, layer=True)
        # Made here and not by a decorator, since it imports the compiler, which takes a second.
        self._uncompiled = torch.compiler.disable(self._attend)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As ``linear_attention``.

        Raises:
            ModelError: with a state from a cache: generation has the whole text on every rank.
        """
        y, last = self._uncompiled(*args, **kwargs)
        return y, last

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        *,
        segments: Tensor | None = None,
        state: Tensor | None = None,
        chunk: int = CHUNK,
    ) -> tuple[Tensor, Tensor]:
        if state is not None:
            raise ModelError(self.links.where, f"shares sequences among {self.links.size} ranks and cannot generate")
        before = None
        if segments is not None:
            # Asked once for all layers, and a recomputed block brings the same tensor; but it may be filled anew, of
            # which tensors made in inference mode say nothing.
            filled = None if segments.is_inference() else segments._version
            known, before = self._documents.get(segments, (None, None))
            if filled is None or filled != known:
                before = document_before(segments, self.links)
                self._documents[segments] = filled, before
        return linear_attention(q, k, v, log_decay, segments=segments, before=before, chunk=chunk, carry=self._carry)


def scan_parallel(
    model: nn.Module, mesh: DeviceMesh, *, method: ScanMethod | str = "zeco", blocks: int = 4
) -> list[str]:
    """Have the mixers of a GLA hand on their state along the ranks of a mesh, in place.

    Args:
        model: its batches hold this rank's stretch of each sequence.
        mesh: one-dimensional, the ranks in the order of the sequence.
        method: ``zeco`` (or ``all-scan``), ``lasp1`` or ``lasp2``.
        blocks: of All-Scan.

    Returns:
        What was done, a sentence each.

    Raises:
        ModelError: the model has no linear attention, or softmax attention that nothing divides; or the ranks' order is
            not that of their group.
    """
    kind: Any = "zeco" if method == "all-scan" else method
    group = rising_group(mesh, "parallel.sequence")
    mixers = {name: m for name, m in model.named_modules() if isinstance(m, GatedLinearAttention)}
    if not mixers:
        raise ModelError("parallel.sequence", f"has no linear attention to divide in a {type(model).__name__}",
                         hint="its kind is ulysses, ring or usp")  # fmt: skip
    left = [name for name, m in model.named_modules() if isinstance(m, Attention) and m.attend is attention]
    if left:
        raise ModelError("parallel.sequence", f"hands on states, and {', '.join(left)} attends with softmax",
                         hint="divide those first (ulysses, ring, usp), or leave out model.softmax_layers")  # fmt: skip
    documents = WeakIdKeyDictionary()
    for name, mixer in mixers.items():
        mixer.attend = ScannedAttention(Links(group, name), kind, blocks, documents)
    _check_first_positions(model, Links(group, "the embedding"))
    how = WORDS[kind].format(blocks=blocks)
    return [f"{len(mixers)} blocks of linear attention hand their state along {mesh.size()} ranks by {how}"]


def check_order(positions: Tensor, links: Links) -> None:
    """Refuse stretches that do not follow each other from rank to rank.

    Args:
        positions: integer [T] or [B, T], of this rank's tokens in the sequence.

    Raises:
        ModelError: on every rank, with the first rank that does not follow.
    """
    row = positions.reshape(-1, positions.shape[-1])[0]
    rising = bool((row.diff() == 1).all())
    ends = torch.tensor([int(row[0]), int(row[-1]), int(rising)], device=positions.device)
    parts = [part.tolist() for part in links.gather(ends, "document")()]
    for rank, (first, _, whole) in enumerate(parts):
        if not whole:
            raise ModelError("parallel.sequence.layout", f"gives rank {rank} tokens that do not follow each other",
                             expected="contiguous stretches")  # fmt: skip
        if rank and first != parts[rank - 1][1] + 1:
            end = parts[rank - 1][1]
            raise ModelError("parallel.sequence", f"gives rank {rank} the tokens from {first}, and rank {rank - 1} "
                             f"ends with {end}", expected="stretches in the order of the ranks")  # fmt: skip


def _check_first_positions(model: Any, links: Links) -> None:
    """Check the order once, when the first batch with positions comes: later ones are cut in the same way."""
    embed, pending = model.embed, [True]

    def checked(tokens: Tensor, *, positions: Tensor | None = None, **shared: Any) -> Any:
        if positions is not None and pending:
            pending.clear()
            check_order(positions, links)
        return embed(tokens, positions=positions, **shared)

    model.embed = checked
