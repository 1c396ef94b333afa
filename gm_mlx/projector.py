"""Projector: image features into the decoder's embedding space."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from gm_mlx.activations import ACTIVATIONS
from gm_mlx.config import ModelConfig


class Projector(nn.Module):
    """LLaVA-1.5's two-layer MLP (LlavaMultiModalProjector; "mlp2x_gelu" in the original code)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.text_config.hidden_size
        self.activation = ACTIVATIONS[config.projector_hidden_act]
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, size)
        self.linear_2 = nn.Linear(size, size)

    def __call__(self, features: mx.array) -> mx.array:
        """[B, N, D_vision] to [B, N, D_text]."""
        return self.linear_2(self.activation(self.linear_1(features)))
