"""Checkpoints of a run: all that it takes to go on as if nothing had happened.

=============================  ==============================================================================
``step-000100.safetensors``    after 100 steps: trained weights, float32, as ``weights.<name>``; AdamW's running means
                               of gradients and of their squares as ``m.<name>`` and ``v.<name>``
``best.safetensors``           the trained weights of the best validation
=============================  ==============================================================================

What is no array is JSON in the file's metadata: ``progress``, ``identity`` and ``config``. Random numbers and batches
are functions of the seed and the step's number, so the step is all that there is to know of them.

A file is written beside its place and renamed when it is on the disk. One that is there is complete.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from gm_mlx.errors import UserError
from gm_mlx.new_folder import sync
from gm_mlx.safetensors_header import check_header
from gm_mlx.train.config import TrainConfig
from gm_mlx.train.progress import Progress

STEP_FILE = re.compile(r"step-(\d{6,})\.safetensors")
BEST_FILE = "best.safetensors"
PARTIAL = ".{}.partial.safetensors"
MOMENTS = ("m", "v")  # of AdamW
START_OVER = "choose another folder (--run), or remove this one to start over (--restart)"
# A run may go on with other values of these. The first few change nothing but what is kept and shown, and how much is
# computed at once. The last two are the remedies for a loss that is no longer a number.
FREE = ("log_every", "save_every", "keep", "patience", "checkpoint", "accumulate", "learning_rate", "clip")


class Found(NamedTuple):
    """A checkpoint that was read.

    Attributes:
        path: of its file.
        weights: by name, float32.
        moments: AdamW's, by name.
        progress: where the run stood.
        identity: what run it was.
        config: its hyperparameters.
    """

    path: Path
    weights: dict[str, mx.array]
    moments: dict[str, dict[str, mx.array]]
    progress: Progress
    identity: dict[str, Any]
    config: dict[str, Any]


class Checkpoints:
    """The checkpoints of a folder.

    Attributes:
        last: the newest one that is good; None before the first.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], config: TrainConfig) -> None:
        self.folder = folder
        self.last: Path | None = None
        self._identity = identity
        self._config = config
        for partial in folder.glob(PARTIAL.format("*")):  # of a process that was killed
            partial.unlink(missing_ok=True)

    def save(
        self, weights: Mapping[str, mx.array], moments: Mapping[str, Mapping[str, mx.array]], progress: Progress
    ) -> Path:
        """Write a checkpoint, then remove those that are too many.

        Raises:
            UserError: it cannot be written. What was there stays.
        """
        path = self.folder / f"step-{progress.step:06d}.safetensors"
        arrays = {f"weights.{name}": array for name, array in weights.items()}
        arrays |= {f"{kind}.{name}": pair[kind] for name, pair in moments.items() for kind in MOMENTS}
        tables = {
            "progress": progress.to_json(),
            "identity": self._identity,
            "config": dataclasses.asdict(self._config),
        }
        self._write(path, arrays, {key: json.dumps(table) for key, table in tables.items()})
        self.last = path
        older = [known for known in self._files() if _step(known) <= progress.step]
        for known in older[: -self._config.keep]:
            known.unlink(missing_ok=True)
        return path

    def save_best(self, weights: Mapping[str, mx.array], step: int) -> None:
        """Write the weights of the best validation; raises ``UserError`` when they cannot be written."""
        self._write(self.folder / BEST_FILE, dict(weights), {"step": str(step)})

    def best(self) -> dict[str, mx.array]:
        """The weights of the best validation; raises ``UserError`` when the file is damaged."""
        return _read(self.folder / BEST_FILE)[0]

    def newest(self) -> tuple[Found | None, list[Path]]:
        """Read the newest checkpoint that is whole.

        Returns:
            It, or None when there is none at all; and newer files, which are damaged.

        Raises:
            UserError: all are damaged.
        """
        damaged: list[UserError] = []
        paths = self._files()[::-1]
        for path in paths:
            try:
                found = _found(path)
            except UserError as error:
                damaged.append(error)
                continue
            self.last = path
            return found, paths[: len(damaged)]
        if damaged:
            raise UserError(f"{damaged[0]}; no other checkpoint there is whole: {START_OVER}")
        return None, []

    def check(self, found: Found, weights: Mapping[str, mx.array]) -> dict[str, tuple[Any, Any]]:
        """Make sure that a checkpoint is of this run.

        Args:
            found: the checkpoint.
            weights: those that are to be trained.

        Returns:
            What the run is now told otherwise: keys of ``TrainConfig`` with the old and the new value.

        Raises:
            UserError: it is of another one.
        """
        if difference := first_difference(found.identity, self._identity):
            raise UserError(f"{found.path}: is of another run, whose {said(difference)}; {START_OVER}")
        if difference := first_difference(_shapes(found.weights), _shapes(weights)):
            raise UserError(f"{found.path}: is of another model, or of other parts; {said(difference)}; {START_OVER}")
        config = as_json(dataclasses.asdict(self._config))
        changed = {key: (found.config.get(key), now) for key, now in config.items() if found.config.get(key) != now}
        free = FREE if found.progress.step < self._config.steps else FREE[:-2]
        for key, (before, now) in changed.items():
            if key not in free:
                raise UserError(f"{found.path}: is of another run, whose {said((key, before, now))}; {START_OVER}")
        return changed

    def _files(self) -> list[Path]:
        """All checkpoints, oldest first."""
        return sorted((path for path in self.folder.iterdir() if STEP_FILE.fullmatch(path.name)), key=_step)

    def _write(self, path: Path, arrays: dict[str, mx.array], metadata: dict[str, str]) -> None:
        partial = path.with_name(PARTIAL.format(path.stem))
        try:
            mx.save_safetensors(str(partial), arrays, metadata)
            check_header(partial)
            sync(partial)
            os.replace(partial, path)
            sync(self.folder)
        except (OSError, RuntimeError, UserError) as error:  # MLX has no other error than RuntimeError
            needed, free = sum(array.nbytes for array in arrays.values()), shutil.disk_usage(self.folder).free
            raise UserError(
                f"{path}: cannot be written ({needed / 1e6:,.1f} MB, and the disk has {free / 1e6:,.1f} MB free): "
                f"{' '.join(str(error).split())}; make room and start again: older checkpoints are whole"
            ) from None
        finally:
            partial.unlink(missing_ok=True)


def first_difference(theirs: Any, ours: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first key, nested keys joined by dots, whose values differ in two JSON tables, and both values."""
    if not (isinstance(theirs, dict) and isinstance(ours, dict)):
        return None if theirs == ours else (path, theirs, ours)
    for key in [*theirs, *(key for key in ours if key not in theirs)]:
        if found := first_difference(theirs.get(key), ours.get(key), f"{path}.{key}" if path else key):
            return found
    return None


def said(difference: tuple[str, Any, Any]) -> str:
    """A difference in words."""
    key, theirs, ours = difference
    return f"{key} is {json.dumps(theirs)} and not {json.dumps(ours)}"


def _found(path: Path) -> Found:
    arrays, metadata = _read(path)
    try:
        progress, identity, config = (json.loads(metadata[key]) for key in ("progress", "identity", "config"))
        weights = {name.removeprefix("weights."): a for name, a in arrays.items() if name.startswith("weights.")}
        moments = {name: {kind: arrays[f"{kind}.{name}"] for kind in MOMENTS} for name in weights}
        return Found(path, weights, moments, Progress.from_json(progress), identity, config)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is no checkpoint of a run") from None


def _read(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    check_header(path)
    arrays: dict[str, mx.array]
    metadata: dict[str, str]
    arrays, metadata = mx.load(str(path), return_metadata=True)  # type: ignore[assignment,misc]
    mx.eval(arrays)  # before the file is removed, as it will be
    return arrays, metadata


def _shapes(arrays: Mapping[str, mx.array]) -> dict[str, list[int]]:
    return {name: list(array.shape) for name, array in arrays.items()}


def _step(path: Path) -> int:
    match = STEP_FILE.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def as_json(table: Any) -> Any:
    """A table as it is when it comes out of a file."""
    return json.loads(json.dumps(table))
