"""Room at the experts: each takes so many tokens of a batch, and what is over is dropped.

In training it bounds the work of an expert that everyone wants, and it teaches tokens to do without. What a dropped
token keeps is the residual stream, and its other choices. In evaluation nothing is dropped unless that is asked for:
an answer would else depend on what else is in the batch. (MoE-LLaVA evaluates with 2.0 for 4 experts and 2 choices,
which is room for all.)

Who is served first:

    position  first come, first served, as DeepSpeed 0.9.5's top2gating has it (deepspeed/moe/sharded_moe.py)
    random    a lottery, as its top1gating has it (``use_rts``); also what Eve calls its baseline
    priority  the surest tokens of the whole batch: Batch Priority Routing (V-MoE, Riquelme et al. 2021, section 4.1;
              MoE-LLaVA, appendix B.2, though its code serves by position; Eve's GBPR)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import mlx.core as mx
import mlx.nn as nn

from gm_mlx.errors import UserError
from gm_mlx.moe import SparseMLP

Order = Literal["position", "random", "priority"]

# Tokens in the order in which they are served, [S], of probabilities [S, E].
ORDERS: dict[Order, Callable[[mx.array], mx.array]] = {
    "position": lambda p: mx.arange(len(p)),
    "random": lambda p: mx.argsort(mx.random.uniform(shape=(len(p),))),
    "priority": lambda p: mx.argsort(-p.max(axis=-1)),  # a stable sort: equals are served by position
}


@dataclass(frozen=True)
class Capacity:
    """How many tokens an expert takes: the batch's, divided evenly, times ``factor``.

    Attributes:
        factor: room for that many times a fair share, ``tokens * top_k / num_experts``, rounded up. MoE-LLaVA and Eve
            have 1.5. From ``num_experts / top_k`` on nothing is ever dropped.
        min_capacity: but room for so many at least.
        by: who is served first. First choices of all tokens come before second ones, in any order.
        in_eval: also when the model is not in training mode.
        padding: padding counts and takes room as in DeepSpeed, which cannot tell it from tokens.
    """

    factor: float = 1.5
    min_capacity: int = 0
    by: Order = "position"
    in_eval: bool = False
    padding: bool = False

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise UserError(f"capacity factor {self.factor}: must be above 0")
        if self.min_capacity < 0:
            raise UserError(f"min_capacity {self.min_capacity}: must not be below 0")
        if self.by not in ORDERS:
            raise UserError(f"capacity by {self.by!r}: is not one of {[*get_args(Order)]}")

    def deal(self, probabilities: mx.array, experts: mx.array, real: mx.array | None = None) -> mx.array:
        """Which choices find room.

        Args:
            probabilities: [..., E].
            experts: choices [..., k], best first.
            real: bool [...], False on padding; None when there is none.

        Returns:
            bool [..., k]; False on padding that does not count.
        """
        num_experts, top_k = probabilities.shape[-1], experts.shape[-1]
        counts = mx.ones(experts.shape[:-1], dtype=mx.bool_) if real is None or self.padding else real
        counts = counts.reshape(-1)  # [S]
        order = ORDERS[self.by](mx.stop_gradient(probabilities).reshape(-1, num_experts))  # [S]
        queue = experts.reshape(-1, top_k)[order].T.reshape(-1, 1)  # [k S, 1]: all first choices, all second ones, ...
        asks = (queue == mx.arange(num_experts)) & mx.tile(counts[order], top_k)[:, None]  # [k S, E]
        # A choice's place among those of its expert. What was dropped is counted, too: there is no room after it.
        place = mx.take_along_axis(mx.cumsum(asks.astype(mx.int32), axis=0), queue, axis=1)
        kept = (place <= self._room(counts, num_experts, top_k)).reshape(top_k, -1).T  # [S, k], in the order of serving
        return (kept[mx.argsort(order)] & counts[:, None]).reshape(experts.shape)

    def _room(self, counts: mx.array, num_experts: int, top_k: int) -> mx.array:
        """Tokens per expert. In float32, since rounding up makes a token of the last bit (``_capacity``)."""
        fair = counts.sum().astype(mx.float32) / num_experts
        return mx.maximum(mx.ceil(fair * (self.factor * top_k)).astype(mx.int32), self.min_capacity)


def set_capacity(model: nn.Module, capacity: Capacity | None) -> None:
    """Limit the experts of all sparse layers of a model, in place, or take their limit away with None."""
    for module in model.modules():
        if isinstance(module, SparseMLP):
            module.capacity = capacity
