"""Quantization recipes, low-rank routers and their quality reports."""
