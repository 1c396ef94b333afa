"""What gm-mlx relies on in mlx-lm, symbol by symbol. A failure here says which promise a new version broke."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from gm_mlx import _mlx_lm
from gm_mlx._mlx_lm import (
    KVCache,
    QuantizedKVCache,
    QuantizedSwitchLinear,
    RotatingKVCache,
    SwitchGLU,
    SwitchLinear,
    SwitchMLP,
    apply_min_p,
    apply_top_k,
    apply_top_p,
    create_attention_mask,
    make_logits_processors,
    scaled_dot_product_attention,
)

LOGPROBS = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05]]))


def test_every_symbol_has_its_check() -> None:
    checks = [name for name in globals() if name.startswith("test_")]
    assert [symbol for symbol in _mlx_lm.__all__ if not any(symbol in check for check in checks)] == []


def rows(count: int, seed: int = 0, width: int = 32) -> tuple[mx.array, mx.array]:
    mx.random.seed(seed)
    return mx.random.normal((1, 2, count, width)), mx.random.normal((1, 2, count, width))


def test_KVCache() -> None:
    cache = KVCache()
    assert cache.offset == 0
    keys, values = rows(5)
    cache.update_and_fetch(keys, values)
    assert cache.is_trimmable() and cache.trim(2) == 2 and cache.offset == 3
    more, more_values = rows(300, 1)  # beyond the 256 that it grows by
    found, found_values = cache.update_and_fetch(more, more_values)
    assert cache.offset == 303
    assert mx.array_equal(found, mx.concatenate([keys[:, :, :3], more], axis=2))
    assert mx.array_equal(found_values, mx.concatenate([values[:, :, :3], more_values], axis=2))
    mx.eval([cache.state])


def test_QuantizedKVCache() -> None:
    cache = QuantizedKVCache(group_size=32, bits=8)
    assert cache.offset == 0
    keys, values = rows(5)
    cache.update_and_fetch(keys, values)
    assert cache.is_trimmable() and cache.trim(2) == 2 and cache.offset == 3
    more, more_values = rows(300, 1)
    found, found_values = cache.update_and_fetch(more, more_values)
    for packed, exact in (
        (found, mx.concatenate([keys[:, :, :3], more], axis=2)),
        (found_values, mx.concatenate([values[:, :, :3], more_values], axis=2)),
    ):
        unpacked = mx.dequantize(packed[0], packed[1], packed[2], group_size=32, bits=8)
        assert mx.allclose(unpacked, exact, atol=0.05)
    assert (cache.bits, cache.group_size) == (8, 32)
    mx.eval([cache.state])


def test_RotatingKVCache() -> None:
    cache = RotatingKVCache(max_size=8, keep=2)
    for position in range(12):
        one = mx.full((1, 1, 1, 4), position, dtype=mx.float32)
        keys, _ = cache.update_and_fetch(one, one)
        if position == 6:
            assert cache.is_trimmable()
    assert cache.offset == 12 and not cache.is_trimmable()
    assert sorted(keys[0, 0, :, 0].tolist()) == [0, 1, 6, 7, 8, 9, 10, 11]  # type: ignore[arg-type]
    assert cache.trim(0) == 0
    mx.eval([cache.state])


@pytest.mark.parametrize("make", [KVCache, lambda: RotatingKVCache(max_size=64, keep=4)])
def test_create_attention_mask(make: Any) -> None:
    assert create_attention_mask(mx.zeros((1, 4, 8)), None) == "causal"
    assert create_attention_mask(mx.zeros((1, 1, 8)), None) is None
    cache = make()
    cache.update_and_fetch(*rows(3))
    assert create_attention_mask(mx.zeros((1, 1, 8)), cache) is None
    assert create_attention_mask(mx.zeros((1, 4, 8)), cache) == "causal"


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal attention of the last rows, with shared key/value heads."""
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = q @ k.swapaxes(-1, -2) * 0.1
    queries, keys = scores.shape[-2:]
    scores[..., ~np.tri(queries, keys, keys - queries, dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


@pytest.mark.parametrize(("cache", "atol"), [(None, 1e-5), (QuantizedKVCache(group_size=32, bits=8), 0.02)])
def test_scaled_dot_product_attention(cache: Any, atol: float) -> None:
    keys, values = rows(9)
    queries = mx.random.normal((1, 4, 3, 32))
    expected = attention(*(np.array(x) for x in (queries, keys, values)))
    if cache is not None:
        keys, values = cache.update_and_fetch(keys, values)
    found = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=0.1, mask="causal")  # type: ignore[arg-type]
    np.testing.assert_allclose(np.array(found), expected, atol=atol)


def test_SwitchLinear() -> None:
    layer = SwitchLinear(8, 6, 3, bias=False)
    assert layer.weight.shape == (3, 6, 8) and "bias" not in layer
    x = mx.random.normal((5, 1, 1, 8))
    experts = mx.array([[0], [2], [1], [2], [0]])
    expected = mx.stack([layer.weight[e] @ row for e, row in zip(experts[:, 0].tolist(), x[:, 0, 0])])  # type: ignore  # noqa: B905
    assert mx.allclose(layer(x, experts)[:, 0, 0], expected, atol=1e-5)


def test_QuantizedSwitchLinear() -> None:
    layer = SwitchLinear(64, 6, 3, bias=False)
    quantized = layer.to_quantized(group_size=32, bits=8, mode="affine")
    assert isinstance(quantized, QuantizedSwitchLinear)
    assert set(quantized.parameters()) == {"weight", "scales", "biases"}
    assert (quantized.group_size, quantized.bits, quantized.mode) == (32, 8, "affine")
    unpacked = mx.dequantize(quantized.weight, quantized.scales, quantized.biases, group_size=32, bits=8)
    assert mx.allclose(unpacked, layer.weight, atol=2e-3)
    x, experts = mx.random.normal((5, 1, 1, 64)), mx.array([[0], [2], [1], [2], [0]])
    assert mx.allclose(quantized(x, experts), layer(x, experts), atol=0.05)
    assert not hasattr(quantized, "to_quantized")


@pytest.mark.parametrize("tokens", [3, 50])  # sorted dispatch begins at 64 assignments
def test_SwitchGLU(tokens: int) -> None:
    def activation(up: mx.array, gate: mx.array) -> mx.array:
        return nn.gelu_approx(gate) * up

    layer = SwitchGLU(8, 16, 4, activation=activation)
    assert set(layer.parameters()) == {"gate_proj", "up_proj", "down_proj"}
    x = mx.random.normal((1, tokens, 8))
    experts = mx.random.randint(0, 4, (1, tokens, 2))
    found = layer(x, experts)
    assert found.shape == (1, tokens, 2, 8)
    for token in range(tokens):
        for place in range(2):
            e, row = int(experts[0, token, place]), x[0, token]  # type: ignore[arg-type]
            gate, up, down = (getattr(layer, f"{name}_proj").weight[e] for name in ("gate", "up", "down"))
            assert mx.allclose(found[0, token, place], down @ activation(up @ row, gate @ row), atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 40])
def test_SwitchMLP(tokens: int) -> None:
    layer = SwitchMLP(8, 16, 4, activation=nn.gelu_approx, bias=True)
    assert {name for name, _ in tree_flatten(layer.parameters())} == {
        f"fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    }
    layer.fc1.bias, layer.fc2.bias = mx.random.normal((4, 16)), mx.random.normal((4, 8))
    x = mx.random.normal((1, tokens, 8))
    experts = mx.random.randint(0, 4, (1, tokens, 2))
    found = layer(x, experts)
    for token in range(tokens):
        for place in range(2):
            e = int(experts[0, token, place])  # type: ignore[arg-type]
            hidden = nn.gelu_approx(layer.fc1.weight[e] @ x[0, token] + layer.fc1.bias[e])
            assert mx.allclose(found[0, token, place], layer.fc2.weight[e] @ hidden + layer.fc2.bias[e], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "filtered", "kept"),
    [
        ("apply_top_p", apply_top_p(LOGPROBS, 0.6), 2),
        ("apply_min_p", apply_min_p(LOGPROBS, 0.2), 3),
        ("apply_top_k", apply_top_k(LOGPROBS, 1), 1),
    ],
)
def test_apply_top_p_and_apply_min_p_and_apply_top_k(name: str, filtered: mx.array, kept: int) -> None:
    assert mx.array_equal(filtered[:, :kept], LOGPROBS[:, :kept]), name
    assert mx.all(filtered[:, kept:] == -mx.inf), name


def test_make_logits_processors() -> None:
    assert make_logits_processors() == []
    (processor,) = make_logits_processors(repetition_penalty=2.0, repetition_context_size=2)
    logits = mx.array([[4.0, -4.0, 4.0, 4.0]])
    assert processor(mx.array([3, 0, 1]), logits + 0).tolist() == [[2.0, -8.0, 4.0, 4.0]]
    assert processor(mx.array([], dtype=mx.uint32), logits + 0).tolist() == logits.tolist()
