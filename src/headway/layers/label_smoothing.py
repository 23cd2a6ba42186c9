"""Label smoothing: train towards a mixture of the target and the uniform distribution.

Source: Szegedy et al. (arXiv 1512.00567), section 7. The mathematics is ``label_smoothing`` of
``linear_cross_entropy``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pydantic import Field

from headway.core.errors import MethodError
from headway.core.method import Card, Method
from headway.core.options import Options


class LabelSmoothingOptions(Options):
    """Options of `label-smoothing`."""

    amount: float = Field(0.1, gt=0, lt=1)
    """Probability that is taken from the target and spread evenly over the vocabulary."""


class LabelSmoothing(Method):
    """Smooth the targets of the training loss; evaluation keeps the plain loss."""

    card = Card(
        name="label-smoothing",
        title="Label smoothing",
        paper="Szegedy et al. 2015, arXiv 1512.00567",
        summary="Spreads a share of each target's probability over the vocabulary.",
        exact=False,
        approximates="nothing: it trains another, smoothed objective, and the training loss shown is that objective's",
        buys="less confident predictions; helps when data is repeated or noisy",
        costs="a higher loss on the plain objective where data is plentiful",
        refuses={"one-epoch": "with every token seen once, regularisation only slows training"},
        parallel=("replicate", "shard", "sequence", "tensor", "pipeline", "experts"),
    )
    Options = LabelSmoothingOptions

    def loss(self, loss: Any) -> Any:
        """The same loss with smoothed targets.

        Raises:
            MethodError: the workload's loss has no targets to smooth.
        """
        if not (dataclasses.is_dataclass(loss) and hasattr(loss, "label_smoothing")):
            raise MethodError(
                self.where,
                f"cannot smooth the loss of workload {self.recipe.workload!r}",
                hint="it works on losses with a label_smoothing field, such as next-token cross-entropy",
            )
        self.changed("loss smoothed", 1, f"{self.options.amount:g} of the probability spread over the vocabulary")
        return dataclasses.replace(loss, label_smoothing=self.options.amount)  # type: ignore[type-var]
