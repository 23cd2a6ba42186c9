"""The memory planner: extrapolation from shallow copies, the choice among candidates, the run that follows it.

Needs: nothing. Run: pytest tests/plan/test_memory.py
"""

import json
import signal
import threading
import time
from dataclasses import replace

import psutil
import pytest
import torch

from headway.core.errors import HeadwayError, is_out_of_memory
from headway.core.meters import live_bytes
from headway.core.recipe import Recipe
from headway.core.run import Run
from headway.core.train import train
from headway.plan.memory.candidates import candidate, micro_batches, refused
from headway.plan.memory.planner import MemoryPlan, Option, _Planner, plan_memory, read_plan
from headway.plan.memory.probe import Footprint, extrapolate, footprint, measure
from headway.plan.memory.worker import Prober


@pytest.fixture
def deep(tiny):
    """A model of which activations are nearly all: eight blocks, long sequences, few weights."""

    def make(**sections):
        return Recipe.load(
            tiny(
                model={"layers": 8, "context": 256},
                data={"sequence": 256},
                train={"steps": 3, "batch": 8, **sections.pop("train", {})},
                log={"every": 1, "tensorboard": False},
                **sections,
            )
        )

    return make


def test_the_line_through_two_depths():
    low, high = Footprint(10, 1, 20, 12, 1.0, 0.1), Footprint(14, 3, 30, 16, 2.0, 0.2)
    assert extrapolate(low, high, (2, 4), 10) == Footprint(26, 9, 60, 28, 5.0, 0.5)


def test_noise_never_makes_a_deeper_model_cheaper():
    low, high = Footprint(10, 1, 20, 12, 2.0, 0.1), Footprint(14, 3, 30, 16, 1.5, 0.2)
    assert extrapolate(low, high, (2, 4), 10).pass_seconds == 1.5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("methods", [{}, {"recompute": {}}, {"recompute": {"every": 2}}, {"streambp": {}}], ids=str)
def test_two_shallow_copies_tell_the_peak_of_the_whole(deep, methods, precision):
    recipe = deep(train={"micro_batch": 4, "precision": precision}, methods=methods)
    predicted, whole = footprint(recipe, (2, 4), measure), measure(recipe)
    for name in ("idle", "gradients", "backward", "update"):
        assert getattr(predicted, name) == pytest.approx(getattr(whole, name), rel=0.02), name


def test_a_run_with_a_budget_takes_the_cheapest_way_and_keeps_its_word(deep, tmp_path):
    others = live_bytes(torch.device("cpu"))  # what tests before this one have left alive in this process
    plain = train(deep(), run=tmp_path / "plain")
    budget = (plain.summary["peak_memory_bytes"] - others) // 2
    notes = []

    class Listener:
        def on_note(self, text):
            notes.append(text)

        def __getattr__(self, name):
            return lambda *_: None

    # Without a disk: how much of what leaves is still here at the peak is a matter of time.
    recipe = deep(memory={"budget": budget, "disk": "/dev/shm"})
    run = train(recipe, run=tmp_path / "run", observers=[Listener()])
    memory = run.summary["memory"]
    assert memory["budget"] == budget
    assert memory["predicted_bytes"] <= budget
    peak = run.summary["peak_memory_bytes"] - others
    assert peak == pytest.approx(memory["predicted_bytes"], rel=0.02)
    assert peak <= budget
    assert any("the fastest that fits" in note for note in notes)
    assert run.recipe.memory.budget == budget  # the recipe stays the user's
    for ours, theirs in zip(run.metrics(), plain.metrics(), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)

    # Going on keeps the plan: nothing is tried again, and the state fits.
    kept = json.loads((run.path / "memory.json").read_text())
    notes.clear()
    (run.path / "summary.json").unlink()
    train(recipe, run=run.path, observers=[Listener()])
    assert not any("trying" in note for note in notes)
    assert json.loads((run.path / "memory.json").read_text()) == kept


def test_a_budget_that_suffices_changes_nothing(deep):
    plan = plan_memory(deep(memory={"budget": "4GiB"}))
    assert (plan.chosen.methods, plan.chosen.micro_batch, len(plan.options)) == ({}, 8, 1)
    assert "fits as it is" in plan.explain()


def test_nothing_fits():
    from tests.conftest import tiny_recipe

    recipe = Recipe.load(tiny_recipe(memory={"budget": "1kB"}))
    with pytest.raises(HeadwayError, match=r"memory\.budget.*do not suffice.*takes least"):
        plan_memory(recipe)


def test_the_thriftiest_is_checked_before_giving_up(deep):
    options = [Option(f"way {i}", {}, 1, "", 90 - i, float(i)) for i in range(8)]  # the fastest first

    def planned(peak_of):
        planner = _Planner(deep(), 100, measure, lambda _: None)
        planner.probe = lambda *_: None
        planner.ranked = lambda _: list(options)
        planner.verify = lambda option: replace(option, peak_bytes=peak_of(option))
        return planner.plan()

    assert planned(lambda option: 200 if option.seconds < 7 else 80).chosen.name == "way 7"
    with pytest.raises(HeadwayError, match=r"do not suffice.*; way 7 takes least, 193B"):
        planned(lambda option: 200 - int(option.seconds))


def test_a_model_whose_depth_is_no_option_is_refused(deep):
    recipe = deep()
    unknown = recipe.model_copy(update={"model": type(recipe.data)(source="python-stdlib")})
    with pytest.raises(HeadwayError, match=r"model\.layers"):
        footprint(unknown, (2, 4), measure)


def test_a_probe_that_is_killed_is_one_that_does_not_fit(deep, tmp_path, monkeypatch):
    (tmp_path / "deadly.py").write_text(
        "import os, signal\n"
        "from headway.core.options import Options\n"
        "from headway.layers.label_smoothing import LabelSmoothing\n"
        "class Deadly(LabelSmoothing):\n"
        "    def model(self, model): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    with Prober() as prober:
        with pytest.raises(MemoryError, match="signal 9"):
            prober.measure(deep(methods={"deadly:Deadly": {}}))
        assert prober.measure(deep()).peak > 0  # the next one is none the worse for it
        with pytest.raises(HeadwayError, match=r"nowhere"):
            prober.measure(deep(train={"from": "nowhere"}))


def test_probes_leave_no_files_behind(deep, tmp_path):
    methods = {"fuyou": {"params": "memory", "activations": "none", "path": str(tmp_path)}}
    with Prober() as prober:
        assert prober.measure(deep(methods=methods, memory={"disk": str(tmp_path)})).peak > 0
    assert not list(tmp_path.iterdir())


def test_an_interrupted_probe_does_not_live_on(deep, tmp_path, monkeypatch, request):
    (tmp_path / "sleepy.py").write_text(
        "import os, pathlib, time\n"
        "from headway.layers.label_smoothing import LabelSmoothing\n"
        "class Sleepy(LabelSmoothing):\n"
        "    def model(self, model):\n"
        "        pathlib.Path(__file__).with_name('pid').write_text(str(os.getpid()))\n"
        "        time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    pid = tmp_path / "pid"

    def interrupt():
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # the processes of xdist ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(KeyboardInterrupt), Prober() as prober:
        thread.start()
        prober.measure(deep(methods={"sleepy:Sleepy": {}}))
    probe = int(pid.read_text())
    for _ in range(500):  # the kernel takes its time to end a process that it has killed
        if not psutil.pid_exists(probe) or psutil.Process(probe).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.01)
    pytest.fail("the probe is still there")


def test_a_kept_plan_is_read_back_and_a_damaged_one_refused(deep, tmp_path):
    option = Option("recompute, micro-batch 4", {"recompute": {}}, 4, "", 100, 1.0, "the fastest that fits")
    plan = MemoryPlan(1000, option, [option])
    assert read_plan(json.loads(json.dumps(plan.to_dict()))) == plan
    run = train(deep(memory={"budget": "4GiB"}), run=tmp_path / "run")
    (run.path / "memory.json").write_text('{"budget": 3}')
    (run.path / "summary.json").unlink()
    with pytest.raises(HeadwayError, match=r"memory\.json.*is no memory plan"):
        train(Run(run.path).recipe, run=run.path)


def test_what_a_recipe_sets_itself_is_not_set_again(deep):
    recipe = deep(methods={"recompute": {"every": 2}})
    assert "sets methods.recompute itself" in refused(
        recipe, candidate(recipe, "recompute", "states in place", 8), "cpu"
    )
    assert "cannot be combined" in refused(recipe, candidate(recipe, "stream", "states in place", 8), "cpu")


def test_the_host_is_no_way_out_for_a_cpu(deep):
    recipe = deep()
    assert "the device's own" in refused(recipe, candidate(recipe, "activations to host", "states in place", 8), "cpu")
    assert not refused(recipe, candidate(recipe, "activations to host", "states in place", 8), "cuda")


def test_the_disk_folder_of_the_recipe_is_used(deep, tmp_path):
    recipe = deep(memory={"disk": str(tmp_path)})
    assert candidate(recipe, "activations to disk", "states in place", 8).methods["ssdtrain"]["path"] == str(tmp_path)
    in_memory = deep(memory={"disk": "/dev/shm"})
    assert "in memory itself" in refused(
        in_memory, candidate(in_memory, "activations to disk", "states in place", 8), "cpu"
    )


@pytest.mark.parametrize(("batch", "micro", "expected"), [(8, None, [8, 4, 2, 1]), (12, 6, [6, 3, 1]), (1, 1, [1])])
def test_micro_batches_divide_the_batch(deep, batch, micro, expected):
    assert micro_batches(deep(train={"batch": batch, "micro_batch": micro})) == expected


@pytest.mark.parametrize(("budget", "hint"), [("4GiB", r"[Ll]ower memory\.budget"), (None, r"memory\.budget=SIZE")])
def test_a_run_out_of_memory_says_what_to_do_about_it(deep, tmp_path, monkeypatch, budget, hint):
    def fit(self):
        raise torch.OutOfMemoryError("out of memory")

    option = Option("recompute, micro-batch 4", {"recompute": {}}, 4, "", 100, 1.0, "the fastest that fits")
    plan = MemoryPlan(1000, option, [option]) if budget else None
    monkeypatch.setattr("headway.core.train.plan_for", lambda *_: plan)
    monkeypatch.setattr("headway.core.trainer.Trainer.fit", fit)
    with pytest.raises(HeadwayError, match=rf"does not fit in memory.*{hint}"):
        train(deep(memory={"budget": budget}), run=tmp_path / "run")


def test_running_out_of_memory_is_told_from_other_failures():
    assert is_out_of_memory(
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate")
    )
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
