"""Training objectives: batches, losses and metrics, one file a task."""
