"""Decoders of all families in float64 NumPy, written from transformers' Llama, Qwen2, StableLm and Phi.

``numpy_decoder`` is Gemma alone, and seen from closer by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from gm_mlx.config import TextConfig

ROOT = "language_model.model"
Weights = Mapping[str, np.ndarray]


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def tanh_gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"silu": silu, "gelu_pytorch_tanh": tanh_gelu}


def logits(text: TextConfig, weights: Weights, embeddings: np.ndarray) -> np.ndarray:
    """Logits [L, V] of what enters the first layer, [L, D]."""
    w = {name: np.asarray(array, np.float64) for name, array in weights.items() if name.startswith("language_model.")}
    x = embeddings.astype(np.float64)
    for i in range(text.num_hidden_layers):
        layer = f"{ROOT}.layers.{i}"
        h = norm(text, w, f"{layer}.input_layernorm", x)
        attended = attention(text, w, f"{layer}.self_attn", h)
        if not text.parallel_block:
            h = norm(text, w, f"{layer}.post_attention_layernorm", x + attended)
        mixed = experts if i in text.sparse_layers else network
        x = x + attended + mixed(text, w, f"{layer}.mlp", h)
    head = w[f"{ROOT}.embed_tokens.weight" if text.tie_word_embeddings else "language_model.lm_head.weight"]
    return norm(text, w, f"{ROOT}.norm", x) @ head.T


def token_embedding(text: TextConfig, weights: Weights, token: int) -> np.ndarray:
    scale = np.sqrt(text.hidden_size) if text.scale_embeddings else 1.0
    return np.asarray(weights[f"{ROOT}.embed_tokens.weight"][token], np.float64) * scale


def linear(w: Weights, path: str, x: np.ndarray) -> np.ndarray:
    return x @ w[f"{path}.weight"].T + w.get(f"{path}.bias", 0)


def norm(text: TextConfig, w: Weights, path: str, x: np.ndarray) -> np.ndarray:
    if text.norm == "layer":
        x = x - x.mean(-1, keepdims=True)
    scaled = x / np.sqrt((x * x).mean(-1, keepdims=True) + text.rms_norm_eps)
    return scaled * (w[f"{path}.weight"] + text.norm_plus_one) + w.get(f"{path}.bias", 0)


def attention(text: TextConfig, w: Weights, path: str, h: np.ndarray) -> np.ndarray:
    length, dim = len(h), text.head_dim
    q, k, v = (linear(w, f"{path}.{part}_proj", h).reshape(length, -1, dim) for part in "qkv")
    q, k = rotated(q, text.rotary_dim, text.rope_theta), rotated(k, text.rotary_dim, text.rope_theta)
    out = np.zeros_like(q)
    for head in range(q.shape[1]):
        shared = head * k.shape[1] // q.shape[1]
        scores = q[:, head] @ k[:, shared].T / np.sqrt(dim)
        scores[np.triu_indices(length, 1)] = -np.inf
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = shares / shares.sum(-1, keepdims=True) @ v[:, shared]
    return linear(w, f"{path}.o_proj", out.reshape(length, -1))


def rotated(x: np.ndarray, turned: int, theta: float) -> np.ndarray:
    """Rotary positions on the first ``turned`` channels of [L, H, Dh]; their halves are the two coordinates."""
    angles = np.arange(len(x))[:, None, None] * theta ** (-np.arange(0, turned, 2) / turned)
    a, b, rest = x[..., : turned // 2], x[..., turned // 2 : turned], x[..., turned:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def network(text: TextConfig, w: Weights, path: str, x: np.ndarray) -> np.ndarray:
    act = ACTIVATIONS[text.hidden_act]
    if not text.gated:
        return linear(w, f"{path}.fc2", act(linear(w, f"{path}.fc1", x)))
    return linear(w, f"{path}.down_proj", act(linear(w, f"{path}.gate_proj", x)) * linear(w, f"{path}.up_proj", x))


def experts(text: TextConfig, w: Weights, path: str, h: np.ndarray) -> np.ndarray:
    assert text.moe is not None
    scores = (
        linear(w, f"{path}.gate", h) if f"{path}.gate.weight" in w else h @ w[f"{path}.gate.u"] @ w[f"{path}.gate.v"]
    )
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    chosen = np.argsort(-shares, axis=-1, kind="stable")[:, : text.moe.top_k]  # [L, k]
    shares = np.where((chosen[..., None] == np.arange(text.moe.num_experts)).any(1), shares, 0)
    if text.moe.norm_topk_prob:
        shares /= shares.sum(-1, keepdims=True)
    out = np.zeros_like(h)
    stacked = {name: array for name, array in w.items() if name.startswith(f"{path}.switch_mlp.")}
    for expert in range(text.moe.num_experts):
        own = {name.replace(".switch_mlp", ""): array[expert] for name, array in stacked.items()}
        out += shares[:, expert, None] * network(text, own, path, h)
    return out
