"""Parameters in bf16, everything the optimizer keeps in fp32.

The model holds bf16 weights, so that no operation of a step has to cast them. The optimizer holds an fp32 master of
each, its moments and the gradient summed over micro-batches, and writes the rounded master back after each step.
Updates smaller than bf16's resolution are thereby not lost (Micikevicius et al. 2018, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headway.core.clip import local

Groups = list[dict[str, Any]]


def lower_precision(model: torch.nn.Module, dtype: torch.dtype) -> dict[Tensor, Tensor]:
    """Round the model's floating-point parameters to ``dtype`` in place; buffers stay as they are.

    Returns:
        Parameter -> its values before, for ``MasterOptimizer``; those that are not trained are left out.
    """
    before: dict[Tensor, Tensor] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            if parameter.requires_grad:
                before[parameter] = parameter.data
            rounded: Any = parameter.data.to(dtype)
            parameter.data = rounded
            if hasattr(parameter, "_local_tensor"):  # assigning a DTensor's data leaves the rank's own part as it was
                divided: Any = parameter
                divided._local_tensor, divided._spec = rounded._local_tensor, rounded._spec
    return before


class MasterOptimizer:
    """Any torch optimizer over fp32 masters of a model's parameters.

    Args:
        groups: parameter groups of the model. A parameter that is fp32 (or fp64) already is its own master.
        build: makes the inner optimizer from the same groups with the masters in place of the parameters.
        masters: parameter -> its exact fp32 values, where ``lower_precision`` has kept them; they become the masters.

    A gradient is added to its master's as soon as the backward pass has produced it, and the low-precision one is
    freed; micro-batches are therefore summed in fp32 and no full set of low-precision gradients ever exists.
    """

    def __init__(
        self,
        groups: Groups,
        build: Callable[[Groups], torch.optim.Optimizer],
        masters: dict[Tensor, Tensor] | None = None,
    ) -> None:
        self._given = masters or {}
        self._pairs: list[tuple[Tensor, Tensor]] = []  # (parameter, master), low-precision ones only
        self._hooks: list[Any] = []
        self.params: list[Tensor] = []
        master_groups = [{**group, "params": [self._master(p) for p in group["params"]]} for group in groups]
        self.inner = build(master_groups)
        self._given = {}

    def _master(self, parameter: Tensor) -> Tensor:
        if parameter.dtype in (torch.float32, torch.float64):
            self.params.append(parameter)
            return parameter
        master = self._given.get(parameter, parameter.detach()).float().requires_grad_()
        self.params.append(master)
        self._pairs.append((parameter, master))
        buffer: Tensor | None = None  # kept over the steps: fresh pages for every gradient are slow on a CPU

        def collect(parameter: Tensor) -> None:
            nonlocal buffer
            if parameter.grad is None:
                return
            if master.grad is not None:
                master.grad.add_(parameter.grad)
            else:
                buffer = torch.empty_like(master) if buffer is None else buffer
                master.grad = buffer.copy_(parameter.grad)
            parameter.grad = None

        self._hooks.append(parameter.register_post_accumulate_grad_hook(collect))
        return master

    @property
    def masters(self) -> dict[Tensor, Tensor]:
        """Parameter -> its master, for the parameters of low precision."""
        return dict(self._pairs)

    @property
    def param_groups(self) -> Groups:
        """The inner optimizer's groups, over the masters; a schedule writes ``lr`` here."""
        return self.inner.param_groups

    @property
    def state(self) -> Any:
        """The inner optimizer's state, keyed by master."""
        return self.inner.state

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's default options."""
        return self.inner.defaults

    @torch.no_grad()
    def step(self) -> None:
        """Update the masters and round them into the parameters."""
        self.inner.step()
        self._round()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of masters and parameters."""
        for parameter, _ in self._pairs:
            parameter.grad = None
        self.inner.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The masters by index and the inner optimizer's state."""
        masters = {str(i): master.detach() for i, (_, master) in enumerate(self._pairs)}
        return {"masters": masters, "inner": self.inner.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over masters and inner state, and round the masters into the parameters.

        Raises:
            ValueError: the state is that of other parameters.
        """
        masters = state["masters"]
        if len(masters) != len(self._pairs):
            raise ValueError(f"the state has {len(masters)} masters, the optimizer {len(self._pairs)}")
        for i, (_, master) in enumerate(self._pairs):
            if masters[str(i)].shape != master.shape:
                raise ValueError(f"master {i} is {list(masters[str(i)].shape)}, expected {list(master.shape)}")
        for i, (_, master) in enumerate(self._pairs):
            master.copy_(masters[str(i)])
        self.inner.load_state_dict(state["inner"])
        self._round()

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @torch.no_grad()
    def _round(self) -> None:
        if self._pairs:
            parameters, masters = ([local(t) for t in column] for column in zip(*self._pairs))
            torch._foreach_copy_(parameters, masters)
