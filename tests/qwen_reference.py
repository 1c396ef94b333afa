"""A PyTorch reference for the first Qwen, whose code is in no release of transformers.

Written from a description of its code (modeling_qwen.py), and not from gm-mlx. Names inside are the checkpoint's own.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from gm_mlx.config import TextConfig


class QwenNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class QwenMLP(nn.Module):
    """``w2`` is the gate."""

    def __init__(self, text: TextConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(text.hidden_size, text.intermediate_size, bias=False)
        self.w2 = nn.Linear(text.hidden_size, text.intermediate_size, bias=False)
        self.c_proj = nn.Linear(text.intermediate_size, text.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.w1(x) * F.silu(self.w2(x)))


class QwenAttention(nn.Module):
    """The rows of ``c_attn`` are those of queries, keys and values; positions turn both halves of a head."""

    def __init__(self, text: TextConfig) -> None:
        super().__init__()
        self.heads, self.dim, self.theta = text.num_attention_heads, text.head_dim, text.rope_theta
        inside = self.heads * self.dim
        self.c_attn = nn.Linear(text.hidden_size, 3 * inside)
        self.c_proj = nn.Linear(inside, text.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        parts = self.c_attn(x).chunk(3, dim=-1)
        q, k, v = (part.reshape(batch, length, self.heads, self.dim).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(batch, length, -1))

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        half = self.dim // 2
        frequencies = self.theta ** (-torch.arange(half) / half)
        angles = torch.arange(x.shape[2])[:, None] * frequencies  # [L, Dh / 2]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


class QwenBlock(nn.Module):
    def __init__(self, text: TextConfig) -> None:
        super().__init__()
        self.ln_1 = QwenNorm(text.hidden_size, text.rms_norm_eps)
        self.attn = QwenAttention(text)
        self.ln_2 = QwenNorm(text.hidden_size, text.rms_norm_eps)
        self.mlp: nn.Module = QwenMLP(text)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class QwenModel(nn.Module):
    """The decoder without its head, in the place of one of transformers' models."""

    def __init__(self, text: TextConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(text.vocab_size, text.hidden_size)
        self.h = nn.ModuleList(QwenBlock(text) for _ in range(text.num_hidden_layers))
        self.ln_f = QwenNorm(text.hidden_size, text.rms_norm_eps)

    @property
    def layers(self) -> nn.ModuleList:
        return self.h

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def forward(self, inputs_embeds: torch.Tensor) -> SimpleNamespace:
        x = inputs_embeds
        for block in self.h:
            x = block(x)
        return SimpleNamespace(last_hidden_state=self.ln_f(x))
