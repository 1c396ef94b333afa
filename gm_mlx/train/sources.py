"""What a user names as training data, and the rows in it.

A file's content says what it is: a JSON list, JSON lines, or CSV; and its first record says of which kind the records
are. A folder has one such file, or is a saved table of Hugging Face's.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from gm_mlx.errors import UserError
from gm_mlx.hub import REPO_ID
from gm_mlx.train.conversations import COLUMNS, KINDS, conversation, kind_of
from gm_mlx.train.hf_table import is_saved_table, read_table
from gm_mlx.train.records import Record, read_csv, read_json_lines, read_json_list
from gm_mlx.train.rows import ImageRef, Problem, Row, Stored

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
PROBED = 100  # records that are looked at for their kind, should the first be damaged


def read_rows(
    source: str | Path,
    *,
    images: str | Path | None = None,
    kind: str | None = None,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
) -> Iterator[Row | Problem]:
    """Read training data, row by row.

    Args:
        source: a file (JSON list, JSON lines, CSV), a folder with one of these or with a saved table, or the name of a
            data set on the Hugging Face hub.
        images: the folder that images' paths start from; without it, the folder of the data file.
        kind: of the records, one of ``conversations.KINDS``; without it, what the first record looks like.
        columns: where ``pairs`` have "image", "question" and "answer", if under other names; an empty name for
            "image" means questions without images.
        split: of a Hugging Face data set.

    Yields:
        A row, or what is wrong with it. Whether its images exist and its tokens fit is not known yet.

    Raises:
        UserError: there is no such data, it cannot be read on, or its kind is not known.
    """
    columns = _columns(columns)
    if kind is not None and kind not in KINDS:
        raise UserError(f"format {kind!r}: unknown; known are {', '.join(KINDS)}")
    place = _found(source)
    try:
        yield from _rows(place, _records(place, kind, columns, split), images, kind, columns)
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or error}); check the file") from error


def _columns(columns: Mapping[str, str] | None) -> dict[str, str]:
    for name in columns or ():
        if name not in COLUMNS:
            raise UserError(f"column {name!r}: unknown; what can be named are {', '.join(COLUMNS)}")
    return {**COLUMNS, **(columns or {})}


def _found(source: str | Path) -> str | Path:
    """The data's file or saved table as a path, or the name of a repository."""
    path = Path(os.path.expanduser(source))
    if path.is_file() or (path.is_dir() and is_saved_table(path)):
        return path
    if path.is_dir():
        files = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in SUFFIXES)
        if len(files) == 1:
            return files[0]
        names = ", ".join(file.name for file in files[:5]) or "none"
        raise UserError(f"{source}: needs one file of {', '.join(SUFFIXES)} but has {names}; name the file")
    if path.suffix.lower() in SUFFIXES or not REPO_ID.fullmatch(str(source)):
        raise UserError(f"{source}: no such file or folder; check the path")
    return str(source)


def _records(place: str | Path, kind: str | None, columns: Mapping[str, str], split: str) -> Iterator[Record | Problem]:
    if isinstance(place, str) or place.is_dir():
        return read_table(place, split)
    with place.open("rb") as file:
        head = file.read(1 << 12).removeprefix(b"\xef\xbb\xbf").lstrip()
    if b"\0" in head:
        raise UserError(f"{place}: neither JSON nor CSV; write the rows as JSON, JSONL or CSV")
    if head[:1] == b"[":
        return read_json_list(place)
    if head[:1] == b"{":
        if head.split(b"\n")[0].strip() == b"{":
            raise UserError(f"{place}: one JSON object over several lines; write a list of rows, or one row per line")
        return read_json_lines(place)
    if not head:
        raise UserError(f"{place}: is empty; add rows")
    if place.suffix.lower() == ".jsonl" or kind not in (None, "pairs"):
        return read_json_lines(place)  # that begin with a damaged one
    return read_csv(place, [name for name in columns.values() if name])


def _rows(
    place: str | Path,
    records: Iterator[Record | Problem],
    images: str | Path | None,
    kind: str | None,
    columns: Mapping[str, str],
) -> Iterator[Row | Problem]:
    if kind is None:
        probed = list(islice(records, PROBED))
        kinds = (kind_of(record.value, columns) for record in probed if isinstance(record, Record))
        kind = next((found for found in kinds if found is not None), None)
        if kind is None:
            raise UserError(_unknown(place, probed))
        records = chain(probed, records)
    folder = os.path.expanduser(images) if images is not None else place.parent if isinstance(place, Path) else ""
    for record in records:
        if isinstance(record, Problem):
            yield record
            continue
        try:
            found = conversation(record.value, kind, columns)
        except UserError as error:
            yield Problem(record.where, str(error))
            continue
        again = partial(_image_again, record.again, kind, columns)  # not the record: its images may be in it
        refs = [_ref(image, folder, partial(again, number)) for number, image in enumerate(found.images)]
        yield Row.of(record.where, found.system, found.turns, refs)


def _ref(image: str | bytes, folder: str | Path, again: Callable[[], bytes]) -> ImageRef:
    if isinstance(image, str):
        return os.path.join(folder, os.path.expanduser(image))
    return Stored(hashlib.blake2b(image, digest_size=16).hexdigest(), again)


def _image_again(record: Callable[[], Any], kind: str, columns: Mapping[str, str], number: int) -> bytes:
    image = conversation(record(), kind, columns).images[number]
    assert isinstance(image, bytes)
    return image


def _unknown(place: str | Path, probed: list[Record | Problem]) -> str:
    """The complaint about records of no known kind."""
    if not probed:
        return f"{place}: has no rows; add some"
    first = probed[0]
    if isinstance(first, Problem):
        return f"{first}; no row can be read"
    keys = ", ".join(map(str, first.value)) if isinstance(first.value, Mapping) else type(first.value).__name__
    return (
        f"{first.where}: a row has 'conversations', 'messages', 'texts', or a question and an answer; this one has "
        f"{keys[:200] or 'nothing'}; name the columns (--columns) or the format (--format)"
    )
