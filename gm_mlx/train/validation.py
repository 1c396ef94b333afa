"""How good a model is on rows that it does not learn from: its loss, and how many of its answers are right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from gm_mlx.errors import UserError
from gm_mlx.model import Model
from gm_mlx.processor import Processor
from gm_mlx.train.answers import answer_text, answers_after, same_answer
from gm_mlx.train.data import Batch
from gm_mlx.train.dataset import Dataset
from gm_mlx.train.loader import Loader
from gm_mlx.train.losses import AnswerLoss
from gm_mlx.train.ranks import Ranks

Loss = Callable[[Model, Batch], tuple[mx.array, mx.array, dict[str, mx.array]]]


class Asked(NamedTuple):
    """An answer of a row that the model is asked for: where it begins in the row's tokens, and what is right."""

    row: int
    start: int
    text: str


class Validation:
    """A function from a model to its figures on held-out rows: always the same ones for the same model.

    An answer is right if it is the row's own but for case, white space and a full stop at the end
    (``answers.same_answer``). Every answer of a row counts: the model is shown the true conversation up to it. Answers
    longer than ``max_tokens`` do not count, since nobody writes a whole description word for word.

    Args:
        dataset: the rows.
        processor: the model's processor.
        batch_size: rows of a forward pass, over all ranks.
        max_tokens: tokens of the longest answer, with its end marker, that is asked for.
        limit: take so many rows, evenly spread; None for all.
        exact_match: whether to let the model answer; without it there is only the loss.
        loss: as for ``loop.train``. If its figures have "answers", terms beside these (such as the balance of experts,
            which is for training) do not count.

    Raises:
        UserError: there are no rows.
    """

    def __init__(
        self,
        dataset: Dataset,
        processor: Processor,
        *,
        batch_size: int,
        max_tokens: int = 32,
        limit: int | None = None,
        exact_match: bool = True,
        loss: Loss | None = None,
    ) -> None:
        if not len(dataset) or (limit is not None and limit < 1):
            raise UserError("there are no rows to validate on; hold some out (--hold-out)")
        if limit is not None and limit < len(dataset):
            dataset = dataset.take([index * len(dataset) // limit for index in range(limit)])
        self._dataset, self._processor = dataset, processor
        self._batch_size, self._max_tokens = batch_size, max_tokens
        self._loss = loss or AnswerLoss(aux_loss_coef=0.0)
        # No processes of its own: images that fit into the loader's memory are decoded at the first validation only.
        self._loader = Loader(dataset, processor, batch_size, workers=0)
        self._asked = _all_asked(dataset, processor, max_tokens) if exact_match else []

    def __call__(self, model: Model) -> dict[str, float]:
        """Measures a model in evaluation mode: without dropout, and without a capacity that is for training.

        Returns:
            ``loss`` per learnt token, ``rows``, and of ``answers`` that were asked for (if there were any) the share
            ``exact_match`` that was right. All ranks get the same figures.

        Raises:
            UserError: an image cannot be decoded; the message names its row.
        """
        ranks = Ranks()
        share = ranks.rank, ranks.size
        with _evaluating(model):
            sums = mx.array([*self._loss_sums(model, *share), *self._num_right(model, *share)], mx.float32)
        mx.clear_cache()  # these buffers would not fit the shapes of training
        total, count, right, asked = np.array(ranks.sum([sums])[0]).tolist()
        figures = {"loss": total / count, "rows": len(self._dataset)}
        return {**figures, "exact_match": right / asked, "answers": int(asked)} if asked else figures

    def _loss_sums(self, model: Model, rank: int, ranks: int) -> tuple[float, float]:
        """This rank's loss, summed over learnt tokens, and their number."""
        sums = np.zeros(2)
        for number in range(self._loader.plan.steps_per_epoch):  # an epoch takes each row once
            total, count, figures = self._loss(model, self._loader(number, rank, ranks))
            sums += np.array(mx.stack([figures.get("answers", total), count]).astype(mx.float32))
        return float(sums[0]), float(sums[1])

    def _num_right(self, model: Model, rank: int, ranks: int) -> tuple[int, int]:
        """How many answers were right, of how many that this rank asked for."""
        asked = self._asked[rank::ranks]
        given = answers_after(
            model,
            self._processor,
            [self._dataset.tokens(one.row)[0][: one.start] for one in asked],
            lambda index: self._pixels(asked[index]),
            max_tokens=self._max_tokens,
            batch_size=self._batch_size,
        )
        return sum(same_answer(mine, one.text) for mine, one in zip(given, asked, strict=True)), len(asked)

    def _pixels(self, asked: Asked) -> np.ndarray | None:
        """The images that have been shown before an answer."""
        slots = self._dataset.tokens(asked.row)[0][: asked.start] == self._dataset.image_token_id
        shown = int(slots.sum()) // max(1, self._dataset.tokens_per_image)
        pixels = self._loader.pixels(asked.row) if shown else None
        return None if pixels is None else pixels[:shown]


def _all_asked(dataset: Dataset, processor: Processor, max_tokens: int) -> list[Asked]:
    """All answers that are short enough; those with equally long conversations before them are neighbours."""
    asked = []
    for row in range(len(dataset)):
        ids, learnt = dataset.tokens(row)
        # An answer is a stretch of tokens that are learnt; what stands before it is what the model is shown.
        edges = np.flatnonzero(np.diff(np.concatenate([[False], learnt, [False]]).astype(np.int8)))
        asked += [
            Asked(row, start, answer_text(processor, ids[start:end]))
            for start, end in edges.reshape(-1, 2).tolist()
            if end - start <= max_tokens
        ]
    return sorted(asked, key=lambda one: one.start)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and the former one at the end, however it ends."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)
