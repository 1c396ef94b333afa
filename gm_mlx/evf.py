"""Eve's elastic vision FFN: a vision FFN beside the language FFN of a layer, and a router over the two.

What the paper says (Rang et al. 2025, "Elastic Vision FFN"): the router is a softmax over the two FFNs and the larger
probability P(x) weighs the output of the chosen one (eq. 1 and 2). Images are to go to the vision FFN and text to the
language FFN: a position is ranked by S(x) = P(x) + S_i or P(x) + S_t, where S_i of an image's position is about 1 for
the vision FFN and about 0 for the language FFN, and S_t of text the reverse (eq. 3 and 4). In training an FFN takes as
many positions as its capacity allows, those of the highest S(x) in the whole batch. Of those that are left over, a
share W is drawn and sent to the other FFN; the others are dropped. A request without images skips router and vision
FFN: language is what it was before there was a vision FFN.

What is interpretation, since the gate's code and all weights are unpublished:

- S(x) chooses the FFN, in training and afterwards. S_i and S_t are ``modality_priority`` (1) and 0.
- There is no capacity outside of training, so an answer does not depend on what else is in a batch.
- W is ``moved``; the paper gives no number. Padding and requests without images take no place.
- The share is exact: of n positions that are left over, W n are drawn, each as likely as any other.

With a priority of 1 or more no probability can outdo it: then the choice is known from the positions alone, and
outside of training each FFN is computed for its own positions only. Otherwise both are computed, and one is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from gm_mlx.config import MoEConfig, TextConfig
from gm_mlx.errors import UserError
from gm_mlx.moe import make_mlp
from gm_mlx.router import Positions, Routing, load_balancing_loss, make_router

if TYPE_CHECKING:
    from gm_mlx.model import Model

# The FFNs' numbers, in the order of the router's rows: Eve's converted checkpoints have the language FFN first.
LANGUAGE, VISION = 0, 1


@dataclass(frozen=True)
class ImgGBPR:
    """Image-aware global batch priority routing: which positions an FFN takes in training (Eve, eq. 3 and 4).

    Attributes:
        capacity_factor: an FFN takes this much more than half of the positions. Below 1, both could be full.
        moved: W, the share of the positions left over that goes to the other FFN.
    """

    capacity_factor: float = 1.5
    moved: float = 0.5

    def __post_init__(self) -> None:
        if not self.capacity_factor >= 1:
            raise UserError(f"capacity_factor: {self.capacity_factor!r} is not 1 or more")
        if not 0 <= self.moved <= 1:
            raise UserError(f"moved: {self.moved!r} is not between 0 and 1")

    def allocate(self, priorities: mx.array, chosen: mx.array, counted: mx.array) -> tuple[mx.array, mx.array]:
        """Where positions go when FFNs have room for so many and no more.

        Args:
            priorities: S(x), float32 [B, L, 2].
            chosen: the FFN that each position asks for, [B, L].
            counted: bool [B, L], False on positions that take no place.

        Returns:
            The FFN of each position, uint32 [B, L], and whether it has room for it, bool [B, L].
        """
        shape, here = chosen.shape, counted.reshape(-1)
        scores, asked = priorities.reshape(-1, 2), chosen.reshape(-1)  # [N, 2], [N]
        # A place must not come of rounding: 1.2 * 200 / 2 is a little more than 120 in float32.
        capacity = mx.ceil(self.capacity_factor / 2 * here.sum() - 1e-3)
        chosen, kept = asked, mx.ones_like(here)
        for ffn in (LANGUAGE, VISION):
            asking = here & (asked == ffn)
            over = asking & (_rank(mx.where(asking, scores[:, ffn], -mx.inf)) >= capacity)
            drawn = _rank(mx.where(over, _draw(scores, ffn), -mx.inf)) < mx.round(self.moved * over.sum())
            chosen = mx.where(over & drawn, 1 - ffn, chosen)
            kept = kept & (~over | drawn)
        return chosen.astype(mx.uint32).reshape(shape), kept.reshape(shape)


def _rank(values: mx.array) -> mx.array:
    """How many are before each of [N], the largest first."""
    return mx.argsort(mx.argsort(-values))


def _draw(scores: mx.array, ffn: int) -> mx.array:
    """Numbers [N] to draw lots with.

    Their seed is the scores' own bits: another in every layer and step, and the same when a step is computed again,
    for a gradient checkpoint or after a crash.
    """
    bits = scores.view(mx.uint32).sum().astype(mx.uint32)
    return mx.random.uniform(shape=scores.shape[:1], key=mx.stack([bits, mx.array(ffn, mx.uint32)]))


class ElasticFFN(nn.Module):
    """A language FFN, a vision FFN and a router in the place of an MLP.

    Attributes:
        allocation: how positions are allocated while the module is in training mode; None for all that ask.
    """

    def __init__(self, config: TextConfig, moe: MoEConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.norm_topk_prob = moe.norm_topk_prob
        self.modality_priority = moe.modality_priority
        self.allocation: ImgGBPR | None = None
        self.gate = make_router(moe, config.hidden_size)
        self.language_ffn = make_mlp(config, layer)
        self.vision_ffn = make_mlp(config, layer)

    def __call__(self, x: mx.array, trace: list[Routing] | None = None, positions: Positions | None = None) -> mx.array:
        """[B, L, D] to [B, L, D]; appends this layer's ``Routing`` to ``trace`` when one is given."""
        if positions is None or positions.image is None:
            if trace is not None:
                trace.append(_unrouted(self.layer, x.shape[:-1]))
            return self.language_ffn(x)
        routing = self.route(self.gate(x), positions)
        if trace is not None:
            trace.append(routing)
        y = self._chosen(x, routing.experts, positions.image)
        return y * routing.weights.astype(y.dtype)

    def _chosen(self, x: mx.array, experts: mx.array, image: mx.array) -> mx.array:
        """What the FFNs [B, L, 1] make of x [B, L, D]."""
        if self.training or self.modality_priority < 1:
            return mx.where(experts == VISION, self.vision_ffn(x), self.language_ffn(x))
        place = np.array(image).reshape(-1)  # from the host: nothing is waited for
        if place.all() or not place.any():
            return self.vision_ffn(x) if place.any() else self.language_ffn(x)
        order = np.argsort(place, kind="stable")  # text first
        rows, texts = x.reshape(-1, x.shape[-1])[mx.array(order)], int((~place).sum())
        y = mx.concatenate([self.language_ffn(rows[:texts]), self.vision_ffn(rows[texts:])])
        return y[mx.array(np.argsort(order))].reshape(x.shape)

    def route(self, logits: mx.array, positions: Positions) -> Routing:
        """Which FFN each position goes to.

        Args:
            logits: the router's, float32 [B, L, 2].
            positions: with images.
        """
        assert positions.image is not None
        probabilities = mx.softmax(logits, axis=-1, precise=True)
        own = mx.stack([~positions.image, positions.image], axis=-1)  # [B, L, 2]
        priorities = mx.stop_gradient(probabilities) + self.modality_priority * own
        ahead = priorities[..., VISION] - priorities[..., LANGUAGE]
        # Of equals, a position's own FFN wins.
        chosen = mx.where(positions.image, ahead >= 0, ahead > 0).astype(mx.uint32)  # [B, L]
        kept = None
        if self.training and self.allocation is not None:
            chosen, kept = self.allocation.allocate(priorities, chosen, _counted(positions))
            kept = kept[..., None]
        experts = chosen[..., None]
        weights = mx.take_along_axis(probabilities, experts, axis=-1)
        if self.norm_topk_prob:
            weights = mx.ones_like(weights)
        if kept is not None:
            weights = mx.where(kept, weights, 0)
        routing = Routing(self.layer, probabilities, experts, weights, logits, kept)
        if positions.pictured is None:
            return routing
        # Rows without images, in a batch with others that have some: what they would be given by themselves.
        plain = _unrouted(self.layer, logits.shape[:-1])
        pictured = positions.pictured[:, None, None]
        return routing._replace(
            probabilities=mx.where(pictured, routing.probabilities, plain.probabilities),
            experts=mx.where(pictured, routing.experts, plain.experts),
            weights=mx.where(pictured, routing.weights, plain.weights),
            logits=mx.where(pictured, routing.logits, plain.logits),
        )


def _unrouted(layer: int, shape: tuple[int, ...]) -> Routing:
    """All positions [B, L] at the language FFN, as if it were the only one."""
    both = (*shape, 2)
    return Routing(
        layer,
        probabilities=mx.broadcast_to(mx.array([1.0, 0.0]), both),
        experts=mx.full((*shape, 1), LANGUAGE, mx.uint32),
        weights=mx.ones((*shape, 1)),
        logits=mx.broadcast_to(mx.array([0.0, -mx.inf]), both),
    )


def _counted(positions: Positions) -> mx.array:
    """bool [B, L], True on real positions of requests with images."""
    assert positions.image is not None
    counted = mx.ones_like(positions.image) if positions.real is None else positions.real.astype(mx.bool_)
    return counted if positions.pictured is None else counted & positions.pictured[:, None]


def balance_loss(trace: list[Routing], positions: Positions) -> mx.array:
    """F_i G_i + F_t G_t, summed over layers (Eve's auxiliary loss, whose coefficient is 0.001).

    F is the share of positions that an FFN is chosen for and G its mean probability; i is the vision FFN and t the
    language FFN. It is ``load_balancing_loss`` without its factor E. Positions of requests without images do not count.

    Args:
        trace: one ``Routing`` per elastic layer.
        positions: what the layers knew.
    """
    if positions.image is None:
        return mx.array(0.0)
    return load_balancing_loss(trace, _counted(positions)) / 2


def set_allocation(model: Model, allocation: ImgGBPR | None) -> None:
    """Let all elastic layers of a model allocate positions in this way while they are trained.

    Raises:
        UserError: the model has no elastic layers.
    """
    layers = [block.mlp for block in model.layers if isinstance(block.mlp, ElasticFFN)]
    if not layers:
        raise UserError("image-aware routing: the model has no vision FFNs; make some with --upcycle evf")
    for layer in layers:
        layer.allocation = allocation
