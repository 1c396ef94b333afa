"""LoRA, with experts: layers, adapters and their folders."""
