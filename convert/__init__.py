"""PyTorch checkpoints to model folders and GGUF files."""
