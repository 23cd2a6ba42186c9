"""What training a GPT on many devices costs, as closed formulas: parameters, operations, bubble, messages, days.

Symbols: l layers, h hidden, s sequence length, V vocabulary, B sequences per step, b sequences per micro-batch, p
pipeline stages, t tensor ranks, d data ranks, v chunks per rank, m = B / (b d) micro-batches per pipeline.

Source: Narayanan et al., SC'21, arXiv 2104.04473 (PTD-P).
"""

from __future__ import annotations

import math


def gpt_parameters(layers: int, hidden: int, vocab: int, sequence: int) -> int:
    """Weights of a GPT-2 with a tied head, but for the final norm's 2 h: ``12 l h^2 (1 + 13/12h + (V + s)/12lh)``.

    Source: equation 2.
    """
    return 12 * layers * hidden**2 + 13 * layers * hidden + (vocab + sequence) * hidden


def gpt_flops(batch: int, sequence: int, layers: int, hidden: int, vocab: int, *, recompute: bool = True) -> float:
    """Floating-point operations of a step of ``batch`` sequences: ``96 B s l h^2 (1 + s/6h + V/16lh)``.

    Without recomputation 72 for 96 and 12 for 16: each block's forward pass runs once instead of twice, the head's in
    both cases once. The masked half of the scores counts.

    Source: equation 3 and its appendix.
    """
    block = 24 * batch * sequence * hidden**2 + 4 * batch * sequence**2 * hidden
    head = 2 * batch * sequence * hidden * vocab
    return float((4 if recompute else 3) * layers * block + 3 * head)


def bubble(pipeline: int, micro_batches: int, chunks: int = 1) -> float:
    """Idle time of a pipeline with a flush, as a share of its ideal time: ``(p - 1) / (v m)``.

    Source: sections 2.2.1 and 2.2.2.
    """
    return (pipeline - 1) / (chunks * micro_batches)


def boundary_elements(micro_batch: int, sequence: int, hidden: int, gather_over: int = 1) -> float:
    """Elements that one rank sends for a micro-batch over one boundary in one direction: ``b s h / t``.

    Args:
        gather_over: tensor ranks that send a part each and gather it behind the boundary; 1 sends everything from each.

    Source: sections 3.2 and 4.1.
    """
    return micro_batch * sequence * hidden / gather_over


def tensor_elements(micro_batch: int, sequence: int, hidden: int, tensor: int, layers: int) -> float:
    """Elements that one rank sends to its tensor group for a micro-batch, both passes: ``8 b s h (t - 1)/t`` per layer.

    Two all-reduces in either pass, each of ``2 (t - 1)/t`` times its size on a ring. Recomputing adds half as much.

    Source: section 3.2.
    """
    return 8 * micro_batch * sequence * hidden * (tensor - 1) / tensor * layers


def ring_elements(elements: float, ranks: int) -> float:
    """Elements that one rank of a ring sends for an all-reduce of ``elements``: ``2 (k - 1)/k``. Section 3.3.2."""
    return 2 * (ranks - 1) / ranks * elements


def step_time(micro_batches: float, pipeline: int, forward: float, backward: float, chunks: int = 1) -> float:
    """Seconds of a step: ``(m + (p - 1)/v) (t_f + t_b)`` for a rank's whole share of the layers.

    Args:
        forward: seconds of one micro-batch's forward pass through all chunks of a rank.
        backward: likewise, with what is recomputed.

    Source: equation 1, with section 2.2.2 for chunks.
    """
    return (micro_batches + (pipeline - 1) / chunks) * (forward + backward)


def best_checkpoints(layers: int, input_bytes: float, inner_bytes: float) -> float:
    """Checkpoints per stage that need the least memory, ``c* = sqrt(l A_mid / A_in)``, from 1 to l.

    Args:
        layers: of the stage.
        input_bytes: of a layer's input.
        inner_bytes: of what a layer keeps beside it.

    Source: section 3.5.
    """
    return min(float(layers), max(1.0, math.sqrt(layers * inner_bytes / input_bytes)))


def checkpointed_bytes(checkpoints: float, layers: int, input_bytes: float, inner_bytes: float) -> float:
    """Bytes of activations of a stage with ``c`` checkpoints: ``c A_in + l/c A_mid``. Section 3.5."""
    return checkpoints * input_bytes + layers / checkpoints * inner_bytes


def days_to_train(tokens: float, parameters: float, devices: int, rate: float) -> float:
    """Days for ``tokens`` with recomputation: ``8 T P / (n X)``.

    Args:
        rate: FLOP/s reached per device.

    Source: equation 4.
    """
    return 8 * tokens * parameters / (devices * rate) / 86_400
