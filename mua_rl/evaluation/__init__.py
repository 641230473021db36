"""Checkpoints evaluated on held-out problems, and compared."""
