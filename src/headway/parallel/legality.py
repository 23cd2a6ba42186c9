"""Whether a recipe can be laid out in a given way: asked before any rank starts, answered in one sentence.

Every refusal names the recipe's path, the numbers that do not fit and the nearest that do.
"""

from __future__ import annotations

from typing import Any

from headway.core import registry
from headway.core.errors import RecipeError
from headway.core.recipe import Recipe
from headway.parallel.mesh import Layout, divisors, one_of

INTERLEAVED = ("interleaved-1f1b", "interleaved-zero-bubble")
ATTENTION_KINDS = ("ulysses", "ring", "usp")
SCAN_KINDS = ("all-scan", "lasp1", "lasp2")


def check_layout(recipe: Recipe, layout: Layout) -> None:
    """Refuse what cannot be laid out.

    Raises:
        RecipeError: the first thing that does not fit.
    """
    if layout.world == 1:
        return
    for check in (_whole_run, _data, _methods, _family, _tensor, _sequence, _pipeline, _experts):
        check(recipe, layout)


def _refuse(where: str, what: str, hint: str = "") -> None:
    raise RecipeError(where, what, hint=hint)


def _fits(number: int, total: int, near: int | None = None) -> str:
    return one_of(divisors(total), near or number)


def _whole_run(recipe: Recipe, layout: Layout) -> None:
    if recipe.memory.budget is not None:
        _refuse("memory.budget", f"plans for one process, and there are {layout.world} ranks",
                "set the switches that `headway plan RECIPE --memory SIZE` names yourself")  # fmt: skip
    if getattr(recipe.checkpoint, "mode", "") == "plain":
        _refuse("checkpoint.mode", f"is plain, which saves one process's state, and there are {layout.world} ranks",
                "take checkpoint.mode=lazy")  # fmt: skip
    if getattr(recipe.checkpoint, "every", None) == "auto":
        _refuse("checkpoint.every", f"is auto: each of {layout.world} ranks would measure its own interval",
                "give a number of steps")  # fmt: skip


def _data(recipe: Recipe, layout: Layout) -> None:
    batch, micro = recipe.train.batch, recipe.train.micro_batch
    if batch % layout.data:
        near = sorted({max(1, batch // layout.data) * layout.data, (batch // layout.data + 1) * layout.data})
        _refuse("train.batch", f"of {batch} sequences cannot be shared among {layout.data} ranks ({layout})",
                f"take {one_of(near)}, or divide the model (parallel.tensor, parallel.pipeline) or the sequences "
                "(parallel.sequence) instead")  # fmt: skip
    share = batch // layout.data
    if micro is not None and micro < share and share % micro:
        _refuse("train.micro_batch", f"of {micro} does not divide the {share} sequences of a rank "
                f"({batch} over {layout.data} shares)", f"take {_fits(micro, share)}")  # fmt: skip


def _methods(recipe: Recipe, layout: Layout) -> None:
    used = [name for name in ("replicate", "shard", "sequence", "tensor", "pipeline") if getattr(layout, name) > 1]
    used += ["experts"] if layout.expert * layout.expert_tensor > 1 else []
    for key in recipe.methods:
        card = registry.find("methods", key, f"methods.{key}").card
        for name in used:
            if name not in card.parallel:
                able = f"it is for {', '.join(card.parallel)}" if card.parallel else "it is for one process"
                _refuse(f"methods.{key}", f"is not made for parallel.{name} (here {layout})",
                        f"{able}; leave it out or lay the run out otherwise")  # fmt: skip


def _family(recipe: Recipe, layout: Layout) -> None:
    family = getattr(recipe.model, "family", None)
    if family == "transformers":
        for name in ("tensor", "pipeline", "sequence"):
            if (size := getattr(layout, name)) > 1:
                _refuse(f"parallel.{name}", f"of {size} needs a model of Headway's own, and this one is transformers'",
                        "use replicate and shard, or a folder that Headway reads itself (model.native)")  # fmt: skip
    if layout.expert * layout.expert_tensor > 1 and not getattr(recipe.model, "experts", None):
        _refuse("parallel.experts", f"divides experts among {layout.expert * layout.expert_tensor} ranks, and a "
                f"{family} model has none", "take model.family=moe, or leave it out")  # fmt: skip


def _divides(where: str, degree: int, total: int, what: str) -> None:
    if total % degree:
        _refuse(where, f"of {degree} does not divide the {total} {what}", f"take {_fits(degree, total)}")


def _tensor(recipe: Recipe, layout: Layout) -> None:
    if layout.tensor == 1:
        return
    model: Any = recipe.model
    where, degree = "parallel.tensor", layout.tensor
    if getattr(model, "family", None) not in ("llama", "gpt2", "moe"):
        _refuse(where, f"of {degree} is for llama, gpt2 and moe models, and this is {getattr(model, 'family', '?')}")
    _divides(where, degree, model.heads, "heads")
    kv = getattr(model, "kv_heads", None) or model.heads
    if degree % kv:  # a multiple of them has each rank hold one of them whole
        _divides(where, degree, kv, "key and value heads")
    _divides(where, degree, model.intermediate_width, "channels of the feed-forward block (model.intermediate)")
    if recipe.parallel.tensor.sequence:
        tokens = getattr(recipe.data, "sequence", 0) // layout.sequence
        _divides(where, degree, tokens, "tokens of a rank's sequences (parallel.tensor.sequence: false does without)")


def sequence_kind(recipe: Recipe) -> str:
    """The kind of sequence parallelism, with ``auto`` settled by the model's family."""
    kind = recipe.parallel.sequence.kind
    if kind != "auto":
        return kind
    return "all-scan" if getattr(recipe.model, "family", None) == "gla" else "ulysses"


def _sequence(recipe: Recipe, layout: Layout) -> None:
    options, model = recipe.parallel.sequence, recipe.model
    degree, tokens = layout.sequence, getattr(recipe.data, "sequence", 0)
    kind, linear = sequence_kind(recipe), getattr(recipe.model, "family", None) == "gla"
    if options.ring > 1 and kind != "usp":
        _refuse("parallel.sequence.ring", f"of {options.ring} is for kind usp, and the kind is {kind}")
    if degree == 1:
        return
    if kind in SCAN_KINDS and not linear:
        _refuse("parallel.sequence.kind", f"is {kind}, for linear attention, and the model has softmax attention",
                f"take {', '.join(ATTENTION_KINDS)}")  # fmt: skip
    if kind in ATTENTION_KINDS and linear:
        _refuse("parallel.sequence.kind", f"is {kind}, for softmax attention, and the model's is linear",
                f"take {', '.join(SCAN_KINDS)}")  # fmt: skip
    pieces = degree * (2 if kind in ("ring", "usp") and options.layout == "zigzag" else 1)
    if tokens % pieces:
        near = [n for n in (tokens // pieces * pieces, (tokens // pieces + 1) * pieces) if n]
        _refuse("data.sequence", f"of {tokens} tokens cannot be cut into {pieces} equal pieces for {degree} ranks",
                f"take {one_of(near)}")  # fmt: skip
    if kind == "usp" and (options.ring == 1 or degree % options.ring):
        _refuse("parallel.sequence.ring", f"of {options.ring} does not make rings of {degree} ranks",
                f"take {one_of(divisors(degree)[1:])}")  # fmt: skip
    if kind in ("ulysses", "usp"):
        heads: int = model.heads // layout.tensor  # type: ignore[attr-defined]
        exchanged = degree // (options.ring if kind == "usp" else 1)
        if exchanged > heads:
            _refuse("parallel.sequence", f"has {exchanged} ranks exchange heads, and each has {heads}",
                    f"take at most {heads}, or kind ring or usp")  # fmt: skip


def micro_batch(recipe: Recipe, layout: Layout) -> int:
    """Sequences that pass through the model together; by default a rank's share, and with a pipeline the largest part
    of it of which there are at least two for each stage, in whole rounds."""
    share = recipe.train.batch // layout.data
    if recipe.train.micro_batch is not None:
        return min(recipe.train.micro_batch, share)
    counts = [n for n in range(1, share + 1) if share % n == 0 and n % layout.pipeline == 0]
    enough = [n for n in counts if n >= 2 * layout.pipeline] or counts
    return share // enough[0] if enough and layout.pipeline > 1 else share


def _pipeline(recipe: Recipe, layout: Layout) -> None:
    options = recipe.parallel.pipeline
    degree, name, chunks = layout.pipeline, options.schedule, options.chunks
    if degree == 1:
        if chunks > 1:
            _refuse("parallel.pipeline.chunks", f"of {chunks} needs a pipeline, and its degree is 1")
        return
    if name in INTERLEAVED and chunks < 2:
        _refuse("parallel.pipeline.chunks", f"of {chunks} leaves {name} nothing to interleave", "take 2 or more")
    if name == "zbv-zero-bubble" and chunks != 2:
        _refuse("parallel.pipeline.chunks", f"of {chunks} does not fit zbv-zero-bubble, whose stages go there and back",
                "take 2")  # fmt: skip
    sharded = layout.world // layout.pipeline // layout.tensor
    if name == "zbv-zero-bubble" and sharded > 1 and getattr(recipe.model, "tied", False):
        _refuse("model.tied", f"has a rank of zbv-zero-bubble use the embedding in two stages, whose weights {sharded} "
                "ranks cannot share", "set it to false, or take schedule interleaved-zero-bubble")  # fmt: skip
    if name in ("gpipe", "1f1b") and chunks > 1:
        _refuse("parallel.pipeline.chunks", f"of {chunks} does not fit {name}, which has one stage on each rank",
                "take 1, or schedule interleaved-1f1b")  # fmt: skip
    layers = recipe.model.layers  # type: ignore[attr-defined]
    if degree * chunks > layers:
        _refuse("parallel.pipeline", f"makes {degree * chunks} stages ({degree} ranks x {chunks}) of {layers} blocks",
                f"take {max(1, layers // degree)} chunks, or a degree of {max(1, layers // chunks)}")  # fmt: skip
    share, micro = recipe.train.batch // layout.data, micro_batch(recipe, layout)
    count = share // micro
    if count < degree and name != "gpipe":
        _refuse("train.micro_batch", f"of {micro} makes {count} micro-batches of a rank's {share} sequences, fewer "
                f"than the {degree} stages in a row", f"take {max(1, share // degree)} or less, or more train.batch"
                if share >= degree else f"take train.batch of {degree * layout.data} or more")  # fmt: skip
    if name in INTERLEAVED and not _in_rounds(count, degree):
        fitting = [m for m in range(1, share + 1) if share % m == 0 and _in_rounds(share // m, degree)]
        _refuse("train.micro_batch", f"of {micro} makes {count} micro-batches, which {name} cannot hand out to "
                f"{degree} ranks in equal rounds", f"take {one_of(fitting, micro)}")  # fmt: skip


def _in_rounds(micro_batches: int, ranks: int) -> bool:
    return micro_batches >= ranks and micro_batches % (micro_batches // ranks) == 0


def _experts(recipe: Recipe, layout: Layout) -> None:
    model: Any = recipe.model
    degree, tensor = layout.expert, layout.expert_tensor
    if layout.tensor > 1 and not recipe.parallel.tensor.sequence and getattr(model, "experts", None):
        _refuse("parallel.tensor.sequence", f"is false, so that each of {layout.tensor} tensor ranks would send the "
                "same tokens to the experts", "set it to true")  # fmt: skip
    if degree * tensor == 1:
        return
    stage = layout.world // layout.pipeline
    if stage % (degree * tensor):
        grid = f"{stage} = {layout.replicate} x {layout.shard} x {layout.sequence} x {layout.tensor}"
        _refuse("parallel.experts", f"makes groups of {degree * tensor} ranks (degree {degree} x tensor {tensor}), "
                f"which do not make up the {grid} of a stage", f"take {_fits(degree * tensor, stage)}")  # fmt: skip
    _divides("parallel.experts.degree", degree, model.experts, "experts (model.experts)")
    width = getattr(model, "expert_width", None) or 0
    if tensor > 1 and width % tensor:
        _divides("parallel.experts.tensor", tensor, width, "channels of an expert")
