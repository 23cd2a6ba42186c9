"""The blocks of a model in stages, one rank after the other."""

from headway.parallel.pipeline.cuts import Cuts, cut_blocks
from headway.parallel.pipeline.runner import PipelineRunner
from headway.parallel.pipeline.stages import Stage, keep_own_parts, make_stages

__all__ = ["Cuts", "PipelineRunner", "Stage", "cut_blocks", "keep_own_parts", "make_stages"]
