"""From a benchmark's files to questions that can be asked: read, annotate, choose, check, order."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from gm_mlx.errors import UserError
from gm_mlx.evaluate.benchmarks import Benchmark
from gm_mlx.evaluate.question import Labels, Question
from gm_mlx.images import image_size
from gm_mlx.train.rows import BadRows, ImageRef, Problem, image_key, image_source


class Prepared(NamedTuple):
    """What is asked.

    Attributes:
        questions: in the order of the benchmark's file.
        order: numbers of the questions as they are asked: those about one image follow each other, so that an engine
            reads the image once.
        problems: what is wrong with rows that are left out.
    """

    questions: list[Question]
    order: list[int]
    problems: list[Problem]


def prepare(
    benchmark: Benchmark,
    questions: Path,
    *,
    annotations: Path | None = None,
    images: Path | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Prepared:
    """Read a benchmark and check everything that can be wrong with it, but for damage inside of images.

    Args:
        benchmark: its row.
        questions: the question file, or a folder of them.
        annotations: the file or folder with the right answers.
        images: where images' names start from; without it, where the question file is.
        limit: take so many questions, evenly spread. A bundle is taken as a whole.
        skip_bad: leave out rows that cannot be asked.
        progress: told how many rows have been checked.

    Raises:
        BadRows: rows cannot be asked; its ``problems`` are all of them.
        UserError: a file cannot be read, or there is nothing to ask or to score.
    """
    try:
        labels = None if annotations is None else _labels(benchmark, annotations)
        found = [_labelled(row, benchmark, labels, annotations) for row in benchmark.read(questions)]
    except OSError as error:
        file = error.filename or questions
        raise UserError(f"{file}: cannot be read ({error.strerror or error}); check the path") from None
    chosen = _chosen([row for row in found if isinstance(row, Question)], limit)
    problems = [row for row in found if isinstance(row, Problem)]
    folder = images if images is not None else questions if questions.is_dir() else questions.parent
    checked = _Images(folder)
    asked: list[Question] = []
    for number, question in enumerate(chosen):
        try:
            asked.append(replace(question, text=_with_suffix(question.text, benchmark), image=checked(question.image)))
        except UserError as error:
            problems.append(Problem(question.where, str(error)))
        if progress is not None:
            progress(number + 1)
    if problems and not (skip_bad and asked):
        raise BadRows(problems, len(asked) + len(problems), "asked")
    if not asked:
        raise UserError(f"{questions}: has no questions; check that it is the file of {benchmark.name}")
    if benchmark.score is not None and benchmark.upload is None and not all(question.wanted for question in asked):
        raise UserError(f"{questions}: does not say what is right; give the benchmark's answers with --annotations")
    return Prepared(asked, _by_image(asked), problems)


def _labels(benchmark: Benchmark, annotations: Path) -> Labels:
    if benchmark.annotations is None:
        raise UserError(f"--annotations: {benchmark.name} reads none beside its questions; leave it out")
    return benchmark.annotations(annotations)


def _labelled(
    row: Question | Problem, benchmark: Benchmark, labels: Labels | None, annotations: Path | None
) -> Question | Problem:
    if labels is None or isinstance(row, Problem):
        return row
    label = labels.get(benchmark.key(row))
    if label is None:
        return Problem(row.where, f"{annotations} has no answer to it")
    return replace(
        row,
        wanted=label.wanted,
        category=label.category or row.category,
        options=label.options or row.options,
    )


def _chosen(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """About so many questions, from bundles that are evenly spread; in the file's order."""
    if limit is None or limit >= len(questions):
        return list(questions)
    bundles: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        bundles.setdefault(question.bundle or f"\0{number}", []).append(number)
    names = list(bundles)
    count = max(1, limit * len(names) // len(questions))
    taken = sorted(row for number in range(count) for row in bundles[names[number * len(names) // count]])
    return [questions[row] for row in taken]


def _with_suffix(text: str, benchmark: Benchmark) -> str:
    # LLaVA's files have it, and the files of a benchmark's makers have not.
    ending = benchmark.suffix.split("\n")[-1]
    return text if ending in text else f"{text}\n{benchmark.suffix}"


class _Images:
    """Finds images, and looks at the header of each once."""

    def __init__(self, folder: Path) -> None:
        self._folder = os.path.expanduser(folder)
        self._faults: dict[str, str | None] = {}

    def __call__(self, image: ImageRef | None) -> ImageRef | None:
        if image is None:
            return None
        if isinstance(image, str):
            image = os.path.join(self._folder, os.path.expanduser(image))
        key = image_key(image)
        if key not in self._faults:
            try:
                image_size(image_source(image))
                self._faults[key] = None
            except UserError as error:
                self._faults[key] = str(error)
        if (fault := self._faults[key]) is not None:
            raise UserError(fault)
        return image


def _by_image(questions: Sequence[Question]) -> list[int]:
    """Numbers of the questions, image by image, in the order in which the images come first."""
    first: dict[str, int] = {}
    images = []
    for number, question in enumerate(questions):
        name = f"\0{number}" if question.image is None else image_key(question.image)
        images.append(first.setdefault(name, number))
    return sorted(range(len(questions)), key=images.__getitem__)
