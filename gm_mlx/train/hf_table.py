"""Data sets of Hugging Face's ``datasets`` library, which is needed for them and for nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gm_mlx.errors import UserError
from gm_mlx.train.records import Record
from gm_mlx.train.rows import Where

MARKS = ("dataset_info.json", "dataset_dict.json", "state.json")  # one of them is in a folder of save_to_disk


def is_saved_table(folder: Path) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    return any((folder / name).is_file() for name in MARKS)


def read_table(name: str | Path, split: str = "train") -> Iterator[Record]:
    """The rows of a data set.

    Images come as the content of their files: the library would decode them, and decoding is for later, when they are
    needed, and for other processes.

    Args:
        name: a folder that ``save_to_disk`` wrote, or a repository on the hub.
        split: which of its splits.

    Raises:
        UserError: ``datasets`` is not installed, or there is no such data set or split.
    """
    table = _opened(name, split)
    for index in range(len(table)):
        again = partial(_row, table, index)
        yield Record(Where(str(name), "row", index + 1), again(), again)


def _opened(name: str | Path, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{name}: is read with Hugging Face's library, which is not installed; pip install datasets"
        ) from None
    try:
        found = datasets.load_from_disk(str(name)) if isinstance(name, Path) else datasets.load_dataset(name)
    except Exception as error:  # whatever the library and its network code raise
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UserError(f"{name}: cannot be read by Hugging Face's datasets ({reason}); check the name") from None
    if isinstance(found, Mapping):
        if split not in found:
            raise UserError(f"{name}: has no split {split!r}; choose one of {', '.join(found)} (--split)")
        found = found[split]
    # As Arrow's own values, images stay as they are stored: {"bytes": ..., "path": ...}.
    return found.with_format("arrow")


def _row(table: Any, index: int) -> dict[str, Any]:
    return table[index].to_pylist()[0]
