"""A run's folder as the loop sees it: rank 0 reads and writes there, and tells the other ranks what they need.

So on several machines one has the folder, and the others need none of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from gm_mlx.errors import UserError
from gm_mlx.train.checkpoints import MOMENTS, Checkpoints, as_json, first_difference, said
from gm_mlx.train.config import TrainConfig
from gm_mlx.train.log import Log
from gm_mlx.train.precision import Masters
from gm_mlx.train.progress import Progress
from gm_mlx.train.ranks import Ranks


class Store:
    """What a run keeps. Within its ``with``, no other process can train in the folder."""

    def __init__(self, folder: Path, identity: Mapping[str, Any] | None, config: TrainConfig, ranks: Ranks) -> None:
        self._folder, self._identity, self._config, self._ranks = folder, as_json(identity or {}), config, ranks
        self._log: Log | None = None
        self._checkpoints: Checkpoints | None = None

    def __enter__(self) -> Store:
        if self._ranks.rank == 0:
            self._log = Log(self._folder)
            self._checkpoints = Checkpoints(self._folder, self._identity, self._config)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._log is not None:
            self._log.close()

    def resume(self, masters: Masters, optimizer: optim.Optimizer) -> tuple[Progress, dict[str, Any]]:
        """Begin where the run stands: all ranks with the weights of rank 0, and of its last checkpoint if it has one.

        Args:
            masters: gets the weights.
            optimizer: of AdamW's kind, initialised; gets its state.

        Returns:
            The counters; and the figures of the event "resumed", empty when there is no checkpoint.

        Raises:
            UserError: the folder holds another run, or its checkpoints are damaged, or another rank has other data.
        """
        progress, figures = Progress(), {}
        if self._checkpoints is not None and self._log is not None:
            found, damaged = self._checkpoints.newest()
            if found is not None:
                changed = self._checkpoints.check(found, masters.values)
                # In the order that they had: sums over all weights, such as the gradient's norm, depend on it.
                masters.values = {name: found.weights[name] for name in masters.values}
                progress = found.progress
                optimizer.state.update(found.moments)
                figures = {"path": found.path, "damaged": damaged, "changed": changed}
            self._log.cut(progress.is_past)
        table = self._ranks.table_of_first({"progress": progress.to_json(), "identity": self._identity})
        if difference := first_difference(table["identity"], self._identity):
            raise UserError(f"rank {self._ranks.rank} is told to train something else than rank 0: {said(difference)}")
        progress = Progress.from_json(table["progress"])
        moments = {name: optimizer.state[name] for name in masters.values}
        masters.values, moments = self._ranks.arrays_of_first((masters.values, moments))
        optimizer.state.update(moments, step=mx.array(progress.step, mx.uint64))
        mx.eval(masters.values, optimizer.state)
        return progress, figures

    def save(self, masters: Masters, optimizer: optim.Optimizer, progress: Progress) -> Path | None:
        """Write a checkpoint; returns its path, on rank 0."""
        if self._checkpoints is None or self._log is None:
            return None
        self._log.sync()  # a checkpoint never knows of a line that a crash of the machine could take
        moments = {name: {kind: optimizer.state[name][kind] for kind in MOMENTS} for name in masters.values}
        return self._checkpoints.save(masters.values, moments, progress)

    def save_best(self, masters: Masters, progress: Progress) -> None:
        """Keep the weights as those of the best validation."""
        if self._checkpoints is not None:
            self._checkpoints.save_best(masters.values, progress.step)

    def load_best(self, masters: Masters) -> None:
        """Give all ranks the weights of the best validation."""
        best = masters.values if self._checkpoints is None else self._checkpoints.best()
        masters.values = self._ranks.arrays_of_first({name: best[name] for name in masters.values})

    def log(self, kind: str, step: int, figures: dict[str, Any]) -> None:
        """Add a line to the log."""
        if self._log is not None:
            self._log.write(kind, step, figures)

    @property
    def last(self) -> Path | None:
        """The last checkpoint, on rank 0."""
        return None if self._checkpoints is None else self._checkpoints.last

    @property
    def go_on(self) -> str:
        """Where the run would go on, as the end of a message."""
        if self._checkpoints is None:
            return ""
        if self._checkpoints.last is None:
            return "; there is no checkpoint yet"
        return f"; the last checkpoint is {self._checkpoints.last}"
