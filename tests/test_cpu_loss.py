"""Cross-entropy in NumPy against MLX's, with gradients."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from torch_reference import relative_error

from gm_mlx.cpu import cross_entropy, loss

TARGETS = mx.array([3, 0, 499, 3, 7])


def logits(scale: float = 1.0, dtype: mx.Dtype = mx.float32) -> mx.array:
    return (scale * mx.random.normal((5, 500), key=mx.random.key(0))).astype(dtype)


@pytest.fixture(autouse=True)
def all_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "WORTH", 1)


@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_value_and_gradient(scale: float, dtype: mx.Dtype) -> None:
    given = logits(scale, dtype)

    def fast(x: mx.array) -> mx.array:
        return 3 * cross_entropy(x, TARGETS)

    def stock(x: mx.array) -> mx.array:
        return 3 * nn.losses.cross_entropy(x.astype(mx.float32), TARGETS, reduction="sum")

    (found, gradient), (wanted, wanted_gradient) = mx.value_and_grad(fast)(given), mx.value_and_grad(stock)(given)
    assert found.dtype == mx.float32 and found.shape == ()
    assert gradient.dtype == dtype
    assert relative_error(found, np.array(wanted)) <= 1e-6
    gradient, wanted_gradient = (a.astype(mx.float32) for a in (gradient, wanted_gradient))
    assert relative_error(gradient, np.array(wanted_gradient)) <= (1e-6 if dtype == mx.float32 else 1e-2)


def test_tokens_that_cannot_be() -> None:
    given = mx.where(mx.arange(500) > 490, -mx.inf, logits())
    targets = mx.array([3, 0, 1, 3, 7])
    found, gradient = mx.value_and_grad(lambda x: cross_entropy(x, targets))(given)
    assert np.isfinite(found.item())
    assert not np.array(gradient)[:, 491:].any()
    assert np.abs(np.array(gradient).sum(axis=1)).max() < 1e-6


def test_little_is_left_to_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "WORTH", 2501)
    assert cross_entropy(logits(), TARGETS) is None
    monkeypatch.setattr(loss, "WORTH", 2500)
    assert cross_entropy(logits(), TARGETS) is not None
