"""What a user wants to know about data before training on it."""

from __future__ import annotations

from typing import Any

import numpy as np

from gm_mlx.train.check import num_duplicates
from gm_mlx.train.dataset import Dataset


def facts(dataset: Dataset, padding: float | None = None) -> dict[str, Any]:
    """A table of a data set, as JSON values.

    Args:
        dataset: the data.
        padding: the share of padding in its batches, if that is known (``Loader.padding``).

    Returns:
        ``rows``, ``rows_with_images``, ``duplicates`` (rows that repeat an earlier one), ``images`` (each counted
        once), ``turns_dropped`` and ``rows_shortened`` (to fit the context), ``tokens``, ``image_tokens`` and
        ``answer_tokens`` (each with ``min``, ``median``, ``max`` per row and ``total``), and ``padding``.
    """
    per_row = np.diff(dataset.slot_starts)
    table = {
        "rows": len(dataset),
        "rows_with_images": int((per_row > 0).sum()),
        "duplicates": num_duplicates(dataset.rows),
        "images": len(dataset.images),
        "turns_dropped": int(dataset.dropped.sum()),
        "rows_shortened": int((dataset.dropped > 0).sum()),
        "tokens": _spread(dataset.lengths),
        "image_tokens": _spread(per_row * dataset.tokens_per_image),
        "answer_tokens": _spread(dataset.answer_lengths),
    }
    return table if padding is None else {**table, "padding": round(padding, 4)}


def _spread(values: np.ndarray) -> dict[str, int]:
    if not len(values):
        return {"min": 0, "median": 0, "max": 0, "total": 0}
    return {
        "min": int(values.min()),
        "median": int(np.median(values)),
        "max": int(values.max()),
        "total": int(values.sum()),
    }
