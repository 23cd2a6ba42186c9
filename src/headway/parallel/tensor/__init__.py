"""Tensor parallelism: every matrix of a model divided among the ranks of a group."""

from headway.parallel.tensor.apply import tensor_parallel

__all__ = ["tensor_parallel"]
