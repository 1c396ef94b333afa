"""What the commands share in talking to people: lines on stderr, colour where it is wanted, progress of slow phases."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from gm_mlx.errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from gm_mlx.engine import Stats
    from gm_mlx.train.rows import Problem

# Before the command's name and after it: people add it to the end of a line that has just failed.
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from.")]

CODES = {"dim": "2", "bold": "1", "cyan": "36"}
LISTED = 20  # bad rows that a terminal shows
DELAY = 1.0  # seconds that a phase may take before it is shown
PHASES = {
    "load": "Loading the model",
    "encode": "Looking at the image",
    "prefill": "Reading the prompt",
    "calibrate": "Reading calibration data",
    "measure": "Measuring what each part needs",
    "scale": "Scaling channels",
    "quantize": "Quantizing",
    "reference": "Answering with the original",
    "compare": "Answering with the result",
    "prepare": "Preparing",
    "hash": "Reading the source",
    "write": "Writing",
}


def say(text: str) -> None:
    """Prints a line to stderr: stdout carries answers only."""
    print(text, file=sys.stderr, flush=True)


def note(text: str) -> None:
    """Prints a remark to stderr that nobody need act on."""
    say(styled(f"note: {text}", "dim", sys.stderr))


def show_problems(problems: Sequence[Problem]) -> None:
    """Lists rows of a file that are of no use on stderr: at a terminal the first of them, elsewhere all."""
    from gm_mlx.train.rows import listing

    for line in listing(problems, LISTED if sys.stderr.isatty() else sys.maxsize):
        say(printable(line))


def one_line(text: str) -> str:
    """Returns the text with every run of white space, line ends included, as one space."""
    return " ".join(text.split())


def styled(text: str, style: str, stream: TextIO) -> str:
    """Returns the text in a style of ``CODES`` where the stream is a terminal that shows colours and may."""
    plain = not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\x1b[{CODES[style]}m{text}\x1b[0m"


def printable(text: str) -> str:
    """Returns the text without control characters, with which a model could drive the terminal."""
    return "".join(char for char in text if (char >= " " and not "\x7f" <= char <= "\x9f") or char in "\n\t")


def checked_text(text: str, name: str) -> str:
    """Returns a prompt as it is; one that is empty or that is no text is a ``UserError``."""
    if not text.strip():
        raise UserError(f"{name} is empty; ask something")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{name} is not UTF-8 text; check the terminal's encoding") from error
    return text


def size(num_bytes: int) -> str:
    """Returns a number of bytes for people, in the units of memory (1 GB = 2**30 bytes)."""
    value, units = float(num_bytes), ["KB", "MB", "GB"]
    value /= 1024
    while value >= 1000 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.3g} {units[0]}" if value < 100 else f"{value:.0f} {units[0]}"


def parse_size(text: str, option: str) -> int:
    """Returns the bytes of a size as people write it, such as "2.9GB", in the units of ``size``.

    Raises:
        UserError: It is no size; the message names the option.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG])i?B?", text.strip(), re.IGNORECASE | re.ASCII)
    if not found or float(found[1]) <= 0:
        raise UserError(f"{option}: {text!r} is not a size; write it like 2.9GB or 800MB (1 GB = 1024 MB)")
    return int(float(found[1]) * 1024 ** (1 + "KMG".index(found[2].upper())))


def with_strength(text: str) -> tuple[str, float]:
    """Returns name and strength of an adapter; of a text without a number behind its last =, all of it is the name."""
    name, _, strength = text.rpartition("=")
    try:
        return name or text, float(strength) if name else 1.0
    except ValueError:
        return text, 1.0


def stats_line(stats: Stats) -> str:
    """Returns an answer's times and rates as one line of less than 80 characters."""
    parts = [
        f"first token {stats.seconds_to_first_token:.2f} s",
        f"prefill {stats.prefill_tokens_per_second:.0f} tok/s",
        f"decode {stats.decode_tokens_per_second:.1f} tok/s",
    ]
    if stats.peak_memory_bytes:  # an answer that was stopped has none
        parts.append(f"peak {size(stats.peak_memory_bytes)}")
    return " | ".join(parts)


class Progress:
    """The callback for ``progress(phase, done, total)``, and a bar on stderr for waits that turn out to be slow.

    The bar appears only where stderr is a terminal, and leaves no trace.
    """

    def __init__(self) -> None:
        self._shows = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._bar: RichProgress | None = None
        self._state: tuple[str, int, int] = ("", 0, 0)

    @contextmanager
    def waiting(self, phase: str) -> Iterator[None]:
        """Everything in here is waited for, beginning with a phase; ``stop`` or the end of the block ends it."""
        self._state = (phase, 0, 0)
        if self._shows:
            # A timer and not a look at the clock in a callback: a slow phase may call back only when it is over.
            self._timer = threading.Timer(DELAY, self._show)
            self._timer.daemon = True
            self._timer.start()
        try:
            yield
        finally:
            self.stop()

    def __call__(self, phase: str, done: int, total: int) -> None:
        with self._lock:
            # What ends tells nothing of what comes next, but for images: the prompt comes after them.
            self._state = ("prefill", 0, 0) if (phase, done) == ("encode", total) else (phase, done, total)
            self._update()

    def stop(self) -> None:
        """Takes the bar away. Call it before anything else is printed."""
        with self._lock:
            if self._timer:
                self._timer.cancel()
            if self._bar:
                self._bar.stop()
            self._timer = self._bar = None

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        bar = BarColumn(complete_style="cyan", pulse_style="cyan")
        columns = (TextColumn("{task.description}"), bar, TaskProgressColumn(), TimeElapsedColumn())
        with self._lock:
            if self._timer is not threading.current_thread():  # stopped while rich was imported
                return
            self._bar = RichProgress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False)
            self._bar.add_task("", total=None)
            self._update()
            self._bar.start()

    def _update(self) -> None:
        if self._bar:
            phase, done, total = self._state
            task = self._bar.tasks[0]
            task.total = total or None  # without counts the bar moves to and fro
            self._bar.update(task.id, description=PHASES.get(phase, phase), completed=done)
