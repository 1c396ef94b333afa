"""Rows held out from training, with none of their images in it."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Sequence

from gm_mlx.errors import UserError
from gm_mlx.train.rows import Row, image_key

SHARE, MOST = 0.05, 200  # of rows that are held out when nobody says how many


def split(rows: Sequence[Row], hold_out: float | int | None, seed: int = 0) -> tuple[list[int], list[int]]:
    """Choose rows to hold out.

    Rows that share an image stay together, directly or through other rows; so do rows without images and with the same
    texts. The hold-out is made of such groups, drawn by the seed, and never has more rows than asked for.

    Args:
        rows: the rows.
        hold_out: a share below 1, or a number of rows; None for a twentieth, at most 200, and for none where images
            are shared too widely for that.
        seed: of the draw. It draws the same rows from data that has the same rows in another order.

    Returns:
        Indices of the rows to train on and of those held out, both ascending.

    Raises:
        UserError: that many rows cannot be held out.
    """
    if hold_out is None:
        count = min(MOST, round(SHARE * len(rows)))
    else:
        count = round(hold_out * len(rows)) if isinstance(hold_out, float) else hold_out
    if isinstance(hold_out, float) and not 0 <= hold_out < 1:
        raise UserError(f"a share of {hold_out} cannot be held out; give a share below 1 or a number of rows")
    if not 0 <= count < max(1, len(rows)):
        raise UserError(f"{count} of {len(rows)} rows cannot be held out; at least one must be left to train on")
    groups = _groups(rows)
    order = sorted(groups, key=lambda name: (random.Random(f"{seed}-{name}").random(), name))
    held: list[int] = []
    for name in order:
        if len(held) + len(groups[name]) <= count:
            held += groups[name]
    if count and not held and hold_out is not None:
        least = min(map(len, groups.values()))
        raise UserError(
            f"{count} rows cannot be held out: the smallest group of rows that share images has {least}; hold out as "
            "many, or give data of its own for validation"
        )
    chosen = set(held)
    return [row for row in range(len(rows)) if row not in chosen], sorted(held)


def _groups(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Rows by the name of what they share, directly or through other rows: the least of their keys."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    keys = [[f"image {image_key(image)}" for image in row.images] or [_text_key(row)] for row in rows]
    for mine in keys:
        for key in mine[1:]:
            low, high = sorted((root(mine[0]), root(key)))
            parent[high] = low
    groups: dict[str, list[int]] = defaultdict(list)
    for index, mine in enumerate(keys):
        groups[root(mine[0])].append(index)
    return groups


def _text_key(row: Row) -> str:
    return f"text {hashlib.blake2b(row.texts, digest_size=16).hexdigest()}"
