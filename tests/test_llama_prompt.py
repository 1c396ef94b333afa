"""Keys and positions of prompts whose images take fewer positions than rows, as models with M-RoPE have them."""

from __future__ import annotations

import pytest

from gm_mlx.llama.prompt import Prompt
from gm_mlx.llama.vision import Picture
from gm_mlx.prefix import reusable

PICTURES = [Picture(0, number, rows=6, positions=3, chunk=None, owner=None) for number in range(2)]
PROMPT = Prompt([[5, 6], PICTURES[0], [7], PICTURES[1], [8, 9]], ["hash"])


def test_keys() -> None:
    assert PROMPT.keys[:3] == [5, 6, ("hash/0", 0)] and PROMPT.keys[8:10] == [7, ("hash/1", 0)]
    assert (len(PROMPT.keys), PROMPT.image_rows, PROMPT.ids) == (17, 12, [5, 6, 7, 8, 9])


@pytest.mark.parametrize(("row", "position"), [(0, 0), (1, 1), (2, 2), (8, 5), (9, 6), (15, 9), (16, 10), (17, 11)])
def test_positions(row: int, position: int) -> None:
    assert PROMPT.position(row) == position


@pytest.mark.parametrize(("changed", "row"), [(0, 0), (2, 2), (7, 2), (8, 8), (9, 9), (14, 9), (16, 16)])
def test_a_picture_is_reused_whole_or_not_at_all(changed: int, row: int) -> None:
    held = list(PROMPT.keys)
    held[changed] = -1
    assert reusable(held, PROMPT.keys) == row
