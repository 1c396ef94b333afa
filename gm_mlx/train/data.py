"""Conversations to batches, and the loss on their answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from gm_mlx.errors import UserError
from gm_mlx.model import Model
from gm_mlx.router import Routing, load_balancing_loss


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


def answer_loss(model: Model, batch: Batch) -> tuple[mx.array, mx.array]:
    """Cross-entropy of the learnt tokens, with the load-balancing loss where there are experts.

    Logits are computed for the rows that predict a learnt token and for no other: at Gemma's vocabulary of 256,000 the
    rest would be gigabytes.

    Returns:
        The sum over learnt tokens, and their number. The load-balancing loss counts once per learnt token.
    """
    features = None if batch.pixels is None else model.encode_images(batch.pixels)
    trace: list[Routing] = []
    hidden = model.hidden(model.embed(batch.ids, features), trace=trace)
    rows, columns = np.nonzero(batch.learnt)
    if not len(rows):  # a rank whose share of a step is empty takes part in it and adds nothing
        return 0 * hidden.sum(), mx.array(0)
    logits = model.logits(hidden[mx.array(rows), mx.array(columns - 1)])  # [M, V]: each row predicts its successor
    total = nn.losses.cross_entropy(logits, mx.array(batch.ids[rows, columns]), reduction="sum")
    count = mx.array(len(rows))
    moe = model.config.text_config.moe
    if moe is not None and trace:
        total = total + moe.aux_loss_coef * count * load_balancing_loss(trace, mx.array(batch.real))
    return total, count
