"""Attention in NumPy against MLX's, with gradients."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from torch_reference import CLIP, TEXT, relative_error

from gm_mlx import cpu
from gm_mlx._mlx_lm import KVCache
from gm_mlx.cpu import attention
from gm_mlx.decoder import Attention as DecoderAttention
from gm_mlx.vision import Attention as TowerAttention

EXACT = 1e-5
Arrays = list[mx.array]

pytestmark = pytest.mark.skipif(mx.default_device().type != mx.DeviceType.cpu, reason="GPUs have kernels of their own")


def arrays(*shapes: tuple[int, ...]) -> Arrays:
    return [mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate(shapes)]


def stock(q: mx.array, k: mx.array, v: mx.array, scale: float, causal: bool) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal" if causal else None)


@pytest.mark.parametrize("queries", [7, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("heads", "shared", "length", "keys"), [(4, 4, 40, 40), (4, 1, 40, 40), (6, 2, 13, 40), (2, 2, 1, 9)]
)
def test_values_and_gradients(
    heads: int, shared: int, length: int, keys: int, causal: bool, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of heads with keys of their own and shared ones, of all positions and of the last after those in a cache."""
    monkeypatch.setattr(attention, "QUERIES", queries)
    given = arrays((2, heads, length, 16), (2, shared, keys, 16), (2, shared, keys, 16), (2, heads, length, 16))

    def run(function: Callable[..., mx.array]) -> Arrays:
        *inputs, seen = given
        y = function(*inputs, 0.3, causal)
        return [y, *mx.grad(lambda *a: (function(*a, 0.3, causal) * seen).sum(), argnums=(0, 1, 2))(*inputs)]

    for found, wanted in zip(run(attention.attention), run(stock), strict=True):
        assert found.shape == wanted.shape
        assert relative_error(found, np.array(wanted)) <= EXACT


def test_scores_that_would_overflow() -> None:
    q, k, v = (100 * a for a in arrays((1, 1, 20, 16), (1, 1, 20, 16), (1, 1, 20, 16)))
    assert relative_error(attention.attention(q, k, v, 1.0, True), np.array(stock(q, k, v, 1.0, True))) <= EXACT


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of the fast function was causal."""
    monkeypatch.setattr(attention, "WORTH", 1)
    seen: list[bool] = []
    fast = attention.attention

    def spy(q: mx.array, k: mx.array, v: mx.array, scale: float, causal: bool) -> mx.array:
        seen.append(causal)
        return fast(q, k, v, scale, causal)

    monkeypatch.setattr(attention, "attention", spy)
    return seen


def test_in_a_decoder(calls: list[bool]) -> None:
    layer = DecoderAttention(TEXT)
    fast = DecoderAttention(TEXT)
    fast.update(layer.parameters())
    cpu.speed_up(fast)
    x = arrays((2, 30, TEXT.hidden_size))[0]

    def run(layer: DecoderAttention) -> Arrays:
        cache = KVCache()
        parts = [layer(x[:, :20], "causal", cache), layer(x[:, 20:29], "causal", cache), layer(x[:, 29:], None, cache)]
        window = mx.tril(mx.ones((30, 30), mx.bool_)) & ~mx.tril(mx.ones((30, 30), mx.bool_), -5)
        return [*parts, layer(x, "causal"), layer(x, window)]

    for found, wanted in zip(run(fast), run(layer), strict=True):
        assert relative_error(found, np.array(wanted)) <= EXACT
    assert calls == [True, True, False, True]  # the mask of a window is for MLX


def test_in_a_tower(calls: list[bool]) -> None:
    layer, fast = TowerAttention(CLIP), TowerAttention(CLIP)
    fast.update(layer.parameters())
    cpu.speed_up(fast)
    x = arrays((2, 30, CLIP.hidden_size))[0]
    assert relative_error(fast(x), np.array(layer(x))) <= EXACT
    assert relative_error(mx.compile(lambda x: fast(x))(x), np.array(layer(x))) <= EXACT
    assert calls == [False]  # within mx.compile nothing is known


def test_few_scores_are_for_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = TowerAttention(CLIP)
    x = arrays((1, 4, CLIP.hidden_size))[0]
    wanted = layer(x)
    cpu.speed_up(layer)
    monkeypatch.setattr(attention, "attention", lambda *given: pytest.fail("was called"))
    assert mx.array_equal(layer(x), wanted)
