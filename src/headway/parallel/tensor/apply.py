"""Make a model tensor-parallel, in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from headway.core.errors import ModelError
from headway.layers.embedding import Embedding
from headway.parallel.tensor.dropout import TokenDropout
from headway.parallel.tensor.head import VocabularyHead
from headway.parallel.tensor.modules import (
    ColumnLinear,
    PositionEmbedding,
    RowLinear,
    SharedColumnLinear,
    VocabularyEmbedding,
    use_whole,
)
from headway.parallel.tensor.place import Place
from headway.parallel.tensor.plan import check_degree, check_modules, kv_heads_of, read_plan

_DIMENSION = {"vocabulary": 0, "heads": 0, "kv_heads": 0, "column": 0, "row": 1}
"""Along which dimension a role divides a matrix; the others keep theirs whole."""
_COLUMN: dict[type, type[nn.Module]] = {nn.Linear: ColumnLinear}
_CLASSES: dict[str, dict[type, type[nn.Module]]] = {
    "vocabulary": {Embedding: VocabularyEmbedding, nn.Linear: ColumnLinear},
    "positions": {Embedding: PositionEmbedding},
    "heads": _COLUMN,
    "kv_heads": _COLUMN,
    "column": _COLUMN,
    "row": {nn.Linear: RowLinear},
}
"""What a module of a given class becomes in a role; in the other roles any module can be."""


def tensor_parallel(
    model: Any, mesh: DeviceMesh, *, sequence: bool = True, regather: bool = False, apart: Sequence[str] = ()
) -> list[str]:
    """Divide the matrices of a model of Headway among the ranks of ``mesh``, in place.

    Every rank has built the same model and gives it the same batches. Parameters become DTensors on ``mesh`` with the
    names and shapes that they had, so that FSDP2 and checkpoints take them as they are; their gradients are whole:
    nothing is left to be summed over ``mesh``. ``hidden`` and ``forward`` give the same on every rank, and so does
    ``head_loss``.

    Args:
        model: declares a ``tensor_plan`` (see `headway.parallel.tensor.plan`).
        mesh: one dimension.
        sequence: between the regions that are divided by channels, each rank works on its share of the tokens.
        regather: with ``sequence``, do not keep the tokens that were gathered for a region for the backward pass, but
            gather them again: of a layer's activations, each rank then keeps its share only, for a quarter more
            communication. Compiled blocks keep them.
        apart: modules that somebody else divides, such as ``blocks.*.mlp.experts``; they are left as they are.

    Returns:
        What was done, as sentences.

    Raises:
        ModelError: the model declares no plan, cannot be divided in so many parts, is divided already, or is not the
            same on all ranks.

    Source: Shoeybi et al. (arXiv 1909.08053), section 3; Korthikanti et al. (arXiv 2205.05198), section 4.2.
    """
    roles = read_plan(model, apart)
    check_modules(model, roles, {role: tuple(classes) for role, classes in _CLASSES.items()})
    check_degree(model, roles, mesh.size())
    _check_same(model, mesh)
    place = Place(mesh, sequence, regather)
    kv_heads = kv_heads_of(model)
    for path, role in roles.items():
        if role != "apart":
            _divide(model.get_submodule(path), role, place, kv_heads)
        if role == "heads":
            attention = model.get_submodule(path.rpartition(".")[0])
            attention.heads, attention.kv_heads = model.config.heads // place.size, max(1, kv_heads // place.size)
    head = VocabularyHead(place, model.vocab)
    model.head_loss, model.head_logits = head.loss, head.logits
    model.cached_heads = max(1, kv_heads // place.size)
    for module in model.modules():
        if hasattr(module, "drop"):
            module.drop = TokenDropout(place)
    return _sentences(roles, model, place)


def _divide(module: Any, role: str, place: Place, kv_heads: int) -> None:
    """Make DTensors of the parameters of ``module``, and it a module that works with them."""
    shared = role == "kv_heads" and kv_heads % place.size != 0
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                whole = shared or (role == "row" and parameter.ndim == 1)  # a row's bias is added once, to the sum
                owner._parameters[name] = place.parameter(parameter, None if whole else _DIMENSION.get(role))
    if role not in _CLASSES:
        use_whole(module, place, role)
        return
    module.__dict__.update(place=place, **({"kv_heads": kv_heads} if shared else {}))
    module.__class__ = SharedColumnLinear if shared else _CLASSES[role][type(module)]


@torch.no_grad()
def _check_same(model: nn.Module, mesh: DeviceMesh) -> None:
    named = list(model.named_parameters())
    for path, parameter in named:
        if isinstance(parameter, DTensor):
            raise ModelError(path, "is divided already", hint="make the model tensor-parallel before it is sharded")
    if any(parameter.is_meta for _, parameter in named):
        return
    sums = torch.stack([parameter.double().sum() if parameter.numel() < 4096 else parameter.sum(dtype=torch.float64)
                        for _, parameter in named]).to(mesh.device_type)  # fmt: skip
    of_all = [torch.empty_like(sums) for _ in range(mesh.size())]
    dist.all_gather(of_all, sums, group=mesh.get_group())
    for rank, other in enumerate(of_all):
        if not torch.equal(other, of_all[0]):
            path = named[int((other != of_all[0]).nonzero()[0])][0]
            raise ModelError(path, f"differs between ranks 0 and {rank} of the tensor group",
                             hint="build the model with the same seed, or load the same weights, on all")  # fmt: skip


def _sentences(roles: dict[str, str], model: Any, place: Place) -> list[str]:
    count = Counter(roles.values())
    columns = count["heads"] + count["kv_heads"] + count["column"]
    said = [f"{columns} matrices divided by columns, {count['row']} by rows, among {place.size} ranks"]
    if count["vocabulary"]:
        said.append(f"a vocabulary of {model.vocab} divided among {place.size} ranks, with the loss of its head")
    if count["kv_heads"] and kv_heads_of(model) % place.size:
        said.append(f"{kv_heads_of(model)} key and value heads repeated for {place.size} ranks")
    if count["tokens"]:
        said.append(f"{count['tokens']} modules whole on every rank")
    if place.sequence:
        again = ", which are gathered again in the backward pass" if place.regather else ""
        said.append(f"norms and residual stream on 1/{place.size} of the tokens{again}")
    return said
