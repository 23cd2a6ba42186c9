"""Where a training step's time and memory go, and which combination of techniques is best on this machine.

Zhang et al., "Dissecting the Runtime Performance of the Training, Fine-tuning, and Inference of Large Language Models",
arXiv 2311.03687.
"""
