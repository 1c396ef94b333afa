"""Rows of training data: conversations with the images they are about.

All formats are read into this one form. It is small, because a data set has hundreds of thousands of rows and all of
them stay in memory: the texts of a row are one byte string, and an image is a file's name, or a way to fetch it again
from the data that it is part of. Nothing here holds pixels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gm_mlx.errors import UserError

Content = str | list[str | None]
"""A message's text, or its texts and image slots (None) in their order."""


class Where(NamedTuple):
    """Where a row comes from.

    Attributes:
        file: the file, folder or repository.
        unit: what is counted there: "line", "record" of a JSON list, "row" of a table.
        number: counted from 1.
        line: the line on which a record begins.
    """

    file: str
    unit: str
    number: int
    line: int | None = None

    def __str__(self) -> str:
        line = "" if self.line is None else f" (line {self.line})"
        return f"{self.file}: {self.unit} {self.number}{line}"


@dataclass(frozen=True, slots=True)
class Stored:
    """An image that is part of the data.

    Attributes:
        digest: a hash of its content.
        read: fetches the content of the image file.
    """

    digest: str
    read: Callable[[], bytes] = field(compare=False)


ImageRef = str | Stored
"""A file's path, or an image in the data."""


def image_key(image: ImageRef) -> str:
    """What is equal for the same image. A file that lies under two names counts as two images."""
    return os.path.normpath(image) if isinstance(image, str) else image.digest


def image_source(image: ImageRef) -> str | bytes:
    """The path, or the content of the image file."""
    return image if isinstance(image, str) else image.read()


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation that ends with an answer.

    Attributes:
        where: where it was read.
        texts: JSON: the system text or null, then the ``Content`` of each turn, the user's first.
        images: one per slot, in the order of the slots.
    """

    where: Where
    texts: bytes
    images: tuple[ImageRef, ...] = ()

    @classmethod
    def of(cls, where: Where, system: str | None, turns: Sequence[Content], images: Sequence[ImageRef] = ()) -> Row:
        """A row of a system text, if there is one, and turns of which the user has the first."""
        # Broken surrogates are legal in JSON's escapes, so texts may have them.
        texts = json.dumps([system, *turns], ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
        return cls(where, texts, tuple(images))

    @property
    def turns(self) -> list[Content]:
        """The contents of the turns."""
        return json.loads(self.texts)[1:]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as ``Processor.encode_supervised`` takes it."""
        system, *turns = json.loads(self.texts)
        messages = [] if system is None else [{"role": "system", "content": system}]
        for index, content in enumerate(turns):
            parts = content if isinstance(content, str) else [_part(part) for part in content]
            messages.append({"role": "assistant" if index % 2 else "user", "content": parts})
        return messages


def _part(part: str | None) -> dict[str, str]:
    return {"type": "image"} if part is None else {"type": "text", "text": part}


class Problem(NamedTuple):
    """A row that cannot be learnt from, and why."""

    where: Where
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class BadRows(UserError):
    """Rows that cannot be learnt from, or whatever else they are for; the message names the first of them.

    Attributes:
        problems: all of them.
    """

    def __init__(self, problems: Sequence[Problem], total: int, purpose: str = "learnt from") -> None:
        self.problems = list(problems)
        bad = f"{len(problems)} of {total} rows cannot be {purpose}"
        remedy = ", or leave such rows out (--skip-bad)" if len(problems) < total else ""
        super().__init__(f"{bad}; the first: {problems[0]}; correct the data{remedy}")


def listing(problems: Sequence[Problem], most: int = 20) -> list[str]:
    """Lines that show problems: the first ``most``, and how many more there are."""
    lines = [str(problem) for problem in problems[:most]]
    if len(problems) > most:
        lines.append(f"... and {len(problems) - most} more")
    return lines
