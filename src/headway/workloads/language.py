"""Language modelling: predict the next token of text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from headway.core.errors import RecipeError, nearest
from headway.core.method import Loss
from headway.core.options import Options
from headway.core.surgery import Absent
from headway.core.workload import StepBatch, Workload
from headway.data.loader import Stream, in_order
from headway.data.options import DataOptions
from headway.data.pipeline import Data, build_data
from headway.layers.linear_cross_entropy import linear_cross_entropy
from headway.models.build import build_model
from headway.models.config import FAMILIES

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class NextTokenLoss:
    """Cross-entropy of the next token, summed over the batch; the logits are made a chunk at a time and never kept.

    Called with a model and ``tokens``, ``targets`` (and ``segments``, of packed documents) of shape [B, T]; returns
    the sum in fp32 and the number of targets that are not -100.
    """

    label_smoothing: float = 0.0
    chunk: int | None = None

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed loss and the number of targets."""
        if not getattr(model, "plain_head", True):  # logits with a bias, a scale or a cap: some models of transformers
            logits = model(batch["tokens"], segments=batch.get("segments")).flatten(0, 1).float()  # [B T, V]
            targets = batch["targets"].flatten()
            loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=self.label_smoothing)
            return loss, (targets != -100).sum()
        given = {key: batch[key] for key in ("segments", "positions") if key in batch}
        hidden = model.hidden(batch["tokens"], **given)  # type: ignore[operator]  # [B, T, D]
        head_loss = getattr(model, "head_loss", linear_cross_entropy)
        return head_loss(
            hidden.flatten(0, 1),
            model.head_weight,  # type: ignore[arg-type]
            batch["targets"].flatten(),
            label_smoothing=self.label_smoothing,
            chunk=self.chunk,
        )


class Language(Workload):
    """A decoder on packed text; metrics are the mean loss per token and bits per byte of the validation text."""

    @staticmethod
    def model_families() -> tuple[type[Options], ...]:
        """Llama, GPT-2, and any causal LM of transformers."""
        return tuple(FAMILIES.values())

    @staticmethod
    def model_options(raw: dict[str, Any]) -> type[Options]:
        """By ``model.family``, Llama where it is not given."""
        family = raw.get("family", "llama")
        if not isinstance(family, str) or family not in FAMILIES:
            raise RecipeError(
                "model.family", got=family, expected=" or ".join(FAMILIES), hint=nearest(str(family), FAMILIES)
            )
        return FAMILIES[family]

    @staticmethod
    def data_options(raw: dict[str, Any]) -> type[Options]:
        """The same for every model."""
        return DataOptions

    @cached_property
    def data(self) -> Data:
        """The tokenizer and the packed training and validation text."""
        with self.engine.one_first():
            return build_data(self.recipe.data, self.recipe.seed)  # type: ignore[arg-type]

    def model_config(self) -> Options:
        """The recipe's model with the tokenizer's vocabulary filled in.

        Raises:
            RecipeError: the vocabulary is too small for the tokenizer, or the context for the sequences; or a router
                could learn nothing.
        """
        config: Any = self.recipe.model
        tokenizer, sequence = self.data.tokenizer, self.recipe.data.sequence  # type: ignore[attr-defined]
        if config.vocab is None:
            config = config.model_copy(update={"vocab": tokenizer.vocab})
        if config.vocab < tokenizer.vocab:
            raise RecipeError(
                "model.vocab",
                got=config.vocab,
                expected=f"at least {tokenizer.vocab}, the tokenizer's vocabulary",
                hint="leave it out to take the tokenizer's",
            )
        if sequence > getattr(config, "context", sequence):
            raise RecipeError("data.sequence", got=sequence, expected=f"at most model.context ({config.context})")
        if config.family == "moe" and config.top_k == 1 and config.normalize and not self.recipe.train.from_:
            raise RecipeError(
                "model.normalize",
                "divides the weight of the one chosen expert by itself: it is always 1, and the router learns nothing",
                hint="normalize: false, or top_k: 2",
            )
        return config

    def build_model(self, config: Options) -> nn.Module:
        """Random weights from the recipe's seed, or those that ``train.from`` names."""
        if self.recipe.train.from_:
            from headway.workloads.load import load_weights

            return load_weights(self.recipe.train.from_, config, self.data.tokenizer)
        return build_model(config, seed=self.recipe.seed)

    def compile(self, model: nn.Module) -> None:
        """Each block apart: one graph serves all of them, and the rest stays readable in a traceback."""
        for block in model.structure().blocks:  # type: ignore[operator]
            if not isinstance(block, Absent):
                block.compile()

    def loss(self) -> Loss:
        """Next-token cross-entropy."""
        return NextTokenLoss()

    def stream(self) -> Iterator[StepBatch]:
        """The training sequences in the order of the seed."""
        train, data = self.recipe.train, self.recipe.data
        return Stream(
            self.data.train,
            batch=train.batch,
            micro_batch=self.engine.stream_micro_batch,
            seed=self.recipe.seed,
            rank=self.engine.data_rank,
            world=self.engine.data_ranks,
            max_passes=data.max_passes,  # type: ignore[attr-defined]
            on_exhausted=data.on_exhausted,  # type: ignore[attr-defined]
        )

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Mean loss per target token and bits per byte of the validation text, all of it or the same part each time.

        ``eval.batches`` takes a fixed sample of whole documents that fill so many batches: its bytes are exact too.
        """
        options, validation = self.recipe.eval, self.data.validation
        size = options.batch or self.recipe.train.micro_batch or self.recipe.train.batch
        if options.batches is not None:
            validation = validation.sample(options.batches * size)
        loss, loss_sum = NextTokenLoss(), 0.0
        size = min(size, self.engine.stream_micro_batch or size)
        for batch in in_order(validation, size, rank=self.engine.data_rank, world=self.engine.data_ranks):
            loss_sum += self.engine.evaluate(model, loss, {key: value.to(device) for key, value in batch.items()})
        loss_sum = self.engine.total(loss_sum)
        bits = loss_sum / math.log(2) / validation.text_bytes
        return {"eval_loss": loss_sum / validation.targets, "bits_per_byte": bits}

    def flops_per_token(self, model: nn.Module) -> float:
        """As the model counts them for sequences of ``data.sequence`` tokens."""
        return model.flops_per_token(self.recipe.data.sequence)  # type: ignore[operator, attr-defined]

    def save_extras(self, folder: Path) -> None:
        """The tokenizer, and the complete model configuration."""
        self.data.tokenizer.save(folder)
