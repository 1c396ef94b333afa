"""The loss on the answers of a batch, and what keeps its experts in balance.

    answers: cross-entropy of the tokens that are learnt
    balance: load-balancing loss, summed over sparse layers (DeepSpeed; MoE-LLaVA eq. 7, 9-11)
    router z: mean over tokens of logsumexp(router logits)^2, summed over sparse layers (ST-MoE eq. 5)

The last two are means over tokens, and they count once per learnt token: of a step that is computed in parts, each part
then has the share in them that it has in the answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from gm_mlx.evf import balance_loss
from gm_mlx.model import Model
from gm_mlx.router import Routing, load_balancing_loss, router_z_loss
from gm_mlx.train.cross_entropy import cross_entropy
from gm_mlx.train.data import Batch


@dataclass(frozen=True)
class AnswerLoss:
    """A loss for ``loop.train``, whose ``describe`` goes with it.

    Attributes:
        aux_loss_coef: weight of the load-balancing loss; None for the one of the model's config.
        z_loss_coef: weight of the router z-loss. ST-MoE has 1e-3; MoE-LLaVA, LLaVA-GM and Eve have none.
    """

    aux_loss_coef: float | None = None
    z_loss_coef: float = 0.0

    def __call__(self, model: Model, batch: Batch) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        """Loss of a batch.

        Returns:
            The sum over learnt tokens, float32; their number; and sums for ``describe``: ``positions`` (real ones),
            ``answers`` (cross-entropy), and of sparse models ``balance`` and ``router_z`` (times the number of learnt
            tokens), and of each layer ``load.<layer>`` (tokens that chose each expert, [E]) and ``dropped.<layer>``
            (choices that found no room). All are zero for a batch in which nothing is learnt.
        """
        rows, columns = np.nonzero(batch.learnt)
        # A rank whose share of a step is empty takes part in it with a row that counts for nothing.
        real = mx.array(batch.real if len(rows) else np.zeros_like(batch.real))
        positions = model.positions(batch.ids, real)
        features = None if batch.pixels is None else model.encode_images(batch.pixels)
        trace: list[Routing] = []
        hidden = model.hidden(model.embed(batch.ids, features), trace=trace, positions=positions)
        # Each row predicts its successor.
        learnt = hidden[mx.array(rows), mx.array(columns - 1)]  # [M, D]
        answers = cross_entropy(model, learnt, mx.array(batch.ids[rows, columns])) if len(rows) else mx.array(0.0)
        count = mx.array(len(rows), dtype=mx.float32)
        figures = {"positions": real.sum(), "answers": answers}
        moe = model.config.text_config.moe
        if moe is None or not trace:
            return answers, count, figures
        balance = balance_loss(trace, positions) if moe.kind == "evf" else load_balancing_loss(trace, real)
        figures["balance"] = count * balance
        figures["router_z"] = count * router_z_loss(trace, real)
        for routing in trace:
            figures |= _loads(routing, real)
        coefficient = moe.aux_loss_coef if self.aux_loss_coef is None else self.aux_loss_coef
        total = answers + coefficient * figures["balance"]
        if self.z_loss_coef:
            total = total + self.z_loss_coef * figures["router_z"]
        return total, count, figures

    def describe(self, figures: dict[str, np.ndarray], count: float) -> dict[str, Any]:
        """What sums of figures say, for a log.

        Args:
            figures: sums over batches.
            count: learnt tokens in them.

        Returns:
            ``answer_loss``, ``balance_loss`` and ``router_z_loss`` per learnt token; ``load_entropy`` by layer: the
            entropy of the experts' load over its maximum, 1 when all are used alike and 0 when one takes all; and
            ``dropped`` by layer: the share of choices that found no room.
        """
        means = {"answers": "answer_loss", "balance": "balance_loss", "router_z": "router_z_loss"}
        described: dict[str, Any] = {
            name: float(figures[key]) / max(count, 1) for key, name in means.items() if key in figures
        }
        loads = {key.removeprefix("load."): np.asarray(load) for key, load in figures.items() if "load." in key}
        if loads:
            described["load_entropy"] = {layer: _entropy(load) for layer, load in loads.items()}
            described["dropped"] = {
                layer: float(figures[f"dropped.{layer}"]) / max(float(load.sum()), 1) for layer, load in loads.items()
            }
        return described


def _loads(routing: Routing, real: mx.array) -> dict[str, mx.array]:
    """Tokens [E] that chose each expert, and how many choices found no room; of real positions."""
    num_experts = routing.probabilities.shape[-1]
    chosen = (routing.experts[..., None] == mx.arange(num_experts)) & real[..., None, None]  # [B, L, k, E]
    dropped = mx.array(0) if routing.kept is None else (~routing.kept & real[..., None]).sum()
    return {f"load.{routing.layer}": chosen.sum(axis=(0, 1, 2)), f"dropped.{routing.layer}": dropped}


def _entropy(load: np.ndarray) -> float:
    """Entropy of shares over that of equal shares; 1 where there is nothing to share."""
    shares = load[load > 0] / load.sum() if load.sum() else np.full(len(load), 1 / len(load))
    return float(-(shares * np.log(shares)).sum() / np.log(len(load))) if len(load) > 1 else 1.0
