"""The join: pixels → tower → projector → embeddings with images in their places → decoder → logits.

Nothing here evaluates an array. A caller that wants one row of logits takes ``hidden`` and passes that row to
``logits``; the rest of a 256,000-column matrix is then never computed.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from gm_mlx.config import ModelConfig
from gm_mlx.decoder import Block, Cache, LanguageModel
from gm_mlx.projector import make_projector
from gm_mlx.router import Positions, Routing
from gm_mlx.vision import VisionTower


class Model(nn.Module):
    """LLaVA-GM, with Hugging Face's names: ``vision_tower``, ``multi_modal_projector``, ``language_model``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(
            config.vision_config,
            config.num_vision_layers_used,
            keep_first=config.vision_feature_select_strategy == "full",
        )
        self.multi_modal_projector = make_projector(config)
        self.language_model = LanguageModel(config.text_config)

    @property
    def layers(self) -> list[Block]:
        return self.language_model.model.layers

    def encode_images(self, pixels: mx.array) -> mx.array:
        """Image features [N, T, D] of normalised pixels [N, H, W, 3], before any scaling."""
        return self.project(self.vision_tower(pixels))

    def project(self, features: mx.array) -> mx.array:
        """The tower's features [N, P, D_vision] as the decoder takes them: [N, T, D], pooled, in its dtype."""
        x = self.multi_modal_projector(features)  # [N, P, D]
        if self.config.spatial_pool_stride > 1:
            x = pool(x, self.config.spatial_pool_stride)  # [N, T, D]
        return x.astype(self.language_model.dtype)

    def embed(self, ids: np.ndarray, features: mx.array | None = None) -> mx.array:
        """Token embeddings with image features in the image slots.

        Args:
            ids: token ids [B, L] on the host; each image slot is a run of ``image_token_index``.
            features: [N, T, D] from ``encode_images``; images fill the slots in reading order, row by row.

        Returns:
            Embeddings [B, L, D].

        Raises:
            ValueError: when the slots and the features differ in number.
        """
        slots = ids == self.config.image_token_index
        # The image token may lie outside the vocabulary; its row is overwritten below, so any valid id does.
        x = self.language_model.embed(mx.array(np.where(slots, 0, ids)))
        given = 0 if features is None else features.shape[0] * features.shape[1]
        if given != slots.sum():
            raise ValueError(f"the prompt has {slots.sum()} image positions but the images give {given} features")
        if features is None:
            return x
        if self.config.scale_image_features:
            features = features * self.language_model.embedding_scale
        rows, columns = (mx.array(axis) for axis in np.nonzero(slots))
        x[rows, columns] = features.reshape(-1, features.shape[-1])
        return x

    def positions(self, ids: np.ndarray, real: mx.array | None = None) -> Positions:
        """What sparse layers may know of whole prompts.

        Args:
            ids: token ids [B, L] on the host, as for ``embed``.
            real: bool [B, L], False on padding.
        """
        slots = ids == self.config.image_token_index
        pictured = slots.any(axis=1)
        if not pictured.any():
            return Positions(real)
        return Positions(real, mx.array(slots), None if pictured.all() else mx.array(pictured))

    def hidden(
        self,
        x: mx.array,
        cache: Cache | None = None,
        trace: list[Routing] | None = None,
        positions: Positions | None = None,
    ) -> mx.array:
        """Hidden states [B, L, D] of embeddings [B, L, D]; see ``DecoderStack``, ``Routing`` and ``Positions``."""
        return self.language_model.model(x, cache, trace, positions)

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits [B, L, V] of hidden states [B, L, D]."""
        return self.language_model.logits(hidden)

    def __call__(
        self,
        ids: mx.array,
        cache: Cache | None = None,
        input_embeddings: mx.array | None = None,
        trace: list[Routing] | None = None,
        positions: Positions | None = None,
    ) -> mx.array:
        """Logits [B, L, V] of token ids [B, L], or of embeddings [B, L, D] in their place (mlx-lm's contract)."""
        x = self.language_model.embed(ids) if input_embeddings is None else input_embeddings
        return self.logits(self.hidden(x, cache, trace, positions))


def pool(features: mx.array, stride: int) -> mx.array:
    """Averages over squares of neighbouring patches (``torch.nn.functional.avg_pool2d``; LLaVA-NeXT's get_2dPool).

    Args:
        features: [N, G * G, D], patches row by row.
        stride: side of a square; it divides G.

    Returns:
        float32 [N, (G / stride) ** 2, D], row by row too. The sum of a square would lose bits in half precision.
    """
    count, positions, size = features.shape
    side = math.isqrt(positions) // stride
    squares = features.astype(mx.float32).reshape(count, side, stride, side, stride, size)
    return squares.mean(axis=(2, 4)).reshape(count, side * side, size)
