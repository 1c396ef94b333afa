"""A second reading of gm-tiny's questions: the answer derived from the scene, ambiguity refused.

Written without the generator's tables and code, so that a slip there is not repeated here.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

COLOURS = ["red", "green", "blue", "yellow", "black", "gray", "teal", "brown", "orange", "purple"]
SHAPES = ["circle", "rectangle", "triangle", "star", "cross"]
NEW_SHAPE = "ring"  # of examples/new_shape
POSITIONS = ["top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right"]


def matching(scene: Any, name: str) -> list[Any]:
    """The objects that a name such as "red shape", "circles" or "blue star" fits."""
    words = [re.sub(r"(?<=[a-z])(?<!cros)s$|(?<=cross)es$", "", word) for word in name.split()]
    assert all(word in [*COLOURS, *SHAPES, NEW_SHAPE, "shape", "object"] for word in words), name
    return [o for o in scene.objects if all(word in (o.shape, o.colour, "shape", "object") for word in words)]


def only(items: list[Any]) -> Any:
    assert len(items) == 1, "ambiguous question"
    return items[0]


def place(item: Any) -> str:
    """The name of the object's position, for an object well inside a ninth of the image."""
    row, column = (sum(value > border for border in (64 / 3, 128 / 3)) for value in (item.y, item.x))
    borders = [abs(value - border) for value in (item.x, item.y) for border in (64 / 3, 128 / 3)]
    assert min(borders) > 1.2, "ambiguous position"
    return POSITIONS[3 * row + column]


def at(scene: Any, words: str) -> Any:
    """The one object at a position, which no other may be said to be at."""
    name = re.sub(r"^(at|on|in) the ", "", words)
    places = {o: place(o) for o in scene.objects}
    if name in ("left", "right", "top", "bottom"):
        return only([o for o, p in places.items() if name in p.split()])
    return only([o for o, p in places.items() if p == name])


def offset(item: Any, other: Any, words: str) -> float:
    """How far ``item`` lies from ``other`` in the direction of the words, in pixels."""
    word = re.sub(r"^to the | of$", "", words)
    dx, dy = item.x - other.x, item.y - other.y
    return {"left": -dx, "right": dx, "above": -dy, "below": dy, "under": dy}[word]


def with_article(item: Any) -> str:
    return ("an " if item.colour == "orange" else "a ") + f"{item.colour} {item.shape}"


def beyond(scene: Any, words: str, name: str) -> Any:
    anchor = only(matching(scene, name))
    offsets = {o: offset(o, anchor, words) for o in scene.objects if o is not anchor}
    assert not any(2 < value < 8 for value in offsets.values()), "ambiguous direction"
    return only([o for o, value in offsets.items() if value >= 8])


def relation(scene: Any, name: str, words: str, other: str) -> str:
    item, anchor = only(matching(scene, name)), only(matching(scene, other))
    assert item is not anchor
    assert abs(offset(item, anchor, words)) >= 8, "ambiguous direction"
    return "yes" if offset(item, anchor, words) > 0 else "no"


def description(scene: Any) -> str:
    order = sorted(scene.objects, key=lambda o: (POSITIONS.index(place(o)) // 3, o.x))
    for a, b in pairwise(order):
        assert POSITIONS.index(place(a)) // 3 != POSITIONS.index(place(b)) // 3 or b.x - a.x >= 4, "ambiguous order"
    words = dict.fromkeys(POSITIONS, "at the ") | {"left": "on the ", "right": "on the ", "middle": "in the "}
    return ", ".join(f"{with_article(o)} {words[place(o)]}{place(o)}" for o in order) or "nothing"


NAME = rf"((?:(?:{'|'.join(COLOURS)}) )?(?:{'|'.join(SHAPES)}|{NEW_SHAPE}|shape))"
AT = r"((?:at|on|in) the (?:(?:top |bottom )?(?:left|right)|top|bottom|middle))"
DIRECTION = r"((?:to the )?(?:left|right) of|above|below|under)"
WITH = r"(?:can you see|do you see|is)"
# The first pattern that fits a whole question answers it.
ORACLE: list[tuple[str, Any]] = [
    (
        r"(?:describe the (?:image|picture)|what do you see(?: in the image)?"
        r"|what is (?:this|in the (?:image|picture))|what does the image show)[?.]",
        description,
    ),
    (rf"{WITH} the {NAME} {DIRECTION} the {NAME}(?: in the image)?\?", relation),
    (
        rf"(?:what is|what (?:do|can) you see|which object is) {DIRECTION} the {NAME}\?",
        lambda scene, words, name: with_article(beyond(scene, words, name)),
    ),
    (
        rf"(?:what is the color of|what colou?r is|which color does) the shape {AT}(?: have)?\?",
        lambda scene, words: at(scene, words).colour,
    ),
    (
        rf"(?:(?:what|which) shape is|what is the shape|what shape do you see) {AT}\?",
        lambda scene, words: at(scene, words).shape,
    ),
    (
        rf"(?:what is|what (?:do|can) you see|describe what is) {AT}[?.]",
        lambda scene, words: with_article(at(scene, words)),
    ),
    (
        rf"(?:where is|where in the image is|in which part of the image is|what is the position of) the {NAME}\?",
        lambda scene, name: place(only(matching(scene, name))),
    ),
    (
        r"(?:how many|what is the number of) (.+?)"
        r"(?: are there| are in the image| do you see| does the image contain)?\?",
        lambda scene, name: str(len(matching(scene, name))),
    ),
    (
        r"what shape (?:does the image contain|is in the image|is present|is it)\?|which shape is in the picture\?",
        lambda scene: only(scene.objects).shape,
    ),
    (
        r"(?:what is the|(?:what|which) shape is(?: the)?|what is the shape of the) (\w+)(?: shape| object)?\?",
        lambda scene, name: only(matching(scene, name)).shape,
    ),
    (
        r"(?:what is the color of|what colou?r is|which color does)? ?the (\w+)(?: have| is what color)?\?",
        lambda scene, name: only(matching(scene, name)).colour,
    ),
    (
        rf"(?:does the image not contain|is there not|is no) (?:an? )?{NAME}(?: present| in the image)?\?",
        lambda scene, name: "no" if matching(scene, name) else "yes",
    ),
    (
        rf"(?:does the image contain|is there|is|can you see|does the picture show) an? {NAME}"
        r"(?: present| in the image)?\?",
        lambda scene, name: "yes" if matching(scene, name) else "no",
    ),
]


def derive(scene: Any, question: str) -> str:
    """The answer to ``question``; an AssertionError when it is ambiguous or not understood."""
    for pattern, answer in ORACLE:
        if found := re.fullmatch(pattern, question):
            return answer(scene, *found.groups())
    raise AssertionError(f"no pattern fits {question!r}")
