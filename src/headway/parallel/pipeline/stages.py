"""A rank's stages: the parts of a model that it keeps, and modules that run them one after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from headway.core.method import Loss
from headway.core.surgery import Absent
from headway.models.structure import structure
from headway.parallel.pipeline.cuts import Cuts

LAST = ("norm", "head")


def keep_own_parts(model: Any, cuts: Cuts, rank: int) -> list[str]:
    """Put `Absent` in the place of everything that ``rank`` does not run, in place; what stays keeps its name.

    A matrix that embedding and head share stays on both ranks that use it.

    Returns:
        What was done, as sentences.
    """
    stages = cuts.stages_of(rank)
    first, last = 0 in stages, cuts.stages - 1 in stages
    tied = structure(model).tied
    own = {block for stage in stages for block in cuts.blocks(stage)}
    for index in range(len(model.blocks)):
        if index not in own:
            model.blocks[index] = Absent()
    for name, child in list(model.named_children()):
        if name == "blocks":
            continue
        needed = last if name in LAST else first or (tied and last and child is model.embedding)
        if not needed:
            setattr(model, name, Absent())
    share = ", ".join(f"{len(cuts.blocks(stage))} on rank {cuts.rank_of(stage)}" for stage in range(cuts.stages))
    return [f"{cuts.bounds[-1]} blocks in {cuts.stages} stages: {share}"]


class Stage(nn.Module):
    """Consecutive blocks of a model; the first stage also embeds, the last also takes the loss.

    Its parameters have the model's names. Blocks are those that the model has when the stage is made: methods that
    replace blocks come before.
    """

    loss: Loss
    """The workload's, with what methods made of it; the last stage needs it."""

    def __init__(self, model: Any, cuts: Cuts, index: int) -> None:
        super().__init__()
        self.index, self.first, self.last = index, index == 0, index == cuts.stages - 1
        self._model = (model,)  # in a tuple: it is no submodule, its parts are
        for name, child in model.named_children():
            shared = name == "embedding" and self.last and model.head is None
            mine = self.last if name in LAST else (self.first or shared)
            if name != "blocks" and mine and not isinstance(child, Absent):
                self.add_module(name, child)
        self.blocks = nn.ModuleDict({str(i): model.blocks[i] for i in cuts.blocks(index)})

    @property
    def model(self) -> Any:
        """The model that the stage is a part of."""
        return self._model[0]

    def forward(self, x: Tensor, **batch: Tensor) -> Tensor:
        """The residual stream at the end of the stage; of the last one, the summed loss.

        Args:
            x: tokens [b, T] for the first stage, else the residual stream [b, T, D].
            batch: ``targets`` [b, T] and, where they are given, ``positions`` and ``segments``.

        Returns:
            [b, T, D], or [1] from the last stage.
        """
        given = {key: batch[key] for key in ("positions", "segments") if key in batch}
        if self.first:
            x, shared = self.model.embed(x, **given)
        else:
            shared = self.model.beside(batch["targets"].shape[1], x.device, x.dtype, **given)
        for block in self.blocks.values():
            x = block(x, **shared)
        if not self.last:
            return x
        loss, _ = self.loss(_Finished(self.model, self.norm(x)), {"tokens": batch["targets"], **batch})  # type: ignore[arg-type, operator]
        return torch.stack([loss])


class _Finished:
    """What a loss asks of a model, once the blocks have run."""

    def __init__(self, model: Any, hidden: Tensor) -> None:
        self._model, self._hidden = model, hidden

    def hidden(self, *_: Any, **__: Any) -> Tensor:
        """The residual stream after the final norm, [b, T, D]."""
        return self._hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def make_stages(model: Any, cuts: Cuts, rank: int) -> list[Stage]:
    """The stages of ``rank``, in the order of the model; the last needs its ``loss`` set."""
    return [Stage(model, cuts, index) for index in cuts.stages_of(rank)]
