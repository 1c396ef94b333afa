"""How fast models run on this machine, engine beside engine. ``gm-mlx bench`` is what uses it."""
