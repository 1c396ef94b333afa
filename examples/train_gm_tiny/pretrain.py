"""What downloading SigLIP and Gemma is to LLaVA: a tower that sees shapes and a decoder that knows the language.

The tower learns to label its own patches: which shape and colour covers each, and whose centre lies in it. That is
dense supervision, and it teaches in minutes what questions and answers alone do not teach in hours. The decoder learns
to answer questions about pictures that are described to it in words.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from scenes import COLOURS, LABELS, SHAPES

from gm_mlx.model import Model
from gm_mlx.vision import VisionTower

CLASSES = {"shape": 1 + len(SHAPES), "colour": 1 + len(COLOURS)}  # class 0 is "nothing here"


class PatchLabeller(nn.Module):
    """A tower with one linear head per label. The heads are thrown away afterwards."""

    def __init__(self, tower: VisionTower, width: int) -> None:
        super().__init__()
        self.tower = tower
        self.heads = {label: nn.Linear(width, CLASSES[label.split("_")[1]]) for label in LABELS}

    def __call__(self, pixels: mx.array) -> dict[str, mx.array]:
        features = self.tower(pixels)  # [B, N, D]
        return {label: head(features) for label, head in self.heads.items()}


def patch_label_loss(model: PatchLabeller, batch: tuple[mx.array, dict[str, mx.array]]) -> tuple[mx.array, mx.array]:
    """Cross-entropy summed over patches and labels, and the number of patches."""
    pixels, labels = batch
    logits = model(pixels)
    total = mx.array(0.0)
    for label, target in labels.items():
        # Nine patches of ten show nothing; weighting them down makes the others heard.
        weight = mx.where(target == 0, 0.3, 1.0)
        total = total + (weight * nn.losses.cross_entropy(logits[label], target)).sum()
    return total, mx.array(next(iter(labels.values())).size)


def patch_label_accuracy(model: PatchLabeller, pixels: np.ndarray, labels: dict[str, np.ndarray]) -> dict[str, float]:
    """Share of patches with something to see that are labelled right, per label."""
    logits = model(mx.array(pixels))
    result = {}
    for label, target in labels.items():
        found, shown = np.array(mx.argmax(logits[label], axis=-1)), target > 0
        result[label] = float((found == target)[shown].mean())
    return result


def select_decoder(model: Model) -> None:
    """Freeze everything but the decoder."""
    model.freeze()
    model.language_model.unfreeze()
