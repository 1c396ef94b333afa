"""k-means with clusters of equal size, deterministic, in NumPy."""

from __future__ import annotations

import numpy as np

MAX_ROUNDS = 30
MAX_SWEEPS = 20  # of swaps between pairs of clusters, per round


def balanced_clusters(points: np.ndarray, num_clusters: int, *, seed: int = 0) -> np.ndarray:
    """Cluster points into clusters of equal size.

    Lloyd's rounds: centres are the means of their points, then points go to centres at the least total squared distance
    that keeps the clusters equal. The second half is solved by a greedy start and by swaps: of any two clusters, points
    change places as long as a pair of them gains. For two clusters that is the best there is.

    Args:
        points: [N, D], N a multiple of ``num_clusters``.
        num_clusters: number of clusters.
        seed: of the choice of the first centres.

    Returns:
        The cluster of each point, int [N].

    Raises:
        ValueError: N is not a multiple of ``num_clusters``.
    """
    if len(points) % num_clusters:
        raise ValueError(f"{len(points)} points do not make {num_clusters} clusters of equal size")
    points = np.asarray(points, dtype=np.float32)
    centres = _first_centres(points, num_clusters, np.random.default_rng(seed))
    labels = _greedy(_costs(points, centres))
    best, best_cost = labels, np.inf
    for _ in range(MAX_ROUNDS):
        centres = np.stack([points[labels == i].mean(axis=0) for i in range(num_clusters)])  # [K, D]
        costs = _costs(points, centres)
        labels = _swap(costs, labels)
        cost = costs[np.arange(len(points)), labels].sum(dtype=np.float64)
        if cost >= best_cost * (1 - 1e-6):
            break
        best, best_cost = labels, cost
    return best


def _costs(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Squared distances [N, K], less each point's own square, which changes no comparison."""
    return (centres**2).sum(axis=1) - 2 * (points @ centres.T)


def _first_centres(points: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """k-means++: each next centre is drawn among the points that are far from the centres so far."""
    chosen = [int(random.integers(len(points)))]
    squares = (points**2).sum(axis=1)
    nearest = np.full(len(points), np.inf)
    for _ in range(count - 1):
        distance = squares + squares[chosen[-1]] - 2 * (points @ points[chosen[-1]])
        nearest = np.minimum(nearest, np.maximum(distance, 0))
        nearest[chosen] = 0
        total = nearest.sum()
        share = nearest / total if total > 0 else None
        chosen.append(int(random.choice(len(points), p=share)))
    return points[chosen]


def _greedy(costs: np.ndarray) -> np.ndarray:
    """Points that lose most by their second choice choose first; a full cluster takes no more."""
    count, clusters = costs.shape
    two = np.partition(costs, 1, axis=1) if clusters > 1 else np.repeat(costs, 2, axis=1)
    room = np.full(clusters, count // clusters)
    labels = np.empty(count, dtype=np.int64)
    for point in np.argsort(two[:, 0] - two[:, 1], kind="stable"):
        wanted = costs[point] + np.where(room > 0, 0, np.inf)
        labels[point] = np.argmin(wanted)
        room[labels[point]] -= 1
    return labels


def _swap(costs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Exchange points between pairs of clusters while the total falls; sizes stay as they are."""
    labels = labels.copy()
    clusters = costs.shape[1]
    for _ in range(MAX_SWEEPS):
        changed = False
        for a in range(clusters):
            for b in range(a + 1, clusters):
                in_a, in_b = np.flatnonzero(labels == a), np.flatnonzero(labels == b)
                gain_a = costs[in_a, a] - costs[in_a, b]  # of moving to b
                gain_b = costs[in_b, b] - costs[in_b, a]
                from_a, from_b = np.argsort(-gain_a, kind="stable"), np.argsort(-gain_b, kind="stable")
                # The best of a changes with the best of b, and so on, as long as the two together gain.
                count = int((gain_a[from_a] + gain_b[from_b] > 1e-7).sum())
                labels[in_a[from_a[:count]]], labels[in_b[from_b[:count]]] = b, a
                changed |= count > 0
        if not changed:
            break
    return labels
