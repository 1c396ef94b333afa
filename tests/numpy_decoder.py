"""Gemma with experts in float64 NumPy, written from the papers and from PyTorch's GemmaModel: no line of it is ours.

It is the reference for llama.cpp: what both of its architectures, the native and the re-expressed one, are held
against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from gm_mlx.config import TextConfig

Gelu = Callable[[np.ndarray], np.ndarray]
ROOT = "language_model.model"


def tanh_gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def table_gelu(x: np.ndarray) -> np.ndarray:
    """llama.cpp's GELU on a CPU: a table from float16 to float16, and the plain function beyond 10."""
    looked_up = tanh_gelu(x.astype(np.float16).astype(np.float64)).astype(np.float16)
    return np.where(x <= -10, 0.0, np.where(x >= 10, x, looked_up))


def half(x: np.ndarray) -> np.ndarray:
    """Through float16 and back, as llama.cpp's key/value cache does."""
    return x.astype(np.float16).astype(np.float64)


def logits(
    text: TextConfig,
    weights: Mapping[str, np.ndarray],
    embeddings: np.ndarray,
    *,
    gelu: Gelu = tanh_gelu,
    cached: Callable[[np.ndarray], np.ndarray] = lambda x: x,
    margins: list[np.ndarray] | None = None,
) -> np.ndarray:
    """Logits [L, V] of what enters the first layer, [L, D]: scaled embeddings, with image features in their places.

    ``margins`` collects, for each sparse layer, by how much [L] the last chosen expert's logit beats the next one's.
    """
    w = {name: np.asarray(array, np.float64) for name, array in weights.items()}
    x = embeddings.astype(np.float64)
    for i in range(text.num_hidden_layers):
        layer = f"{ROOT}.layers.{i}"
        x = x + _attention(text, w, f"{layer}.self_attn", _norm(text, x, w[f"{layer}.input_layernorm.weight"]), cached)
        h = _norm(text, x, w[f"{layer}.post_attention_layernorm.weight"])
        if i in text.sparse_layers:
            x = x + _experts(text, w, f"{layer}.mlp", h, gelu, margins)
        else:
            gate, up, down = (w[f"{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
            x = x + (gelu(h @ gate.T) * (h @ up.T)) @ down.T
    head = w[f"{ROOT}.embed_tokens.weight" if text.tie_word_embeddings else "language_model.lm_head.weight"]
    return _norm(text, x, w[f"{ROOT}.norm.weight"]) @ head.T


def token_embeddings(text: TextConfig, weights: Mapping[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """Scaled embeddings [L, D] of token ids."""
    return np.asarray(weights[f"{ROOT}.embed_tokens.weight"], np.float64)[ids] * np.sqrt(text.hidden_size)


def _norm(text: TextConfig, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    scale = 1 + weight if text.norm_plus_one else weight
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + text.rms_norm_eps) * scale


def _rotated(x: np.ndarray, theta: float) -> np.ndarray:
    """Rotary positions on [L, H, Dh]: the halves of a head are the two coordinates."""
    length, _, dim = x.shape
    angles = np.arange(length)[:, None] * theta ** (-np.arange(0, dim, 2) / dim)  # [L, Dh/2]
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b = x[..., : dim // 2], x[..., dim // 2 :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _attention(
    text: TextConfig,
    w: Mapping[str, np.ndarray],
    path: str,
    h: np.ndarray,
    cached: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    length, dim, group = len(h), text.head_dim, text.num_attention_heads // text.num_key_value_heads
    q, k, v = (
        (h @ w[f"{path}.{name}_proj.weight"].T).reshape(length, heads, dim)
        for name, heads in (
            ("q", text.num_attention_heads),
            ("k", text.num_key_value_heads),
            ("v", text.num_key_value_heads),
        )
    )
    q, k, v = _rotated(q, text.rope_theta), cached(_rotated(k, text.rope_theta)), cached(v)
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)  # [L, H, Dh]
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(dim)
    scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", shares, v).reshape(length, -1) @ w[f"{path}.o_proj.weight"].T


def _experts(
    text: TextConfig,
    w: Mapping[str, np.ndarray],
    path: str,
    h: np.ndarray,
    gelu: Gelu,
    margins: list[np.ndarray] | None,
) -> np.ndarray:
    assert text.moe is not None
    k = text.moe.top_k
    scores = (
        h @ w[f"{path}.gate.weight"].T if f"{path}.gate.weight" in w else h @ w[f"{path}.gate.u"] @ w[f"{path}.gate.v"]
    )
    probabilities = np.exp(scores - scores.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    order = np.argsort(-scores, axis=-1, kind="stable")
    if margins is not None and k < text.moe.num_experts:
        ranked = np.take_along_axis(scores, order, -1)
        margins.append(ranked[:, k - 1] - ranked[:, k])
    gate, up, down = (w[f"{path}.switch_mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    out = np.zeros_like(h)
    for position, (x, chosen) in enumerate(zip(h, order[:, :k], strict=True)):
        shares = probabilities[position, chosen]
        if text.moe.norm_topk_prob:
            shares = shares / shares.sum()
        for expert, share in zip(chosen, shares, strict=True):
            out[position] += share * (down[expert] @ (gelu(gate[expert] @ x) * (up[expert] @ x)))
    return out
