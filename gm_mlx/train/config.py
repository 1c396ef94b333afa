"""Hyperparameters of a training run, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gm_mlx.errors import UserError

# How the rate falls: its share of the full rate where `progress` of the fall, 0 to 1, is done.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}
PRECISIONS = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class TrainConfig:
    """Hyperparameters of a run.

    Attributes:
        steps: how often the weights are changed.
        learning_rate: the highest rate.
        schedule: how the rate falls: "cosine", "linear", or "constant", which does not.
        warmup: share of ``steps`` over which the rate rises.
        decay: share of ``steps`` over which it falls, at the end; between the two it stays. One leaves nothing between.
        weight_decay: AdamW's.
        betas: AdamW's shares of the old gradient and of its square in their running means.
        eps: AdamW's; keeps small gradients from being divided by nothing.
        clip: gradients are scaled down to this length, all together. 0 for never.
        accumulate: batches that make a step; their gradients are added up.
        precision: dtype of the arithmetic; "auto" for the model's own. Weights that are trained, and the optimizer's
            state, are float32 in any case.
        checkpoint: keep of each decoder block its input only, and compute the rest again for the gradients. Takes about
            a third more time and far less memory.
        seed: of all that is random, such as dropout.
        log_every: steps per line of the log.
        save_every: steps between two checkpoints.
        keep: how many checkpoints stay.
        validate_every: steps between two validations; 0 for one at the end only.
        patience: validations without a better loss after which training stops; 0 for never.
    """

    steps: int
    learning_rate: float
    schedule: str = "cosine"
    warmup: float = 0.03
    decay: float = 1.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    clip: float = 1.0
    accumulate: int = 1
    precision: str = "auto"
    checkpoint: bool = False
    seed: int = 0
    log_every: int = 20
    save_every: int = 100
    keep: int = 2
    validate_every: int = 0
    patience: int = 0

    def __post_init__(self) -> None:
        for keys, allowed, what in RULES:
            for key in keys.split():
                value = getattr(self, key)
                if not allowed(value):
                    raise UserError(f"{key}: {value!r} is not {what}")
        if self.patience and not self.validate_every:
            raise UserError("patience: counts validations, and there is one at the end only; set validate_every too")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from zero."""
        warmup = max(1, round(self.warmup * self.steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        start = max(warmup, self.steps - round(self.decay * self.steps))
        progress = max(0, step - start) / max(1, self.steps - start)
        return self.learning_rate * SCHEDULES[self.schedule](progress)


def _is_count(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _is_number(value: Any, allowed: Callable[[float], bool]) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and allowed(value)


def _is_betas(value: Any) -> bool:
    return (
        isinstance(value, tuple | list) and len(value) == 2 and all(_is_number(v, lambda v: 0 <= v < 1) for v in value)
    )


# Keys, what they may be, and how that is said.
RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("steps accumulate log_every save_every keep", lambda v: _is_count(v, 1), "a whole number of 1 or more"),
    ("seed validate_every patience", lambda v: _is_count(v, 0), "a whole number of 0 or more"),
    ("learning_rate eps", lambda v: _is_number(v, lambda v: v > 0), "a number above 0"),
    ("weight_decay clip", lambda v: _is_number(v, lambda v: v >= 0), "a number of 0 or more"),
    ("warmup decay", lambda v: _is_number(v, lambda v: 0 <= v <= 1), "a share between 0 and 1"),
    ("betas", _is_betas, "two numbers between 0 and 1, 1 left out"),
    ("schedule", lambda v: v in list(SCHEDULES), f"one of {list(SCHEDULES)}"),
    ("precision", lambda v: v in PRECISIONS, f"one of {list(PRECISIONS)}"),
    ("checkpoint", lambda v: isinstance(v, bool), "true or false"),
)
