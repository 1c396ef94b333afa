"""From what a user names as data to rows that can be trained on: read, check, tokenize, hold out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gm_mlx.errors import UserError
from gm_mlx.processor import Processor
from gm_mlx.train.check import checked_images
from gm_mlx.train.dataset import Dataset, tokenized
from gm_mlx.train.rows import BadRows, Problem, Row
from gm_mlx.train.sources import read_rows
from gm_mlx.train.split import split as split_rows

Progress = Callable[[int], None]
EVERY = 256  # rows between two reports of progress


@dataclass(frozen=True)
class Prepared:
    """Data that is ready for training.

    Attributes:
        train: the rows to learn from.
        held_out: the rows to measure on; no image is in both.
        problems: the bad rows that were left out.
    """

    train: Dataset
    held_out: Dataset
    problems: list[Problem]


def prepare(
    sources: Sequence[str | Path],
    processor: Processor,
    *,
    max_length: int,
    images: str | Path | None = None,
    kind: str | None = None,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    hold_out: float | int | None = 0,
    seed: int = 0,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """Read, check and tokenize training data.

    Args:
        sources: files, folders or names of data sets; see ``sources.read_rows`` for these and for ``images``, ``kind``,
            ``columns`` and ``split``, which hold for all of them.
        processor: the model's processor.
        max_length: tokens that a row may have, the positions of its images among them.
        hold_out: a share below 1, a number of rows, or None for a few; see ``split.split``.
        seed: of the hold-out.
        skip_bad: leave bad rows out; otherwise one is enough to stop.
        progress: told how many rows were read.

    Raises:
        BadRows: there are bad rows; its ``problems`` are all of them.
        UserError: no data, no good rows, or as for ``read_rows``, ``tokenized`` and ``split``.
    """
    problems: list[Problem] = []
    rows = (
        row for source in sources for row in read_rows(source, images=images, kind=kind, columns=columns, split=split)
    )
    good = _good(checked_images(rows), problems, progress)
    dataset, unfit = tokenized(good, processor, max_length)
    problems = sorted(problems + unfit, key=lambda problem: (problem.where.file, problem.where.number))
    if problems and not (skip_bad and len(dataset)):
        raise BadRows(problems, len(dataset) + len(problems))
    if not len(dataset):
        raise UserError(f"{', '.join(map(str, sources)) or 'no data'}: has no rows; name data with rows")
    learnt, held = split_rows(dataset.rows, hold_out, seed)
    if not held:
        return Prepared(dataset, dataset.take([]), problems)
    return Prepared(dataset.take(learnt), dataset.take(held), problems)


def _good(rows: Iterable[Row | Problem], problems: list[Problem], progress: Progress | None) -> Iterator[Row]:
    """The rows that can be used; the others join the problems."""
    for number, row in enumerate(rows, 1):
        if progress is not None and number % EVERY == 0:
            progress(number)
        if isinstance(row, Row):
            yield row
        else:
            problems.append(row)
