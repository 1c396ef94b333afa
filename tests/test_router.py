"""Routers: who is chosen, with what weight, at what precision, and how small a router may be."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from torch_reference import relative_error

from gm_mlx.config import MoEConfig
from gm_mlx.router import LowRankRouter, Router, Routing, choose, load_balancing_loss, low_rank, make_router


def naive_choice(logits: np.ndarray, top_k: int, norm_topk_prob: bool) -> tuple[np.ndarray, np.ndarray]:
    """Experts and weights of logits [S, E], in float64."""
    experts, weights = [], []
    for row in logits.astype(np.float64):
        p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        chosen = sorted(range(len(row)), key=lambda e: (-row[e], e))[:top_k]
        experts.append(chosen)
        weights.append(p[chosen] / p[chosen].sum() if norm_topk_prob else p[chosen])
    return np.array(experts), np.array(weights)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize(("num_experts", "top_k"), [(2, 1), (2, 2), (4, 1), (4, 2), (4, 3), (4, 4)])
@pytest.mark.parametrize("tokens", [1, 600])
def test_choice(tokens: int, num_experts: int, top_k: int, norm_topk_prob: bool) -> None:
    logits = np.random.default_rng(0).normal(size=(tokens, num_experts)).astype(np.float32) * 3
    experts, weights = naive_choice(logits, top_k, norm_topk_prob)
    probabilities, ours, our_weights = choose(mx.array(logits), top_k, norm_topk_prob)
    assert np.array_equal(np.array(ours), experts)
    assert relative_error(our_weights, weights) < 1e-6
    assert relative_error(probabilities, torch.softmax(torch.from_numpy(logits), -1)) < 1e-6


@pytest.mark.parametrize(
    ("logits", "chosen"),
    [
        ([0, 0, 0, 0], [0, 1, 2, 3]),
        ([1, 2, 2, 1], [1, 2, 0, 3]),
        ([0, 1, 0, 1], [1, 3, 0, 2]),
        ([-5, -5, -5, 7], [3, 0, 1, 2]),
        ([0, 0, 200, 0], [2, 0, 1, 3]),  # the probability of all but one is zero in float32
        ([-np.inf, -np.inf, 0, 0], [2, 3]),
    ],
)
def test_the_lower_index_wins_a_tie(logits: list[float], chosen: list[int]) -> None:
    for k in range(1, len(chosen) + 1):
        _, experts, weights = choose(mx.array([logits], dtype=mx.float32), k, True)
        assert experts.tolist() == [chosen[:k]]
        assert weights.sum().item() == pytest.approx(1)


def test_batches_keep_their_shape() -> None:
    probabilities, experts, weights = choose(mx.random.normal((2, 5, 4)), 2, True)
    assert (probabilities.shape, experts.shape, weights.shape) == ((2, 5, 4), (2, 5, 2), (2, 5, 2))


@pytest.mark.parametrize("router", [Router(64, 4), LowRankRouter(64, 4, 3)])
def test_half_precision_activations_are_routed_in_float32(router: Router | LowRankRouter) -> None:
    x = mx.random.normal((40, 64)).astype(mx.bfloat16)
    logits = router(x)
    wide = np.array(x.astype(mx.float32)).astype(np.float64)
    if isinstance(router, Router):
        exact = wide @ np.array(router.weight).T
    else:
        exact = wide @ np.array(router.u) @ np.array(router.v)
    assert logits.dtype == mx.float32
    assert relative_error(logits, exact) < 1e-6  # bfloat16 would be wrong in the third digit
    assert choose(logits, 2, True)[2].dtype == mx.float32


def test_a_gap_that_bfloat16_cannot_see_decides() -> None:
    router = Router(2, 4)
    router.weight = mx.array([[1.0, 0], [1.001, 0], [1.002, 0], [0, 0]])
    _, experts, _ = choose(router(mx.array([[1.0, 1.0]], dtype=mx.bfloat16)), 2, True)
    assert experts.tolist() == [[2, 1]]


@pytest.mark.parametrize("num_experts", [2, 3, 4, 8])
def test_rank_one_less_than_experts_loses_nothing(num_experts: int) -> None:
    random = np.random.default_rng(1)
    # A large common part, as trained routers have: it must not eat the precision.
    weight = (random.normal(size=(num_experts, 48)) + 3 * random.normal(size=48)).astype(np.float32)
    x = mx.array(random.normal(size=(200, 48)).astype(np.float32) / 7)
    full, small = Router(48, num_experts), LowRankRouter(48, num_experts, num_experts - 1)
    full.weight = mx.array(weight)
    small.u, small.v = (mx.array(factor) for factor in low_rank(weight, num_experts - 1))
    ours, theirs = (mx.softmax(router(x), axis=-1) for router in (small, full))
    assert mx.allclose(ours, theirs, rtol=0, atol=1e-5)


def test_lower_ranks_are_the_best_of_their_size() -> None:
    weight = np.random.default_rng(2).normal(size=(6, 40)) * np.linspace(1, 3, 6)[:, None]
    centred = weight - weight.mean(axis=0)
    left, singular, right = np.linalg.svd(centred)
    errors = []
    for rank in range(1, 6):
        u, v = low_rank(weight, rank)
        assert (u.shape, v.shape, u.dtype, v.dtype) == ((40, rank), (rank, 6), np.float32, np.float32)
        best = (left[:, :rank] * singular[:rank]) @ right[:rank]
        errors.append(np.linalg.norm(centred - (u @ v).T))
        assert np.linalg.norm((u @ v).T - best) < 1e-5
        assert errors[-1] == pytest.approx(np.sqrt((singular[rank:] ** 2).sum()), abs=1e-5)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5 < errors[-2]


@pytest.mark.parametrize("rank", [0, 4])
def test_a_rank_outside_its_range_is_named(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} of a router with 4 experts is not between 1 and 3"):
        low_rank(np.ones((4, 8)), rank)


def test_the_config_chooses_the_router() -> None:
    assert isinstance(make_router(MoEConfig(), 8), Router)
    router = make_router(MoEConfig(router_rank=2), 8)
    assert isinstance(router, LowRankRouter)
    assert (router.u.shape, router.v.shape) == ((8, 2), (2, 4))


def trace_of(logits: np.ndarray) -> Routing:
    return Routing(0, *choose(mx.array(logits), 2, True), mx.array(logits))


def test_load_balancing_loss_sums_over_layers() -> None:
    random = np.random.default_rng(4)
    layers = [random.normal(size=(2, 30, 4)).astype(np.float32) for _ in range(3)]
    expected = torch.tensor(0.0)
    for layer in layers:
        p = torch.softmax(torch.from_numpy(layer).reshape(-1, 4), dim=-1)
        first = torch.nn.functional.one_hot(p.argmax(-1), 4).float()
        expected += 4 * (p.mean(0) * first.mean(0)).sum()
    assert load_balancing_loss([trace_of(layer) for layer in layers]).item() == pytest.approx(expected.item(), rel=1e-6)


def test_load_balancing_loss_ignores_masked_tokens() -> None:
    logits = np.random.default_rng(5).normal(size=(2, 9, 4)).astype(np.float32)
    mask = np.ones((2, 9))
    mask[0, 4:] = 0
    kept = logits[mask.astype(bool)]
    masked = load_balancing_loss([trace_of(logits)], mx.array(mask)).item()
    assert masked == pytest.approx(load_balancing_loss([trace_of(kept)]).item(), rel=1e-6)
    assert masked != pytest.approx(load_balancing_loss([trace_of(logits)]).item(), rel=1e-3)
    assert load_balancing_loss([trace_of(logits)], mx.zeros((2, 9))).item() == 0


def test_load_balancing_loss_is_one_in_balance_and_all_experts_out_of_it() -> None:
    assert load_balancing_loss([trace_of(np.eye(4, dtype=np.float32) * 50)]).item() == pytest.approx(1)
    assert load_balancing_loss([trace_of(np.tile([50.0, 0, 0, 0], (9, 1)).astype(np.float32))]).item() == 4
    assert load_balancing_loss([]).item() == 0
