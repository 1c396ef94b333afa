"""Low-rank routers: the routers of a model replaced by factors, with a report on what that costs.

A router of E experts needs no more than rank E - 1 (see ``gm_mlx.router``). Lower ranks lose something: how much of the
logits, and how often a token would go elsewhere, is what the report says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from gm_mlx.config import ModelConfig
from gm_mlx.errors import UserError
from gm_mlx.router import low_rank
from gm_mlx.tensors import Tensor

# Logits closer than this share of |x| |w| are the same: float32 routers do not tell them apart reliably either.
SAME_LOGIT = 1e-6


@dataclass(frozen=True)
class RouterRank:
    """What a lower rank does to the router of one layer.

    Attributes:
        layer: index of the decoder layer.
        energy: share of the centred logits' squared size that is kept: over the calibration's tokens, or else over
            inputs that are alike in all directions.
        top1: share of the calibration's tokens whose first expert stays, or None without calibration.
        top2: share of them whose first two experts stay, in any order, or None.
    """

    layer: int
    energy: float
    top1: float | None
    top2: float | None


@dataclass(frozen=True)
class RankReport:
    """What ``low_rank_routers`` did.

    Attributes:
        rank: the rank of all routers now.
        weighted: whether a calibration's covariances weighted the decomposition.
        layers: one entry per sparse layer.
    """

    rank: int
    weighted: bool
    layers: list[RouterRank]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return dataclasses.asdict(self)


def low_rank_routers(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    rank: int,
    covariances: Mapping[int, np.ndarray] | None = None,
    rows: Mapping[int, np.ndarray] | None = None,
) -> tuple[ModelConfig, dict[str, Tensor], RankReport]:
    """Give every router of a model a lower rank.

    Args:
        config: the model's config.
        tensors: its tensors; nothing but the routers is read, and routers that have a low rank already can get a lower
            one.
        rank: 1 to E - 1; E - 1 changes no answer.
        covariances: ``Calibration.covariances``, so that the logits of real inputs lose least; or None.
        rows: ``Calibration.rows``, for the report's agreement; or None.

    Returns:
        The new config, all tensors with float32 ``mlp.gate.u`` [D, rank] and ``mlp.gate.v`` [rank, E] in the place of
        each router's, and the report.

    Raises:
        UserError: the model has no routers, the rank is out of range, or a router is missing.
    """
    moe = config.text_config.moe
    if moe is None or not config.text_config.sparse_layers:
        raise UserError(f"--router-rank {rank}: the model has no experts and so no routers; leave the option out")
    most = moe.router_rank or moe.num_experts - 1
    if not 1 <= rank <= most:
        why = f"its routers have rank {most} already" if moe.router_rank else f"it has {moe.num_experts} experts"
        raise UserError(
            f"--router-rank {rank}: not between 1 and {most} for this model, since {why}; choose from these"
        )
    out = dict(tensors)
    layers = []
    for layer in config.text_config.sparse_layers:
        gate = f"language_model.model.layers.{layer}.mlp.gate"
        weight = router_weight(tensors, gate)
        covariance = None if covariances is None else covariances.get(layer)
        u, v = low_rank(weight, rank, covariance)
        reduced = (u.astype(np.float64) @ v.astype(np.float64)).T
        inputs = None if rows is None else rows.get(layer)
        layers.append(
            RouterRank(
                layer,
                _kept_energy(weight, reduced, covariance),
                None if inputs is None else agreement(weight, reduced, inputs, 1),
                None if inputs is None else agreement(weight, reduced, inputs, 2),
            )
        )
        for name in ("weight", "u", "v"):
            out.pop(f"{gate}.{name}", None)
        for name, factor in (("u", u), ("v", v)):
            out[f"{gate}.{name}"] = Tensor("F32", factor.shape, _reader(factor))
    moe = dataclasses.replace(moe, router_rank=rank)
    text = dataclasses.replace(config.text_config, moe=moe)
    return (
        dataclasses.replace(config, text_config=text),
        out,
        RankReport(rank, covariances is not None, layers),
    )


def router_weight(tensors: Mapping[str, Tensor], gate: str) -> np.ndarray:
    """The weight [E, D], in float64, of the router with module path ``gate``; of a low-rank one its product.

    Raises:
        UserError: the router's tensors are missing.
    """
    names = [f"{gate}.weight"] if f"{gate}.weight" in tensors else [f"{gate}.u", f"{gate}.v"]
    for name in names:
        if name not in tensors:
            raise UserError(f"{name}: the model has no such tensor; fetch or convert the model again")
    parts = [np.array(tensors[name].read().astype(mx.float32)).astype(np.float64) for name in names]
    return parts[0] if len(parts) == 1 else (parts[0] @ parts[1]).T


def agreement(full: np.ndarray, reduced: np.ndarray, rows: np.ndarray, k: int) -> float:
    """The share of inputs that two routers send to the same k experts, in any order.

    Another choice counts as the same if the full router has equal logits for both: it is a matter of rounding then.

    Args:
        full: weight [E, D] of the one.
        reduced: weight [E, D] of the other.
        rows: inputs [n, D].
        k: experts per token.
    """
    if not len(rows):
        return 1.0
    rows = rows.astype(np.float64)
    ours, theirs = rows @ full.T, rows @ reduced.T  # [n, E]
    reached, best = (
        np.take_along_axis(ours, np.argsort(-logits, axis=1, kind="stable")[:, :k], axis=1).sum(axis=1)
        for logits in (theirs, ours)
    )
    same = SAME_LOGIT * np.linalg.norm(rows, axis=1) * np.linalg.norm(full, axis=1).max()
    return float(np.mean(reached >= best - same))


def _kept_energy(weight: np.ndarray, reduced: np.ndarray, covariance: np.ndarray | None) -> float:
    def energy(logits: np.ndarray) -> float:
        centred = logits - logits.mean(axis=0)  # [E, D]
        return float(np.sum((centred if covariance is None else centred @ covariance) * centred))

    total = energy(weight)
    return 1.0 - energy(weight - reduced) / total if total > 0 else 1.0


def _reader(factor: np.ndarray) -> Callable[[], mx.array]:
    return lambda: mx.array(factor)
