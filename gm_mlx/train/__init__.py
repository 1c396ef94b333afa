"""Training: conversations to batches, stages, one loop."""
