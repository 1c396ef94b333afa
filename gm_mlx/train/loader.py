"""Batches of a data set, with their pixels: what the training loop calls.

A batch depends on its number, the rank and the seed only, so a run that is resumed, or that has more or fewer workers,
sees the same ones. What is read ahead is bounded, and images that fit into memory are decoded once.
"""

from __future__ import annotations

from concurrent.futures import Future
from types import TracebackType

import numpy as np

from gm_mlx.errors import UserError
from gm_mlx.images import normalize
from gm_mlx.processor import Processor
from gm_mlx.train.batches import Plan, padding
from gm_mlx.train.data import Batch, Example, collate
from gm_mlx.train.dataset import Dataset
from gm_mlx.train.image_pool import ImagePool
from gm_mlx.train.rows import image_source

AHEAD = 4  # images that are decoded ahead, per worker
BATCHES_AHEAD = 64  # but no further than this: where few rows have images, it would be a long way
MULTIPLE = 32  # batches are padded to multiples of it: few shapes, since a compiled step is compiled for each


class Loader:
    """A function from (number, rank, ranks) to a batch; close it, or use it in a ``with``.

    Args:
        dataset: the rows.
        processor: the model's processor.
        batch_size: rows of a step, over all ranks and parts; see ``batches.Plan``.
        parts: how many batches make a step: gradients of so many are added up before the model is changed.
        seed: of the shuffling.
        workers: processes that decode images; 0 for none but this one.
        cache_bytes: memory for decoded images. There they have 8 bits, a quarter of what a batch has.
        multiple: batches are padded to a multiple of this length.
    """

    def __init__(
        self,
        dataset: Dataset,
        processor: Processor,
        batch_size: int,
        *,
        parts: int = 1,
        seed: int = 0,
        workers: int = 2,
        cache_bytes: int = 1 << 30,
        multiple: int = MULTIPLE,
    ) -> None:
        self.dataset = dataset
        self.plan = Plan(dataset.lengths, batch_size, seed)
        self._parts = parts
        self._image, self._pad_id = processor.image, processor.tokenizer.pad_id or 0
        self._pool = None if processor.image is None else ImagePool(processor.image, workers)
        self._ahead, self._multiple = AHEAD * workers, multiple
        self._cache: dict[int, np.ndarray] = {}
        self._room = cache_bytes
        self._coming: dict[int, Future[np.ndarray]] = {}

    def __call__(self, number: int, rank: int = 0, ranks: int = 1) -> Batch:
        """A rank's batch with a number. Step s takes the numbers ``s * parts`` to ``(s + 1) * parts - 1``.

        Returns:
            The batch. Where a step has fewer rows than batches, some have nothing to learn, so that all ranks take it.

        Raises:
            UserError: an image cannot be decoded; the message names its row.
        """
        rows = self._rows(number, rank, ranks)
        if not rows:
            batch = self._batch([int(self.dataset.lengths.argmin())])
            return batch._replace(learnt=np.zeros_like(batch.learnt))
        self._read_ahead(number, rank, ranks)
        return self._batch(rows)

    def names(self, step: int) -> list[str]:
        """Where the rows of a step come from, over all ranks and parts, for messages."""
        return [str(self.dataset.rows[row].where) for row in self.plan.rows(step)]

    def pixels(self, row: int) -> np.ndarray | None:
        """A row's images as the model takes them, float32 [N, size, size, 3]; None when it has none.

        Raises:
            UserError: an image cannot be decoded; the message names the row.
        """
        squares = [self._square(image, row) for image in self.dataset.images_of(row)]
        return normalize(np.stack(squares), self._image) if squares and self._image is not None else None

    def padding(self, ranks: int = 1) -> float:
        """The share of padding among the positions of an epoch's batches."""
        return padding(self.plan, self.dataset.lengths, self._parts * ranks, self._multiple)

    def close(self) -> None:
        """End the worker processes."""
        if self._pool is not None:
            self._pool.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _rows(self, number: int, rank: int, ranks: int) -> list[int]:
        step, part = divmod(number, self._parts)
        return self.plan.share(step, part * ranks + rank, self._parts * ranks).tolist()

    def _batch(self, rows: list[int]) -> Batch:
        examples = []
        for row in rows:
            ids, learnt = self.dataset.tokens(row)
            examples.append(Example(ids, learnt, self.pixels(row)))
        return collate(examples, self._pad_id, self._multiple)

    def _read_ahead(self, number: int, rank: int, ranks: int) -> None:
        """Ask for the images of this batch and of those to come, and forget what was asked for others."""
        if len(self._cache) == len(self.dataset.images):
            return
        wanted: list[int] = []
        for later in range(number, number + 1 + (BATCHES_AHEAD if self._ahead else 0)):
            if later > number and len(wanted) >= self._ahead:
                break
            rows = self._rows(later, rank, ranks)
            wanted += [image for row in rows for image in self.dataset.images_of(row) if image not in self._cache]
        for image in self._coming.keys() - set(wanted):
            self._coming.pop(image).cancel()
        for image in wanted:
            self._ask(image)

    def _ask(self, image: int) -> Future[np.ndarray]:
        assert self._pool is not None
        if image not in self._coming:
            self._coming[image] = self._pool.submit(image_source(self.dataset.images[image]))
        return self._coming[image]

    def _square(self, image: int, row: int) -> np.ndarray:
        """uint8 [size, size, 3]."""
        if image in self._cache:
            return self._cache[image]
        try:
            square = self._ask(image).result()
        except UserError as error:
            raise UserError(f"{self.dataset.rows[row].where}: {error}") from error
        # Nothing is ever thrown out: an epoch takes every image once, so what is kept is as good as anything else.
        fits = square.nbytes <= self._room
        if fits:
            self._room -= square.nbytes
            self._cache[image] = square
        if fits or not self._ahead:  # where nothing is read ahead, nobody waits for it
            self._coming.pop(image, None)
        return square
