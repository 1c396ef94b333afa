"""gm-mlx: sparse vision-language models that answer questions about pictures on your own machine."""

__version__ = "0.1.0"
