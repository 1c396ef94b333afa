"""Which rows a step learns from: a function of the seed and the step's number, and of nothing else.

Each epoch takes each row once, in its own order. Rows of like length share a batch, so that little of it is padding:
of the shuffled rows, stretches of some dozen batches are sorted by length, cut into batches, and the batches shuffled
again (LLaVA's ``group_by_modality_length`` and Hugging Face's ``LengthGroupedSampler`` do the same). Rows without
images are short, so they are mostly among themselves, too.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from gm_mlx.errors import UserError

STRETCH = 50  # batches that are sorted together; with more, batches would be ever more alike from epoch to epoch


class Plan:
    """The batches of all steps.

    A step's batch is shared by R machines, each of which may take its share in P parts, one after another, so of
    ``R * P`` shares. However many machines and parts there are, a step learns from the same rows.

    Args:
        lengths: int [N], tokens of each row.
        batch_size: rows of a step, over all machines and parts. An epoch's last batch is not a small rest: an epoch's
            batches have this size or a little less, and differ by one row at most.
        seed: of the shuffling.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int = 0) -> None:
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: must be at least 1")
        if not len(lengths):
            raise UserError("there are no rows to learn from; check the data")
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        self.steps_per_epoch = -(-len(lengths) // batch_size)
        self._epoch = lru_cache(maxsize=2)(self._drawn)  # two: reading ahead crosses from one to the next

    def rows(self, step: int) -> np.ndarray:
        """Indices of the rows of a step, counted from zero, by ascending length."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[index]

    def share(self, step: int, number: int = 0, shares: int = 1) -> np.ndarray:
        """The rows of one of a step's shares: neighbours in length. None when there are more shares than rows."""
        return np.array_split(self.rows(step), shares)[number]

    def _drawn(self, epoch: int) -> list[np.ndarray]:
        order = self._shuffled(len(self._lengths), epoch, 0)
        batches: list[np.ndarray] = []
        sizes = [len(part) for part in np.array_split(order, self.steps_per_epoch)]
        ends = np.cumsum([0, *sizes])
        # Few batches are not sorted as a whole: there would be no chance left in them.
        stretch = max(1, min(STRETCH, self.steps_per_epoch // 4))
        for first in range(0, len(sizes), stretch):
            last = min(first + stretch, len(sizes))
            rows = order[ends[first] : ends[last]]
            rows = rows[np.argsort(self._lengths[rows], kind="stable")]
            batches += np.split(rows, ends[first + 1 : last] - ends[first])
        shuffled = [batches[index] for index in self._shuffled(len(batches), epoch, 1)]
        if epoch == 0:
            # What needs most memory comes first: if it is too much, that is known at once and not after hours.
            largest = max(range(len(shuffled)), key=lambda index: len(shuffled[index]) * self._longest(shuffled[index]))
            shuffled.insert(0, shuffled.pop(largest))
        return shuffled

    def _longest(self, rows: np.ndarray) -> int:
        return int(self._lengths[rows[-1]])

    def _shuffled(self, size: int, *key: int) -> np.ndarray:
        """The numbers below ``size`` in an order that the seed and the key decide.

        NumPy promises that a bit generator's raw output stays the same in all its versions, but not its permutations.
        """
        return np.argsort(np.random.PCG64([self._seed, *key]).random_raw(size), kind="stable")


def padding(plan: Plan, lengths: np.ndarray, shares: int = 1, multiple: int = 1) -> float:
    """The share of padding among the positions of an epoch's batches.

    Args:
        plan: the batches.
        lengths: int [N], tokens of each row.
        shares: how many shares a batch is computed in.
        multiple: batches are padded to a multiple of this length.
    """
    real = padded = 0
    for step in range(plan.steps_per_epoch):
        for rows in np.array_split(plan.rows(step), shares):
            if len(rows):
                longest = int(lengths[rows[-1]])
                real += int(lengths[rows].sum())
                padded += len(rows) * (longest + -longest % multiple)
    return 1 - real / padded
