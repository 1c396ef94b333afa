"""What others have for following a run, fed with what goes into its log: TensorBoard and Weights & Biases.

Neither is needed, and neither is imported before it is asked for. TensorBoard's files are written by its own package,
which needs neither TensorFlow nor PyTorch for that. Whether wandb sends anything is up to its own settings, such as
WANDB_MODE=offline.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gm_mlx.errors import UserError
from gm_mlx.train.events import Event

PREFIXES = {"log": "train", "validation": "validation"}  # of figures' names, by the kind of event that has them
FLUSH_SECONDS = 10  # a curve is looked at while it grows
PROJECT = "gm-mlx"


class TensorBoard:
    """Event files in ``FOLDER/tensorboard``, for ``tensorboard --logdir FOLDER``."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary, self._log = event_pb2.Event, summary_pb2.Summary, event_pb2.SessionLog
        self._file = EventFileWriter(str(folder / "tensorboard"), flush_secs=FLUSH_SECONDS)
        # Markdown shows what is indented by four as it is.
        shown = json.dumps(config, indent=2, ensure_ascii=False).replace("\n", "\n    ")
        self._add(step=0, summary=text_pb("config", f"    {shown}"))

    def go_on(self, step: int) -> None:
        """Forget what an earlier process wrote of later steps: they are done again."""
        self._add(step=step + 1, session_log=self._log(status=self._log.START))

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Write figures of a step."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._add(step=step, summary=self._summary(value=values))

    def close(self, finished: bool) -> None:
        """Write what is left."""
        self._file.close()

    def _add(self, **event: Any) -> None:
        self._file.add_event(self._event(wall_time=time.time(), **event))


class WandB:
    """A run of Weights & Biases, named like the folder; a run that goes on is the same one there."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        from wandb import Error, Settings, init

        known = folder / "wandb" / "gm-mlx-id"
        known.parent.mkdir(exist_ok=True)
        try:
            self._run = init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=folder.resolve().name,
                id=known.read_text() if known.exists() else None,
                resume="allow",
                dir=str(folder),
                config=dict(config),
                settings=Settings(console="off"),  # what this program prints is its own affair
            )
        except Error as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(f"wandb: {reason}; or keep the run on this machine with WANDB_MODE=offline") from error
        known.write_text(self._run.id)
        # By a step of our own: wandb's may never go back, and steps that are done again say the same again.
        self._run.define_metric("*", step_metric="step")

    def go_on(self, step: int) -> None:
        """Nothing is to be done: see ``define_metric``."""

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Log figures of a step."""
        self._run.log({"step": step, **figures})

    def close(self, finished: bool) -> None:
        """End the run there; one that was interrupted counts as failed until it goes on."""
        self._run.finish(exit_code=0 if finished else 1)


# By name, which is that of the package that it needs.
TRACKERS: dict[str, type[TensorBoard] | type[WandB]] = {"tensorboard": TensorBoard, "wandb": WandB}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse what cannot be used, before work is put into a run.

    Raises:
        UserError: there is no tracker of a name, or its package is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--report-to: {name!r} is unknown; known are {' and '.join(TRACKERS)}")
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # no more than a folder of that name, such as wandb makes
            raise UserError(f"--report-to: {name} is not installed here; pip install {name}")


class Trackers:
    """Several trackers, as what ``loop.train`` lets watch. Close it, or use it in a ``with``.

    Args:
        names: of ``TRACKERS``.
        folder: of the run; made if it is not there.
        config: what the run is, as JSON values, to be shown beside its curves.

    Raises:
        UserError: see ``check_trackers``; or wandb knows no account; or the folder cannot be written.
    """

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> None:
        check_trackers(names)
        wanted = list(dict.fromkeys(names))
        self._finished = False
        self._trackers: list[TensorBoard | WandB] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in wanted:
                self._trackers.append(TRACKERS[name](folder, config))
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error
        except ImportError as error:
            raise UserError(f"--report-to: {name} cannot be loaded ({error}); install it again") from error
        finally:
            if len(self._trackers) < len(wanted):
                self.close()

    def __call__(self, event: Event) -> None:
        """Hand on what an event has of figures.

        Raises:
            UserError: the disk is full.
        """
        self._finished = self._finished or event.kind == "finished"
        try:
            for tracker in self._trackers:
                if event.kind == "resumed":
                    tracker.go_on(event.step)
                elif event.kind in PREFIXES:
                    tracker.add(event.step, dict(_named(PREFIXES[event.kind], event.figures)))
        except OSError as error:
            raise UserError(f"tensorboard: cannot be written ({error.strerror}); make room on the disk") from error

    def close(self) -> None:
        """Write what is left, and end what was begun."""
        while self._trackers:
            with suppress(OSError):  # a disk that is full by now takes nothing away from what was trained
                self._trackers.pop().close(self._finished)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _named(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers in nested tables, by their path."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _named(f"{name}/{key}", inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value
