"""Vision towers: CLIP and SigLIP vision transformers, up to the hidden state that LLaVA reads.

What is special here:
- LLaVA reads a hidden state *before* the last norm (``hidden_states[-2]`` for CLIP), so the layers behind it and the
  ``post_layernorm`` do not exist in this model: they are neither stored nor run. Eve's SigLIP has the norm.
- CLIP has a class token and a norm before its first layer ("pre_layrnorm", sic: the name in every checkpoint) and no
  bias in the patch embedding. SigLIP has none of the two, and a bias. All else is one transformer.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from gm_mlx.config import VisionConfig
from gm_mlx.moe import PlainMLP


class Embeddings(nn.Module):
    """Pixels to patch vectors with positions (CLIPVisionEmbeddings, SiglipVisionEmbeddings)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size, patch = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(3, size, kernel_size=patch, stride=patch, bias=not config.is_clip)
        self.position_embedding = nn.Embedding(config.num_patches + config.is_clip, size)
        if config.is_clip:
            self.class_embedding = mx.zeros((size,))

    def __call__(self, pixels: mx.array) -> mx.array:
        weight = self.patch_embedding.weight  # [D, P, P, 3]
        size, patch = weight.shape[0], weight.shape[1]
        batch, height, width, _ = pixels.shape
        # Kernel and stride are equal, so the convolution is one matmul, which every backend has a fast gradient for.
        rows, columns = height // patch, width // patch
        # SigLIP's 384 pixels are not a multiple of its 14: a convolution leaves the rest out, and so must this.
        x = pixels[:, : rows * patch, : columns * patch].reshape(batch, rows, patch, columns, patch, 3)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * 3)  # [B, N, P*P*3]
        x = x @ weight.reshape(size, -1).T  # [B, N, D]
        if "bias" in self.patch_embedding:
            x = x + self.patch_embedding.bias
        if "class_embedding" in self:
            x = mx.concatenate([mx.broadcast_to(self.class_embedding, (batch, 1, size)), x], axis=1)  # [B, 1+N, D]
        return x + self.position_embedding.weight


class Attention(nn.Module):
    """Bidirectional multi-head attention with biases (CLIPAttention, SiglipAttention)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.scale = (size // self.num_heads) ** -0.5
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size)
        self.v_proj = nn.Linear(size, size)
        self.out_proj = nn.Linear(size, size)

    def __call__(self, x: mx.array) -> mx.array:
        q, k, v = (
            proj(x).reshape(*x.shape[:2], self.num_heads, -1).swapaxes(1, 2)  # [B, H, N, Dh]
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(self.attend(q, k, v).swapaxes(1, 2).reshape(x.shape))

    def attend(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """What queries find in keys and values, [B, H, N, Dh] all of them."""
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=self.scale)


class EncoderLayer(nn.Module):
    """A pre-norm transformer layer (CLIPEncoderLayer, SiglipEncoderLayer)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = PlainMLP(config)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig, num_layers: int) -> None:
        super().__init__()
        self.layers = [EncoderLayer(config) for _ in range(num_layers)]


class VisionTransformer(nn.Module):
    def __init__(self, config: VisionConfig, num_layers: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        if config.is_clip:
            self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = Encoder(config, num_layers)
        if config.post_norm:
            self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, pixels: mx.array) -> mx.array:
        x = self.embeddings(pixels)
        if "pre_layrnorm" in self:
            x = self.pre_layrnorm(x)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x) if "post_layernorm" in self else x


class VisionTower(nn.Module):
    """The tower under Hugging Face's name ``vision_tower.vision_model``.

    Args:
        config: the tower's shape.
        num_layers: layers that exist; the output is ``hidden_states[num_layers]`` of the PyTorch tower.
        keep_first: return the first position too (``vision_feature_select_strategy`` "full"). It is CLIP's class token;
            of SigLIP, which has none, it is a patch, and PyTorch's models drop it all the same.
    """

    def __init__(self, config: VisionConfig, num_layers: int, keep_first: bool = False) -> None:
        super().__init__()
        self.keep_first = keep_first
        self.vision_model = VisionTransformer(config, num_layers)

    def __call__(self, pixels: mx.array) -> mx.array:
        """Image features [B, N, D] of normalised pixels [B, H, W, 3], in the tower's dtype."""
        x = self.vision_model(pixels.astype(self.vision_model.embeddings.position_embedding.weight.dtype))
        return x if self.keep_first else x[:, 1:]
