"""Lines from a person at a terminal: editing, history and completion by readline, several lines by paste or quotes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType, TracebackType

from gm_mlx.cli.console import styled

PROMPT, CONTINUED = ">>> ", "... "
QUOTES = '"""'
HISTORY_LENGTH = 1000
BLANKS = " \t\n"


class LineInput:
    """Reads messages with readline where Python has it, and keeps the history in a file for its owner's eyes.

    Use it in a ``with`` statement: leaving writes the history. A message of several lines is pasted, where readline
    knows pastes from typing, or stands between triple quotes.
    """

    def __init__(self, commands: Sequence[str]) -> None:
        self._commands = commands
        self._readline = _readline()

    def __enter__(self) -> LineInput:
        if self._readline:
            self._set_up(self._readline)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._readline:
            return
        self._readline.set_completer(None)
        with suppress(OSError, RuntimeError):  # no home, or none to write to, is no reason to complain at each farewell
            path = history_file()
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            path.chmod(0o600)
            self._readline.write_history_file(path)

    def __call__(self) -> str:
        """Returns the next message without the white space around it.

        Raises:
            EOFError: Ctrl-D at an empty line.
            KeyboardInterrupt: Ctrl-C; what was typed is dropped.
        """
        line = self._line(PROMPT).strip()
        if not line.startswith(QUOTES):
            return line
        text = line.removeprefix(QUOTES)
        while not text.rstrip().endswith(QUOTES):
            text += "\n" + self._line(CONTINUED)
        return text.rstrip().removesuffix(QUOTES).strip()

    def _line(self, prompt: str) -> str:
        # readline counts columns, so it must be told which characters take none; libedit shows these marks to people.
        if self._readline and not _is_libedit(self._readline):
            coloured = styled("\x02" + prompt + "\x01", "cyan", sys.stdout)
            prompt = f"\x01{coloured}\x02" if coloured[0] == "\x1b" else prompt
        return input(prompt)

    def _set_up(self, readline: ModuleType) -> None:
        readline.set_history_length(HISTORY_LENGTH)
        with suppress(OSError, RuntimeError):  # there is none the first time
            readline.read_history_file(history_file())
        readline.set_completer_delims(BLANKS)
        readline.set_completer(self._complete)
        if _is_libedit(readline):
            readline.parse_and_bind("bind ^I rl_complete")
        else:
            readline.parse_and_bind("tab: complete")
            readline.parse_and_bind("set enable-bracketed-paste on")

    def _complete(self, word: str, index: int) -> str | None:
        """readline's question for the index-th completion of the word before the cursor."""
        assert self._readline
        found = completions(self._readline.get_line_buffer()[: self._readline.get_endidx()], self._commands)
        return found[index] if index < len(found) else None


def history_file() -> Path:
    """Returns where the history is kept: the state folder of the XDG base directory specification.

    Raises:
        RuntimeError: Nobody knows where this user's home is.
    """
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state") / "gm-mlx" / "history"


def completions(line: str, commands: Sequence[str]) -> list[str]:
    """Returns what the last word of a line can become: a command, or a path after one.

    readline takes any blank for a border between words, also one that is escaped. So when a path has blanks, the
    completions are of the piece of it after its last blank.

    Args:
        line: The line up to the cursor.
        commands: Commands with their slash.
    """
    command, blank, rest = line.partition(" ")
    if not command.startswith("/"):
        return []
    if not blank:
        return [f"{name} " for name in commands if name.startswith(command)]
    start = _last_word(rest)
    typed = rest[start:]
    quote = typed[:1] if typed[:1] in ("'", '"') else ""
    found = []
    for path in _paths(typed[1:] if quote else _unescaped(typed)):
        word = quote + path + (quote if quote and not path.endswith("/") else "") if quote else _escaped(path)
        found.append(word[len(typed) - len(_after_last_blank(typed)) :])
    return found


def _last_word(text: str) -> int:
    """Returns where the last shell word of a text starts; quotes and backslashes hold a word together."""
    start, quote, escaped = 0, "", False
    for index, char in enumerate(text):
        if escaped:
            escaped = False
        elif char == "\\" and quote != "'":
            escaped = True
        elif char == quote:
            quote = ""
        elif quote:
            continue
        elif char in "'\"":
            quote = char
        elif char in BLANKS:
            start = index + 1
    return start


def _after_last_blank(text: str) -> str:
    return text[max(text.rfind(blank) for blank in BLANKS) + 1 :]


def _paths(typed: str) -> list[str]:
    """Returns the paths that start with what was typed, folders with a slash at the end."""
    folder, name = os.path.split(typed)
    try:
        with os.scandir(os.path.expanduser(folder) or ".") as entries:
            found = [(entry.name, entry.is_dir()) for entry in entries if entry.name.startswith(name)]
    except OSError:
        return []
    return sorted(
        os.path.join(folder, entry) + ("/" if is_folder else "")
        for entry, is_folder in found
        if name.startswith(".") or not entry.startswith(".")
    )


def _escaped(path: str) -> str:
    return "".join("\\" + char if char in " \t'\"\\" else char for char in path)


def _unescaped(word: str) -> str:
    out, escaped = "", False
    for char in word:
        escaped = char == "\\" and not escaped
        out += "" if escaped else char
    return out


def _readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:  # some builds of Python come without
        return None
    return readline


def _is_libedit(readline: ModuleType) -> bool:
    """Whether this is macOS's substitute for readline, which has other key bindings and no bracketed paste."""
    return "libedit" in (readline.__doc__ or "")
