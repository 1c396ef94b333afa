"""Hyperparameters that are refused, and the learning rate against plain formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from gm_mlx.errors import UserError
from gm_mlx.train.config import TrainConfig


def rates(**keys: Any) -> list[float]:
    config = TrainConfig(**{"steps": 100, "learning_rate": 2.0, **keys})
    return [config.rate(step) for step in range(config.steps)]


def test_all_rise_alike() -> None:
    for schedule in ("cosine", "linear", "constant"):
        np.testing.assert_allclose(rates(schedule=schedule, warmup=0.1)[:10], [0.2 * (n + 1) for n in range(10)])
        assert rates(schedule=schedule, warmup=0.0)[0] == 2.0


def test_falls() -> None:
    """Over the steps after the warm-up, or over the last ones that ``decay`` says, towards zero."""
    for decay, start in ((1.0, 10), (0.4, 60)):
        done = [(step - start) / (100 - start) for step in range(start, 100)]
        cosine = [1 + math.cos(math.pi * share) for share in done]
        linear = [2 * (1 - share) for share in done]
        np.testing.assert_allclose(rates(warmup=0.1, decay=decay)[start:], cosine)
        np.testing.assert_allclose(rates(schedule="linear", warmup=0.1, decay=decay)[start:], linear)
        for schedule in ("cosine", "linear"):
            assert set(rates(schedule=schedule, warmup=0.1, decay=decay)[9:start]) == {2.0}
    assert set(rates(schedule="constant", warmup=0.1, decay=0.4)[9:]) == {2.0}


def test_one_step_has_a_rate() -> None:
    for schedule in ("cosine", "linear", "constant"):
        assert rates(steps=1, schedule=schedule) == [2.0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0),
        ("steps", 1.5),
        ("steps", True),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("learning_rate", "1e-4"),
        ("schedule", "step"),
        ("schedule", ["cosine"]),
        ("warmup", 1.1),
        ("decay", -0.1),
        ("weight_decay", -1.0),
        ("betas", (0.9,)),
        ("betas", (0.9, 1.0)),
        ("betas", 0.9),
        ("eps", 0),
        ("clip", -1.0),
        ("accumulate", 0),
        ("precision", "float8"),
        ("checkpoint", 1),
        ("seed", -1),
        ("log_every", 0),
        ("save_every", 0),
        ("keep", 0),
        ("validate_every", -1),
        ("patience", -1),
        ("patience", 3),  # without validate_every
    ],
)
def test_refused(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"^{key}: "):
        TrainConfig(**{"steps": 10, "learning_rate": 1e-3, key: value})
