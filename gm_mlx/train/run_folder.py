"""The folder of a run: checkpoints, log and ``run.json``, which says that it is one and what it is for.

It lies beside OUT, what the run makes in the end, and not in it: OUT appears complete or not at all. Both have the
run's id in them, so that a finished run knows its own work.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gm_mlx import __version__
from gm_mlx.errors import UserError
from gm_mlx.new_folder import check_out
from gm_mlx.train.log import Log

RUN_FILE = "run.json"
SAMPLE = 4096  # bytes of each tensor that its fingerprint is of


def check_places(
    out: Path, run: Path, *, force: bool = False, restart: bool = False, sources: Iterable[Path] = ()
) -> bool:
    """Make sure that a run can write what it makes, before work is put into it.

    Args:
        out: what it makes, a folder.
        run: its own folder.
        force: OUT may be there, and is replaced in the end.
        restart: what the run has done so far will be forgotten.
        sources: folders and files that are read meanwhile.

    Returns:
        Whether OUT is there and is what this run has made.

    Raises:
        UserError: one of the folders is taken by something else, cannot be there, or lies in the other.
    """
    place, inside = Path(os.path.realpath(run)), Path(os.path.realpath(out))
    if place == inside or place in inside.parents or inside in place.parents:
        raise UserError(f"{run}: a run's folder, which cannot lie in {out} nor around it; choose another with --run")
    if not place.parent.is_dir():
        raise UserError(f"{run}: there is no folder {place.parent}; make it first")
    if place.exists() and not place.is_dir():
        raise UserError(f"{run}: is a file; choose another folder with --run")
    if place.is_dir() and any(place.iterdir()) and not (place / RUN_FILE).is_file():
        raise UserError(f"{run}: holds something else than a run; choose another folder with --run")
    is_ours = not restart and _is_made_by(inside, place)
    check_out(out, force=force or is_ours, sources=sources)
    return is_ours


def open_run(run: Path, table: Mapping[str, Any]) -> str:
    """Make a run's folder, or find it as it was left.

    Args:
        run: the folder.
        table: what ``run.json`` says of a new run.

    Returns:
        The run's id, which is to be in the ``gm.json`` of what it makes, as ``training.run``.
    """
    file = run / RUN_FILE
    try:
        run.mkdir(exist_ok=True)
        if known := _read(file).get("id"):
            return known
        table = {"id": uuid.uuid4().hex, "made_by": f"gm-mlx {__version__}", **table}
        partial = run / f".{RUN_FILE}.partial"
        partial.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        raise UserError(f"{run}: cannot be written ({error.strerror or error}); choose another with --run") from error
    return table["id"]


def remove_run(run: Path) -> None:
    """Forget all that a run has done; raises ``UserError`` when another process is at it."""
    if (run / RUN_FILE).is_file():
        Log(run).close()
        shutil.rmtree(run, ignore_errors=True)


def fingerprint(files: Iterable[Path]) -> str:
    """A hash of safetensors files: of all names, dtypes, shapes and places, and of the first bytes of each tensor.

    A few megabytes of a model are read, and not gigabytes. Training, merging and quantizing change a tensor from its
    first bytes on.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = file.read(length)
            digest.update(header)
            table = json.loads(header)
            table.pop("__metadata__", None)
            for begin, end in sorted(entry["data_offsets"] for entry in table.values()):
                file.seek(8 + length + begin)
                digest.update(file.read(min(SAMPLE, end - begin)))
    return digest.hexdigest()


def _is_made_by(out: Path, run: Path) -> bool:
    mine = _read(run / RUN_FILE).get("id")
    training = _read(out / "gm.json").get("training")
    return mine is not None and isinstance(training, dict) and training.get("run") == mine


def _read(file: Path) -> dict[str, Any]:
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}
