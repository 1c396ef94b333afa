"""Conversations to batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from gm_mlx.errors import UserError


class Example(NamedTuple):
    """One conversation: token ids with image slots, True where a token is to be learnt, and its images' pixels."""

    ids: Sequence[int] | np.ndarray
    learnt: Sequence[bool] | np.ndarray
    pixels: np.ndarray | None = None  # [N, H, W, 3] float32


class Batch(NamedTuple):
    """Examples padded on the right to one length."""

    ids: np.ndarray  # [B, L] int32, on the host: the model looks for image slots there
    learnt: np.ndarray  # [B, L] bool
    real: np.ndarray  # [B, L] bool, False on padding
    pixels: mx.array | None  # [N, H, W, 3]


def collate(examples: Sequence[Example], pad_id: int, multiple: int = 8) -> Batch:
    """Pad to the longest example, rounded up to ``multiple``.

    Padding stands on the right and attention is causal, so no real token ever sees it.

    Raises:
        UserError: an example in which nothing is to be learnt.
    """
    length = max(len(example.ids) for example in examples)
    length += -length % multiple
    ids = np.full((len(examples), length), pad_id, dtype=np.int32)
    learnt = np.zeros((len(examples), length), dtype=bool)
    real = np.zeros((len(examples), length), dtype=bool)
    for row, example in enumerate(examples):
        if not np.any(example.learnt):
            raise UserError(f"example {row} of the batch has no answer to learn; check its conversation")
        n = len(example.ids)
        ids[row, :n], learnt[row, :n], real[row, :n] = example.ids, example.learnt, True
    pixels = [example.pixels for example in examples if example.pixels is not None]
    return Batch(ids, learnt, real, mx.array(np.concatenate(pixels)) if pixels else None)
