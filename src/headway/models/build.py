"""From a configuration to a model with its first weights."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from headway.core.errors import ModelError
from headway.core.options import Options
from headway.models.config import GLAConfig, GPT2Config, LlamaConfig, MoEConfig, TransformersConfig


def build_model(config: Options, seed: int | None = None) -> Any:
    """A model on the CPU in fp32; new weights are a function of ``seed`` and the parameter's name alone.

    Args:
        config: of any family; ``vocab`` must be known.
        seed: of the initial weights; by default drawn from torch's global generator. Apart from that draw the global
            random state is neither used nor changed.

    Raises:
        ModelError: ``vocab`` is unknown, or the folder that the configuration names cannot be used.
    """
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    if isinstance(config, TransformersConfig):
        from headway.models.transformers_model import build_from_folder

        return build_from_folder(config, seed)
    model = empty_model(config)
    init_weights(model, model.config.initializer_range, seed)
    return model


def empty_model(config: Options, dtype: torch.dtype = torch.float32) -> Any:
    """A model of our own families on the CPU whose weights are not set."""
    from headway.models.gla import GLA
    from headway.models.gpt2 import GPT2
    from headway.models.llama import Llama
    from headway.models.moe import MoETransformer

    with _Unfilled():
        if isinstance(config, MoEConfig):
            model: nn.Module = MoETransformer(config)
        elif isinstance(config, LlamaConfig):
            model = Llama(config)
        elif isinstance(config, GPT2Config):
            model = GPT2(config)
        elif isinstance(config, GLAConfig):
            model = GLA(config)
        else:
            raise ModelError(
                "model.family", got=getattr(config, "family", type(config).__name__), expected="llama, moe, gpt2 or gla"
            )
    return model.to(dtype)


class _Unfilled(TorchFunctionMode):
    """Modules made under it keep the memory they get: torch's own first values cost time and global random numbers.

    The meta device would do the same, but the first random fill on it imports the compiler, which takes a second.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@torch.no_grad()
def init_weights(model: nn.Module, std: float, seed: int) -> None:
    """Give a model of our own families its first weights, in place.

    Matrices, stacks of them too, are normal with deviation ``std``, those that write into the residual stream with
    ``std / sqrt(2 L)`` for L blocks (Radford et al. 2019, section 2.3); norms are one, biases zero. Each parameter has
    a generator of its own, so that a method that adds or leaves out some does not change the others.
    """
    residual: tuple[str, ...] = getattr(model, "residual_projections", ())
    layers = getattr(model, "blocks", None)
    blocks = len(layers) if isinstance(layers, nn.ModuleList) else 1
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{key}"
            if parameter.ndim < 2:
                parameter.fill_(0.0 if key == "bias" else 1.0)
            else:
                scale = std / math.sqrt(2 * blocks) if name.endswith(residual) else std
                normal_(parameter, scale, seed, name)


def normal_(parameter: Tensor, std: float, seed: int, name: str) -> None:
    """Fill ``parameter`` in place with normal numbers that depend on ``seed``, ``name`` and its shape alone."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    # Drawn in fp32 on the CPU whatever the parameter is, so that one seed gives one model everywhere.
    values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator)
    parameter.copy_(values)
