"""The gradient of a step: over its parts, over all ranks, divided once, clipped.

Losses are sums and counts, not means. Parts and ranks add up both and divide once, so a batch of N * B in one piece
gives the same step as N batches of B. (A load-balancing loss is the exception: it is a product of means, and each part
balances its own share, as each of DeepSpeed's ranks does.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from gm_mlx.train.config import TrainConfig
from gm_mlx.train.precision import Masters
from gm_mlx.train.ranks import Ranks

# (model, batch) -> (sum of losses, number of terms, other sums by name)
Loss = Callable[[Any, Any], tuple[mx.array, mx.array, dict[str, mx.array]]]
# (number, rank, ranks) -> this rank's share of the batch of that number
Batches = Callable[[int, int, int], Any]


class Gradient(NamedTuple):
    """The gradient of a step and what the loss said on the way, over all parts and ranks.

    Attributes:
        values: by name, float32; of the mean loss, clipped.
        norm: before clipping.
        total: the sum of losses.
        learnt: the number of its terms.
        figures: the loss's other sums.
    """

    values: dict[str, mx.array]
    norm: float
    total: float
    learnt: float
    figures: dict[str, np.ndarray]

    @property
    def loss(self) -> float:
        """The mean loss."""
        return self.total / self.learnt if self.learnt else math.nan

    @property
    def positions(self) -> int:
        """Real positions that went through the decoder; 0 when the loss does not count them."""
        return int(self.figures.get("positions", 0))

    @property
    def is_finite(self) -> bool:
        """Whether the weights can be changed by it."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


def make_gradient(
    model: nn.Module, loss: Loss, batches: Batches, masters: Masters, config: TrainConfig, ranks: Ranks
) -> Callable[[int], Gradient]:
    """A function from the number of a step to its gradient, at the weights as they then are."""

    def forward(values: dict[str, mx.array], batch: Any) -> tuple[mx.array, tuple[mx.array, dict[str, mx.array]]]:
        masters.put(values)
        total, count, figures = loss(model, batch)
        figures = {name: value.astype(mx.float32) for name, value in figures.items()}
        return total.astype(mx.float32), (mx.array(count, mx.float32), figures)

    # Not compiled: models look for image slots in ids on the host, and a compiled function would be compiled again for
    # each length of a batch.
    differentiated = mx.value_and_grad(forward)

    def part(number: int) -> Any:
        mx.random.seed(_seed(config.seed, number, ranks.rank))
        (total, others), gradient = differentiated(masters.values, batches(number, ranks.rank, ranks.size))
        masters.put()  # instead of what is left of the differentiation
        return total, *others, gradient

    def gradient(step: int) -> Gradient:
        first, *others = range(step * config.accumulate, (step + 1) * config.accumulate)
        sums = part(first)
        for number in others:
            mx.eval(sums)  # so that one part's activations are in memory, and not all
            sums = tree_map(mx.add, sums, part(number))
        total, count, figures, values = ranks.sum(sums)
        values = tree_map(lambda value: value / count, values)
        values, norm = optim.clip_grad_norm(values, config.clip or math.inf)
        mx.eval(total, count, figures, values, norm)
        known = {name: np.array(value, np.float64) for name, value in figures.items()}
        return Gradient(values, norm.item(), total.item(), count.item(), known)

    return gradient


def _seed(*key: int) -> int:
    """A seed that the key decides. NumPy promises that a bit generator's raw output stays the same in all versions."""
    return int(np.random.PCG64(key).random_raw())
