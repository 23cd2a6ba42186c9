"""Costs for a plan: weights and kept activations of models that are built, profiles, messages, PTD-P's Table 1.

Needs nothing. Run: pytest tests/plan/test_cluster_costs.py
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from headway.core.errors import HeadwayError
from headway.models.build import build_model
from headway.models.config import GPT2Config, LlamaConfig, TransformersConfig
from headway.parallel.mesh import Layout
from headway.plan.cluster.choice import Choice
from headway.plan.cluster.costs import boundary, ring, stage_costs
from headway.plan.cluster.estimate import estimate
from headway.plan.cluster.formulas import boundary_elements, gpt_flops, tensor_elements
from headway.plan.cluster.hardware import Link, cluster, profiles
from headway.plan.cluster.shape import shape_of

CONFIGS = [
    GPT2Config(hidden=64, layers=3, heads=4, vocab=96, context=32),
    GPT2Config(hidden=64, layers=2, heads=4, vocab=96, context=32, tied=False, intermediate=100),
    LlamaConfig(hidden=64, layers=2, heads=4, kv_heads=2, vocab=96, context=32),
    LlamaConfig(hidden=64, layers=2, heads=4, vocab=96, context=32, tied=False, qkv_bias=True, qk_norm=True),
]
GPT3 = GPT2Config(hidden=12288, layers=96, heads=96, vocab=51200, context=2048)


@pytest.mark.parametrize("config", CONFIGS)
def test_weights_are_those_of_the_built_model(config):
    shape = shape_of(config, 32)
    model = build_model(config, seed=0)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.block_parameters == sum(p.numel() for p in model.blocks[0].parameters())
    assert shape.step_flops(1) == pytest.approx(model.flops_per_token(32) * 32)


@pytest.mark.parametrize("config", CONFIGS)
def test_kept_activations_are_what_autograd_saves_of_a_block(config):
    shape, model = shape_of(config, 32), build_model(config, seed=0)
    block = model.blocks[0]

    def fused(q, k, v, **_):  # on a CPU, short sequences keep their scores: GPUs do not
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    block.attention.attend = fused
    x, shared = model.embed(torch.zeros(2, 32, dtype=torch.long))
    x = x.detach().requires_grad_()
    passed_over = [*model.parameters(), *shared.get("rope", ())]
    seen = {tensor.untyped_storage().data_ptr() for tensor in passed_over}
    kept = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen and tensor.shape[-1] > 1:  # statistics are one number per row
            seen.add(storage.data_ptr())
            kept.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x, **shared)
    counted = sum(storage.nbytes() for storage in kept) / 4
    assert shape.kept_elements(64) == pytest.approx(counted, rel=0.04)


def test_operations_are_the_papers():
    assert shape_of(GPT3, 2048).step_flops(7, recompute=True) == gpt_flops(7, 2048, 96, 12288, 51200)


def test_a_family_without_formulas_is_refused():
    with pytest.raises(HeadwayError, match="llama or gpt2"):
        shape_of(TransformersConfig(path="x"), 32)


def test_profiles_by_name_and_file(tmp_path):
    found = cluster("h100x64")
    assert (found.devices, found.node, found.device.memory) == (64, 8, 80 * 10**9)
    assert cluster("a100x2").node == 2
    assert cluster("h100").devices == 1
    for name in profiles():
        assert cluster(name).peak("bf16") > 1e12
    with pytest.raises(HeadwayError, match="Did you mean 'h100'"):
        cluster("h10x8")
    file = tmp_path / "mine.yaml"
    file.write_text(
        "device: {peak: {fp32: 1e12}, memory: 8GB, memory_bandwidth: 1e11}\nnode: 2\ndevices: 6\n"
        "inside: {kind: pcie, bandwidth: 1e10}\nbetween: {kind: tcp, bandwidth: 1e8}\n"
    )
    assert (cluster(str(file)).devices, cluster(f"{file}x12").devices) == (6, 12)
    assert cluster(str(file)).peak("bf16") == 1e12
    file.write_text(file.read_text() + "nodes: 3\n")
    with pytest.raises(HeadwayError, match="nodes"):
        cluster(str(file))
    with pytest.raises(HeadwayError, match="no file"):
        cluster("nowhere.yaml")


def test_this_machine_is_measured():
    found = cluster("herex2")
    assert found.devices == 2
    assert found.peak("fp32") > 1e8
    assert found.link(2).kind == "memory"


def test_groups_talk_over_what_joins_them():
    found = cluster("a100x64")
    assert [found.link(span).kind for span in (1, 2, 8, 16, 3)] == ["nvlink"] * 3 + ["infiniband"] * 2


def test_a_ring():
    link = Link(kind="x", bandwidth=10.0, latency=1.0)
    assert ring(100, 1, link).bytes == 0
    found = ring(100, 4, link)
    assert found.bytes == 150
    assert found.seconds == 15 + 6


@pytest.mark.parametrize("recompute, times", [(False, 1), (True, 1.5)])
def test_messages_are_the_formulas(recompute, times):
    shape, on = shape_of(GPT3, 2048), cluster("a100x96")
    choice = Choice(Layout(tensor=8, pipeline=12), 1, recompute=recompute, divided_stream=False)
    costs = stage_costs(shape, choice, on)
    counted = sum(cost.tensor.bytes for cost in costs) / 2
    assert counted == pytest.approx(times * tensor_elements(1, 2048, 12288, 8, 96))
    for gather, parts in ((True, 8), (False, 1)):
        sent, link = boundary(shape, replace(choice, gather=gather), on)
        assert sent.bytes / 2 == boundary_elements(1, 2048, 12288, parts)
        assert link.kind == "infiniband"


def test_a_costly_head_takes_blocks_off_the_last_stage():
    shape = shape_of(LlamaConfig(hidden=256, layers=16, heads=4, vocab=32000), 512)
    costs = stage_costs(shape, Choice(Layout(pipeline=4)), cluster("a100x4"))
    blocks = [cost.blocks for cost in costs]
    assert sum(blocks) == 16
    assert blocks[-1] < blocks[0]
    assert sum(cost.parameters for cost in costs) == shape.parameters + 32000 * 256  # the tied matrix twice


def test_weights_divided_among_data_ranks_add_up():
    shape, on = shape_of(GPT3, 2048), cluster("a100x64")
    whole = estimate(shape, Choice(Layout(replicate=64), recompute=True), on, 64).memory[0]
    parts = estimate(shape, Choice(Layout(shard=64), recompute=True), on, 64).memory[0]
    assert whole.weights == pytest.approx(4 * shape.parameters)
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name) / 64)
    assert parts.activations == whole.activations


def test_recomputation_trades_memory_for_a_third_more_work():
    shape, on = shape_of(GPT3, 2048), cluster("a100x96")
    kept, again = (
        estimate(shape, Choice(Layout(tensor=8, pipeline=12), 1, recompute=r), on, 96) for r in (False, True)
    )
    assert again.memory[0].activations < kept.memory[0].activations / 10
    assert 1.2 < again.seconds / kept.seconds < 1.4
    assert again.hardware_rate / again.mfu > kept.hardware_rate / kept.mfu
