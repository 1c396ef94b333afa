"""Questions and answers about a scene, in lower-case English, none of them ambiguous.

A finder per kind picks something that may be asked of a scene: the form of words (a key of ``PHRASINGS``), what to fill
in, and the answer. As in easy-VQA the answer to a negated question ("is there not a circle?") is "yes" when the thing
is absent.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

from phrasings import (
    AT_POSITION,
    DIRECTIONS,
    HELDOUT_MIX,
    PHRASINGS,
    POSITIONS,
    TRAINING_MIX,
    plural,
    with_article,
)
from scenes import COLOURS, IMAGE_SIZE, SHAPES, Object, Scene, band, sample_scene, scene_rng

Fact = tuple[str, dict[str, str], str]  # form, slots, answer
Question = tuple[str, str, str]  # question, answer, kind

RELATION_MARGIN = 8.0  # pixels between two centres along an axis, before one is "left of" the other
NOT_NEXT_MARGIN = 2.0  # and at most so many for an object that is not
ORDER_MARGIN = 4.0  # pixels between neighbours in a row, before "describe" may be asked


def position(item: Object) -> str | None:
    """The object's name in ``POSITIONS``, None when its centre is too close to a border between two."""
    row, column = band(item.y), band(item.x)
    return None if row is None or column is None else POSITIONS[row][column]


def _third(value: float) -> int:
    return min(2, int(value * 3 / IMAGE_SIZE))


def reading_order(scene: Scene) -> list[Object]:
    """The objects by third of the image from the top, then from left to right."""
    return sorted(scene.objects, key=lambda item: (_third(item.y), item.x))


def caption(scene: Scene) -> str:
    """``"a red circle at the top left, a blue star in the middle"`` in reading order, or ``"nothing"``.

    An object too close to call is put into the third of the image that its centre is in; such a scene has a caption for
    training but is never asked to be described.
    """
    parts = [f"{named(o)} {AT_POSITION[POSITIONS[_third(o.y)][_third(o.x)]]}" for o in reading_order(scene)]
    return ", ".join(parts) or "nothing"


def named(item: Object) -> str:
    """The object with its article: ``"an orange star"``."""
    return with_article(f"{item.colour} {item.shape}")


def references(scene: Scene, item: Object) -> list[str]:
    """The names that fit ``item`` and nothing else in the scene, such as ``["star", "red shape", "red star"]``."""
    names = [item.shape, f"{item.colour} shape", f"{item.colour} {item.shape}"]
    fitting = Counter(name for o in scene.objects for name in (o.shape, f"{o.colour} shape", f"{o.colour} {o.shape}"))
    unique = [name for name in names if fitting[name] == 1]
    return [*unique, "shape"] if len(scene.objects) == 1 else unique


def _referable(scene: Scene, rng: random.Random) -> tuple[Object, str] | None:
    options = [(item, name) for item in scene.objects for name in references(scene, item)]
    return rng.choice(options) if options else None


def _colour(scene: Scene, rng: random.Random) -> Fact | None:
    counts = Counter(o.shape for o in scene.objects)
    options = [o for o in scene.objects if counts[o.shape] == 1]
    if not options:
        return None
    item = rng.choice(options)
    thing = rng.choice(("shape", item.shape)) if len(scene.objects) == 1 else item.shape
    return "colour", {"thing": thing}, item.colour


def _shape(scene: Scene, rng: random.Random) -> Fact | None:
    counts = Counter(o.colour for o in scene.objects)
    options = [o for o in scene.objects if counts[o.colour] == 1]
    if not options:
        return None
    item = rng.choice(options)
    if len(scene.objects) == 1 and rng.random() < 0.6:
        return "shape of the only object", {}, item.shape
    return "shape by colour", {"colour": item.colour}, item.shape


def _noun(scene: Scene, rng: random.Random, there: bool) -> str | None:
    """A thing that is in the scene, or is not: "red shape", "circle" or "red circle"."""
    shapes, colours = {o.shape for o in scene.objects}, {o.colour for o in scene.objects}
    pairs = {(o.colour, o.shape) for o in scene.objects}
    level = rng.random()
    if level < 0.3:
        nouns = [name for name in SHAPES if (name in shapes) == there]
    elif level < 0.65:
        nouns = [f"{name} shape" for name in COLOURS if (name in colours) == there]
    elif there:
        nouns = [f"{o.colour} {o.shape}" for o in scene.objects]
    else:
        absent = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in pairs]
        # A thing that shares its colour or its shape with something there is the harder question.
        close = [(c, s) for c, s in absent if c in colours or s in shapes]
        nouns = [f"{c} {s}" for c, s in (close if close and rng.random() < 0.75 else absent)]
    return rng.choice(nouns) if nouns else None


def _existence(scene: Scene, rng: random.Random, form: str, answers: Mapping[bool, str]) -> Fact | None:
    there = rng.random() < 0.5
    noun = _noun(scene, rng, there)
    return (form, {"a": with_article(noun), "no": noun}, answers[there]) if noun else None


def _present(scene: Scene, rng: random.Random) -> Fact | None:
    return _existence(scene, rng, "present", {True: "yes", False: "no"})


def _absent(scene: Scene, rng: random.Random) -> Fact | None:
    return _existence(scene, rng, "absent", {True: "no", False: "yes"})


def _count(scene: Scene, rng: random.Random) -> Fact | None:
    names = [(o.shape, f"{o.colour} shape", f"{o.colour} {o.shape}") for o in scene.objects]
    # Most things are there once, so what is there twice or not at all is asked for more often than it comes up.
    level = rng.choices(("all", "some", "none"), (0.3, 0.5, 0.2 if len(names) > 1 else 0.6))[0]
    if level == "all" or not names:
        return "count", {"things": rng.choice(("shapes", "objects"))}, str(len(names))
    totals = Counter(name for fitting in names for name in fitting)
    repeated = [name for name, total in totals.items() if total > 1]
    if level == "none":
        noun = _noun(scene, rng, there=False)
    else:
        noun = rng.choice(repeated if repeated and rng.random() < 0.6 else list(totals))
    return ("count", {"things": plural(noun)}, str(totals[noun])) if noun else None


def _where(scene: Scene, rng: random.Random) -> Fact | None:
    options = [(ref, place) for o in scene.objects if (place := position(o)) for ref in references(scene, o)]
    if not options:
        return None
    ref, place = rng.choice(options)
    return "where", {"ref": ref}, place


def _at(scene: Scene, rng: random.Random) -> Fact | None:
    item = rng.choice(scene.objects) if scene.objects else None
    if item is None or not _alone_at(scene, item):
        return None
    form, answer = rng.choice((("shape at", item.shape), ("colour at", item.colour), ("object at", named(item))))
    return form, {"at": AT_POSITION[position(item) or ""]}, answer


def _alone_at(scene: Scene, item: Object) -> bool:
    """Whether ``item``'s position names it alone: "on the left" also takes in what is at the top left."""
    cells = [(band(o.y), band(o.x)) for o in scene.objects]
    if any(row is None or column is None for row, column in cells):
        return False
    row, column = band(item.y), band(item.x)
    if (row, column) == (1, 1) or (row != 1 and column != 1):
        return cells.count((row, column)) == 1
    return sum(c == column if row == 1 else r == row for r, c in cells) == 1


def _relation(scene: Scene, rng: random.Random) -> Fact | None:
    first, second = _referable(scene, rng), _referable(scene, rng)
    if first is None or second is None or first[0] is second[0]:
        return None
    (item, ref), (anchor, other) = first, second
    word = rng.choice(list(DIRECTIONS))
    axis, sign, words = DIRECTIONS[word]
    distance = sign * (getattr(item, axis) - getattr(anchor, axis))
    if abs(distance) < RELATION_MARGIN:
        return None
    slots = {"ref": ref, "direction": rng.choice(words), "other": other}
    return "relation", slots, "yes" if distance > 0 else "no"


def _next(scene: Scene, rng: random.Random) -> Fact | None:
    found = _referable(scene, rng)
    if found is None:
        return None
    anchor, other = found
    axis, sign, words = DIRECTIONS[rng.choice(list(DIRECTIONS))]
    distances = [(sign * (getattr(o, axis) - getattr(anchor, axis)), o) for o in scene.objects if o is not anchor]
    beyond = [o for distance, o in distances if distance > NOT_NEXT_MARGIN]
    if len(beyond) != 1 or max(distance for distance, _ in distances) < RELATION_MARGIN:
        return None
    return "next to", {"direction": rng.choice(words), "other": other}, named(beyond[0])


def _describe(scene: Scene, rng: random.Random) -> Fact | None:
    if any(position(o) is None for o in scene.objects):
        return None
    ordered = reading_order(scene)
    for a, b in pairwise(ordered):
        if _third(a.y) == _third(b.y) and b.x - a.x < ORDER_MARGIN:
            return None
    return "describe", {}, caption(scene)


FINDERS = {
    "colour": _colour,
    "shape": _shape,
    "present": _present,
    "absent": _absent,
    "count": _count,
    "where": _where,
    "at": _at,
    "relation": _relation,
    "next": _next,
    "describe": _describe,
}


def ask(scene: Scene, rng: random.Random, kind: str, tries: int = 6) -> Question | None:
    """A question of one kind, or None when the scene offers none (or luck found none in ``tries``)."""
    for _ in range(tries):
        fact = FINDERS[kind](scene, rng)
        if fact is not None:
            form, slots, answer = fact
            return rng.choice(PHRASINGS[form]).format(**slots), answer, kind
    return None


def questions_for(
    scene: Scene, rng: random.Random, n: int, mix: Mapping[str, float] = TRAINING_MIX
) -> list[tuple[str, str, str]]:
    """Up to ``n`` different questions about a scene, as ``(question, answer, kind)``.

    Args:
        scene: the scene.
        rng: source of all choices.
        n: how many to ask; fewer come back when the scene offers fewer.
        mix: relative share of each kind; a kind that the scene cannot answer gives its turn to another.
    """
    kinds, weights = list(mix), list(mix.values())
    found: dict[str, Question] = {}
    for kind in rng.choices(kinds, weights, k=3 * n):
        question = ask(scene, rng, kind)
        if question is not None:
            found.setdefault(question[0], question)
        if len(found) == n:
            break
    return list(found.values())


def as_typed(question: str, rng: random.Random) -> str:
    """Mostly the question itself, else as a hurried or a careful person types it: "What is it?", "what is it"."""
    style = rng.random()
    if style < 0.12:
        question = question[0].upper() + question[1:]
    return question[:-1] if 0.09 < style < 0.15 else question


def heldout(n: int = 1000, seed: int = 0) -> list[tuple[Scene, str, str, str]]:
    """The held-out questions, at most two per scene, as ``(scene, question, answer, kind)``.

    The scenes are drawn as for training, from a random source of their own, so a third is easy-VQA-like. The kinds
    come in the shares of ``HELDOUT_MIX``, whatever the scenes favour; "present" takes what rounding leaves.
    """
    left = Counter({kind: int(n * share + 1e-9) for kind, share in HELDOUT_MIX.items()})
    left["present"] += n - left.total()
    found: list[tuple[Scene, str, str, str]] = []
    index = 0
    while left.total():
        rng = scene_rng("heldout", seed, index)
        scene = sample_scene(rng)
        for question in questions_for(scene, rng, min(2, left.total()), +left):
            if left[question[2]]:
                left[question[2]] -= 1
                found.append((scene, *question))
        index += 1
    return found
