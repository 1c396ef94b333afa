"""Projectors: image features into the decoder's embedding space.

LLaVA's is two linear layers. MobileVLM's LDP and LDPv2, which Eve has too, make fewer tokens on the way: a picture of
24 x 24 patches becomes 12 x 12 tokens. Their convolutions are computed in MLX's layout, [B, H, W, C]. Those of one
pixel are linear layers and stored as such.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from gm_mlx.activations import ACTIVATIONS
from gm_mlx.config import LDPV2_GRID, ModelConfig, squeezed_size


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


class Squeeze(nn.Module):
    """Channels weighed by what the whole picture has in them (torchvision.ops.SqueezeExcitation; hard sigmoid)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size, squeezed_size(size))
        self.fc2 = nn.Linear(squeezed_size(size), size)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, H, W, D] to [B, H, W, D]."""
        mean = x.astype(mx.float32).mean(axis=(1, 2), keepdims=True).astype(x.dtype)  # [B, 1, 1, D]
        return x * hard_sigmoid(self.fc2(nn.relu(self.fc1(mean))))


class InvertedResidual(nn.Module):
    """MobileNetV3's block without an expansion (torchvision.models.mobilenetv3.InvertedResidual), with LayerNorms.

    Args:
        size: channels.
        stride: of the depthwise convolution; a block with a stride of 1 adds its input.
    """

    def __init__(self, size: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.depthwise = nn.Conv2d(size, size, 3, stride=stride, padding=1, groups=size, bias=False)
        self.norm_1 = nn.LayerNorm(size)
        self.squeeze = Squeeze(size)
        self.pointwise = nn.Linear(size, size, bias=False)
        self.norm_2 = nn.LayerNorm(size)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, H, W, D] to [B, ceil(H / stride), ceil(W / stride), D]."""
        y = self.norm_1(self.depthwise(x))
        y = self.norm_2(self.pointwise(self.squeeze(y * hard_sigmoid(y))))
        return x + y if self.stride == 1 else y


class LDP(Projector):
    """MobileVLM's lightweight downsample projector (LDPNetProjector): two inverted residuals behind the MLP."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.blocks = [InvertedResidual(config.text_config.hidden_size, stride) for stride in (1, 2)]

    def __call__(self, features: mx.array) -> mx.array:
        """[B, G * G, D_vision] to [B, ceil(G / 2) ** 2, D_text]."""
        x = as_grid(super().__call__(features))
        for block in self.blocks:
            x = block(x)
        return x.flatten(1, 2)


class LDPv2(Projector):
    """MobileVLM V2's projector (LDPNetV2Projector): adaptive pooling, and positions from a depthwise convolution."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        size = config.text_config.hidden_size
        self.peg = nn.Conv2d(size, size, 3, padding=1, groups=size)

    def __call__(self, features: mx.array) -> mx.array:
        """[B, G * G, D_vision] to [B, 144, D_text]."""
        x = adaptive_pool(as_grid(super().__call__(features)), LDPV2_GRID)  # [B, 12, 12, D]
        return (x + self.peg(x)).flatten(1, 2)


PROJECTORS: dict[str, type[Projector]] = {"mlp2x_gelu": Projector, "ldpnet": LDP, "ldpnetv2": LDPv2}


def make_projector(config: ModelConfig) -> Projector:
    """The projector that the config asks for."""
    return PROJECTORS[config.projector_type](config)


def hard_sigmoid(x: mx.array) -> mx.array:
    """``clip((x + 3) / 6, 0, 1)`` (torch.nn.Hardsigmoid); x times it is torch.nn.Hardswish."""
    return mx.clip(x + 3, 0, 6) / 6


def as_grid(features: mx.array) -> mx.array:
    """[B, G * G, D], patches row by row, as [B, G, G, D]."""
    side = math.isqrt(features.shape[1])
    return features.reshape(features.shape[0], side, side, -1)


def adaptive_pool(x: mx.array, side: int) -> mx.array:
    """Averages [B, side, side, D] over a grid [B, G, G, D], whatever G is (torch.nn.AdaptiveAvgPool2d).

    Where ``side`` does not divide G, neighbouring averages share rows or columns.
    """
    shares = mx.array(pooling_matrix(x.shape[1], side))
    rows = mx.einsum("ig,bghd->bihd", shares, x.astype(mx.float32))
    return mx.einsum("jh,bihd->bijd", shares, rows).astype(x.dtype)


def pooling_matrix(size: int, pooled: int) -> np.ndarray:
    """What each of ``size`` numbers counts in each of ``pooled`` averages, float32 [pooled, size]."""
    matrix = np.zeros((pooled, size), np.float32)
    for i in range(pooled):
        start, stop = i * size // pooled, -(-(i + 1) * size // pooled)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix
