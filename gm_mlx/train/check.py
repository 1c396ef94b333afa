"""Rows whose images can be opened, as far as headers tell, and how many rows there are twice."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from gm_mlx.errors import UserError
from gm_mlx.images import image_size
from gm_mlx.train.rows import ImageRef, Problem, Row, image_key, image_source


def checked_images(rows: Iterable[Row | Problem]) -> Iterator[Row | Problem]:
    """Rows with a missing, unreadable or oversized image become problems.

    Only headers are read, once per image: a file that is damaged behind its header is found when it is decoded.
    """
    reasons: dict[str, str | None] = {}
    for row in rows:
        if isinstance(row, Row):
            for image in row.images:
                key = image_key(image)
                if key not in reasons:
                    reasons[key] = _reason(image)
                if (reason := reasons[key]) is not None:
                    yield Problem(row.where, reason)
                    break
            else:
                yield row
        else:
            yield row


def _reason(image: ImageRef) -> str | None:
    if isinstance(image, str) and not os.path.lexists(image):
        name = image if image.isprintable() and len(image) < 300 else f"{image[:80]!r}..."
        return f"{name}: no such image; check its name, or name the folder that images are in (--images)"
    try:
        image_size(image_source(image))
    except UserError as error:
        return str(error)
    return None


def num_duplicates(rows: Iterable[Row]) -> int:
    """How many rows repeat an earlier one, word for word and with the same images."""
    seen: set[int] = set()
    total = 0
    for row in rows:
        seen.add(hash((row.texts, *map(image_key, row.images))))
        total += 1
    return total - len(seen)
