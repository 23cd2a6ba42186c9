"""Replacing parts of a model: per instance, old -> new, and undone by putting the old ones back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from headway.core.errors import MethodError


class Shell(nn.Module):
    """A module around another that owns the other's children, so that no parameter changes its name.

    Subclasses say what calling it does; ``self.original`` is the module inside.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._inside = (original,)  # in a tuple: it is no submodule, its children are
        self._modules = original._modules
        self._parameters = original._parameters
        self._buffers = original._buffers

    @property
    def original(self) -> Any:
        """The module inside."""
        return self._inside[0]

    def train(self, mode: bool = True) -> Shell:
        """Switch the module inside as well: its own code asks it."""
        self.original.train(mode)
        self.training = mode
        return self


class Absent(nn.Module):
    """Stands where a part of the model would be that another rank holds: the parts beside it keep their names."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Never run.

        Raises:
            RuntimeError: somebody ran it.
        """
        raise RuntimeError("this part of the model is on another rank")


def replace_blocks(
    blocks: nn.ModuleList, make: Callable[[nn.Module], nn.Module], where: str
) -> dict[nn.Module, nn.Module]:
    """Put ``make(block)`` in the place of every block that is on this rank, in place.

    Returns:
        Old -> new.

    Raises:
        MethodError: another method has replaced the blocks already, or ``make`` refuses one; nothing is replaced then.
    """
    for block in blocks:
        if isinstance(block, Shell):
            raise MethodError(where, f"finds blocks that {type(block).__name__} has already replaced",
                              hint="only one method can own how a block is run")  # fmt: skip
    replaced = {block: make(block) for block in blocks if not isinstance(block, Absent)}
    for index, block in enumerate(list(blocks)):
        blocks[index] = replaced.get(block, block)
    return replaced


def restore_blocks(blocks: nn.ModuleList) -> None:
    """Put the original blocks back."""
    for index, block in enumerate(list(blocks)):
        if isinstance(block, Shell):
            blocks[index] = block.original
