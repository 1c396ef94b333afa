"""Seeded scenes of a few coloured shapes: sampled, drawn at 64 x 64 pixels and labelled patch by patch.

A third of the scenes imitates easy-VQA (one clean circle, rectangle or triangle on a light background). Its pictures
are drawn at 128 x 128 and halved with Pillow's bilinear filter, which its edge weights of 1/8 and 1/2 show, so all
scenes here are drawn in the same way. The other scenes hold up to four objects of five shapes and ten colours, with
uneven colours, some rotation, some darker backgrounds and some noise.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

IMAGE_SIZE = 64
PATCH_SIZE = 8
GRID = IMAGE_SIZE // PATCH_SIZE

SHAPES = ("circle", "rectangle", "triangle", "star", "cross")
COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
    "orange": (255, 140, 0),
    "purple": (128, 0, 128),
}
COLOUR_NAMES = tuple(COLOURS)
EASY_SHAPES = SHAPES[:3]
EASY_COLOURS = COLOUR_NAMES[:8]
LABELS = ("cover_shape", "cover_colour", "cover_row", "cover_column", "centre_shape", "centre_colour")

EASY_SHARE = 1 / 3
OBJECT_COUNT_WEIGHTS = (0.02, 0.13, 0.30, 0.30, 0.25)  # 0 to 4 objects in a scene that is not easy-VQA-like
REPEAT_SHARE = 0.3  # how often an object takes an earlier one's colour, or shape: makes counts above one common
CLEAR_SHARE = 0.8  # how often all centres keep out of the gaps between the position bands, see `band`
MIN_DISTANCE = 14.0  # between two centres; more than a patch's diagonal, so no two centres share a patch
MIN_GAP = 1.5  # between two bounding boxes
MIN_CONTRAST = 100  # sum over R, G, B of the distance between an object and the background
MIN_COVER = 0.2  # of a patch, for the object to be the patch's label

_SCALE = 2  # drawn at twice the size, then halved
_STAR_INNER = 0.45
_CROSS_ARM = 0.34


@dataclass(frozen=True)
class Object:
    """One shape. ``x`` and ``y`` are the centre of its unrotated bounding box, in pixels of the 64 x 64 image."""

    shape: str
    colour: str
    x: float
    y: float
    width: float
    height: float
    rgb: tuple[int, int, int]
    angle: float = 0.0  # degrees, clockwise

    def outline(self) -> list[tuple[float, float]]:
        """Corner points in image pixels; of a circle the corners of its bounding box."""
        turn = math.radians(self.angle)
        cos, sin = math.cos(turn), math.sin(turn)
        points = [(u * self.width, v * self.height) for u, v in _UNIT_OUTLINES[self.shape]]
        return [(self.x + u * cos - v * sin, self.y + u * sin + v * cos) for u, v in points]

    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the drawn shape."""
        xs, ys = zip(*self.outline(), strict=True)
        return min(xs), min(ys), max(xs), max(ys)


@dataclass(frozen=True)
class Scene:
    """A background and the objects on it; ``noise`` is a standard deviation in grey levels."""

    background: tuple[int, int, int]
    objects: tuple[Object, ...]
    noise: float = 0.0
    noise_seed: int = 0


def _star() -> list[tuple[float, float]]:
    turns = [math.pi * i / 5 for i in range(10)]
    radii = [0.5 if i % 2 == 0 else 0.5 * _STAR_INNER for i in range(10)]
    return [(r * math.sin(t), -r * math.cos(t)) for r, t in zip(radii, turns, strict=True)]


def _cross() -> list[tuple[float, float]]:
    a, h = _CROSS_ARM / 2, 0.5
    return [(-a, -h), (a, -h), (a, -a), (h, -a), (h, a), (a, a), (a, h), (-a, h), (-a, a), (-h, a), (-h, -a), (-a, -a)]


_SQUARE = [(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)]
_UNIT_OUTLINES = {
    "circle": _SQUARE,
    "rectangle": _SQUARE,
    "triangle": [(0.0, -0.5), (0.5, 0.5), (-0.5, 0.5)],
    "star": _star(),
    "cross": _cross(),
}


def scene_rng(split: str, seed: int, index: int) -> random.Random:
    """The random source of scene ``index``; splits of different names share no scene."""
    return random.Random(f"{split}/{seed}/{index}")


def band(value: float) -> int | None:
    """Which third of the image a centre coordinate is in: 0, 1, 2, or None when it is too close to call.

    The bands 0-20, 24-40 and 44-64 leave out the thirds' borders (21.3 and 42.7) and those of the patch columns.
    """
    if value <= 20:
        return 0
    if value >= 44:
        return 2
    return 1 if 24 <= value <= 40 else None


def sample_scene(rng: random.Random) -> Scene:
    """Draw a scene: easy-VQA-like with chance ``EASY_SHARE``, else 0 to 4 objects that do not overlap."""
    if rng.random() < EASY_SHARE:
        return sample_easy_scene(rng)
    count = rng.choices(range(len(OBJECT_COUNT_WEIGHTS)), OBJECT_COUNT_WEIGHTS)[0]
    clear = rng.random() < CLEAR_SHARE
    clean = rng.random() < 0.5
    objects: list[Object] | None = None
    while objects is None:
        objects = _sample_objects(rng, count, clear, clean)
    return Scene(
        background=_sample_background(rng, objects),
        objects=tuple(objects),
        noise=0.0 if clean else rng.uniform(0.0, 8.0),
        noise_seed=rng.getrandbits(32),
    )


def sample_easy_scene(rng: random.Random) -> Scene:
    """Draw a scene as easy-VQA does: sides of 16 to 64 of 128 pixels, anywhere, exact colours, no noise."""
    shape, colour = rng.choice(EASY_SHAPES), rng.choice(EASY_COLOURS)
    width = rng.randint(16, 64)
    height = {"circle": width, "triangle": int(width * math.sqrt(3) / 2)}.get(shape, rng.randint(16, 64))
    left, top = rng.randint(0, 127 - width), rng.randint(0, 127 - height)
    only = Object(
        shape,
        colour,
        x=(left + width / 2) / _SCALE,
        y=(top + height / 2) / _SCALE,
        width=width / _SCALE,
        height=height / _SCALE,
        rgb=COLOURS[colour],
    )
    return Scene(background=_light(rng), objects=(only,))


def _light(rng: random.Random) -> tuple[int, int, int]:
    return rng.randint(230, 255), rng.randint(230, 255), rng.randint(230, 255)


def _sample_background(rng: random.Random, objects: list[Object]) -> tuple[int, int, int]:
    while True:
        if rng.random() < 0.7:
            colour = _light(rng)
        else:
            level = rng.randint(165, 235)
            colour = (level + rng.randint(-18, 18), level + rng.randint(-18, 18), level + rng.randint(-18, 18))
        if all(sum(abs(a - b) for a, b in zip(colour, o.rgb, strict=True)) >= MIN_CONTRAST for o in objects):
            return colour


def _sample_objects(rng: random.Random, count: int, clear: bool, clean: bool) -> list[Object] | None:
    """Place ``count`` objects one by one; None when one finds no room."""
    objects: list[Object] = []
    while len(objects) < count:
        repeated = rng.choice(objects) if objects else None
        shape = repeated.shape if repeated and rng.random() < REPEAT_SHARE else rng.choice(SHAPES)
        colour = repeated.colour if repeated and rng.random() < REPEAT_SHARE else rng.choice(COLOUR_NAMES)
        for _ in range(40):
            candidate = _sample_object(rng, shape, colour, count, clean)
            if clear and (band(candidate.x) is None or band(candidate.y) is None):
                continue
            if all(_apart(candidate, other) for other in objects):
                objects.append(candidate)
                break
        else:
            return None
    return objects


def _sample_object(rng: random.Random, shape: str, colour: str, count: int, clean: bool) -> Object:
    smallest = 16 if shape in ("star", "cross") else 14
    largest = 26 if count < 4 else 23
    width = rng.uniform(smallest, largest)
    height = rng.uniform(smallest, largest) if shape == "rectangle" else width
    if shape == "triangle":
        height = width * rng.uniform(0.8, 1.0)
    # One shift of brightness and a smaller one per channel: a gray with a strong tint has no fair name.
    jitter, shift = (3, 0) if clean else (8, rng.randint(-20, 20))
    r, g, b = (min(255, max(0, level + shift + rng.randint(-jitter, jitter))) for level in COLOURS[colour])
    angle = rng.uniform(-15, 15) if shape != "circle" and rng.random() < 0.4 else 0.0
    left, top, right, bottom = Object(shape, colour, 0.0, 0.0, width, height, (r, g, b), angle).box()
    x, y = rng.uniform(-left, IMAGE_SIZE - right), rng.uniform(-top, IMAGE_SIZE - bottom)
    return Object(shape, colour, x, y, width, height, (r, g, b), angle)


def _apart(a: Object, b: Object) -> bool:
    if math.hypot(a.x - b.x, a.y - b.y) < MIN_DISTANCE:
        return False
    (l1, t1, r1, b1), (l2, t2, r2, b2) = a.box(), b.box()
    return max(l1, l2) - min(r1, r2) >= MIN_GAP or max(t1, t2) - min(b1, b2) >= MIN_GAP


def _draw(canvas: ImageDraw.ImageDraw, item: Object, fill: Any) -> None:
    points = [(_SCALE * x, _SCALE * y) for x, y in item.outline()]
    if item.shape == "circle":
        canvas.ellipse((points[0], points[2]), fill=fill)
    elif item.shape == "rectangle" and not item.angle:
        canvas.rectangle((points[0], points[2]), fill=fill)
    else:
        canvas.polygon(points, fill=fill)


def render(scene: Scene) -> NDArray[np.uint8]:
    """Draw a scene.

    Returns:
        uint8 ``[64, 64, 3]``, RGB.
    """
    size = (_SCALE * IMAGE_SIZE, _SCALE * IMAGE_SIZE)
    image = Image.new("RGB", size, scene.background)
    canvas = ImageDraw.Draw(image)
    for item in scene.objects:
        _draw(canvas, item, item.rgb)
    pixels = np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR))
    if not scene.noise:
        return pixels.copy()
    noise = np.random.default_rng(scene.noise_seed).standard_normal(pixels.shape, dtype=np.float32) * scene.noise
    return np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8)


def patch_labels(scene: Scene) -> dict[str, NDArray[np.uint8]]:
    """Label the 8 x 8 patches, row by row, for dense pretraining of the vision tower.

    Returns:
        Six arrays uint8 ``[64]``, 0 for nothing, else 1 + the index in ``SHAPES`` or ``COLOURS``, or 1 + the row or
        column of patches: ``cover_shape`` and ``cover_colour`` of the object that covers most of the patch, if more
        than ``MIN_COVER`` of it, and ``cover_row`` and ``cover_column`` of that object's centre; ``centre_shape`` and
        ``centre_colour`` of the object whose centre lies in the patch.
    """
    size = _SCALE * IMAGE_SIZE
    mask = Image.new("L", (size, size), 0)
    canvas = ImageDraw.Draw(mask)
    for index, item in enumerate(scene.objects, start=1):
        _draw(canvas, item, index)
    cell = _SCALE * PATCH_SIZE
    cells = np.asarray(mask).reshape(GRID, cell, GRID, cell)
    labels = {key: np.zeros(GRID * GRID, np.uint8) for key in LABELS}
    best = np.full(GRID * GRID, MIN_COVER)
    for index, item in enumerate(scene.objects, start=1):
        shape, colour = 1 + SHAPES.index(item.shape), 1 + COLOUR_NAMES.index(item.colour)
        cover = (cells == index).mean(axis=(1, 3)).reshape(-1)  # [64]
        wins = cover > best
        best[wins] = cover[wins]
        row, column = int(item.y // PATCH_SIZE), int(item.x // PATCH_SIZE)
        for label, value in zip(LABELS, (shape, colour, 1 + row, 1 + column), strict=False):
            labels[label][wins] = value
        centre = row * GRID + column
        labels["centre_shape"][centre] = shape
        labels["centre_colour"][centre] = colour
    return labels
