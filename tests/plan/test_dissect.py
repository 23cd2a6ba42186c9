"""The dissected step: times against clocks around the phases, FLOPs against closed forms, recompute, hooks taken off.

Needs torch alone: pytest tests/plan/test_dissect.py
"""

import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from dissect_models import Decoder, Square
from torch import nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from headway.core.errors import HeadwayError
from headway.layers.attention import attention
from headway.plan.dissect.dissect import dissect
from headway.plan.dissect.scopes import marked, phase

BATCH, SEQUENCE, VOCAB = 2, 32, 128


class Step:
    """A training step with its own clocks; ``times`` has one record per call."""

    def __init__(self, model, micro=1, batch=BATCH, sequence=SEQUENCE):
        self.model, self.micro, self.size = model, micro, (batch, sequence)
        self.optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        self.times = []

    def __call__(self):
        spent = {"forward": 0.0, "backward": 0.0}
        for _ in range(self.micro):
            with phase("data"):
                tokens, targets = torch.randint(0, VOCAB, (2, *self.size))
            start = time.perf_counter()
            loss = F.cross_entropy(self.model(tokens).flatten(0, 1), targets.flatten())
            middle = time.perf_counter()
            loss.backward()
            spent["forward"] += middle - start
            spent["backward"] += time.perf_counter() - middle
        with phase("gradients"):
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.times.append(spent)


def take_apart(step, steps=2, **options):
    return dissect(step, step.model, optimizer=step.optimizer, steps=steps, warmup=1, plain=1, peaks={}, **options)


def flops(tree, phase, *path):
    node = tree.phases[phase]
    for name in path:
        node = node.children[name]
    return node.total_flops


def check_times(tree, clocked, recompute):
    phases = {name: node.milliseconds for name, node in tree.phases.items()}
    assert phases["forward"] == pytest.approx(clocked["forward"], rel=0.02)
    assert phases["backward"] + phases.get("recompute", 0.0) == pytest.approx(clocked["backward"], rel=0.02)
    assert ("recompute" in phases) == (recompute is not None)
    assert {"data", "gradients", "optimizer"} <= phases.keys()
    # At least 98 % of the step has a phase, and the leaves are all of their phase. Operations are most of it; how much
    # depends on the load of the machine, the rest being Python and the freeing of tensors (the evidence has a number).
    assert tree.coverage() >= 0.98
    assert sum(phases.values()) == pytest.approx(tree.milliseconds, rel=1e-9)
    for node in tree.phases.values():
        assert sum(leaf.milliseconds for leaf in node.leaves()) == pytest.approx(node.milliseconds, rel=1e-9)
    assert min(tree.coverage(n) for n in ("forward", "backward", "recompute") if n in phases) >= 0.5


@pytest.mark.parametrize("recompute", [None, "plain", "reentrant"])
def test_phases_are_what_clocks_around_them_show(recompute):
    torch.manual_seed(0)
    model = Decoder(dim=256, layers=2, heads=4)
    model.recompute = recompute
    step = Step(model, batch=4, sequence=128)
    for attempt in range(6):
        tree = take_apart(step)
        clocked = {key: sum(t[key] for t in step.times[-2:]) / 2 * 1e3 for key in ("forward", "backward")}
        try:
            return check_times(tree, clocked, recompute)
        except AssertionError:  # a busy machine took the core away, in the middle of Python
            if attempt == 5:
                raise


def test_flops_are_the_closed_form():
    model = Decoder()
    tree = take_apart(Step(model))
    expected = model.product_flops(BATCH, SEQUENCE)
    assert tree.root.total_flops == pytest.approx(expected, rel=0.01)
    assert tree.counted_flops == tree.root.flops
    assert flops(tree, "forward") == pytest.approx(expected / 3, rel=0.01)
    assert flops(tree, "backward") == pytest.approx(expected * 2 / 3, rel=0.01)


@pytest.mark.parametrize("kind", ["plain", "reentrant"])
def test_full_recompute_runs_the_forward_pass_a_second_time(kind):
    model = Decoder()
    plain = take_apart(Step(model))
    model.recompute, model.recompute_head = kind, True
    with set_checkpoint_early_stop(False):
        tree = take_apart(Step(model))
    assert tree.root.total_flops == pytest.approx(4 / 3 * model.product_flops(BATCH, SEQUENCE), rel=0.01)
    assert flops(tree, "forward") == pytest.approx(flops(plain, "forward"))
    assert flops(tree, "backward") == pytest.approx(flops(plain, "backward"))
    assert flops(tree, "recompute") == pytest.approx(flops(plain, "forward"))
    for path in (("blocks.*", "attention", "qkv"), ("blocks.*", "mlp", "down"), ("head",)):
        assert flops(tree, "recompute", *path) == pytest.approx(flops(tree, "forward", *path))


def test_a_recomputation_that_stops_early_leaves_out_the_last_product():
    model = Decoder()
    model.recompute = "plain"
    tree = take_apart(Step(model))
    assert flops(tree, "recompute", "blocks.*", "mlp", "down") == 0
    assert flops(tree, "recompute", "blocks.*", "mlp", "up") == flops(tree, "forward", "blocks.*", "mlp", "up")
    assert tree.root.flops == tree.counted_flops
    assert "head" not in tree.phases["recompute"].children


def test_backward_belongs_to_the_module_that_ran_forward():
    model = Decoder()
    model.head.weight.requires_grad_(False)
    tree = take_apart(Step(model, micro=2))
    for path in (("blocks.*", "attention", "out"), ("blocks.*", "mlp", "gate"), ("blocks.*", "attention")):
        assert flops(tree, "backward", *path) == pytest.approx(2 * flops(tree, "forward", *path))
    assert flops(tree, "backward", "head") == flops(tree, "forward", "head"), "a frozen weight has no gradient"
    layers, micro = len(model.blocks), 2
    forward, backward = tree.phases["forward"].children, tree.phases["backward"].children
    assert forward["blocks.*"].calls == backward["blocks.*"].calls == layers * micro
    assert forward["blocks.*"].children["mlp"].children["down"].children["aten::mm"].calls == layers * micro
    assert backward["embedding"].calls == micro
    assert all(name in {"embedding", "blocks.*", "norm", "head"} for name, n in backward.items() if n.kind == "module")


def test_blocks_can_be_kept_apart():
    model = Decoder()
    tree = take_apart(Step(model), collapse=False)
    names = [name for name in tree.phases["backward"].children if name.startswith("blocks")]
    assert sorted(names) == ["blocks.0", "blocks.1", "blocks.2"]
    assert len({flops(tree, "backward", name) for name in names}) == 1


class Custom(nn.Module):
    """A custom Function inside a module, and one in the loss, outside of all modules."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 64, bias=False)
        self.weight = nn.Parameter(torch.randn(64, 64))

    def forward(self, x):
        return Square.apply(self.inner(x), self.weight)


def test_custom_functions_are_branches_of_their_own():
    model = nn.Sequential(Custom(), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    weight = torch.randn(64, 32)

    def step():
        Square.apply(model(torch.randn(16, 64)), weight).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    tree = dissect(step, model, optimizer=optimizer, steps=2, peaks={})
    product = 2 * 16 * 64 * 64
    inside = flops(tree, "forward", "0", "Square"), flops(tree, "backward", "0", "Square")
    assert inside == (product, 2 * product)
    assert flops(tree, "forward", "Square") == product / 2, "the loss's own Function belongs to no module"
    # Its weight needs no gradient, but a custom backward computes it all the same.
    assert flops(tree, "backward", "Square") == product
    assert flops(tree, "backward", "0", "inner") == product, "the input needs no gradient"
    assert tree.phases["forward"].children["0"].children["Square"].kind == "function"


class Fast(nn.Module):
    """Attention by the layers' own operator, which is written in Python."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4)
        return attention(q, k, v)


@pytest.mark.parametrize("compiled", [False, True])
def test_custom_operators_are_looked_into(compiled):
    torch._dynamo.reset()
    model = nn.ModuleDict({"fast": Fast()})
    if compiled:
        model.fast.compile(backend="aot_eager")

    def step():
        model.fast(torch.randn(2, 64, 32)).square().sum().backward()

    tree = dissect(step, model, steps=2, peaks={})
    products = 2 * (2 * 64 * 64 * 16) * 2 * 2  # scores and values; batch and heads
    operator = tree.phases["forward"].children["fast"].children["headway::blocked_attention"]
    assert operator.kind == "operator" and operator.calls == 1
    assert operator.total_flops == products
    assert any(leaf.name == "aten::bmm" for leaf in operator.leaves())
    backward = [n for _, n in tree.phases["backward"].walk() if n.kind == "operator"]
    assert len(backward) == 1 and backward[0].total_flops >= 2 * products
    assert tree.root.flops == tree.counted_flops


@torch.library.custom_op("headway_test::twice", mutates_args=())
def twice(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight) @ weight


def test_composite_operations_inside_an_operator_are_counted():
    x, weight = torch.randn(2, 16, 8), torch.randn(8, 8)
    tree = dissect(lambda: twice(x, weight), nn.Identity(), steps=1, peaks={})
    assert tree.root.total_flops == 2 * (2 * 32 * 8 * 8)
    assert tree.root.flops == tree.counted_flops
    names = {leaf.name for leaf in tree.root.leaves()}
    assert "aten::mm" in names and not names & {"aten::linear", "aten::matmul"}


def test_compiled_modules_stay_compiled_and_whole():
    torch._dynamo.reset()
    model = Decoder(layers=2)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    before = [block._compiled_call_impl for block in model.blocks]
    step = Step(model)
    step()
    torch._dynamo.utils.counters.clear()
    tree = take_apart(step)
    assert not torch._dynamo.utils.counters["stats"], "dissecting made nothing compile again"
    assert [block._compiled_call_impl for block in model.blocks] == before
    block = tree.phases["forward"].children["blocks.*"]
    assert block.kind == "compiled"
    assert not any(child.kind == "module" for child in block.children.values())
    assert tree.root.total_flops == pytest.approx(model.product_flops(BATCH, SEQUENCE), rel=0.01)
    assert flops(tree, "backward", "blocks.*") == pytest.approx(2 * flops(tree, "forward", "blocks.*"))


def test_nothing_stays_behind_even_after_an_error():
    model = Decoder()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    calls = 0

    def step():
        nonlocal calls
        calls += 1
        model(torch.randint(0, VOCAB, (1, 8)))
        if calls == 4:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        dissect(step, model, optimizer=optimizer, warmup=1, plain=1, peaks={})
    for name, module in model.named_modules():
        assert module.__dict__ == before[name]
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    with torch.profiler.profile() as profile:
        model(torch.randint(0, VOCAB, (1, 8)))
    assert not any(event.name.startswith("headway/") for event in profile.events())


def test_marks_do_not_change_the_result():
    torch.manual_seed(0)
    model = Decoder()
    tokens = torch.randint(0, VOCAB, (2, 16))
    expected = model(tokens)
    with marked(model):
        assert torch.equal(model(tokens), expected)


def test_collectives_are_communication(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Decoder(layers=1)
        plain = Step(model)

        def step():
            plain()
            for parameter in model.parameters():
                dist.all_reduce(parameter.data)

        tree = dissect(step, model, optimizer=plain.optimizer, steps=2, peaks={})
    finally:
        dist.destroy_process_group()
    count = len(list(model.parameters()))
    assert sum(leaf.calls for leaf in tree.phases["communication"].leaves() if leaf.kind == "op") == count


def test_a_step_without_gradients_is_forward():
    model = Decoder()

    def step():
        with torch.no_grad():
            model(torch.randint(0, VOCAB, (1, 16)))

    tree = dissect(step, model, peaks={})
    assert "backward" not in tree.phases and "recompute" not in tree.phases
    assert tree.root.total_flops == pytest.approx(model.product_flops(1, 16) / 3, rel=0.01)


def test_rates_and_utilization():
    model = Decoder()
    step = Step(model)
    tree = dissect(step, model, optimizer=step.optimizer, peaks={"float32": 1e9})
    rate = tree.root.total_flops / (tree.milliseconds / 1e3)
    assert tree.root.flops_rate == pytest.approx(rate)
    assert tree.utilization(tree.root) == pytest.approx(rate / 1e9)
    assert tree.precision == {"float32": 1.0}
    tree.peaks = {}
    assert tree.utilization(tree.root) is None, "an unknown peak gives no share of it"
    record = tree.to_dict()
    assert record["tree"]["flops_rate"] == pytest.approx(rate)
    assert [child["name"] for child in record["tree"]["children"]] == list(tree.phases)
    assert record["tree"]["children"][0]["share"] == tree.phases["data"].milliseconds / tree.milliseconds


def test_unknown_phases_and_optimizers_are_refused():
    with pytest.raises(HeadwayError, match="fwd"):
        phase("fwd")
    with pytest.raises(HeadwayError, match="torch optimizer"):
        dissect(lambda: None, Decoder(), optimizer="adam", warmup=0, plain=0, peaks={})
