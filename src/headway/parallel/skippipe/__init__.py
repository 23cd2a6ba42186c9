"""SkipPipe: every micro-batch takes its own path through some of a pipeline's stages.

Source: Blagoev, Chen and Ersoy, SkipPipe: Partial and Reordered Pipelining Framework for Training LLMs in Heterogeneous
Networks, arXiv 2502.19913.
"""
