"""A folder that appears complete or not at all, and never takes away what it replaces before it is complete.

Everything goes to a hidden folder beside OUT, ``.OUT.partial-<pid>``, which is renamed to OUT when all of it is on the
disk. An OUT that was there is first renamed to ``.OUT.old-<pid>``, since no portable call swaps two folders. A crash
between the two renames leaves the old folder under that name, and the next run that writes to OUT brings it back.

A hidden folder is locked by the run that made it. The system drops the lock with the process, however that ended: a
hidden folder that can be locked is a leftover, and the next run that writes to the same OUT removes it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gm_mlx.config import MODEL_TYPE
from gm_mlx.errors import UserError

BESIDE_GM_JSON = ("model.gguf", "adapter_model.safetensors")  # what shows that a folder is ours when it has no config
SIDE_FILES_BYTES = 16 << 20  # room beside the weights, for the tokenizer and the like
REASONS = {
    errno.ENOSPC: "the disk is full; make room or write elsewhere",
    errno.EDQUOT: "your share of the disk is used up; make room or write elsewhere",
    errno.EFBIG: "a file grew too large for its file system; use a smaller --max-shard-size",
    errno.ENOTEMPTY: "was made by another program meanwhile; choose another folder, or replace it with --force",
    errno.EBUSY: "is in use by the system, as the root of a disk is; write to a folder inside it",
}


def check_out(out: Path, *, force: bool = False, sources: Iterable[Path] = ()) -> Path:
    """Make sure that a folder can be written, before work is put into it; clear away what dead runs left.

    Args:
        out: the folder to be.
        force: it may exist, if it is a model folder or empty.
        sources: folders and files that are read meanwhile; none may be ``out``, lie in it or have it inside.

    Returns:
        ``out``, absolute and without symbolic links.

    Raises:
        UserError: something is in the way, or there is no place for it.
    """
    given, out = out, Path(os.path.realpath(out))
    if not out.parent.is_dir():
        raise UserError(f"{given}: there is no folder {out.parent}; make it first")
    _recover(out)
    for source in (Path(os.path.realpath(source)) for source in sources):
        if out == source or source in out.parents or out in source.parents:
            raise UserError(f"{given}: is the source {source}, or one lies in the other; choose another folder")
    if not os.path.lexists(out):
        return out
    if not out.is_dir():
        raise UserError(f"{given}: is a file; name a folder that does not exist")
    if not force:
        raise UserError(f"{given}: exists; choose another folder, or replace it with --force")
    if any(out.iterdir()) and not _is_model(out):
        raise UserError(f"{given}: holds something else than a model, which --force does not replace; remove it first")
    return out


def check_space(out: Path, needed: int) -> None:
    """Refuse to begin what the disk of ``out`` has no room for."""
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise UserError(
            f"{out}: needs {needed / 1e6:,.0f} MB and its disk has {free / 1e6:,.0f} MB free; make room or write "
            "elsewhere"
        )


@contextmanager
def new_folder(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Give an empty folder that becomes ``out`` at the end of the block, or vanishes when the block raises.

    Args:
        out: as ``check_out`` returns it.
        force: replace what is there.

    Raises:
        UserError: the files cannot be written, or ``out`` was made meanwhile.
    """
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    lock = None
    try:
        partial.mkdir()
        lock = _lock(partial)
        yield partial
        for path in [*partial.iterdir(), partial]:
            sync(path)
        _move(partial, out, force)
    except OSError as error:
        reason = REASONS.get(error.errno or 0, f"cannot be written ({error.strerror or error}); write elsewhere")
        raise UserError(f"{out}: {reason}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already when all went well
        if lock is not None:
            os.close(lock)


def _move(partial: Path, out: Path, force: bool) -> None:
    aside = out.with_name(f".{out.name}.old-{os.getpid()}")
    lock = None
    try:
        if force and out.exists():
            lock = _lock(out)
            out.rename(aside)
        partial.rename(out)
        sync(out.parent)
    except BaseException:
        if aside.exists() and not os.path.lexists(out):
            aside.rename(out)
        raise
    finally:
        if lock is not None:
            os.close(lock)
    shutil.rmtree(aside, ignore_errors=True)


def _recover(out: Path) -> None:
    """Bring back a folder whose successor never came; remove all else that dead runs left beside ``out``."""
    pattern = re.compile(re.escape(f".{out.name}.") + r"(partial|old)-\d+")
    if not os.access(out.parent, os.R_OK):
        return
    for path in sorted(out.parent.iterdir()):
        kind = pattern.fullmatch(path.name)
        if not kind or not path.is_dir():
            continue
        try:
            if (lock := _lock(path)) is None:
                continue  # at work
            if kind[1] == "old" and not os.path.lexists(out):
                path.rename(out)
            else:
                shutil.rmtree(path, ignore_errors=True)
            os.close(lock)
        except OSError:  # another run was faster, or it is somebody else's
            continue


def _lock(folder: Path) -> int | None:
    """Lock a folder for this process; returns what to close to give it free, or None when another has it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # or its file system has no locks: then no leftover is ever taken for one
        os.close(handle)
        return None
    return handle


def _is_model(folder: Path) -> bool:
    """Whether a folder is one that this program writes: a model for MLX or for llama.cpp, or an adapter."""
    if (folder / "gm.json").is_file() and any((folder / name).is_file() for name in BESIDE_GM_JSON):
        return True
    try:
        return json.loads((folder / "config.json").read_bytes())["model_type"] == MODEL_TYPE
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return False


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
