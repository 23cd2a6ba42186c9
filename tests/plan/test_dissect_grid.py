"""Grids: failures are results, ladders stop, the log resumes, drift makes void, what misleads is not compared.

Needs no torch in the cells, which are made up: pytest tests/plan/test_dissect_grid.py
"""

import json

import pytest

from headway.core.errors import HeadwayError
from headway.plan.dissect.grid import Cell, Conduct, run_cells
from headway.plan.dissect.isolate import run_isolated
from headway.plan.dissect.ledger import Log
from headway.plan.dissect.results import Results, ratio, refuse_incomparable
from headway.plan.dissect.spec import cells_of, load_grid, run_grid

RUNNER = "dissect_runners:made_up"
ONCE = Conduct(repeats=1, drift=None, timeout=30)


def cell(*techniques, ladder="", labels=None, **work):
    return Cell(techniques, {"name": "+".join(techniques), **work}, labels or {}, RUNNER, ladder)


def lines(log):
    return list(Log(log))


@pytest.mark.parametrize(
    "fail,status,cause",
    [
        ("oom", "oom", "MemoryError: no more"),
        ("cuda-oom", "oom", "CUDA out of memory"),
        ("nan", "nan", "the loss is nan"),
        ("refused", "refused", "methods.x: cannot do this"),
        ("crash", "crash", "ValueError: a bug"),
        ("exit", "crash", "status 7"),
        ("SIGKILL", "oom", "want of memory"),
        ("SIGSEGV", "crash", "SIGSEGV"),
    ],
)
def test_every_failure_is_a_result(fail, status, cause):
    outcome = run_isolated(RUNNER, {"fail": fail}, timeout=30)
    assert outcome.status == status
    assert cause in outcome.cause
    assert "\n" not in outcome.cause


def test_a_cell_that_takes_too_long_is_stopped():
    outcome = run_isolated(RUNNER, {"fail": "sleep"}, timeout=1.5)
    assert outcome.status == "timeout" and "1.5 s" in outcome.cause
    assert 1.5 <= outcome.wall_seconds < 10


def test_memory_can_be_limited_to_that_of_a_smaller_machine():
    outcome = run_isolated(RUNNER, {"fail": "allocate"}, timeout=30, memory=1 << 30)
    assert outcome.status == "oom"


def test_an_unknown_runner_is_a_crash():
    assert run_isolated("dissect_runners:nothing", {}, timeout=30).status == "crash"


def test_the_ladder_stops_at_the_first_failure_and_the_rest_of_the_grid_goes_on(tmp_path):
    rungs = [cell("a", ladder="a", labels={"batch": b}, fail="oom" if b >= 4 else None, b=b) for b in (1, 2, 4, 8, 16)]
    other = [cell("b", ladder="b", labels={"batch": b}, b=b) for b in (1, 2)]
    results = run_cells([*rungs, *other], tmp_path / "log.jsonl", ONCE)
    found = {(c.name, c.labels["batch"]): c.status for c in results.cells}
    assert found == {("a", 1): "ok", ("a", 2): "ok", ("a", 4): "oom", ("b", 1): "ok", ("b", 2): "ok"}
    assert results.find("a", batch=4).cause == "MemoryError: no more"


def test_repeats_are_interleaved_and_the_reference_is_measured_between(tmp_path):
    log = tmp_path / "log.jsonl"
    conduct = Conduct(repeats=2, timeout=30)
    run_cells([cell("a"), cell("b")], log, conduct, cell("reference", seconds=0.05))
    order = [x["kind"][0] if x["kind"] == "reference" else x["techniques"][0] + str(x["repeat"]) for x in lines(log)]
    assert order == ["r", "a0", "r", "b0", "r", "a1", "r", "b1", "r"]


def test_a_grid_goes_on_where_it_was_even_after_a_line_was_cut_short(tmp_path):
    log, count = tmp_path / "log.jsonl", tmp_path / "count"
    cells = [cell(name, count=str(count)) for name in "abc"]
    run_cells(cells[:2], log, ONCE)
    before = log.read_text()
    log.write_text(before[:-30])  # killed while it wrote the second line
    results = run_cells([*cells, cell("d", fail="crash", count=str(count))], log, ONCE)
    assert count.read_text().split() == ["a", "b", "b", "c", "d"]
    assert [c.name for c in results.cells if c.status == "ok"] == ["a", "b", "c"]
    run_cells([*cells, cell("d", fail="crash", count=str(count))], log, ONCE)
    assert len(count.read_text().split()) == 5, "a failure is a result and is not measured again"
    assert log.read_text().startswith(before[:-30]), "the log is only appended to"


def test_raw_step_times_are_kept(tmp_path):
    run_cells([cell("a", steps=4, seconds=0.2)], tmp_path / "log.jsonl", ONCE)
    [line] = lines(tmp_path / "log.jsonl")
    assert line["value"]["step_seconds"] == [0.2] * 4
    [found] = Results.load(tmp_path / "log.jsonl").cells
    assert found.step_seconds == [[0.2] * 4]
    assert found.tokens_per_second == pytest.approx(100 / 0.2)
    assert found.flops_rate == pytest.approx(1e9 / 0.2)
    assert found.utilization == pytest.approx(1e9 / 0.2 / 1e11)
    assert found.loss_after(300) == 3.0 and found.loss_after(350) == 3.0 and found.loss_after(10**6) is None


def test_cells_beside_a_drifting_reference_are_void_and_measured_again(tmp_path):
    speeds = tmp_path / "speeds"
    # References before a, between a and b, after b; then, in the second go, before and after what was void.
    speeds.write_text("1.0 1.0 1.2 1.0 1.0 1.0 1.0")
    reference = cell("reference", speeds=str(speeds))
    said = []
    log = tmp_path / "log.jsonl"
    results = run_cells([cell("a"), cell("b")], log, Conduct(repeats=1, timeout=30), reference, said.append)
    measured = [x["techniques"][0] for x in lines(log) if x["kind"] == "cell"]
    assert measured == ["a", "b", "b"]
    assert {c.name: c.status for c in results.cells} == {"a": "ok", "b": "ok"}
    speeds.write_text("1.0 1.0 1.2 1.2")
    strict = Conduct(repeats=1, timeout=30, retries=0)
    results = run_cells([cell("c", x=1), cell("d", x=2)], log, strict, reference)
    assert {c.name: c.status for c in results.cells} == {"c": "ok", "d": "void"}
    assert "5%" in results.find("d").cause
    assert Results(results.lines, drift=0.5).find("d").status == "ok", "the threshold is the reader's"


def test_the_same_grid_again_gives_ratios_within_the_spread(tmp_path):
    grids = []
    for run in range(2):
        cells = [cell("a", seconds=0.1), cell("b", seconds=0.13)]
        results = run_cells(cells, tmp_path / f"{run}.jsonl", Conduct(repeats=2, drift=None, timeout=30))
        grids.append(ratio(results.find("b"), results.find("a")))
    assert grids[0].value == pytest.approx(1.3)
    assert grids[0].low <= grids[1].value <= grids[0].high


def result(tmp_path, *cells):
    return run_cells(cells, tmp_path / "log.jsonl", ONCE)


def test_different_tokens_per_step_are_not_compared(tmp_path):
    results = result(tmp_path, cell("a", tokens=100), cell("b", tokens=200))
    with pytest.raises(HeadwayError, match="tokens per step"):
        ratio(results.find("a"), results.find("b"))
    with pytest.raises(HeadwayError, match="tokens per step"):
        refuse_incomparable(results.cells)


def test_fewer_than_three_steps_are_not_compared(tmp_path):
    results = result(tmp_path, cell("a"), cell("b", steps=2))
    with pytest.raises(HeadwayError, match="b: has fewer than 3 measured steps"):
        ratio(results.find("b"), results.find("a"))


def test_machines_are_not_mixed_in_one_table(tmp_path):
    log = tmp_path / "log.jsonl"
    result(tmp_path, cell("a"), cell("b"))
    changed = lines(log)
    changed[1]["environment"] = "elsewhere"
    log.write_text("".join(json.dumps(x) + "\n" for x in changed))
    results = Results.load(log)
    with pytest.raises(HeadwayError, match="different machines"):
        refuse_incomparable(results.cells)
    assert [len(table) for table in results.tables()] == [1, 1]


def test_failed_cells_have_no_ratio(tmp_path):
    results = result(tmp_path, cell("a"), cell("b", fail="nan"))
    with pytest.raises(HeadwayError, match="no result: nan"):
        ratio(results.find("b"), results.find("a"))
    with pytest.raises(HeadwayError, match="0 cells"):
        results.find("c")


def test_an_empty_grid_and_equal_cells_are_refused(tmp_path):
    with pytest.raises(HeadwayError, match="no cell"):
        run_cells([], tmp_path / "log.jsonl")
    with pytest.raises(HeadwayError, match="the same as"):
        run_cells([cell("a"), Cell(("b",), cell("a").work, {}, RUNNER)], tmp_path / "log.jsonl")


def test_utilization_needs_the_mix_of_precisions(tmp_path):
    [found] = result(tmp_path, cell("a")).cells
    value = dict(found.values[0])

    def share(**changes):
        return type(found)(found.key, (), {}, "ok", "", "", {0: {**value, **changes}}).utilization

    assert share() == pytest.approx(0.1)
    assert share(precision=None) is None
    assert share(matmul_peak=None) is None, "an unknown peak gives FLOP/s without a share"
    mixed = {"float32": 0.5, "bfloat16": 0.5}
    assert share(precision=mixed) is None, "one peak does not serve two precisions"
    assert share(precision=mixed, matmul_peak={"float32": 1e11, "bfloat16": 2e11}) == pytest.approx(0.075)


def test_a_spec_becomes_cells(tiny, tmp_path):
    grid = load_grid({
        "recipe": tiny(train={"batch": 4}),
        "techniques": {"bf16": None, "accumulate": "train.micro_batch=2", "other": "train.micro_batch=1"},
        "sequences": [16, 32],
        "batches": [4, 8],
    })  # fmt: skip
    cells, refused = cells_of(grid)
    assert refused == {
        "accumulate+other": "accumulate and other both set train.micro_batch",
        "bf16+accumulate+other": "accumulate and other both set train.micro_batch",
    }
    assert len(cells) == 6 * 2 * 2
    assert len({c.key for c in cells}) == len(cells)
    ladders = [c.labels["batch"] for c in cells if c.ladder == "/16/bf16"]
    assert ladders == [4, 8]
    assert cells[0].techniques == () and cells[0].work["recipe"]["data"]["sequence"] == 16


@pytest.mark.parametrize(
    "change,message",
    [
        ({"measure": 2}, "grid.measure"),
        ({"warmup": 1}, "grid.warmup"),
        ({"techniks": {}}, "grid.techniks"),
        ({"techniques": {"bf61": None}}, "Did you mean 'bf16'"),
        ({"techniques": {"bad": "train.batch=0"}}, "grid.techniques.bad"),
        ({"recipe": "missing.yaml"}, "missing.yaml"),
        ({"drift": -1}, "grid.drift"),
    ],
)
def test_wrong_specs_are_refused(tiny, change, message):
    with pytest.raises(HeadwayError, match=message):
        cells_of(load_grid({"recipe": tiny(), "techniques": {"bf16": None}, **change}))


@pytest.mark.slow
def test_a_real_grid_of_recipes(tiny, tmp_path):
    spec = tmp_path / "grid.yaml"
    recipe = json.dumps(tiny(train={"batch": 4}))
    (tmp_path / "tiny.yaml").write_text(recipe)
    spec.write_text(
        "recipe: tiny.yaml\n"
        "techniques: {accumulate: train.micro_batch=2, broken: [optimizer.lr=1e30, train.clip=null]}\n"
        "combine: 1\nwarmup: 2\nmeasure: 3\nrepeats: 1\ndrift: null\ntimeout: 120\n"
    )
    results = run_grid(spec, tmp_path / "log.jsonl")
    found = {c.name: c for c in results.cells}
    assert found["none"].status == found["accumulate"].status == "ok"
    assert found["broken"].status == "nan"
    assert found["none"].tokens_per_step == found["accumulate"].tokens_per_step == 4 * 32
    assert ratio(found["accumulate"], found["none"]).value > 0
    assert ratio(found["accumulate"], found["none"], "peak_memory_bytes").value < 1
    assert found["none"].loss_after(640) == pytest.approx(found["accumulate"].loss_after(640), rel=1e-4)
