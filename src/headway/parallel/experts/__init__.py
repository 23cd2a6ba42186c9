"""Experts laid over the ranks independently of attention (MoE Parallel Folding)."""
