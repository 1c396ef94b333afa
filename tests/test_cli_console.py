"""What people see: plain lines, colours only where they are wanted, and a bar only for slow waits at a terminal."""

from __future__ import annotations

import io
import sys
import time

import pytest

from gm_mlx.cli import console
from gm_mlx.engine import Stats
from gm_mlx.errors import UserError


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def _terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Puts stderr at a terminal that shows bars at once. Not a fixture: pytest takes stderr back after the set-up."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(console, "DELAY", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return stream


def _wait_for(stream: Terminal, text: str) -> None:
    for _ in range(500):
        if text in stream.getvalue():
            return
        time.sleep(0.02)
    pytest.fail(f"{text!r} is not in {stream.getvalue()!r}")


def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert console.styled("word", "dim", Terminal()) == "\x1b[2mword\x1b[0m"
    assert console.styled("word", "dim", io.StringIO()) == "word"
    monkeypatch.setenv("NO_COLOR", "1")
    assert console.styled("word", "dim", Terminal()) == "word"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert console.styled("word", "dim", Terminal()) == "word"


def test_an_answer_cannot_drive_the_terminal() -> None:
    assert console.printable("a\tb\nc \x1b[2Jd\x07\x9be\r\x7fé\U0001f7e6") == "a\tb\nc [2Jdeé\U0001f7e6"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 KB"),
        (1536, "1.5 KB"),
        (3 << 20, "3 MB"),
        (999 << 20, "999 MB"),
        (1000 << 20, "0.977 GB"),
        (5 << 40, "5120 GB"),
    ],
)
def test_sizes_are_short(num_bytes: int, text: str) -> None:
    assert console.size(num_bytes) == text


def test_the_line_of_rates_is_short_and_complete() -> None:
    stats = Stats(prompt_tokens=90_000, cached_tokens=600, generated_tokens=4096, peak_memory_bytes=123 << 30)
    stats.encode_seconds, stats.prefill_seconds, stats.decode_seconds = 60.5, 60.0, 10.0
    line = console.stats_line(stats)
    assert line == "first token 120.50 s | prefill 1490 tok/s | decode 409.6 tok/s | peak 123 GB"
    assert len(line) < 80
    assert console.stats_line(Stats()) == "first token 0.00 s | prefill 0 tok/s | decode 0.0 tok/s"


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_prompt_is_an_error(text: str) -> None:
    with pytest.raises(UserError, match="--prompt is empty"):
        console.checked_text(text, "--prompt")


def test_a_prompt_that_is_no_text_is_an_error() -> None:
    with pytest.raises(UserError, match="--prompt is not UTF-8"):
        console.checked_text("caf\udce9", "--prompt")  # how Python passes on a byte of another encoding


def test_a_slow_wait_shows_a_bar_that_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _terminal(monkeypatch)
    progress = console.Progress()
    with progress.waiting("load"):
        _wait_for(terminal, "Loading the model")
        progress("load", 30, 40)
        _wait_for(terminal, "75%")
        progress.stop()
        shown = terminal.getvalue()
        progress("load", 40, 40)
    assert terminal.getvalue() == shown
    assert shown.endswith("\x1b[1A\x1b[2K")  # up to the bar's line, and wiped


def test_after_the_images_comes_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _terminal(monkeypatch)
    progress = console.Progress()
    with progress.waiting("encode"):
        _wait_for(terminal, "Looking at the image")
        progress("encode", 1, 1)
        _wait_for(terminal, "Reading the prompt")


def test_a_quick_wait_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _terminal(monkeypatch)
    monkeypatch.setattr(console, "DELAY", 60.0)
    progress = console.Progress()
    with progress.waiting("load"):
        progress("load", 1, 2)
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("place", ["a file", "a dumb terminal"])
def test_bars_are_for_terminals(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream: io.StringIO = _terminal(monkeypatch)
    if place == "a file":
        monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    else:
        monkeypatch.setenv("TERM", "dumb")
    progress = console.Progress()
    with progress.waiting("load"):
        progress("load", 1, 2)
        time.sleep(0.3)
    assert stream.getvalue() == ""
