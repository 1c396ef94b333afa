"""PyTorch references for Eve: PanGu-pi's layers, MobileVLM's projectors, timm's SigLIP, and routing token by token.

Written from descriptions of the papers and the code, and not from gm-mlx. Names inside are the checkpoints' own, so a
state dict is a checkpoint's.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch_reference import randomise
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaModel

from gm_mlx.config import ModelConfig, TextConfig, VisionConfig


def fast_gelu(x: torch.Tensor) -> torch.Tensor:
    """MindSpore's, as Eve's code writes it."""
    absolute = x.abs()
    return x * torch.sigmoid(1.702 * absolute) * torch.exp(0.851 * (x - absolute))


class FastGELU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fast_gelu(x)


class FFN(nn.Module):
    """SwiGLU, or with a second gate the series-informed activation."""

    def __init__(self, size: int, width: int, series: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, width, bias=False)
        if series:
            self.gate_proj2 = nn.Linear(size, width, bias=False)
        self.up_proj = nn.Linear(size, width, bias=False)
        self.down_proj = nn.Linear(width, size, bias=False)
        self.series = series

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gates = F.silu(self.gate_proj(x))
        if self.series:
            gates = gates + fast_gelu(self.gate_proj2(x))
        return self.down_proj(gates * self.up_proj(x))


class Elastic(nn.Module):
    """Eve's two FFNs by DeepSpeed's names, one token after the other; ``image`` [B, L], or None for text alone.

    ``seen`` keeps the probabilities and the choice of each token of the last call.
    """

    def __init__(self, size: int, width: int, series: bool) -> None:
        super().__init__()
        self.deepspeed_moe = nn.Module()
        self.deepspeed_moe.gate = nn.Module()
        self.deepspeed_moe.gate.wg = nn.Linear(size, 2, bias=False)
        self.deepspeed_moe.experts = nn.Module()
        self.deepspeed_moe.experts.deepspeed_experts = nn.ModuleList(FFN(size, width, series) for _ in range(2))
        self.image: torch.Tensor | None = None
        self.seen: list[tuple[torch.Tensor, int]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        language, vision = self.deepspeed_moe.experts.deepspeed_experts
        if self.image is None:
            return language(x)
        rows, self.seen = [], []
        for token, is_image in zip(x.reshape(-1, x.shape[-1]), self.image.reshape(-1).tolist(), strict=True):
            p = torch.softmax(self.deepspeed_moe.gate.wg(token), dim=-1)
            priorities = [p[0].item() + (not is_image), p[1].item() + is_image]
            chosen = int(priorities[1] > priorities[0])
            rows.append(p[chosen] * (vision if chosen else language)(token))
            self.seen.append((p, chosen))
        return torch.stack(rows).reshape(x.shape)


class Layer(nn.Module):
    """A Vanilla layer (series) or an Aug one: h = x + a + shortcut(a)."""

    def __init__(self, text: TextConfig, layer: int, attention: nn.Module) -> None:
        super().__init__()
        size, width, series = text.hidden_size, text.intermediate_size, layer < text.series_layers
        self.self_attn = attention
        self.mlp = Elastic(size, width, series) if layer in text.sparse_layers else FFN(size, width, series)
        if not series:
            inside = text.shortcut_size
            self.attn_linear = nn.Sequential(
                nn.Linear(size, inside, bias=False), FastGELU(), nn.Linear(inside, size, bias=False)
            )
        self.input_layernorm = nn.RMSNorm(size, eps=text.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(size, eps=text.rms_norm_eps)

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(x), **options)
        x = x + attended
        if hasattr(self, "attn_linear"):
            x = x + self.attn_linear(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


def pangu(text: TextConfig) -> LlamaModel:
    """Llama's attention, rotary positions, mask and norms around PanGu-pi's layers."""
    config = LlamaConfig(
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        vocab_size=text.vocab_size,
        rms_norm_eps=text.rms_norm_eps,
        max_position_embeddings=text.max_position_embeddings,
        attention_bias=True,
    )
    model = LlamaModel(config)
    for i, layer in enumerate(model.layers):
        layer.self_attn.o_proj = nn.Linear(text.hidden_size, text.hidden_size, bias=False)
        model.layers[i] = Layer(text, i, layer.self_attn)
    return model


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W] (timm's LayerNormAct2d), with an activation behind it or none."""

    def __init__(self, size: int, act: nn.Module | None = None) -> None:
        super().__init__(size, eps=1e-5)
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x if self.act is None else self.act(x)


class SqueezeExcitation(nn.Module):
    def __init__(self, size: int, inside: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(size, inside, 1), nn.Conv2d(inside, size, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * F.hardsigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))


class InvertedResidual(nn.Module):
    def __init__(self, size: int, inside: int, stride: int) -> None:
        super().__init__()
        depthwise = nn.Conv2d(size, size, 3, stride, 1, groups=size, bias=False)
        self.block = nn.Sequential(
            nn.Sequential(depthwise, ChannelNorm(size, nn.Hardswish())),
            SqueezeExcitation(size, inside),
            nn.Sequential(nn.Conv2d(size, size, 1, bias=False), ChannelNorm(size)),
        )
        self.residual = stride == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.block(x) if self.residual else self.block(x)


class LDP(nn.Module):
    """MobileVLM's "ldpnet"; ``inside`` are the channels of its squeeze-and-excitation."""

    def __init__(self, vision_size: int, size: int, inside: int) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.mlp = nn.Sequential(nn.Identity(), nn.Linear(vision_size, size), nn.GELU(), nn.Linear(size, size))
        self.model.mb_block = nn.Sequential(
            nn.Identity(), InvertedResidual(size, inside, 1), InvertedResidual(size, inside, 2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side = math.isqrt(x.shape[1])
        x = self.model.mlp(x)
        x = x.permute(0, 2, 1).reshape(len(x), -1, side, side)
        return self.model.mb_block(x).flatten(2).permute(0, 2, 1)


class LDPv2(nn.Module):
    """MobileVLM V2's "ldpnetv2"."""

    def __init__(self, vision_size: int, size: int) -> None:
        super().__init__()
        self.mlp, self.peg = nn.Module(), nn.Module()
        self.mlp.mlp = nn.Sequential(nn.Linear(vision_size, size), nn.GELU(), nn.Linear(size, size))
        self.peg.peg = nn.Sequential(nn.Conv2d(size, size, 3, 1, 1, groups=size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side = math.isqrt(x.shape[1])
        x = self.mlp.mlp(x).permute(0, 2, 1).reshape(len(x), -1, side, side)
        x = F.adaptive_avg_pool2d(x, (12, 12))
        return (self.peg.peg(x) + x).flatten(2).transpose(1, 2)


class TimmBlock(nn.Module):
    def __init__(self, size: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(size, eps=1e-6), nn.LayerNorm(size, eps=1e-6)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(size, width), nn.Linear(width, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, size = x.shape
        qkv = self.attn.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(batch, length, size)
        x = x + self.attn.proj(y)
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class TimmSiglip(nn.Module):
    """timm's vision transformer without a class token, behind its last norm; nobody reads its pool."""

    def __init__(self, vision: VisionConfig) -> None:
        super().__init__()
        size, patch = vision.hidden_size, vision.patch_size
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, size, patch, patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, vision.num_patches, size))
        self.blocks = nn.Sequential(
            *(
                TimmBlock(size, vision.intermediate_size, vision.num_attention_heads)
                for _ in range(vision.num_hidden_layers)
            )
        )
        self.norm = nn.LayerNorm(size, eps=1e-6)
        self.attn_pool = nn.Linear(size, size)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] to [B, N, D]."""
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        return self.norm(self.blocks(x + self.pos_embed))


class Eve(nn.Module):
    """The whole of it, with the names of a checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        text, vision = config.text_config, config.vision_config
        self.config = config
        self.model = pangu(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.model.image_tower = TimmSiglip(vision)
        self.model.mm_projector = nn.Module()
        inside = SQUEEZED[text.hidden_size]
        ldp = config.projector_type == "ldpnet"
        self.model.mm_projector.image_spatial_proj = (
            LDP(vision.hidden_size, text.hidden_size, inside) if ldp else LDPv2(vision.hidden_size, text.hidden_size)
        )

    def forward(self, ids: np.ndarray, pixels: np.ndarray | None = None) -> torch.Tensor:
        """Logits [B, L, V] of ids [B, L], whose image slots are filled from pixels [N, H, W, 3]."""
        slots = torch.from_numpy(ids == self.config.image_token_index)
        x = self.model.embed_tokens(torch.from_numpy(np.where(slots, 0, ids)))
        if pixels is not None:
            features = self.model.image_tower(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
            x[slots] = self.model.mm_projector.image_spatial_proj(features).flatten(0, 1)
        for layer in self.model.layers:
            if isinstance(layer.mlp, Elastic):
                layer.mlp.image = None if pixels is None else slots
        return self.lm_head(self.model(inputs_embeds=x).last_hidden_state)


# torchvision's _make_divisible(size // 4, 8), by hand.
SQUEEZED = {32: 8, 64: 16, 96: 24, 2048: 512}


def eve(config: ModelConfig, seed: int = 0) -> Eve:
    """An Eve with random weights."""
    torch.manual_seed(seed)
    return randomise(Eve(config))  # type: ignore[return-value]
