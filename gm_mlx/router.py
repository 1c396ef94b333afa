"""Routers: which experts a token goes to, and with what weight.

The rule is DeepSpeed 0.9.5's gate (deepspeed/moe/sharded_moe.py), made deterministic: softmax in float32, the k largest
logits win, the lower index wins a tie. DeepSpeed adds Gumbel noise when it draws the second expert, even in evaluation,
so its answers cannot be repeated; the second largest logit is what that draw returns most often. The draw is an option,
and so is DeepSpeed's limit to the tokens of an expert (``capacity``).

A low-rank router computes ``(x U) V`` instead of ``x W^T``. Softmax does not see what is common to all logits, so the
router's rows are centred first. Centred rows sum to zero, hence have rank E - 1 at most: with rank E - 1 nothing is
lost, and below it the truncated SVD is the best approximation there is.

Both routers hold raw arrays and no ``nn.Linear``, so that quantization and LoRA, which look for linears, leave them
alone: a router in 4 bits sends tokens to the wrong experts.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from gm_mlx.config import MoEConfig

FLOAT32_EPS = float(np.finfo(np.float32).eps)


class Routing(NamedTuple):
    """Where the tokens of one sparse layer went.

    Attributes:
        layer: index of the decoder layer.
        probabilities: softmax over all experts, float32 [..., E].
        experts: chosen experts, best first, uint32 [..., k].
        weights: their weights in the output, float32 [..., k].
        logits: of which the probabilities are the softmax, float32 [..., E].
        kept: bool [..., k], False where an expert had no room for a token; None when every expert takes all.
    """

    layer: int
    probabilities: mx.array
    experts: mx.array
    weights: mx.array
    logits: mx.array
    kept: mx.array | None = None


class Positions(NamedTuple):
    """What sparse layers may know of the positions of a pass, beside their hidden states.

    Attributes:
        real: bool [B, L], False on padding; None when there is none.
        image: bool [B, L], True where a position is an image's; None for requests without images.
        pictured: bool [B], True for the rows whose requests have images; None when ``image`` is about all of them.
    """

    real: mx.array | None = None
    image: mx.array | None = None
    pictured: mx.array | None = None

    def part(self, start: int, stop: int) -> Positions:
        """Of a stretch of the positions."""
        real, image = (None if a is None else a[:, start:stop] for a in self[:2])
        return Positions(real, image, self.pictured)

    def next_token(self) -> Positions:
        """Of one more position of each row: text, in a request with or without images as before."""
        image = None if self.image is None else mx.zeros((self.image.shape[0], 1), mx.bool_)
        return Positions(None, image, self.pictured)


class Router(nn.Module):
    """One row of logits weights per expert, without bias (``gate.wg`` in DeepSpeed)."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        bound = hidden_size**-0.5
        self.weight = mx.random.uniform(-bound, bound, (num_experts, hidden_size))

    def __call__(self, x: mx.array) -> mx.array:
        """Logits float32 [..., E] of x [..., D]."""
        return x.astype(mx.float32) @ self.weight.astype(mx.float32).T


class LowRankRouter(nn.Module):
    """Logits through a bottleneck of ``rank`` numbers: ``(x U) V``."""

    def __init__(self, hidden_size: int, num_experts: int, rank: int) -> None:
        super().__init__()
        bound = hidden_size**-0.5
        self.u = mx.random.uniform(-bound, bound, (hidden_size, rank))
        self.v = mx.random.uniform(-1, 1, (rank, num_experts))

    def __call__(self, x: mx.array) -> mx.array:
        """Logits float32 [..., E] of x [..., D], up to a constant per token that softmax does not see."""
        return (x.astype(mx.float32) @ self.u.astype(mx.float32)) @ self.v.astype(mx.float32)


def make_router(config: MoEConfig, hidden_size: int) -> Router | LowRankRouter:
    """The router that the config asks for."""
    if config.router_rank:
        return LowRankRouter(hidden_size, config.num_experts, config.router_rank)
    return Router(hidden_size, config.num_experts)


def low_rank(weight: np.ndarray, rank: int, covariance: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Factors of a router: the best of their rank for routing.

    Best means the least squared error of the centred logits: for inputs that are alike in all directions, or for inputs
    x of which the mean of x x^T is known. In that case the answer is P W, with P the projector on the strongest
    directions of the centred logits' own covariance W C W^T: it takes no inverse, so C may be singular.

    Args:
        weight: a full router's weight [E, D].
        rank: 1 to E - 1; E - 1 is exact.
        covariance: mean of x x^T over the router's inputs x, [D, D]; or None.

    Returns:
        ``u`` [D, rank] and ``v`` [rank, E], float32, with ``(x u) v`` equal to ``x weight^T`` up to a constant per
        token.

    Raises:
        ValueError: when ``rank`` is outside 1..E-1.
    """
    if not 1 <= rank < len(weight):
        raise ValueError(f"rank {rank} of a router with {len(weight)} experts is not between 1 and {len(weight) - 1}")
    weight = weight.astype(np.float64)
    left, singular, right = np.linalg.svd(weight - weight.mean(axis=0), full_matrices=False)
    # Of E directions of centred logits, the last one is nothing but rounding.
    directions, rows = left[:, : len(weight) - 1], (singular[:, None] * right)[: len(weight) - 1]  # [E, E-1], [E-1, D]
    if covariance is not None:
        moment = rows @ covariance.astype(np.float64) @ rows.T
        # Directions in which the inputs never differ are ranked by the weights: a tiny share of the plain rule does it.
        moment = _unit_trace(moment) + 1e-9 * _unit_trace(rows @ rows.T)
        turn = np.linalg.eigh(moment)[1][:, ::-1]  # strongest first
        directions, rows = directions @ turn, turn.T @ rows
    directions, rows = directions[:, :rank], rows[:rank]
    # The scale is split between the factors, so that neither becomes small in a half-precision file.
    scale = np.sqrt(np.linalg.norm(rows, axis=1, keepdims=True))  # [rank, 1]
    u = np.divide(rows, scale, out=np.zeros_like(rows), where=scale > 0)
    return u.T.astype(np.float32), (scale * directions.T).astype(np.float32)


def _unit_trace(moment: np.ndarray) -> np.ndarray:
    trace = np.trace(moment)
    return moment / trace if trace > 0 else moment


def choose(
    logits: mx.array, top_k: int, norm_topk_prob: bool, noise: mx.array | None = None
) -> tuple[mx.array, mx.array, mx.array]:
    """Pick the experts of each token.

    Args:
        logits: float32 [..., E].
        top_k: experts per token.
        norm_topk_prob: divide the chosen probabilities by their sum.
        noise: float32 [..., E], added to the logits when all experts but the first are picked; None for no noise. With
            draws from Gumbel(0, 1), an expert is second with its share of the probability that the first has left over:
            DeepSpeed's gate, in training and evaluation alike.

    Returns:
        probabilities [..., E], experts [..., k] (uint32) and weights [..., k], as in ``Routing``.
    """
    probabilities = mx.softmax(logits, axis=-1, precise=True)
    # k rounds of argmax and not a sort: argmax takes the first of equals on every backend, and k is small.
    candidates, chosen = mx.stop_gradient(logits), []
    for choice in range(top_k):
        chosen.append(mx.argmax(candidates, axis=-1, keepdims=True))
        if choice == 0 and noise is not None:
            candidates = candidates + noise
        candidates = mx.where(mx.arange(logits.shape[-1]) == chosen[-1], -mx.inf, candidates)
    experts = mx.stop_gradient(mx.concatenate(chosen, axis=-1))
    return probabilities, experts, weigh(probabilities, experts, norm_topk_prob)


def weigh(probabilities: mx.array, experts: mx.array, norm_topk_prob: bool, kept: mx.array | None = None) -> mx.array:
    """Weights [..., k] of chosen experts [..., k]; zero where ``kept`` is False, the rest sharing what is its share."""
    weights = mx.take_along_axis(probabilities, experts, axis=-1)
    if kept is not None:
        weights = weights * kept
    if norm_topk_prob:
        weights = weights / mx.maximum(weights.sum(axis=-1, keepdims=True), FLOAT32_EPS)
    return weights


def load_balancing_loss(trace: list[Routing], mask: mx.array | None = None) -> mx.array:
    """The auxiliary loss that spreads tokens over experts, summed over layers (MoE-LLaVA eq. 9-11, DeepSpeed).

    Per layer E * sum_e mean(p_e) * mean(e is the first choice): 1 when balanced, E when one expert takes all.

    Args:
        trace: one ``Routing`` per sparse layer.
        mask: [...] of 0 and 1; tokens with 0, such as padding, do not count.
    """
    total = mx.array(0.0)
    for routing in trace:
        num_experts = routing.probabilities.shape[-1]
        first = (routing.experts[..., :1] == mx.arange(num_experts)).astype(mx.float32)  # [..., E]
        weight = mx.ones(first.shape[:-1]) if mask is None else mask.astype(mx.float32)
        # Sums as products: over many tokens, float32 loses less in a product than in MLX's sums.
        importance, load = (weight.reshape(-1) @ x.reshape(-1, num_experts) for x in (routing.probabilities, first))
        tokens = mx.maximum(weight.sum(), 1.0)
        total = total + num_experts * (importance / tokens * (load / tokens)).sum()
    return total


def router_z_loss(trace: list[Routing], mask: mx.array | None = None) -> mx.array:
    """The mean of logsumexp(logits)^2 over tokens, summed over layers (ST-MoE, Zoph et al. 2022, eq. 5).

    It keeps router logits small, where float32's softmax has most digits. A low-rank router is centred, so its logits
    are those of the full router up to a constant per token, which this loss does see.

    Args:
        trace: one ``Routing`` per sparse layer.
        mask: [...] of 0 and 1; tokens with 0, such as padding, do not count.
    """
    total = mx.array(0.0)
    for routing in trace:
        squares = mx.logsumexp(routing.logits, axis=-1).square().reshape(-1)
        weight = mx.ones(squares.shape) if mask is None else mask.reshape(-1).astype(mx.float32)
        total = total + weight @ squares / mx.maximum(weight.sum(), 1.0)
    return total
