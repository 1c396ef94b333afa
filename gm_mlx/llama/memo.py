"""Small findings about files on this machine, kept so that they are made once.

A finding lies in a file of its own under ``$XDG_CACHE_HOME/gm-mlx`` (``~/.cache/gm-mlx``). Its name is a hash of what
it depends on: path, size and time of change of each file. So nothing ever has to be thrown away, and all may be.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path


def remembered(kind: str, files: Iterable[Path], find: Callable[[], str]) -> str:
    """A finding from the last time, or what ``find`` finds now.

    Args:
        kind: what is found, for the file's name.
        files: what it depends on.
        find: called when nothing is known; what it raises is not kept.
    """
    place = _folder() / f"{kind}-{_fingerprint(files)}"
    try:
        return place.read_text(encoding="utf-8")
    except (OSError, ValueError):
        pass
    found = find()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(f"{place.name}.{os.getpid()}")
        partial.write_text(found, encoding="utf-8")
        partial.replace(place)
    except OSError:  # a machine without a home to write to finds it out each time
        pass
    return found


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "gm-mlx"


def _fingerprint(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        real = Path(os.path.realpath(file))
        state = real.stat()
        digest.update(f"{real}\0{state.st_size}\0{state.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]
