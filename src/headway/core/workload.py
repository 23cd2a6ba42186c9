"""What a workload offers to the trainer: model, data, loss and metrics of one domain."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.core.options import Options

if TYPE_CHECKING:
    import torch
    from torch import nn

    from headway.core.engine import Engine
    from headway.core.method import Loss
    from headway.core.recipe import Recipe


@dataclass
class StepBatch:
    """What one optimizer step trains on."""

    micro: list[dict[str, torch.Tensor]]
    """This rank's micro-batches."""
    tokens: int
    """Input tokens (samples, for other workloads) of the step, over all ranks."""
    targets: int
    """Targets of the step that count in the loss, over all ranks: what the loss is divided by."""


class Workload(ABC):
    """Builds everything that depends on what is learnt; made anew for each run from its recipe."""

    def __init__(self, recipe: Recipe) -> None:
        from headway.core.engine import Engine

        self.recipe = recipe
        self.engine: Engine = Engine(recipe)
        """Says which samples are this rank's, and sums over ranks."""

    @staticmethod
    @abstractmethod
    def model_families() -> tuple[type[Options], ...]:
        """The option classes of the model families, for the JSON schema."""

    @staticmethod
    @abstractmethod
    def model_options(raw: dict[str, Any]) -> type[Options]:
        """The option class that ``model: raw`` asks for."""

    @staticmethod
    @abstractmethod
    def data_options(raw: dict[str, Any]) -> type[Options]:
        """The option class that ``data: raw`` asks for."""

    @abstractmethod
    def model_config(self) -> Options:
        """The complete model configuration: what the recipe leaves open is filled in from the data."""

    @abstractmethod
    def build_model(self, config: Options) -> nn.Module:
        """The model with its first weights, fp32, on the CPU; from ``train.from`` where the recipe names one."""

    @abstractmethod
    def compile(self, model: nn.Module) -> None:
        """Compile the parts of the model that gain from it, in place."""

    @abstractmethod
    def loss(self) -> Loss:
        """``(model, batch) -> (sum of losses, number of targets)``."""

    @abstractmethod
    def stream(self) -> Iterator[StepBatch]:
        """The training batches, with ``state_dict`` and ``load_state_dict``."""

    @abstractmethod
    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Metrics on the validation split; ``eval_loss`` among them."""

    @abstractmethod
    def flops_per_token(self, model: nn.Module) -> float:
        """Floating-point operations of one forward and backward pass, per token."""

    @abstractmethod
    def save_extras(self, folder: Path) -> None:
        """Write beside a run what a model needs to be used: its tokenizer, say."""
