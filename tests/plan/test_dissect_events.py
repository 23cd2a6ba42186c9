"""Attribution of events made by hand: kernels on a device, autograd's own thread, phases told by their neighbours.

Needs no device: pytest tests/plan/test_dissect_events.py
"""

import pytest

from headway.plan.dissect.attribution import build_tree
from headway.plan.dissect.counting import Costs
from headway.plan.dissect.events import Event, nest
from headway.plan.dissect.scopes import MODULE, PHASE, STEP


@pytest.fixture
def costs():
    found = Costs()
    found.add(("aten::mm", ((4, 4), (4, 4))), 128.0, "float32", 192.0)
    found.add(("aten::relu", ((4, 4),)), 0.0, "float32", 128.0)
    found.add(("aten::_foreach_norm", ()), 0.0, "float32", 1000.0)
    return found


def scope(name, start, end, **rest):
    return Event(name, start, end, annotation=True, **rest)


def mm(start, end, **rest):
    return Event("aten::mm", start, end, shapes=((4, 4), (4, 4)), **rest)


def milliseconds(node):
    return {name: child.milliseconds for name, child in node.children.items()}


def test_nesting_is_by_time_and_thread():
    events = [mm(10, 20), scope(STEP, 0, 100), Event("x", 10, 15), Event("y", 15, 20), Event("z", 5, 30, thread=2)]
    threads = nest(events)
    assert [e.name for e in threads[1]] == [STEP] and [e.name for e in threads[2]] == ["z"]
    assert [e.name for e in threads[1][0].children[0].children] == ["x", "y"]


def test_every_moment_is_placed_once(costs):
    events = [
        scope(STEP, 0, 1000),
        scope(PHASE + "data", 0, 100),
        scope(MODULE + "layer", 120, 400),
        mm(150, 350, sequence=7),
        Event("autograd::engine::evaluate_function: MmBackward0", 500, 800, sequence=7, forward_thread=1),
        Event("MmBackward0", 510, 790, sequence=7, forward_thread=1, backward=True),
        mm(520, 780),
        scope(PHASE + "gradients", 800, 900),
        Event("aten::_foreach_norm", 810, 890),
    ]
    root, seconds = build_tree(events, costs)
    assert seconds == [1e-3]
    # 100 to 120, 400 to 500 and 900 to 1000 lie between different phases.
    assert milliseconds(root) == pytest.approx(
        {"data": 0.1, "other": 0.22, "forward": 0.28, "backward": 0.3, "gradients": 0.1}
    )
    layer = root.children["backward"].children["layer"]
    assert layer.children["aten::mm"].milliseconds == pytest.approx(0.26)
    assert layer.children["python"].milliseconds == pytest.approx(0.04)
    assert layer.total_flops == 128.0
    assert root.children["gradients"].children["aten::_foreach_norm"].bytes == 1000.0


def test_an_operation_outside_of_modules_is_forward_if_it_was_differentiated(costs):
    events = [
        scope(STEP, 0, 100),
        Event("aten::relu", 0, 10, sequence=1, shapes=((4, 4),)),
        Event("aten::relu", 20, 30, sequence=2, shapes=((4, 4),)),
        Event("autograd::engine::evaluate_function: ReluBackward0", 50, 60, sequence=2, forward_thread=1),
    ]
    root, _ = build_tree(events, costs)
    # The first one made no node: it is of no phase. The time between 60 and the end has no neighbour.
    assert milliseconds(root) == pytest.approx({"other": 0.08, "forward": 0.01, "backward": 0.01})


def test_a_module_called_inside_backward_is_recompute_and_a_nested_node_is_backward(costs):
    node = "autograd::engine::evaluate_function: X"
    events = [
        scope(STEP, 0, 100),
        scope(MODULE + "a", 0, 10),
        mm(0, 10, sequence=1),
        Event(node, 10, 100, sequence=1, forward_thread=1),
        scope(MODULE + "a", 20, 50),
        mm(20, 40, sequence=2),
        Event(node, 60, 90, sequence=2, forward_thread=1),
    ]
    root, _ = build_tree(events, costs)
    assert milliseconds(root) == pytest.approx({"forward": 0.01, "backward": 0.06, "recompute": 0.03})
    assert root.children["backward"].children.keys() == {"a"}


def test_what_runs_with_gradients_enabled_inside_backward_is_recompute_without_any_module(costs):
    node = "autograd::engine::evaluate_function: X"
    events = [
        scope(STEP, 0, 100),
        scope(MODULE + "a", 0, 10),
        mm(0, 10, sequence=1),
        Event(node, 10, 100, sequence=1, forward_thread=1),
        mm(20, 50, sequence=2),  # a checkpointed function
        mm(60, 70, sequence=-1),  # the node's own product
    ]
    root, _ = build_tree(events, costs)
    assert milliseconds(root) == pytest.approx({"forward": 0.01, "backward": 0.06, "recompute": 0.03})
    assert root.children["backward"].children["a"].children["aten::mm"].milliseconds == pytest.approx(0.01)


def test_an_operation_made_of_others_made_their_nodes(costs):
    node = "autograd::engine::evaluate_function: X"
    events = [
        scope(STEP, 0, 100),
        scope(MODULE + "a", 0, 50),
        Event("aten::relu", 0, 40, sequence=5, shapes=((4, 4),)),
        Event("aten::inside", 10, 20, sequence=6),
        Event("aten::inside", 20, 30, sequence=7),
        Event(node, 60, 100, sequence=7, forward_thread=1),
    ]
    root, _ = build_tree(events, costs)
    assert root.children["backward"].children.keys() == {"a"}


def test_time_on_a_device_is_that_of_its_kernels_and_the_rest_is_idle(costs):
    node = "autograd::engine::evaluate_function: MmBackward0"
    events = [
        scope(STEP, 0, 1000),
        scope(MODULE + "layer", 0, 100),
        mm(10, 20, sequence=3, device=0.0),
        Event("cudaLaunchKernel", 12, 14, device=300.0),
        scope(MODULE + "fused", 40, 90),
        Event("triton_kernel_0", 50, 60, device=100.0),
        # Autograd runs on another thread for a device.
        Event(node, 200, 300, thread=2, sequence=3, forward_thread=1),
        mm(210, 220, thread=2, device=390.0),
        # A part of the graph that has no device runs on the caller's.
        Event(node, 400, 420, sequence=3, forward_thread=1),
        mm(405, 415, device=10.0),
        # A data loader's thread has no part in the step.
        Event("aten::mm", 0, 900, thread=3, shapes=((4, 4), (4, 4))),
    ]
    root, _ = build_tree(events, costs)
    assert root.milliseconds == pytest.approx(1.0)
    assert milliseconds(root) == pytest.approx({"forward": 0.4, "backward": 0.4, "other": 0.2})
    assert root.children["other"].children["idle"].milliseconds == pytest.approx(0.2)
    assert root.children["backward"].children["layer"].children["aten::mm"].milliseconds == pytest.approx(0.4)
    assert root.children["forward"].children["fused"].children["triton_kernel_0"].kind == "fused"


def test_events_without_a_marked_step_are_refused(costs):
    with pytest.raises(ValueError, match="marked"):
        build_tree([mm(0, 1)], costs)
