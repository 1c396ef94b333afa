"""How a training run goes: a live bar at a terminal, plain lines elsewhere, both on stderr.

    step 340/2,000 ━━━━━━━━━━━━━━━━━━╸━━━━━━━━━━━━━━━━━━━━━ 17% 12:31 left
    loss 0.4312 | rate 1.9e-04 | 812 tok/s | peak 3.1 GB
    validation loss 0.5203, exact match 71.2% at step 300

The bar is redrawn by a thread of its own, a few times a second, so that a step costs no more than a few additions. What
is worth keeping, such as a validation, is a line above it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gm_mlx.cli.console import note, printable, say, size

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

    from gm_mlx.train.events import Event

SMOOTH = 0.9  # share of the past in a smoothed figure
REFRESH = 4  # times a second that the bar is drawn
BAR = range(8, 41)  # widths that a bar may have


class Smooth:
    """A ratio of two sums in which the past counts ever less."""

    def __init__(self) -> None:
        self._above = self._below = 0.0

    def add(self, above: float, below: float = 1.0) -> None:
        """Add to both sums."""
        self._above = SMOOTH * self._above + above
        self._below = SMOOTH * self._below + below

    @property
    def value(self) -> float:
        """The ratio; 0 before there is any."""
        return self._above / self._below if self._below else 0.0


class TrainingDisplay:
    """What ``loop.train`` lets watch. Close it, or use it in a ``with``, so that the terminal is left clean."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._console: Console | None = None
        self._live: Live | None = None
        self._step = self._steps = 0
        self._loss, self._speed = Smooth(), Smooth()
        self._rate: float | None = None
        self._peak = 0
        self._validation = ""
        # Of this process: steps, and how long they and the validations between them took. The first step is not
        # counted once there are others, as it takes longer.
        self._counted, self._seconds, self._first = 0, 0.0, 0.0
        self._kinds = {
            "resumed": self._resumed,
            "step": self._stepped,
            "log": self._logged,
            "validation": self._validated,
            "saved": self._saved,
            "stopped": self._stopped,
            "finished": lambda event: self.close(),
        }

    def __call__(self, event: Event) -> None:
        """Show an event."""
        self._step, self._steps = event.step, event.steps
        if self._is_terminal and self._live is None and event.kind != "finished":
            self._start()
        self._kinds[event.kind](event)

    def close(self) -> None:
        """Take the bar away. Call it before anything else is printed to stdout."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> TrainingDisplay:
        """Show the bar at once: a first step may take long."""
        if self._is_terminal:
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(stderr=True)
        # Lines that are printed to stderr meanwhile, by anyone, are shown above the bar.
        self._live = Live(
            console=self._console,
            get_renderable=self._draw,
            refresh_per_second=REFRESH,
            transient=True,
            redirect_stdout=False,
        )
        self._live.start()

    def _resumed(self, event: Event) -> None:
        for path in event.figures.get("damaged", ()):
            note(f"{printable(str(path))} is damaged and not used")
        for key, (before, now) in event.figures.get("changed", {}).items():
            note(f"{key} was {before} and is {now} from here on")
        say(f"going on from step {event.step:,}")

    def _stepped(self, event: Event) -> None:
        figures = event.figures
        self._loss.add(figures["loss"])
        self._speed.add(figures["positions"], figures["seconds"])
        self._rate = figures["rate"]
        if not self._first:
            self._first = figures["seconds"]
        else:
            self._counted += 1
            self._seconds += figures["seconds"]

    def _logged(self, event: Event) -> None:
        figures = event.figures
        self._peak = max(self._peak, figures["peak_memory_bytes"], _process_peak())
        if self._live is None:
            shown = _figures(figures["loss"], figures["rate"], figures["tokens_per_second"], self._peak)
            say(" | ".join([self._position, *shown, *self._left]))

    def _validated(self, event: Event) -> None:
        figures = event.figures
        if self._counted:
            self._seconds += figures.get("seconds", 0.0)
        shown = _validation(figures)
        self._validation = f"{shown} at step {event.step:,}"
        answers = f" of {figures['answers']:,} answers" if "answers" in figures else ""
        say(f"step {event.step:,}: {shown}{answers}{' (best)' if figures.get('best') else ''}")

    def _saved(self, event: Event) -> None:
        say(f"step {event.step:,}: saved {printable(Path(event.figures['path']).name)}")

    def _stopped(self, event: Event) -> None:
        best = f"step {event.figures['best_step']:,}, validation loss {event.figures['best_loss']:#.4g}"
        say(f"step {event.step:,}: stopped early; the best was {best}")

    @property
    def _position(self) -> str:
        return f"step {self._step:,}/{self._steps:,}"

    @property
    def _left(self) -> list[str]:
        """How long it will still take, once that is known."""
        per_step = self._seconds / self._counted if self._counted else self._first
        return [f"{_clock(per_step * (self._steps - self._step))} left"] if per_step else []

    def _draw(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.spinner import Spinner
        from rich.table import Table
        from rich.text import Text

        assert self._console is not None
        width = self._console.width
        if not self._steps:
            return Spinner("dots", Text("Starting", no_wrap=True, overflow="crop"))
        ends = [self._position, " ".join([f"{self._step / self._steps:.0%}", *self._left])]
        room = min(width - len("  ".join(ends)), BAR[-1])
        line = Table.grid(padding=(0, 1))
        if room in BAR:
            bar = ProgressBar(self._steps, self._step, room, complete_style="cyan", finished_style="cyan")
            line.add_row(ends[0], bar, ends[1])
        else:
            line.add_row(Text(_fitted(ends, width, " "), no_wrap=True, overflow="crop"))
        below = []
        if self._rate is not None:
            below.append(_fitted(_figures(self._loss.value, self._rate, self._speed.value, self._peak), width, " | "))
        if self._validation:
            below.append(self._validation)
        return Group(line, *(Text(text, no_wrap=True, overflow="ellipsis") for text in below))


def _figures(loss: float, rate: float, tokens_per_second: float, peak: int) -> list[str]:
    shown = [f"loss {loss:#.4g}", f"rate {rate:.1e}", f"{tokens_per_second:,.0f} tok/s"]
    return [*shown, f"peak {size(peak)}"] if peak else shown


def _process_peak() -> int:
    """The most bytes that this process has had, where MLX's arrays are in its memory; else 0."""
    from gm_mlx.bench.child import peak_memory
    from gm_mlx.weights import runs_on_cpu

    return peak_memory() if runs_on_cpu() else 0


def _validation(figures: Mapping[str, Any]) -> str:
    exact = f", exact match {figures['exact_match']:.1%}" if "exact_match" in figures else ""
    return f"validation loss {figures['loss']:#.4g}{exact}"


def _fitted(parts: Sequence[str], width: int, between: str) -> str:
    """As many of the first parts as fit into a line, and one in any case."""
    while len(parts) > 1 and len(between.join(parts)) > width:
        parts = parts[:-1]
    return between.join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
