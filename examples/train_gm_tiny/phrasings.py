"""The words of the questions: positions, directions, phrasings and the mix of question kinds.

All 107 question strings of easy-VQA are here: those about "the shape" are asked of scenes with a single object, the
yes/no ones of every scene.
"""

from __future__ import annotations

POSITIONS = (
    ("top left", "top", "top right"),
    ("left", "middle", "right"),
    ("bottom left", "bottom", "bottom right"),
)
AT_POSITION = {
    "left": "on the left",
    "right": "on the right",
    "middle": "in the middle",
} | {name: f"at the {name}" for name in ("top left", "top", "top right", "bottom left", "bottom", "bottom right")}

# Direction: its axis, its sign along that axis, and its wordings between two things.
DIRECTIONS = {
    "left": ("x", -1, ("left of", "to the left of")),
    "right": ("x", 1, ("right of", "to the right of")),
    "above": ("y", -1, ("above",)),
    "below": ("y", 1, ("below", "under")),
}

PHRASINGS: dict[str, tuple[str, ...]] = {
    # easy-VQA's own wording of the colour question, then ours. {thing} is "circle", or "shape" when it is the only one.
    "colour": (
        "what color is the {thing}?",
        "what is the color of the {thing}?",
        "what color is the {thing}?",
        "what is the color of the {thing}?",
        "what colour is the {thing}?",
        "which color does the {thing} have?",
        "the {thing} is what color?",
    ),
    "shape of the only object": (
        "what shape does the image contain?",
        "what shape is in the image?",
        "what shape is present?",
        "what shape is it?",
        "which shape is in the picture?",
    ),
    "shape by colour": (
        "what is the {colour} shape?",
        "what is the {colour} shape?",
        "what shape is {colour}?",
        "which shape is {colour}?",
        "what shape is the {colour} object?",
        "what is the shape of the {colour} object?",
    ),
    # {a} is "a red shape", "a circle" or "an orange star"; {no} is the same without its article.
    "present": (
        "does the image contain {a}?",
        "is {a} present?",
        "is there {a} in the image?",
        "is there {a}?",
        "can you see {a}?",
        "does the picture show {a}?",
    ),
    "absent": (
        "does the image not contain {a}?",
        "is no {no} present?",
        "is there not {a} in the image?",
        "is there not {a}?",
    ),
    # {things} is "shapes", "objects", "circles", "red shapes" or "red circles".
    "count": (
        "how many {things} are there?",
        "how many {things} are in the image?",
        "how many {things} do you see?",
        "how many {things} does the image contain?",
        "what is the number of {things}?",
    ),
    # {ref} is a name that fits one object only: "circle", "red shape", "red circle" or "shape".
    "where": (
        "where is the {ref}?",
        "where in the image is the {ref}?",
        "in which part of the image is the {ref}?",
        "what is the position of the {ref}?",
    ),
    # {at} is "at the top left", "on the left", "in the middle".
    "shape at": (
        "what shape is {at}?",
        "which shape is {at}?",
        "what is the shape {at}?",
        "what shape do you see {at}?",
    ),
    "colour at": (
        "what color is the shape {at}?",
        "what is the color of the shape {at}?",
        "what colour is the shape {at}?",
        "which color does the shape {at} have?",
    ),
    "object at": (
        "what is {at}?",
        "what do you see {at}?",
        "what can you see {at}?",
        "describe what is {at}.",
    ),
    # {direction} is "left of", "to the left of", "above", "below", "under".
    "relation": (
        "is the {ref} {direction} the {other}?",
        "is the {ref} {direction} the {other} in the image?",
        "do you see the {ref} {direction} the {other}?",
        "can you see the {ref} {direction} the {other}?",
    ),
    "next to": (
        "what is {direction} the {other}?",
        "what do you see {direction} the {other}?",
        "which object is {direction} the {other}?",
        "what can you see {direction} the {other}?",
    ),
    "describe": (
        "describe the image.",
        "describe the picture.",
        "what do you see?",
        "what is in the image?",
        "what is in the picture?",
        "what does the image show?",
        "what do you see in the image?",
        "what is this?",
    ),
}

# Weights, not shares: what a scene cannot answer gives its turn away, so kinds that need several objects weigh more.
TRAINING_MIX = {
    "colour": 0.13,
    "shape": 0.14,
    "present": 0.16,
    "absent": 0.10,
    "count": 0.20,
    "where": 0.10,
    "at": 0.10,
    "relation": 0.18,
    "next": 0.12,
    "describe": 0.05,
}
# Share of each kind in the held-out set.
HELDOUT_MIX = {
    "colour": 0.12,
    "shape": 0.12,
    "present": 0.16,
    "absent": 0.10,
    "count": 0.18,
    "where": 0.10,
    "at": 0.08,
    "relation": 0.07,
    "next": 0.04,
    "describe": 0.03,
}


def with_article(noun: str) -> str:
    """``noun`` after "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """``"crosses"``, ``"red circles"``."""
    return noun + ("es" if noun.endswith("s") else "s")
