"""The training step, and everything that a run decides before and after it."""
