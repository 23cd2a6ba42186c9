"""Sequence parallelism put into a model with softmax attention, per instance, and taken out again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headway.core.clip import local
from headway.core.errors import ModelError
from headway.models import gpt2, llama
from headway.models.gpt2 import GPT2
from headway.parallel.order import rising_group
from headway.parallel.sequence.batch import Layout, ring_size
from headway.parallel.sequence.exchange import Link
from headway.parallel.sequence.ring import ring_attention
from headway.parallel.sequence.ulysses import WHERE, share_heads, ulysses_attention
from headway.parallel.sequence.usp import usp_attention, usp_links

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

KINDS = ("ulysses", "ring", "usp")


class SharedAttention:
    """Stands in an attention module for ``attend``: the sequence's other parts come from other ranks.

    Args:
        attend: with the keyword arguments of ``layers.attention.attention``.
        replaced: what stood there.
        size: ranks that share a sequence.
        sent: bytes that ``attend`` has sent to other ranks, by kind of message.
    """

    def __init__(self, attend: Callable[..., Tensor], replaced: Callable[..., Tensor], size: int,
                 sent: Counter[str]) -> None:  # fmt: skip
        self.replaced, self.size, self.sent = replaced, size, sent
        # Made here and not by a decorator, since it imports the compiler, which takes a second.
        self._uncompiled = torch.compiler.disable(attend)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, segments: Tensor | None = None, **options: Any) -> Tensor:
        """As ``attention``, with this rank's tokens and whole ``segments``.

        Raises:
            ModelError: ``segments`` are not those of the whole sequence.
        """
        whole = q.shape[2] * self.size
        if segments is not None and segments.shape[1] != whole:
            raise ModelError("segments", f"name the documents of {segments.shape[1]} tokens, and {self.size} ranks "
                             f"with {q.shape[2]} each hold {whole}",
                             hint="segments stay whole: headway.parallel.sequence.shard_batch")  # fmt: skip
        y: Tensor = self._uncompiled(q, k, v, segments=segments, **options)
        return y


def sequence_parallel(
    model: nn.Module, mesh: DeviceMesh, *, kind: str = "ulysses", ring: int | None = None, layout: Layout = "zigzag"
) -> list[str]:
    """Have every softmax attention of a model see the tokens of all ranks of a mesh, in place.

    Batches are then cut by ``shard_batch`` with the same options. With each rank's loss the sum over its own targets,
    divided by the targets of all, gradients of weights are to be summed over the ranks.

    Args:
        model: Llama, a mixture of experts, GPT-2, or the softmax layers of a GLA; tensor parallelism may have cut its
            heads already.
        mesh: one-dimensional, in the order of the ranks.
        kind: ``ulysses``, ``ring`` or ``usp``.
        ring: with ``usp``, ranks in each ring; 2 by default.
        layout: of ``ring`` and ``usp``.

    Returns:
        What was done, a sentence each.

    Raises:
        ModelError: the model has no attention that is known, its attention is replaced already, or its positions
            depend on the length of the sequence; or the ranks' order is not that of their group.
        RecipeError: ``ring`` does not divide the ranks.
    """
    if kind not in KINDS:
        raise ModelError(f"{WHERE}.kind", got=kind, expected=" or ".join(KINDS))
    found: Any = [m for m in model.modules() if isinstance(m, (llama.Attention, gpt2.Attention))]
    if not found:
        raise ModelError(WHERE, f"has no softmax attention that it knows in a {type(model).__name__}",
                         hint="it divides Headway's own Llama, GPT-2 and mixtures of experts")  # fmt: skip
    if any(isinstance(module.attend, SharedAttention) for module in found):
        raise ModelError(WHERE, "has divided this model already", hint="undo_sequence_parallel(model) first")
    if getattr(getattr(model, "rope", None), "dynamic", False):
        raise ModelError("model.rope_scaling", "is dynamic: it depends on the length of the sequence, of which a rank "
                         "has a part", hint="take yarn or llama3")  # fmt: skip
    rings = ring_size(kind, mesh.size(), ring)
    attend, sent, words = _attention(kind, rising_group(mesh, WHERE), rings, layout)
    for module in found:
        module.attend = SharedAttention(attend, module.attend, mesh.size(), sent)
    _require_positions(model)
    changes = [f"{len(found)} attentions share each sequence among {mesh.size()} ranks by {words}"]
    row = mesh.size() // rings
    # Of this rank, where tensor parallelism has cut them.
    heads, kv_heads = (local(part.weight).shape[0] // found[0].head_dim for part in (found[0].q, found[0].k))
    if heads % row:
        shares = sorted({len(of) for of in share_heads(heads, kv_heads, row).queries}, reverse=True)
        changes.append(f"{heads} heads do not divide among {row} ranks: they attend with {shares[0]} or {shares[1]}, "
                       f"and all wait for {shares[0]}")  # fmt: skip
    return changes


def _attention(
    kind: str, group: dist.ProcessGroup, rings: int, layout: Layout
) -> tuple[Callable[..., Tensor], Counter[str], str]:
    sent: Counter[str] = Counter()
    if kind == "ulysses":
        return partial(ulysses_attention, group=Link(group, sent)), sent, "an exchange of heads (Ulysses)"
    if kind == "ring":
        words = f"a ring of keys and values, {layout}"
        return partial(ring_attention, group=Link(group, sent), layout=layout), sent, words
    rows, columns = usp_links(group, rings, sent)
    words = f"an exchange of heads in {rings} groups of {rows.size}, and rings of {rings} between them, {layout}"
    return partial(usp_attention, rows=rows, columns=columns, layout=layout), sent, words


def _require_positions(model: Any) -> None:
    """A model that counts the positions of its own part from 0 would be wrong on every rank but the first."""
    embed, name = model.embed, type(model).__name__

    def checked(tokens: Tensor, *, positions: Tensor | None = None, **shared: Any) -> Any:
        if positions is None:
            raise ModelError("positions", f"are missing: a {name} that shares its sequences cannot count them itself",
                             hint="headway.parallel.sequence.shard_batch gives them")  # fmt: skip
        return embed(tokens, positions=positions, **shared)

    checked.replaced = embed  # type: ignore[attr-defined]
    model.embed = checked


def undo_sequence_parallel(model: Any) -> None:
    """Put back what ``sequence_parallel`` replaced."""
    for module in model.modules():
        if isinstance(getattr(module, "attend", None), SharedAttention):
            module.attend = module.attend.replaced
    if hasattr(model.embed, "replaced"):
        model.embed = model.embed.replaced


def restarts_positions(model: nn.Module) -> bool:
    """Whether the model's positions begin anew with every document: for ``shard_batch``."""
    return isinstance(model, GPT2)


def bytes_sent(model: nn.Module) -> Counter[str]:
    """Bytes that this rank's attentions have sent to other ranks, by kind of message."""
    attends = [getattr(module, "attend", None) for module in model.modules()]
    return next((attend.sent for attend in attends if isinstance(attend, SharedAttention)), Counter())
