"""``log.jsonl``: what a run has to say of its steps, one JSON object a line.

A run that goes on from a checkpoint cuts off what was logged after it, so that the log never tells of a step twice. It
is that of a run that was never interrupted, but for the time that steps took.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gm_mlx.errors import UserError
from gm_mlx.files import lock

LOG = "log.jsonl"


class Log:
    """The log of a run. While it is open, no other process can train in its folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOG
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab+")  # noqa: SIM115 - closed by ``close``
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); choose another folder") from None
        if not lock(self._file):
            self._file.close()
            raise UserError(f"{folder}: another process trains there; wait for it, or choose another folder")

    def cut(self, is_past: Callable[[dict[str, Any]], bool]) -> None:
        """Keep lines up to the first one that is not of the past, or that a sudden end has left incomplete."""
        self._file.seek(0)
        end = 0
        for line in self._file:
            try:
                if not (line.endswith(b"\n") and is_past(json.loads(line))):
                    break
            except (ValueError, KeyError, TypeError):
                break
            end += len(line)
        self._file.truncate(end)

    def write(self, kind: str, step: int, figures: dict[str, Any]) -> None:
        """Add a line; raises ``UserError`` when the disk is full."""
        line = json.dumps({"kind": kind, "step": step, **figures}) + "\n"
        try:
            self._file.write(line.encode())
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); make room on the disk") from None

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let others train in the folder."""
        self._file.close()
