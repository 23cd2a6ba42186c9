"""The side-by-side experiment: its ways can be built or say why not, and its judgement of a pair of points.

Needs: nothing. Run: pytest tests/experiments/test_memory.py
"""

import pytest

from headway.core.build import build_trainer
from headway.core.errors import MethodError
from headway.core.recipe import Recipe
from headway.experiments.memory import PEERS, WAYS, Point, Way, _matches


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_every_way_trains_the_same_losses_or_says_what_it_needs(way, tiny):
    def losses(methods):
        trainer = build_trainer(Recipe.load(tiny(model={"layers": 4}, methods=methods)))
        return [trainer.train_step()["loss"] for _ in range(3)]

    small = {"ssdtrain": {"min_bytes": 1}, "streambp": {"chunk": 8, "logits_chunk": 16}}
    methods = {name: {**options, **small.get(name, {})} for name, options in way.methods.items()}
    plain = losses({})
    try:
        assert losses(methods) == pytest.approx(plain, rel=1e-5)
    except MethodError as error:
        assert "needs a GPU" in str(error)
        assert way.name in ("TRL offloading", "torchao optimizer")


def test_other_libraries_are_asked_for_by_module():
    assert {name for way in WAYS for name in way.methods if ":" in name} == {
        f"{PEERS}:SaveOnCPU",
        f"{PEERS}:TRLOffload",
        f"{PEERS}:TorchaoOffload",
    }


def test_a_peer_is_matched_by_no_more_memory_and_no_more_time():
    peer = Point(Way("theirs", {}, ours=False), 100, [1.0, 1.0, 1.0], 0.0)

    def ours(peak, ratio):
        return Point(Way("ours", {}), peak, [ratio] * 3, 0.0)

    assert _matches(ours(90, 1.04), peer) and _matches(ours(102, 0.5), peer)
    assert not _matches(ours(103, 0.5), peer) and not _matches(ours(50, 1.06), peer)
