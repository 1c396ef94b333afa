"""A question of a benchmark, what is right for it, and what a model said.

Nothing here holds pixels: a benchmark has up to a hundred thousand questions, and all of them stay in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from gm_mlx.train.rows import ImageRef, Where


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a picture, or about none.

    Attributes:
        where: where it was read.
        id: what the benchmark calls it. Some give one id to all questions about an image.
        text: what the model is asked.
        image: a file, or an image that is part of the data; None for a question without one.
        category: the part of the benchmark that it belongs to; empty where there are no parts.
        wanted: the right answer, or those that several people gave; empty where it is not known.
        options: of multiple choice: the letters that can be chosen, such as "ABCD".
        bundle: questions of one bundle count only together and are next to each other; empty for one by itself.
    """

    where: Where
    id: str | int
    text: str
    image: ImageRef | None = None
    category: str = ""
    wanted: tuple[str, ...] = ()
    options: str = ""
    bundle: str = ""


class Label(NamedTuple):
    """What a file of annotations says of a question; the fields are ``Question``'s."""

    wanted: tuple[str, ...]
    category: str = ""
    options: str = ""


Key = str | tuple[str, ...]
Labels = Mapping[Key, Label]
"""Annotations by what identifies a question in them."""


class Answered(NamedTuple):
    """A question and the model's answer to it."""

    question: Question
    text: str
