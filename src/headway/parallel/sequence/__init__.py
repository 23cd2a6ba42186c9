"""Sequence parallelism: every sample divided along its sequence among the ranks of a group."""

from headway.parallel.sequence.apply import sequence_parallel, undo_sequence_parallel
from headway.parallel.sequence.batch import shard_batch

__all__ = ["sequence_parallel", "shard_batch", "undo_sequence_parallel"]
