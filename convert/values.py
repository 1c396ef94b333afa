"""Values out of a JSON file that somebody else wrote: present or not, of the type that is needed or not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gm_mlx.errors import UserError

NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    dict: "a table",
    list: "a list",
}


@dataclass(frozen=True)
class Values:
    """A JSON object of a file.

    Attributes:
        file: the file, for errors.
        table: the object.
        prefix: where in the file it is: "text_config." or nothing.
    """

    file: Path
    table: Mapping[str, Any]
    prefix: str = ""

    @classmethod
    def read(cls, file: Path) -> Values:
        """Read a file; an empty table if it does not exist. Raises ``UserError`` if it is not a JSON object."""
        try:
            table = json.loads(file.read_bytes())
        except FileNotFoundError:
            table = {}
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file}: not valid JSON ({error}); fetch the checkpoint again") from None
        if not isinstance(table, dict):
            raise UserError(f"{file}: not a JSON object; fetch the checkpoint again")
        return cls(file, table)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value of a given type, or ``default`` if it is missing or null.

        Raises:
            UserError: it is of another type.
        """
        value = self.table.get(key)
        if value is None:
            return default
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise self.error(key, f"is {value!r} and not {NAMES[kind]}; correct the file")
        return value

    def inner(self, key: str) -> Values:
        """The table under a key; an empty one if it is missing or null."""
        return Values(self.file, self.get(key, dict, {}), f"{self.prefix}{key}.")

    def refuse(self, allowed: Mapping[str, tuple[object, ...]]) -> None:
        """Raise ``UserError`` for the first key whose value is none of those allowed; a missing key counts as None."""
        for key, values in allowed.items():
            value = self.table.get(key)
            if value not in values:
                known = " or ".join(json.dumps(each) for each in values if each is not None)
                raise self.error(key, f"is {json.dumps(value)}, which this version cannot convert; it converts {known}")

    def error(self, key: str, problem: str) -> UserError:
        """A ``UserError`` that names the file and the key."""
        return UserError(f"{self.file}: {self.prefix}{key} {problem}")
