"""Pictures to calibrate with when there are none: drawn from a seed, so that everybody measures the same.

They are no photographs. What matters is that they differ in what a vision tower answers to: flat colour and fine
grain, edges and slow gradients, few things and many, small pictures and large ones, upright and wide.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Random = np.random.Generator
Size = tuple[int, int]

SIZES: tuple[Size, ...] = ((224, 224), (336, 252), (180, 320), (640, 480), (96, 96), (500, 160), (336, 336))


def draw(index: int) -> Image.Image:
    """The RGB picture of a number; each kind of drawing meets each size."""
    # The number of kinds and that of sizes have no common factor.
    return DRAWINGS[index % len(DRAWINGS)](np.random.default_rng([index, 20]), SIZES[index % len(SIZES)])


def _colour(random: Random) -> tuple[int, int, int]:
    red, green, blue = random.integers(0, 256, 3).tolist()
    return red, green, blue


def _shapes(random: Random, size: Size) -> Image.Image:
    """Circles, boxes and triangles of any colour on a plain ground."""
    image = Image.new("RGB", size, _colour(random))
    canvas = ImageDraw.Draw(image)
    for _ in range(random.integers(1, 12)):
        reach = int(random.integers(4, max(5, min(size) // 3)))
        x, y = (int(random.integers(0, side)) for side in size)
        box = (x - reach, y - reach, x + reach, y + reach)
        kind = random.integers(0, 3)
        if kind == 0:
            canvas.ellipse(box, fill=_colour(random))
        elif kind == 1:
            canvas.rectangle(box, fill=_colour(random), outline=_colour(random), width=2)
        else:
            canvas.polygon([(x, y - reach), (x - reach, y + reach), (x + reach, y + reach)], fill=_colour(random))
    return image


def _gradient(random: Random, size: Size) -> Image.Image:
    """One colour that becomes another along a slanted line."""
    angle = random.uniform(0, 2 * np.pi)
    across, down = np.meshgrid(np.linspace(-1, 1, size[0]), np.linspace(-1, 1, size[1]))
    share = (across * np.cos(angle) + down * np.sin(angle) + np.sqrt(2)) / np.sqrt(8)  # [H, W], 0 to 1
    first, last = np.array(_colour(random)), np.array(_colour(random))
    return _image(first + share[..., None] * (last - first))


def _page(random: Random, size: Size) -> Image.Image:
    """Dark bars in rows, as words on a page, under a headline."""
    image = Image.new("RGB", size, (250, 248, 240))
    canvas = ImageDraw.Draw(image)
    height = int(random.integers(3, 9))
    canvas.rectangle((8, 6, size[0] * 2 // 3, 6 + 2 * height), fill=_colour(random))
    for y in range(10 + 3 * height, size[1] - height, 2 * height):
        x = 8
        while (end := x + int(random.integers(2, 9)) * height) < size[0] - 8:
            canvas.rectangle((x, y, end, y + height - 1), fill=(40, 40, 48))
            x = end + height
    return image


def _noise(random: Random, size: Size) -> Image.Image:
    """Every pixel on its own."""
    return _image(random.integers(0, 256, (size[1], size[0], 3)))


def _checks(random: Random, size: Size) -> Image.Image:
    """A board of two colours, its fields from a few pixels to a quarter of the picture."""
    field = int(random.integers(3, max(4, min(size) // 4)))
    odd = (np.arange(size[1])[:, None] // field + np.arange(size[0]) // field) % 2
    return _image(np.where(odd[..., None], _colour(random), _colour(random)))


def _clouds(random: Random, size: Size) -> Image.Image:
    """Noise of all scales, the coarse strongest, as in photographs."""
    total = np.zeros((size[1], size[0], 3))
    for cells in (2, 4, 8, 16, 32, 64):
        coarse = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)) / cells
    return _image(total / total.max() * 255).filter(ImageFilter.SMOOTH)


def _image(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


DRAWINGS = (_shapes, _gradient, _page, _noise, _checks, _clouds)
