"""Which part of a prompt is in the cache already."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gm_mlx.prefix import Key, prompt_keys, reusable

SLOT = -200


def keys(ids: list[int], *hashes: str) -> list[Key]:
    return prompt_keys(ids, SLOT, 3, hashes)


IMAGE = [SLOT] * 3


def test_an_image_position_is_its_hash_and_number() -> None:
    assert keys([1, *IMAGE, 2, *IMAGE, *IMAGE], "a", "b", "a") == [
        1,
        *(("a", 0), ("a", 1), ("a", 2)),
        2,
        *(("b", 0), ("b", 1), ("b", 2)),
        *(("a", 0), ("a", 1), ("a", 2)),
    ]


@pytest.mark.parametrize(
    ("held", "wanted", "count"),
    [
        ([], [1, 2], 0),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 9], [1, 2, 3], 2),
        ([1, 2, 3, 4], [1, 2, 3], 2),  # one position is left to compute
        ([1, 2, 3], [1, 2, 3], 2),
        ([5], [5], 0),
        (keys([1, *IMAGE, 2], "a"), keys([1, *IMAGE, 2, 3], "a"), 5),
        (keys([1, *IMAGE, 2], "a"), keys([1, *IMAGE, 2, 3], "b"), 1),  # the same text, another image
        (keys([1, *IMAGE], "a"), keys([1, *IMAGE, *IMAGE, 3], "a", "b"), 4),
        (keys([1, *IMAGE], "a")[:3], keys([1, *IMAGE, 3], "a"), 1),  # half an image is none
        (keys([1, *IMAGE, *IMAGE], "a", "a")[:6], keys([1, *IMAGE, *IMAGE, 3], "a", "a"), 4),
        (keys([1, *IMAGE], "a"), keys([1, *IMAGE], "a"), 1),  # a prompt that ends with an image
        ([1, 7, 7, 7], keys([1, *IMAGE, 2], "a"), 1),
    ],
)
def test_reusable(held: list[Key], wanted: list[Key], count: int) -> None:
    assert reusable(held, wanted) == count


@given(
    st.lists(st.sampled_from(["t", "u", "A", "B"]), max_size=5),
    st.lists(st.sampled_from("tuAB"), min_size=1, max_size=5),
)
def test_what_is_reused_is_equal_and_ends_between_images(held: list[str], wanted: list[str]) -> None:
    def build(parts: list[str]) -> list[Key]:
        ids = [token for part in parts for token in (IMAGE if part.isupper() else [ord(part)])]
        return keys(ids, *(part for part in parts if part.isupper()))

    mine, other = build(held), build(wanted)
    count = reusable(mine, other)
    assert mine[:count] == other[:count]
    assert count < len(other)
    first = other[count]
    assert not isinstance(first, tuple) or first[1] == 0
