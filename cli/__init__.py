"""The ``gm-mlx`` command: one module per command, argument handling and output only."""
