"""Files that appear when they are complete, and files that one process at a time writes to."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A place beside ``path`` to write to; at the end the file there takes the place of what was at ``path``.

    After an exception, what was there is there still, and nothing is left of the new file.

    Raises:
        OSError: the file cannot be moved to its place.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        with suppress(OSError):  # it has become the file, or was never there
            partial.unlink()


def lock(file: IO[Any]) -> bool:
    """Lock an open file for this process until it is closed; False when another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: then there is nothing to be sure of
        pass
    return True
