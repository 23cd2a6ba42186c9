"""Which blocks make up which stage, and which rank runs it: plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from headway.core.errors import HeadwayError


@dataclass(frozen=True)
class Cuts:
    """A model's blocks, cut into stages."""

    bounds: tuple[int, ...]
    """Stage s runs blocks ``bounds[s]`` to ``bounds[s + 1] - 1``."""
    ranks: int
    there_and_back: bool = False
    """Each rank's two stages lie opposite each other (ZB-V), instead of at equal distances."""

    @property
    def stages(self) -> int:
        """Their number."""
        return len(self.bounds) - 1

    def blocks(self, stage: int) -> range:
        """The blocks of a stage."""
        return range(self.bounds[stage], self.bounds[stage + 1])

    def rank_of(self, stage: int) -> int:
        """The rank that runs a stage."""
        if self.there_and_back:
            return min(stage, self.stages - 1 - stage)
        return stage % self.ranks

    def stages_of(self, rank: int) -> list[int]:
        """The stages that a rank runs, in the order of the model."""
        return [stage for stage in range(self.stages) if self.rank_of(stage) == rank]


def cut_blocks(
    layers: int, ranks: int, chunks: int = 1, *, embedding: float = 0.0, head: float = 0.0, there_and_back: bool = False
) -> Cuts:
    """Cut ``layers`` equal blocks into ``ranks * chunks`` stages so that the heaviest is as light as can be.

    Args:
        embedding: the cost of what is before the blocks, in blocks; it falls to the first stage.
        head: the cost of norm, head and loss, in blocks; it falls to the last stage.
        there_and_back: the placement of the ZB-V schedule; ``chunks`` is 2.

    Raises:
        HeadwayError: there are fewer blocks than stages.

    Among cuts with an equally heavy heaviest stage, the one whose stages are most even is taken, blocks early.
    """
    stages = ranks * chunks
    if stages > layers:
        raise HeadwayError("parallel.pipeline", f"makes {stages} stages ({ranks} ranks x {chunks}) of {layers} blocks",
                           hint=f"take at most {layers // chunks} ranks")  # fmt: skip

    def cost(stage: int, blocks: int) -> float:
        return blocks + (embedding if stage == 0 else 0.0) + (head if stage == stages - 1 else 0.0)

    # best[n]: (heaviest stage, sum of squares, bounds) of the first stages over n blocks.
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, (0,))}
    for stage in range(stages):
        after: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for done, (heaviest, squares, bounds) in best.items():
            for blocks in range(layers - done - (stages - 1 - stage), 0, -1):
                own = cost(stage, blocks)
                found = (max(heaviest, own), squares + own * own, (*bounds, done + blocks))
                kept = after.get(done + blocks)
                if kept is None or found[:2] < kept[:2]:
                    after[done + blocks] = found
        best = after
    return Cuts(best[layers][2], ranks, there_and_back)
