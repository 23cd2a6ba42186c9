"""PTD-P's formulas: the paper's ten models, models that are built, counted operations, brute force.

Needs nothing. Run: pytest tests/plan/test_cluster_formulas.py
"""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from headway.layers.attention import attention_reference
from headway.models.build import build_model
from headway.models.config import GPT2Config
from headway.plan.cluster import formulas

TABLE_1 = [  # billions of parameters; heads, hidden, layers; aggregate PF/s, batch and devices, TF/s per device
    (1.7, 2304, 24, 4.4, 32, 137), (3.6, 3072, 30, 8.8, 64, 138), (7.5, 4096, 36, 18.2, 128, 142),
    (18.4, 6144, 40, 34.6, 256, 135), (39.1, 8192, 48, 70.8, 512, 138), (76.1, 10240, 60, 143.8, 1024, 140),
    (145.6, 12288, 80, 227.1, 1536, 148), (310.1, 16384, 96, 297.4, 1920, 155), (529.6, 20480, 105, 410.2, 2520, 163),
    (1008.0, 25600, 128, 502.0, 3072, 163),
]  # fmt: skip


@pytest.mark.parametrize("billions, hidden, layers, petaflops, devices, rate", TABLE_1)
def test_the_papers_models_have_its_parameters(billions, hidden, layers, petaflops, devices, rate):
    assert formulas.gpt_parameters(layers, hidden, 51_200, 2048) / 1e9 == pytest.approx(billions, abs=0.1)
    assert petaflops * 1e3 / devices == pytest.approx(rate, rel=0.005)


@pytest.mark.parametrize("layers, hidden, vocab, sequence", [(2, 64, 96, 32), (3, 48, 50, 17)])
def test_parameters_are_those_of_the_built_model_less_the_final_norm(layers, hidden, vocab, sequence):
    config = GPT2Config(hidden=hidden, layers=layers, heads=4, vocab=vocab, context=sequence)
    built = sum(p.numel() for p in build_model(config, seed=0).parameters())
    assert formulas.gpt_parameters(layers, hidden, vocab, sequence) == built - 2 * hidden


def test_operations_are_those_counted_in_the_built_model():
    layers, hidden, vocab, batch, sequence = 2, 64, 96, 2, 32
    model = build_model(GPT2Config(hidden=hidden, layers=layers, heads=4, vocab=vocab, context=sequence), seed=0)
    for block in model.blocks:
        block.attention.attend = attention_reference  # the counter does not know the CPU's fused kernel
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.forward(torch.zeros(batch, sequence, dtype=torch.long))
    head = 2 * batch * sequence * hidden * vocab
    blocks = counter.get_total_flops() - head
    for recompute, factor in ((True, 4), (False, 3)):
        claimed = formulas.gpt_flops(batch, sequence, layers, hidden, vocab, recompute=recompute)
        assert claimed == pytest.approx(factor * blocks + 3 * head, rel=0.01)


def test_the_published_form_of_the_operations():
    B, s, l, h, V = 3072, 2048, 128, 25_600, 51_200
    published = 96 * B * s * l * h**2 * (1 + s / (6 * h) + V / (16 * l * h))
    assert formulas.gpt_flops(B, s, l, h, V) == pytest.approx(published, rel=1e-12)
    published = 72 * B * s * l * h**2 * (1 + s / (6 * h) + V / (12 * l * h))
    assert formulas.gpt_flops(B, s, l, h, V, recompute=False) == pytest.approx(published, rel=1e-12)


def test_bubble_falls_with_chunks_and_micro_batches():
    assert formulas.bubble(4, 8) == 3 / 8
    assert formulas.bubble(4, 8, chunks=3) == 1 / 8
    assert formulas.bubble(1, 8) == 0


def test_messages():
    assert formulas.boundary_elements(2, 3, 5) == 30
    assert formulas.boundary_elements(2, 4, 5, gather_over=4) == 10
    assert formulas.tensor_elements(1, 2, 3, 1, 7) == 0
    # Four all-reduces per layer on a ring: what the general formula says of one of them.
    assert formulas.tensor_elements(1, 2, 3, 4, 7) == pytest.approx(4 * 7 * formulas.ring_elements(6, 4))


def test_checkpoints_that_need_the_least_memory():
    layers, kept, inner = 24, 1.0, 17.0
    best = formulas.best_checkpoints(layers, kept, inner)
    assert best == pytest.approx(math.sqrt(24 * 17))  # or 24, where that is less
    least = min(formulas.checkpointed_bytes(c, layers, kept, inner) for c in range(1, layers + 1))
    assert formulas.checkpointed_bytes(best, layers, kept, inner) <= least
    assert formulas.best_checkpoints(2, 1.0, 100.0) == 2
    assert formulas.best_checkpoints(8, 100.0, 1.0) == 1


def test_days_are_the_papers_examples():
    assert formulas.days_to_train(300e9, 175e9, 1024, 140e12) == pytest.approx(34, abs=0.6)
    assert formulas.days_to_train(450e9, 1008e9, 3072, 163e12) == pytest.approx(84, abs=0.6)
