"""What a model is trained for: batches, losses and metrics of each task, one file a task."""
