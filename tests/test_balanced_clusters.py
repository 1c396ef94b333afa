"""Clusters of equal size: balanced, deterministic, and better than chance."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gm_mlx.balanced_clusters import balanced_clusters


def spread(points: np.ndarray, labels: np.ndarray) -> float:
    """Total squared distance of points to the means of their clusters."""
    return sum(((points[labels == i] - points[labels == i].mean(axis=0)) ** 2).sum() for i in set(labels.tolist()))


@settings(max_examples=40)
@given(count=st.integers(1, 5), size=st.integers(1, 12), seed=st.integers(0, 99), few=st.booleans())
def test_equal_sizes_and_the_same_result_again(count: int, size: int, seed: int, few: bool) -> None:
    random = np.random.default_rng(seed)
    points = random.integers(0, 2, (count * size, 3)) if few else random.normal(size=(count * size, 3))
    labels = balanced_clusters(points, count, seed=seed)
    assert np.bincount(labels, minlength=count).tolist() == [size] * count
    np.testing.assert_array_equal(labels, balanced_clusters(points, count, seed=seed))


@pytest.mark.parametrize("points", [np.zeros((8, 3)), np.ones((8, 3)), np.repeat([[1.0, 2.0], [3.0, 4.0]], 4, axis=0)])
def test_points_that_coincide(points: np.ndarray) -> None:
    assert np.bincount(balanced_clusters(points, 4)).tolist() == [2] * 4


def test_groups_are_found() -> None:
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(5), 20)
    random.shuffle(groups)
    points = 4 * random.normal(size=(5, 16))[groups] + random.normal(size=(100, 16))
    labels = balanced_clusters(points, 5)
    assert all(len(set(labels[groups == i].tolist())) == 1 for i in range(5))


@pytest.mark.parametrize("seed", range(5))
def test_two_clusters_cannot_be_improved_by_any_exchange(seed: int) -> None:
    points = np.random.default_rng(seed).normal(size=(10, 2))
    labels = balanced_clusters(points, 2, seed=seed)
    centres = [points[labels == i].mean(axis=0) for i in range(2)]
    costs = np.stack([((points - centre) ** 2).sum(axis=1) for centre in centres], axis=1)
    best = min(
        costs[list(chosen), 0].sum() + costs[[i for i in range(10) if i not in chosen], 1].sum()
        for chosen in itertools.combinations(range(10), 5)
    )
    assert costs[np.arange(10), labels].sum() == pytest.approx(best, rel=1e-5)


def test_better_than_chance() -> None:
    random = np.random.default_rng(1)
    points = random.normal(size=(400, 6))
    dealt = np.arange(400) % 4
    assert spread(points, balanced_clusters(points, 4)) < 0.85 * spread(points, dealt)


def test_sizes_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="7 points do not make 2 clusters of equal size"):
        balanced_clusters(np.zeros((7, 2)), 2)
