"""The switch `one-epoch`: no token twice, no dropout, and on request the model size that the budget asks for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field, model_validator
from torch import nn

from headway.core.errors import CheckpointError, MethodError
from headway.core.fallback import fallback
from headway.core.method import Card, Loss, Method
from headway.core.options import Options
from headway.core.recipe import Recipe
from headway.core.units import Seconds, human
from headway.core.workload import StepBatch
from headway.data.loader import Stream
from headway.models.config import GPT2Config, LlamaConfig, MoEConfig
from headway.plan.one_epoch.planner import flops, one_epoch_plan, seconds
from headway.plan.one_epoch.sizes import Size, measure, nearest_size

LATER_RATIO = 20.0  # Hoffmann et al., arXiv 2203.15556
# What transformers' modules call the dropout that they apply as a function.
DROPOUT_NAMES = ("dropout", "attention_dropout", "hidden_dropout", "activation_dropout", "dropout_p", "dropout_prob")
Configuration = Options  # inside the class, Options names its own
UNLIMITED = 1e18  # tokens; the data's own number is checked when it is there


class BudgetOptions(Options):
    """An amount of compute: FLOP, or time at a rate."""

    flops: float | None = Field(None, gt=0)
    """Floating-point operations of the run, forward and backward."""
    time: Seconds | None = Field(None, gt=0)
    """Training time such as `2h`; needs `flops_per_second`."""
    flops_per_second: float | None = Field(None, gt=0)
    """Rate that training reaches: `flops_per_token * tokens_per_second` of a run's summary."""

    @model_validator(mode="after")
    def _one_of_both(self) -> BudgetOptions:
        if (self.flops is None) == (self.time is None):
            raise ValueError("expected either flops, or time with flops_per_second")
        if (self.time is None) != (self.flops_per_second is None):
            raise ValueError("expected time and flops_per_second together")
        return self


class OneEpochOptions(Options):
    """Options of `one-epoch`."""

    ratio: float | None = Field(None, gt=0)
    """Tokens per non-embedding parameter (the paper's 5, later work's 20): the model is resized to it; `null` keeps
    the recipe's size, or takes 20 where there is a `budget`."""
    budget: BudgetOptions | None = None
    """Compute to plan size and steps for; `train.steps` must then be the planned number, which the error names."""


class OneEpoch(Method):
    """Limit the data to one pass, take dropout off, choose the size."""

    card = Card(
        name="one-epoch",
        title="One epoch is all you need",
        paper="Komatsuzaki 2019, arXiv 1906.06669",
        summary="Ends the run when the data would repeat, takes dropout off, and sizes the model to its tokens.",
        exact=False,
        approximates="nothing of the plain run within its first pass without dropout, whose losses stay the same; "
        "otherwise it is another run: without dropout, without repeats, of another size",
        buys="a lower loss for the same compute where data is plentiful, and a learning curve that can be extrapolated",
        costs="unique tokens: as many as the run is long",
        before=("length-warmup", "token-accumulation"),
        refuses={"label-smoothing": "with every token seen once, regularisation only slows training"},
        deviations="The ratio of tokens to parameters is not fixed at the paper's 5 but given, or fitted with "
        "fit_tokens_per_param; the cost of a token includes the output head. Size and iterations are adjusted at "
        "constant compute by P = P0 sqrt(m0 / m), the form that follows from cost = 6 P T; the paper's own was not "
        "available. Weight decay is left as it is: in one pass it acts on the optimisation.",
    )
    Options = OneEpochOptions

    def __init__(self, options: Any, recipe: Recipe) -> None:
        super().__init__(options, recipe)
        self._config: Configuration | None = None
        self._stream: Stream | None = None

    def check(self, recipe: Recipe) -> None:
        """The data may not be asked to repeat; resizing needs fresh weights and a run of known length.

        Raises:
            MethodError: one of these.
        """
        data, options = recipe.data, self.options
        passes, then = getattr(data, "max_passes", None), getattr(data, "on_exhausted", "repeat")
        if (passes or 1) > 1 or then == "warn":
            raise MethodError(
                self.where,
                f"allows one pass, but data.max_passes is {passes} and data.on_exhausted {then}",
                hint="leave both out, or switch one-epoch off",
            )
        if options.ratio is None and options.budget is None:
            return
        option = f"{self.where}.{'ratio' if options.ratio is not None else 'budget'}"
        if recipe.train.from_ is not None:
            hint = "leave it out, or start from new weights"
            raise MethodError(option, "would resize the model that train.from loads", hint=hint)
        if "token-accumulation" in recipe.methods:
            why = "cannot tell how many tokens the run has, since token-accumulation makes its steps larger"
            raise MethodError(option, why, hint="raise train.batch instead")
        if options.budget is None and _planned_tokens(recipe) is None:
            raise MethodError(
                f"{self.where}.ratio",
                "needs to know how many tokens the run has",
                hint="give train.steps or train.tokens, or budget with its time and flops_per_second",
            )

    def model_config(self, config: Configuration) -> Configuration:
        """The configuration without dropout, and of the planned size.

        Raises:
            MethodError: the budget asks for another number of steps than the recipe's.
        """
        if self.options.ratio is not None or self.options.budget is not None:
            config = self._resized(config)
        if getattr(config, "dropout", 0.0) > 0:
            self.changed("dropout taken off", 1, f"was {config.dropout:g}")  # type: ignore[attr-defined]
            config = config.model_copy(update={"dropout": 0.0})
        self._config = config
        return config

    def _resized(self, config: Configuration) -> Configuration:
        before, ratio = measure(config), self.options.ratio or LATER_RATIO
        if self.options.budget is None:
            tokens = _planned_tokens(self.recipe) or 0  # known: see `check`
            size = nearest_size(config, lambda s: tokens / s.parameters / ratio)
        else:
            size, tokens = self._plan(config, ratio)
        reached = tokens / size.parameters
        if not 0.5 < reached / ratio < 2:
            raise MethodError(
                f"{self.where}.ratio",
                f"wants {human(tokens / ratio)} parameters for {human(tokens)} tokens, but the nearest size has "
                f"{_shape(size)}",
                hint="change the length of the run, or the ratio",
            )
        if (size.width, size.depth) == (before.width, before.depth):
            return config
        self.changed("model resized", 1, f"{_shape(before)} to {_shape(size)}: {reached:.3g} tokens per parameter")
        return size.config

    def _plan(self, config: Configuration, ratio: float) -> tuple[Size, int]:
        recipe, budget = self.recipe, self.options.budget
        sequence = recipe.data.sequence  # type: ignore[attr-defined]
        plan = one_epoch_plan(
            flops(budget.flops) if budget.flops is not None else seconds(budget.time),
            UNLIMITED,
            recipe.train.batch * sequence,
            config,
            ratio=ratio,
            sequence=sequence,
            flops_per_second=budget.flops_per_second,
        )
        tokens = _planned_tokens(recipe)
        if tokens is None or abs(tokens - plan.tokens) > 0.02 * plan.tokens:
            given = "no number of steps" if tokens is None else f"{human(tokens)} tokens"
            pays = f"pays for {_shape(plan.size)} and {plan.steps} steps, {human(plan.tokens)} tokens"
            raise MethodError(
                f"{self.where}.budget", f"{pays}; the run has {given}", hint=f"set train.steps={plan.steps}"
            )
        return plan.size, plan.tokens

    def model(self, model: nn.Module) -> nn.Module:
        """The model with every dropout that its configuration did not name taken off too."""
        found = 0
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
                module.p = 0.0
                found += 1
            for name in DROPOUT_NAMES:
                value = getattr(module, name, None)
                if isinstance(value, float) and value > 0:
                    setattr(module, name, 0.0)
                    found += 1
        self.changed("modules without dropout", found)
        return model

    def loss(self, loss: Loss) -> Loss:
        """The same loss; one with smoothed labels is refused.

        Raises:
            MethodError: the labels are smoothed.
        """
        if getattr(loss, "label_smoothing", 0.0) > 0:
            hint = "regularisation only slows one epoch"
            raise MethodError(self.where, "refuses a loss with smoothed labels", hint=hint)
        return loss

    def stream(self, stream: Iterator[StepBatch]) -> Iterator[StepBatch]:
        """The same batches in the same order, ending with the first pass.

        Raises:
            MethodError: the stream is not one whose sequences are counted.
        """
        if not isinstance(stream, Stream):
            kind = type(stream).__name__
            raise MethodError(self.where, f"cannot count the passes of a {kind}", hint="it needs packed text")
        if stream.on_exhausted != "stop":
            stream = Stream(
                stream.dataset, batch=stream.batch, micro_batch=stream.micro_batch, seed=stream.seed, rank=stream.rank,
                world=stream.world, max_passes=1, on_exhausted="stop",
            )  # fmt: skip
            self.changed("data limited to one pass", 1, f"{len(stream.dataset)} sequences, none of them twice")
        self._stream = stream
        self._say_if_too_long(stream)
        return stream

    def _say_if_too_long(self, stream: Stream) -> None:
        recipe = self.recipe
        sequence = recipe.data.sequence  # type: ignore[attr-defined]
        tokens, unique = _planned_tokens(recipe), len(stream.dataset) * sequence
        if tokens is None or tokens <= unique:
            return
        advice = ""
        if isinstance(self._config, LlamaConfig | GPT2Config) and not isinstance(self._config, MoEConfig):
            ratio = tokens / measure(self._config).parameters
            fed = nearest_size(self._config, lambda s: unique / s.parameters / ratio)
            if fed.parameters < measure(self._config).parameters:
                advice = f"; at the same tokens per parameter one epoch feeds {_shape(fed)}"
        steps, asked = len(stream.dataset) // stream.batch, tokens // (recipe.train.batch * sequence)
        fallback(
            f"ending after about {steps} of {asked} steps",
            f"the run asks for {tokens / unique:.2f} epochs of {human(unique)} unique tokens",
            f"the end of the learning-rate schedule{advice}",
        )

    @property
    def passes(self) -> float:
        """Share of the unique data that has been used, 0 to 1."""
        return self._stream.passes if self._stream is not None else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Sequences used so far: what a resumed run must not use again."""
        return {"consumed": self._stream.position if self._stream is not None else 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the data goes on where it was.

        Raises:
            CheckpointError: the data would start over, which would make two epochs of one.
        """
        position = self._stream.position if self._stream is not None else 0
        if position != state["consumed"]:
            raise CheckpointError(
                self.where,
                f"the data would go on at sequence {position}, though {state['consumed']} have been used",
                hint="the checkpoint's data position is lost; start a new run from its weights",
            )


def _planned_tokens(recipe: Recipe) -> int | None:
    """Input tokens of the whole run; None where only its time is given."""
    train, sequence = recipe.train, getattr(recipe.data, "sequence", 1)
    by_steps = None if train.steps is None else train.steps * train.batch * sequence
    known = [n for n in (by_steps, train.tokens) if n is not None]
    return min(known) if known else None


def _shape(size: Size) -> str:
    return f"{human(size.parameters)} parameters (width {size.width}, {size.depth} blocks)"
