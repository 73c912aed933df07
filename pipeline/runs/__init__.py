"""A run in its folder: the chain of stages, what it starts from, checkpoints, progress, interruption."""
