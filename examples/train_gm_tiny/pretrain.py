"""What downloading SigLIP and Gemma is to LLaVA, and stage 1: a tower that sees, a decoder that speaks, and the link.

The tower learns to label its own patches: which shape and colour covers each, where the centre of that object is, and
whose centre lies in the patch. That is dense supervision, and it teaches in minutes what questions and answers alone do
not teach in hours. The decoder learns
to answer questions about pictures that are described to it in words.

Stage 1 trains the projector on captions of patches: the feature of a patch that shows a red circle is to be the sum of
the decoder's own embeddings of "red" and "circle". A whole-image caption through a frozen decoder this small taught it
nothing but which captions are common; with this, a question's "circle" finds the patch by likeness from the first step
of stage 2 on.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from phrasings import POSITIONS
from scenes import COLOURS, GRID, LABELS, SHAPES

from gm_mlx.model import Model
from gm_mlx.tokenizer import Tokenizer
from gm_mlx.train.step import Loss
from gm_mlx.vision import VisionTower

Patches = tuple[mx.array, dict[str, mx.array]]  # images and labels of their patches
Sums = tuple[mx.array, mx.array, dict[str, mx.array]]  # see gm_mlx.train.step.Loss

# Class 0 is "nothing here".
CLASSES = {"shape": 1 + len(SHAPES), "colour": 1 + len(COLOURS), "row": 1 + GRID, "column": 1 + GRID}


class PatchLabeller(nn.Module):
    """A tower with one linear head per label. The heads are thrown away afterwards."""

    def __init__(self, tower: VisionTower, width: int) -> None:
        super().__init__()
        self.tower = tower
        self.heads = {label: nn.Linear(width, CLASSES[label.split("_")[1]]) for label in LABELS}

    def __call__(self, pixels: mx.array) -> dict[str, mx.array]:
        features = self.tower(pixels)  # [B, N, D]
        return {label: head(features) for label, head in self.heads.items()}


def patch_label_loss(model: PatchLabeller, batch: Patches) -> Sums:
    """Cross-entropy summed over patches and labels, and the number of patches."""
    pixels, labels = batch
    logits = model(pixels)
    total = mx.array(0.0)
    for label, target in labels.items():
        # Nine patches of ten show nothing; weighting them down makes the others heard.
        weight = mx.where(target == 0, 0.3, 1.0)
        total = total + (weight * nn.losses.cross_entropy(logits[label], target)).sum()
    return total, mx.array(next(iter(labels.values())).size), {}


def patch_label_accuracy(model: PatchLabeller, pixels: np.ndarray, labels: dict[str, np.ndarray]) -> dict[str, float]:
    """Share of patches with something to see that are labelled right, per label."""
    logits = model(mx.array(pixels))
    result = {}
    for label, target in labels.items():
        found, shown = np.array(mx.argmax(logits[label], axis=-1)), target > 0
        result[label] = float((found == target)[shown].mean())
    return result


class PatchWords:
    """For every patch the words that say what it shows, as vectors in the decoder's embedding space.

    A covered patch is its object's colour, shape and place in the image. The place is that of the object's centre, so
    whichever of an object's patches the decoder finds, it reads the right answer there. Its words are the third of
    the image ("top left"), plus as much of "right" less "left" and of "bottom" less "top" as the centre is off the
    middle: two objects can be compared by it. The patch with an object's centre is "object" too, so that the decoder
    has one patch per object to count. Any other patch is "nothing".
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, model: Model, labels: dict[str, mx.array]) -> mx.array:
        """Target vectors [B, N, D] of patch labels [B, N]."""
        shapes = mx.stack([self._vector(model, words) for words in ("", *SHAPES)])  # [S, D]
        colours = mx.stack([self._vector(model, words) for words in ("", *COLOURS)])  # [C, D]
        places = mx.stack([self._vector(model, place) for row in POSITIONS for place in row])  # [9, D]
        rightward = self._vector(model, "right") - self._vector(model, "left")  # [D]
        downward = self._vector(model, "bottom") - self._vector(model, "top")
        centre = labels["centre_shape"] > 0
        shape = mx.where(centre, labels["centre_shape"], labels["cover_shape"])
        colour = mx.where(centre, labels["centre_colour"], labels["cover_colour"])
        patch = mx.arange(GRID * GRID)
        # Patches that show nothing have row and column -1 here; the last line drops them.
        row = mx.where(centre, patch // GRID, labels["cover_row"].astype(mx.int32) - 1)
        column = mx.where(centre, patch % GRID, labels["cover_column"].astype(mx.int32) - 1)
        target = shapes[shape] + colours[colour] + places[3 * _third(row) + _third(column)]
        target = target + _offset(column) * rightward + _offset(row) * downward
        target = target + centre[..., None] * self._vector(model, "object")
        return mx.where((shape == 0)[..., None], self._vector(model, "nothing"), target)

    def _vector(self, model: Model, words: str) -> mx.array:
        """Sum of the embeddings of words, as tokens with and without the space that they have inside a sentence."""
        pieces = [self._tokenizer.encode(form) for word in words.split() for form in (word, f" {word}")]
        tokens = [piece for piece in pieces if len(piece) == 1]
        if not tokens:
            return mx.zeros((model.config.text_config.hidden_size,))
        return model.language_model.embed(mx.array(tokens)).sum(axis=(0, 1)) / 2


def _third(patch: mx.array) -> mx.array:
    """Which third of the image the objects are in whose centre is in this row or column of patches.

    Patches 2 and 5 hold the borders between thirds; centres there keep to the outer side, see ``scenes.band``.
    """
    return (patch >= 3).astype(mx.int32) + (patch >= 5).astype(mx.int32)


def _offset(patch: mx.array) -> mx.array:
    """How far a row or column of patches is off the middle, from -1 to 1, as [B, N, 1]."""
    middle = (GRID - 1) / 2
    return ((patch - middle) / middle)[..., None]


def alignment_loss(words: PatchWords) -> Loss:
    """The loss of stage 1: squared distance between projected features and their words, per patch and channel."""

    def loss(model: Model, batch: Patches) -> Sums:
        pixels, labels = batch
        distance = (model.encode_images(pixels) - words(model, labels)).square().mean(axis=-1)  # [B, N]
        centre, cover = labels["centre_shape"] > 0, labels["cover_shape"] > 0
        # One patch in thirty is a centre, and all counting hangs on it.
        weight = mx.where(centre, 4.0, mx.where(cover, 1.0, 0.1))
        return (weight * distance).sum(), mx.array(distance.size), {}

    return loss


def select_decoder(model: Model) -> None:
    """Freeze everything but the decoder."""
    model.freeze()
    model.language_model.unfreeze()
