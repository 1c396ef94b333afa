"""JSON lists, JSON lines and CSV, one record at a time: memory holds a record, not the file.

A record comes with a way to read it again, so that nobody needs to keep an image that is written inside it.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gm_mlx.errors import UserError
from gm_mlx.train.rows import Problem, Where

CHUNK = 1 << 20  # characters that are read at a time
LONGEST = 1 << 26  # of a record: a list that is broken somewhere must not be read to its end to find that out
DELIMITERS = ",;\t|"


class Record(NamedTuple):
    """What stands in one place of the data, not looked at yet, and how to read it again."""

    where: Where
    value: Any
    again: Callable[[], Any]


def read_json_lines(path: Path) -> Iterator[Record | Problem]:
    """One JSON value per line; empty lines are passed over."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = Where(str(path), "line", number)
            if line.strip():
                try:
                    yield Record(where, json.loads(line), partial(_read_again, path, start, len(line)))
                except (ValueError, RecursionError) as error:
                    yield Problem(where, f"not JSON ({_why(error)})")
            start += len(line)


def read_json_list(path: Path) -> Iterator[Record]:
    """The values of one JSON list.

    Raises:
        UserError: the file is not such a list, or breaks off. Behind a place that is not JSON nobody knows where the
            next record begins, so there is no going on.
    """
    with path.open("rb") as file:
        window = _Window(path, file)
        window.take("[")
        for number in count(1):
            if window.peek() == "]":
                break
            yield window.record(number)
            if window.peek() != "]":
                window.take(",")


class _Window:
    """A piece of a JSON text that moves through its file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at, self._ended = "", 0, False
        self._offset = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0  # of _at in the file, in bytes
        self._line = 1  # of _at
        file.seek(self._offset)

    def peek(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        while True:
            self._pass(_SPACE.match(self._text, self._at).end())  # type: ignore[union-attr]
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._grow()

    def take(self, wanted: str) -> None:
        """Pass over a character that must come next."""
        if (found := self.peek()) != wanted:
            what = f"{found!r} where {wanted!r} is due" if found else "the file ends too early"
            raise UserError(f"{self._path}: not a JSON list: {what} on line {self._line}; download or write it again")
        self._pass(self._at + 1)

    def record(self, number: int) -> Record:
        """Pass over the next value."""
        self.peek()
        where = Where(str(self._path), "record", number, self._line)
        start = self._offset
        while True:
            last = self._ended or len(self._text) - self._at > LONGEST
            try:
                value, end = _DECODE(self._text, self._at)
                # A number may go on behind the window.
                if last or not isinstance(value, int | float) or self._text[end : end + 1] in _ENDS:
                    break
            except (ValueError, RecursionError) as error:
                if last:
                    raise UserError(
                        f"{where}: not JSON ({_why(error)}), and what follows is lost with it; correct the file, or "
                        "write one row per line (JSONL)"
                    ) from None
            self._grow()
        self._pass(end)
        return Record(where, value, partial(_read_again, self._path, start, self._offset - start))

    def _pass(self, end: int) -> None:
        passed = self._text[self._at : end]
        self._offset += len(passed.encode())
        self._line += passed.count("\n")
        self._at = end

    def _grow(self) -> None:
        rest = self._text[self._at :]
        chunk = self._file.read(max(CHUNK, len(rest)))  # doubles, so that a long record is not parsed too often
        self._ended = not chunk
        try:
            self._text, self._at = rest + self._decoder.decode(chunk, self._ended), 0
        except UnicodeDecodeError as error:
            raise UserError(f"{self._path}: not UTF-8 text ({error.reason}); write it again as UTF-8") from None


_SPACE = re.compile(r"[ \t\r\n]*")
_ENDS = (*" \t\r\n", ",", "]")
_DECODE = json.JSONDecoder().raw_decode


def _read_again(path: Path, start: int, length: int) -> Any:
    try:
        with path.open("rb") as file:
            file.seek(start)
            return json.loads(file.read(length))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: has changed since training began ({error}); restore it") from None


def _why(error: Exception) -> str:
    """A parser's complaint without its positions, which count from where it was started."""
    if isinstance(error, RecursionError):
        return "nested too deep"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def read_csv(path: Path, columns: Sequence[str]) -> Iterator[Record | Problem]:
    """The lines of a CSV file, as objects with the names in its first line as keys.

    Args:
        path: a UTF-8 file. Commas, semicolons, tabs and bars are known as separators.
        columns: names that must be among its columns, in any case; the keys are as they are here.

    Raises:
        UserError: a name is missing, or from some place on the file is no CSV.
    """
    line = 2
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            delimiter, header = _header(path, file.readline(), columns)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            for cells in reader:
                where = Where(str(path), "line", line)
                line = reader.line_num + 2  # a cell in quotes may take several
                value = dict(zip(header, cells, strict=False))
                if len(cells) == len(header):
                    yield Record(where, value, partial(dict, value))
                elif cells:
                    yield Problem(where, f"{len(cells)} cells where the first line has {len(header)}; check its quotes")
    except csv.Error as error:
        raise UserError(f"{path}: not CSV from line {line} on ({error}); check the quotes there") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); save it as CSV in UTF-8") from None


def _header(path: Path, line: str, wanted: Sequence[str]) -> tuple[str, list[str]]:
    """Separator and column names: whichever separator leaves none of the wanted names missing."""
    spelling = {name.lower(): name for name in wanted}
    readings: dict[str, list[str]] = {}
    for delimiter in DELIMITERS:
        cells = [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter), [])]
        readings[delimiter] = [spelling.get(cell.lower(), cell) for cell in cells]
    for delimiter, names in readings.items():
        if set(wanted) <= set(names):
            return delimiter, names
    names = max(readings.values(), key=len)
    missing = next(name for name in wanted if name not in names)
    raise UserError(
        f"{path}: no column {missing!r} in its first line ({', '.join(names)[:200]}); name the columns that hold the "
        "image, the question and the answer (--columns)"
    )
