"""The schedule that the paper's authors published, with the times that they expect of it.

Figures from gensyn-ai/skippipe (MIT licence, (c) 2025 Nikolay Blagoev), schedule.json: 20 nodes, 6 stages, paths of 4.
"""

from __future__ import annotations

from headway.parallel.skippipe.cluster import Cluster, Path
from headway.parallel.skippipe.links import regions_cluster
from headway.parallel.skippipe.simulator import Job

STAGES = ((0, 3, 4, 10, 11), (15, 8, 14), (1, 9, 6), (16, 12, 13), (5, 18, 7), (17, 2, 19))
SECONDS = {"full": 79.93971963540922, "random": 48.915682705668054, "no-tc2": 35.43481420147051,
           "cbs": 33.31379002209655}  # fmt: skip
"""Expected time of an iteration."""

# Three paths for each data node in turn, but one for `cbs`; without the data node itself.
_AFTER = {
    "cbs": "14 6 12, 15 17 5, 7 13 19, 1 18 2, 8 16 9",
    "no-tc2": "12 5 19, 1 19 18, 6 18 17, 12 6 2, 14 12 2, 6 14 13, 15 13 7, 15 5 17, 15 13 7, 1 17 5, 1 7 2, "
    "14 18 19, 8 16 9, 8 16 9, 8 16 9",
    "random": "12 7 17, 14 16 9, 1 8 19, 12 7 17, 15 6 5, 1 8 19, 13 18 2, 15 6 5, 1 8 19, 13 18 2, 15 6 5, 14 16 9, "
    "13 18 2, 12 7 17, 14 16 9",
}


def cluster() -> Cluster:
    """The twenty nodes: the published delays, and the compute time that gives the expected times."""
    return regions_cluster(20, size=33_554_648, compute=0.44, as_published=True)


def paths(arm: str) -> tuple[Path, ...]:
    """The paths of ``full`` (3 chains), ``random``, ``no-tc2`` (15 paths) or ``cbs`` (5)."""
    if arm == "full":
        return tuple(zip(*(stage[:3] for stage in STAGES), strict=True))
    after = [tuple(int(node) for node in text.split()) for text in _AFTER[arm].split(",")]
    each = len(after) // len(STAGES[0])
    return tuple((STAGES[0][i // each], *rest) for i, rest in enumerate(after))


def jobs(arm: str) -> list[Job]:
    """What the authors' simulation releases in an iteration: 27 micro-batches for ``full``, else 30."""
    found = []
    for i, path in enumerate(paths(arm)):
        if arm == "full":
            found += [Job(path, 0.1 * r, 3 * k + 9 * i) for k in range(3) for r in range(3)]
        elif arm == "cbs":
            found += [Job(path, 2.5 * r + copy, 10 * copy + i) for copy in range(3) for r in range(2)]
        else:
            found += [Job(path, 2.5 * r + 0.44 * (i % 3), i) for r in range(2)]
    return found
