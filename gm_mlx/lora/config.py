"""What LoRA is put on, and how large and strong it is there.

The words are peft's. A target is a component of ``gm_mlx.inventory`` ("attention", "dense_ffn", "experts",
"projector", "routers", "tower", "embeddings") or a pattern of module paths. A pattern is matched as peft matches it,
against a whole path or the end of one, so that "q_proj" and "layers.0.self_attn.*" both do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gm_mlx.config import ModelConfig
from gm_mlx.errors import UserError
from gm_mlx.inventory import Layer, model_layers
from gm_mlx.lora.peft import matches

# Components that LoRA is put on unless targets are given; those that a model does not have are left out.
DEFAULT_TARGETS = ("attention", "dense_ffn", "experts", "projector")
TOWER = "vision_tower"


@dataclass(frozen=True)
class LoRAConfig:
    """How LoRA is trained.

    Attributes:
        rank: r, the rank of B A.
        alpha: B A is multiplied by alpha / rank.
        dropout: share of inputs that A does not see while training.
        rslora: multiply by alpha / sqrt(rank) instead, which keeps large ranks at work (rank-stabilised LoRA, eq. 4).
        dora: learn the length of each output's row apart from its direction (DoRA, eq. 5).
        targets: components or patterns; empty for ``DEFAULT_TARGETS``.
        router: train the routers too.
        tower: train the vision tower too. Without it a pattern finds nothing in the tower, unless it names it.
        rank_pattern: patterns of paths that get another rank; the first that matches counts.
        alpha_pattern: the same for alpha.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    targets: Sequence[str] = ()
    router: bool = False
    tower: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for where, rank in [("rank", self.rank), *((f"rank_pattern: {p}", r) for p, r in self.rank_pattern.items())]:
            if type(rank) is not int or rank < 1:
                raise UserError(f"{where}: {rank!r} is not a whole number of 1 or more")
        for where, alpha in [
            ("alpha", self.alpha),
            *((f"alpha_pattern: {p}", a) for p, a in self.alpha_pattern.items()),
        ]:
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha <= 0:
                raise UserError(f"{where}: {alpha!r} is not a number above 0")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout: {self.dropout!r} is not between 0 and 1, 1 left out")
        for pattern in (*self.targets, *self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise UserError(f"{pattern!r}: not a pattern of module names ({error})") from None

    def rank_of(self, path: str) -> int:
        """The rank at a module."""
        return _first_match(self.rank_pattern, path, self.rank)

    def alpha_of(self, path: str) -> float:
        """The alpha at a module."""
        return _first_match(self.alpha_pattern, path, self.alpha)


@dataclass(frozen=True)
class Target:
    """A matrix that can have LoRA.

    Attributes:
        path: of the module in the model.
        component: of ``gm_mlx.inventory``.
        shape: [out, in], of stacked experts [E, out, in]; of an embedding [D, V], as its factors multiply.
    """

    path: str
    component: str
    shape: tuple[int, ...]


def lora_targets(config: ModelConfig) -> dict[str, Target]:
    """All matrices of a model that can have LoRA, by path, in the model's order."""
    found = {}
    for layer in model_layers(config):
        if shape := _shape(layer):
            found[layer.path] = Target(layer.path, layer.component, shape)
    return found


def choose_targets(config: ModelConfig, lora: LoRAConfig) -> list[Target]:
    """The matrices that LoRA is to be put on, in the model's order.

    Raises:
        UserError: a target is nothing that the model has, or DoRA is asked for where it has no form.
    """
    every = lora_targets(config)
    components = {target.component for target in every.values()}
    asked = tuple(lora.targets) or tuple(name for name in DEFAULT_TARGETS if name in components)
    asked += ("routers",) * lora.router + ("tower",) * lora.tower
    chosen: set[str] = set()
    for pattern in asked:
        paths = {target.path for target in every.values() if _is_meant(target, pattern, lora.tower)}
        if not paths:
            raise UserError(f"target {pattern!r}: the model has nothing of that name; it has {_what_there_is(every)}")
        chosen |= paths
    for pattern in (*lora.rank_pattern, *lora.alpha_pattern):
        if not any(matches(pattern, path) for path in chosen):
            raise UserError(f"pattern {pattern!r}: is of none of the modules that LoRA is put on; correct it")
    targets = [target for target in every.values() if target.path in chosen]
    if lora.dora and any(is_embedding(target.path) for target in targets):
        raise UserError("dora: has no form for token embeddings; leave them out of the targets")
    return targets


def is_embedding(path: str) -> bool:
    """Whether a path is that of the token embeddings, whose factors peft stores apart."""
    return path.endswith(".embed_tokens")


def is_router(path: str) -> bool:
    """Whether a path is a router's."""
    return path.endswith(".mlp.gate")


def _shape(layer: Layer) -> tuple[int, ...] | None:
    """The shape of a layer's matrix as its factors multiply; None for what cannot have LoRA."""
    if is_router(layer.path) and "weight" not in layer.arrays:  # of a low rank: u [D, r] and v [r, E]
        return layer.arrays["v"][1], layer.arrays["u"][0]
    if not (layer.quantizable or is_router(layer.path)):
        return None
    shape = layer.arrays["weight"]
    return shape[::-1] if is_embedding(layer.path) else shape


def _is_meant(target: Target, pattern: str, tower: bool) -> bool:
    if pattern == target.component:
        return True
    return matches(pattern, target.path) and (tower or target.component != "tower" or TOWER in pattern)


def _first_match(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if matches(pattern, path)), default)


def _what_there_is(targets: Mapping[str, Target]) -> str:
    names: dict[str, list[str]] = {}
    for target in targets.values():
        names.setdefault(target.component, []).append(target.path.rpartition(".")[2])
    return ", ".join(f"{component} ({', '.join(dict.fromkeys(last))})" for component, last in names.items())
