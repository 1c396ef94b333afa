"""Where a run stands, apart from its weights: plain numbers, which go into a checkpoint as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gm_mlx.train.step import Gradient


@dataclass
class Window:
    """Sums over the steps since the last line of the log.

    Attributes:
        steps: how many.
        loss: sum of losses.
        learnt: number of their terms.
        gradient_norm: sum of the steps' norms.
        positions: that went through the decoder.
        seconds: that the steps took.
        figures: the loss's other sums, as arrays or, out of a checkpoint, as lists.
    """

    steps: int = 0
    loss: float = 0.0
    learnt: float = 0.0
    gradient_norm: float = 0.0
    positions: int = 0
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)

    def add(self, gradient: Gradient, seconds: float) -> None:
        """Add a step's sums."""
        self.steps += 1
        self.loss += gradient.total
        self.learnt += gradient.learnt
        self.gradient_norm += gradient.norm
        self.positions += gradient.positions
        self.seconds += seconds
        for name, value in gradient.figures.items():
            self.figures[name] = np.asarray(self.figures.get(name, 0.0), np.float64) + value

    def arrays(self) -> dict[str, np.ndarray]:
        """The figures, float64."""
        return {name: np.asarray(value, np.float64) for name, value in self.figures.items()}

    def means(self) -> dict[str, Any]:
        """What a line of the log says of these steps, whatever the loss."""
        return {
            "loss": self.loss / self.learnt,
            "gradient_norm": self.gradient_norm / self.steps,
            "learnt": int(self.learnt),
            "positions": self.positions,
            "seconds": self.seconds,
            "tokens_per_second": self.positions / self.seconds,
        }


@dataclass
class Progress:
    """A run's counters.

    Attributes:
        step: steps that are done.
        logged: the last step whose window is in the log.
        loss: the mean of that window.
        validated: the step of the last validation.
        best_step: the step of the best validation; None before the first.
        best_loss: its loss.
        waited: validations since then.
        window: steps that the log does not know yet.
    """

    step: int = 0
    logged: int = 0
    loss: float | None = None
    validated: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    waited: int = 0
    window: Window = field(default_factory=Window)

    def has_validated(self, loss: float) -> bool:
        """Note a validation of the present step; returns whether it is the best so far."""
        self.validated = self.step
        better = self.best_loss is None or loss < self.best_loss
        if better:
            self.best_step, self.best_loss, self.waited = self.step, loss, 0
        else:
            self.waited += 1
        return better

    def is_past(self, line: Mapping[str, Any]) -> bool:
        """Whether a line of the log is of a time before this one."""
        return line["step"] <= (self.validated if line["kind"] == "validation" else self.logged)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values, to the last bit."""
        figures = {name: value.tolist() for name, value in self.window.arrays().items()}
        return {**vars(self), "window": {**vars(self.window), "figures": figures}}

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Progress:
        """What ``to_json`` was made of."""
        return dataclasses.replace(cls(**table), window=Window(**table["window"]))
