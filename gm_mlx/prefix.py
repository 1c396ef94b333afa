"""How much of a new prompt is in a key/value cache already.

Token ids alone cannot tell: all images look the same there. So a prompt is compared as a list of keys, in which a text
token is its id and an image position is the image's hash with the position's number. The same text about another image
then has nothing in common from the image on.
"""

from __future__ import annotations

from collections.abc import Sequence

Key = int | tuple[str, int]


def prompt_keys(ids: Sequence[int], image_token: int, tokens_per_image: int, hashes: Sequence[str]) -> list[Key]:
    """The keys of a prompt.

    Args:
        ids: token ids with every image slot at its full length.
        image_token: the id that fills the slots.
        tokens_per_image: positions of a slot.
        hashes: one hash per image, in the order of the slots.
    """
    positions = ((digest, index) for digest in hashes for index in range(tokens_per_image))
    return [next(positions) if token == image_token else token for token in ids]


def reusable(held: Sequence[Key], wanted: Sequence[Key]) -> int:
    """How many leading positions of ``wanted`` need not be computed when ``held`` is in the cache.

    At least one position is left over, since the next token comes from the last one's logits, and an image is reused
    whole or not at all, since its features come whole.
    """
    count = 0
    for mine, other in zip(held, wanted[:-1], strict=False):
        if mine != other:
            break
        count += 1
    if count < len(wanted) and isinstance(key := wanted[count], tuple):
        count -= key[1]
    return count
