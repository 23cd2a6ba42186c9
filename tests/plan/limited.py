"""Train a recipe in a process whose address space is capped; started by test_memory_limit.py.

Arguments: the recipe file, the run directory, bytes that the process may take beyond what it has when it has trained
one step of a small model: libraries, threads and their arenas are there by then.
"""

import resource
import sys
from pathlib import Path

from headway.core.build import build_trainer
from headway.core.recipe import Recipe
from headway.core.train import train


def main() -> None:
    recipe, run, extra = Recipe.load(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    small = recipe.override("data.sequence=32", "train.batch=1", "train.micro_batch=null", "memory.budget=null")
    build_trainer(small).metered_step()
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + extra, size + extra))
    train(recipe, run=run)


if __name__ == "__main__":
    main()
