"""Benchmarks: questions about pictures asked of a model, and its answers scored with the papers' metrics."""
