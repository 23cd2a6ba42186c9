"""SkipPipe's planning: published times, simulator, A* and conflict-based search against trying everything, the checker.

Needs nothing. Run: pytest tests/parallel/test_skippipe_scheduler.py
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from headway.parallel.skippipe import published
from headway.parallel.skippipe.cluster import Cluster, Rules, Schedule, ScheduleError
from headway.parallel.skippipe.constraints import order_violations, overlaps, violations
from headway.parallel.skippipe.links import LINKS, REGIONS, link_seconds, regions_cluster
from headway.parallel.skippipe.paths import Forbidden, PathFinder
from headway.parallel.skippipe.placement import Placer, _bottleneck, bottleneck_matching, open_tour
from headway.parallel.skippipe.reroute import reroute
from headway.parallel.skippipe.scheduler import skip_paths
from headway.parallel.skippipe.search import Budget, ConflictSearch
from headway.parallel.skippipe.simulator import Job, simulate


def random_cluster(nodes: int, seed: int, memory: int = 3) -> Cluster:
    rng = np.random.default_rng(seed)
    costs = rng.uniform(0.3, 3.0, (nodes, nodes))
    costs = (costs + costs.T) / 2 * (1 - np.eye(nodes))
    return Cluster(costs, rng.uniform(0.3, 1.0, nodes), memory)


def cut(nodes: int, sizes: list[int], seed: int) -> tuple[tuple[int, ...], ...]:
    order = np.random.default_rng(seed).permutation(nodes).tolist()
    ends = np.cumsum(sizes)
    return tuple(tuple(order[e - s : e]) for s, e in zip(sizes, ends))


def every_path(stages, rules: Rules, start: int):
    for order in itertools.permutations(range(1, len(stages)), rules.length - 1):
        if not order_violations((0, *order), len(stages), rules):
            for nodes in itertools.product(*(stages[s] for s in order)):
                yield (start, *nodes)


@pytest.mark.parametrize("arm", sorted(published.SECONDS))
def test_published_times(arm: str) -> None:
    result = simulate(published.cluster(), published.jobs(arm))
    assert result.seconds == pytest.approx(published.SECONDS[arm], abs=1e-9)
    if arm != "full":
        load = {stage: 0 for stage in range(6)}
        of = Schedule(published.STAGES, ()).stage_of()
        for path in published.paths(arm):
            for node in path:
                load[of[node]] += 15 // len(published.paths(arm))
        assert [load[stage] for stage in range(1, 6)] == [9] * 5


def test_one_micro_batch_by_hand() -> None:
    cluster = random_cluster(5, 3)
    for path in [(0, 1), (2, 4, 1), (3, 0, 1, 2, 4)]:
        seconds = simulate(cluster, [Job(path, 0.0, 0)]).seconds
        links = sum(cluster.costs[a, b] for a, b in zip(path, (*path[1:], path[0])))
        w = cluster.compute
        assert seconds == pytest.approx(2.5 * w[list(path)].sum() + 2 * links + w[path[0]] / 4)
        assert seconds == pytest.approx(cluster.pass_seconds(path))


def test_a_node_runs_one_task_at_a_time_within_its_memory() -> None:
    cluster = random_cluster(6, 1, memory=2)
    jobs = [Job((i % 2, 2 + i % 3, 5), 0.0, i) for i in range(8)]
    spans = simulate(cluster, jobs).spans
    assert not overlaps([[(s.node, s.start, s.end) for s in spans if s.job == j] for j in range(8)])
    for node in range(6):
        held = 0
        for span in sorted((s for s in spans if s.node == node), key=lambda s: s.start):
            held += {"forward": 1, "loss": 0, "backward": -1}[span.kind]
            assert 0 <= held <= 2


def test_a_schedule_that_blocks_itself_is_stuck() -> None:
    cluster = random_cluster(4, 0, memory=1)
    jobs = [Job((0, 2, 3), 0.0, 0), Job((1, 3, 2), 0.0, 1)]  # each holds what the other needs
    cluster.costs[:] = 1 - np.eye(4)
    cluster.compute[:] = 1.0
    with pytest.raises(ScheduleError, match="stuck with 2 of 2"):
        simulate(cluster, jobs)


@pytest.mark.parametrize("seed", range(6))
def test_a_star_finds_the_best_of_all_paths(seed: int) -> None:
    cluster, rules = random_cluster(12, seed), Rules(4)
    stages = cut(12, [2, 2, 2, 2, 2, 2], seed)
    finder = PathFinder(cluster, stages, rules)
    for start in stages[0]:
        best = min(cluster.pass_seconds(p) for p in every_path(stages, rules, start))
        route = finder.best(start)
        assert route is not None and route.seconds == pytest.approx(best)
        assert cluster.pass_seconds(route.path) == pytest.approx(best)
    # and with stages and nodes forbidden, and times to wait for
    forbidden = Forbidden(frozenset((2,)), frozenset(stages[3][:1]))
    allowed = [p for p in every_path(stages, rules, stages[0][0]) if stages[3][0] not in p
               and not set(p) & set(stages[2])]  # fmt: skip
    route = finder.best(stages[0][0], 0.5, forbidden)
    assert route is not None
    assert route.seconds == pytest.approx(0.5 + min(map(cluster.pass_seconds, allowed)))
    busy = frozenset((node, 0.0, 4.0) for stage in stages[1:] for node in stage)
    later = finder.best(stages[0][0], 0.0, Forbidden(busy=busy))
    expected = min(finder._timed(p, 0.0, {v[0]: [v] for v in busy}).seconds
                   for p in every_path(stages, rules, stages[0][0]))  # fmt: skip
    assert later is not None and later.seconds == pytest.approx(expected)
    assert all(start >= 4.0 for node, start, _ in later.visits if node not in stages[0])


@pytest.mark.parametrize("seed", range(8))
def test_search_finds_the_optimum_of_few_agents(seed: int) -> None:
    """Quotas and memories, against every combination of paths."""
    cluster, rules = random_cluster(7, seed, 1), Rules(3, memory=1)
    stages = cut(7, [3, 2, 1, 1], seed)
    stages = (stages[0][:2], *stages[1:])
    finder = PathFinder(cluster, stages, rules)
    options = [[(cluster.pass_seconds(p), p) for p in every_path(stages, rules, s)] for s in stages[0]]
    best = min(
        (max(seconds for seconds, _ in paths) for paths in itertools.product(*options)
         if all(sum(n in p for _, p in paths) <= 1 for n in range(7))), default=None)  # fmt: skip
    agents = [(node, 0.0) for node in stages[0]]
    found = ConflictSearch(finder, agents, rules, False, budget=Budget(10_000, 60, exhaustive=True)).run()
    assert best is not None and found is not None
    assert found.planned == pytest.approx(best) and found.gap == 0 and found.complete


@pytest.mark.parametrize("seed", range(6))
def test_search_with_times_is_no_worse_than_taking_turns(seed: int) -> None:
    """Nobody at a node at once; between the bound and what three get who choose one after the other."""
    cluster, rules = random_cluster(4, seed), Rules(3, memory=3)
    stages = ((0,), (1, 2), (3,))
    finder = PathFinder(cluster, stages, rules)
    agents = [(0, 0.0)] * 3
    found = ConflictSearch(finder, agents, rules, True, budget=Budget(5_000, 30, exhaustive=True)).run()
    assert found is not None
    assert not overlaps([route.visits for route in found.routes])
    busy: frozenset = frozenset()
    greedy = 0.0
    for start, offset in agents:
        route = finder.best(start, offset, Forbidden(busy=busy))
        assert route is not None
        busy, greedy = busy | set(route.visits), max(greedy, route.seconds)
    assert found.bound - 1e-9 <= found.planned <= greedy + 1e-9


def test_search_beats_random_and_keeps_every_constraint_on_200_clusters() -> None:
    better = worse = 0
    for seed in range(200):
        cluster = random_cluster(8, seed, 2)
        stages = cut(8, [2, 2, 2, 2], seed)
        budget = Budget(8, 1.0)
        found = {arm: skip_paths(cluster, [2, 2, 2, 2], 3, micro_batches=8, arm=arm, stages=stages, seed=seed,
                                 budget=budget) for arm in ("random", "no-tc2", "cbs")}  # fmt: skip
        for arm, schedule in found.items():
            assert violations(schedule, Rules(3, memory=2), cluster) == [], (seed, arm)
        assert found["cbs"].seconds <= found["no-tc2"].seconds + 1e-9
        better += found["cbs"].seconds < found["random"].seconds
        worse += found["cbs"].seconds > found["random"].seconds
    assert better > 10 * worse


def test_the_checker_sees_what_is_wrong() -> None:
    stages = ((0, 1), (2, 3), (4, 5), (6, 7), (8,), (9,), (10,))
    good = Schedule(stages, ((0, 2, 4), (1, 3, 6), (0, 8, 9), (1, 8, 10)))
    rules = Rules(3, memory=2)
    assert violations(good, rules) == []

    def wrong(*paths: tuple[int, ...]) -> str:
        return " ".join(violations(Schedule(stages, (*paths, *good.paths[1:])), rules))

    assert "CC1" in wrong((2, 4, 6)) and "CC2" in wrong((0, 2, 3)) and "CC3" in wrong((0, 2))
    assert "CC4" in wrong((0, 6, 2)) and "CC6" in wrong((0, 9, 10))
    assert "CC5" in " ".join(order_violations((0, 2, 1, 4, 3, 6, 5), 7, Rules(7)))
    assert "memory holds" in wrong((0, 8, 9)) and "no micro-batch" in wrong((0, 2, 3))
    assert "no stage" in wrong((0, 2, 99))
    assert overlaps([[(0, 0.0, 2.0)], [(0, 1.0, 3.0)]]) and not overlaps([[(0, 0.0, 2.0)], [(0, 2.0, 3.0)]])


def test_matching_and_tour_against_trying_everything() -> None:
    rng = np.random.default_rng(0)
    for rows, columns in [(3, 3), (3, 5), (5, 3), (4, 4)]:
        costs = rng.uniform(0, 1, (rows, columns))
        small = costs if rows <= columns else costs.T
        best = min(max(small[i, p[i]] for i in range(len(small)))
                   for p in itertools.permutations(range(small.shape[1]), len(small)))  # fmt: skip
        highest, pairs = bottleneck_matching(costs)
        assert highest == best == _bottleneck(costs) == max(costs[i, j] for i, j in pairs)
    costs = rng.uniform(0, 1, (6, 6))
    tours: dict = {sum(costs[a, b] for a, b in zip((0, *p), p)): [0, *p] for p in itertools.permutations(range(1, 6))}
    seconds, tour = open_tour(costs)
    assert seconds == pytest.approx(min(tours)) and tour == tours[min(tours)]


def test_placement_beats_random_and_keeps_sizes() -> None:
    cluster, sizes = regions_cluster(), [5, 3, 3, 3, 3, 3]
    placer = Placer(cluster, sizes, seed=1)
    stages = placer.search(20, 100)
    assert sorted(n for s in stages for n in s) == list(range(20)) and [len(s) for s in stages] == sizes
    chance = [placer.score(cut(20, sizes, seed)) for seed in range(20)]
    assert placer.score(stages) < min(chance)
    with pytest.raises(ScheduleError, match="20 nodes"):
        Placer(cluster, [5, 3])


def test_links() -> None:
    assert len(LINKS) == 66 and {r for pair in LINKS for r in pair} == set(REGIONS)
    assert link_seconds("Oregon", "LA", 2**20, 0) == pytest.approx(0.0124 + 1 / 121.375)
    assert link_seconds("LA", "Oregon", 2**20, 0) == link_seconds("Oregon", "LA", 2**20, 0)
    assert link_seconds("NL", "London", 2**25) < 1 < 100 < link_seconds("NL", "London", 2**25, as_published=True)


def test_bad_tables_name_the_pair() -> None:
    costs = np.ones((4, 4)) - np.eye(4)
    w = np.ones(4)
    names = ("a", "b", "c", "d")
    one_way, missing, slip = costs.copy(), costs.copy(), costs.copy()
    one_way[1, 2] = 2.0
    missing[0, 3] = np.nan
    slip[1, 3] = slip[3, 1] = 1000.0
    said = {
        r"1 \(b\), 2 \(c\)\]: is 2 s there and 1 s back": one_way,
        r"0 \(a\), 3 \(d\)\]: is missing": missing,
        r"1 \(b\), 3 \(d\)\]: is 1000 s where": slip,
    }
    for words, table in said.items():
        with pytest.raises(ScheduleError, match=words):
            Cluster(table, w, names=names)
    published_table = published.cluster()
    with pytest.raises(ScheduleError, match=r"6 \(NL\), 10 \(London\)"):
        Cluster(published_table.costs, published_table.compute, names=published_table.names)


def test_impossible_demands_are_refused() -> None:
    cluster = random_cluster(8, 0, 2)
    with pytest.raises(ScheduleError, match="2 to 4"):
        skip_paths(cluster, [2, 2, 2, 2], 1, micro_batches=4)
    with pytest.raises(ScheduleError, match="learn nothing"):
        skip_paths(cluster, [1, 2, 2, 2, 1], 2, micro_batches=4)
    with pytest.raises(ScheduleError, match=r"room for 8 visits .* make 16"):
        skip_paths(cluster, [4, 2, 1, 1], 3, micro_batches=4)


def test_a_lost_node_is_gone_round() -> None:
    stages = ((0,), (1, 2), (3,), (4,))
    schedule = Schedule(stages, ((0, 1, 3), (0, 2, 4)))
    rules = Rules(3, memory=2)
    assert reroute(schedule, 2, rules).paths == ((0, 1, 3), (0, 1, 4))  # a sibling takes over
    alone = Schedule(stages, ((0, 1, 3), (0, 1, 4), (0, 2, 3)))
    with pytest.raises(ScheduleError, match="CC3"):
        reroute(alone, 1, Rules(3, memory=1))
    # no sibling: another stage instead, and the stage without visits is a violation while nobody else has it
    with pytest.raises(ScheduleError, match=r"stage 3 has no micro-batch|no stage"):
        reroute(schedule, 4, rules)
    with pytest.raises(ScheduleError, match="data node"):
        reroute(schedule, 0, rules)
    whole = Schedule(((0,), (1,)), ((0, 1),))
    with pytest.raises(ScheduleError, match="CC3"):
        reroute(whole, 1, Rules(2))
    round_trip = Schedule.from_dict(schedule.to_dict())
    assert round_trip.paths == schedule.paths and round_trip.stages == schedule.stages
