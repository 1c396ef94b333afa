"""How training is shown: plain lines where there is no terminal, and a live bar at a pseudo-terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gm_mlx.cli import training_display
from gm_mlx.cli.training_display import TrainingDisplay, _clock, _fitted
from gm_mlx.train.events import Event

STEPS = 2000


def step(number: int, **figures: Any) -> Event:
    common = {"loss": 2.0, "rate": 2e-4, "gradient_norm": 1.0, "learnt": 50, "positions": 800, "seconds": 2.0}
    return Event("step", number, STEPS, {**common, **figures})


def log(number: int, **figures: Any) -> Event:
    common = {"loss": 0.5, "rate": 2e-4, "tokens_per_second": 1234.5, "peak_memory_bytes": 3 << 30}
    return Event("log", number, STEPS, {**common, **figures})


def validation(number: int, **figures: Any) -> Event:
    return Event("validation", number, STEPS, {"loss": 0.25, "rows": 9, "best": True, "seconds": 5.0, **figures})


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What a display prints of some events."""
    monkeypatch.setattr(training_display, "_process_peak", lambda: 0)

    def printed(*events: Event) -> list[str]:
        with TrainingDisplay() as display:
            for event in events:
                display(event)
        captured = capsys.readouterr()
        assert not captured.out  # it is for answers
        return captured.err.splitlines()

    return printed


def test_one_line_per_log_where_there_is_no_terminal(lines: Callable[..., list[str]]) -> None:
    assert lines(step(1, seconds=30.0), step(2), step(3), log(3), step(4), log(4, loss=0.125)) == [
        "step 3/2,000 | loss 0.5000 | rate 2.0e-04 | 1,234 tok/s | peak 3 GB | 1:06:34 left",
        "step 4/2,000 | loss 0.1250 | rate 2.0e-04 | 1,234 tok/s | peak 3 GB | 1:06:32 left",
    ]


def test_the_time_left_counts_validations_and_not_the_first_step(lines: Callable[..., list[str]]) -> None:
    (first,) = lines(step(1, seconds=30.0), log(1))
    assert first.endswith("| 16:39:30 left")  # there is nothing else to go by
    *_, last = lines(step(1, seconds=30.0), step(2), validation(2, seconds=6.0), step(3), log(3))
    assert last.endswith("| 2:46:25 left")  # 5 seconds per step
    *_, resumed = lines(Event("resumed", 1990, STEPS, {}), step(1991), step(1992), log(1992))
    assert resumed.endswith("| 0:16 left")


def test_what_else_happens_is_a_line(lines: Callable[..., list[str]]) -> None:
    found = lines(
        Event("resumed", 100, STEPS, {"damaged": ["step-\x1b000150"], "changed": {"learning_rate": (2e-4, 1e-4)}}),
        validation(200),
        validation(300, loss=0.52026, exact_match=0.7123, answers=1200, best=False),
        Event("saved", 300, STEPS, {"path": "/run/step-000300.safetensors"}),
        Event("stopped", 300, STEPS, {"best_step": 200, "best_loss": 0.25}),
        Event("finished", 300, STEPS, {"loss": 0.5, "best_step": 200, "best_loss": 0.25}),
    )
    assert found == [
        "note: step-000150 is damaged and not used",
        "note: learning_rate was 0.0002 and is 0.0001 from here on",
        "going on from step 100",
        "step 200: validation loss 0.2500 (best)",
        "step 300: validation loss 0.5203, exact match 71.2% of 1,200 answers",
        "step 300: saved step-000300.safetensors",
        "step 300: stopped early; the best was step 200, validation loss 0.2500",
    ]


def test_on_a_cpu_the_peak_is_that_of_the_process() -> None:
    assert training_display._process_peak() > 1 << 20


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (3599.5, "1:00:00"), (360_000, "100:00:00")]
)
def test_clock(seconds: float, shown: str) -> None:
    assert _clock(seconds) == shown


def test_what_does_not_fit_is_left_out_from_the_end() -> None:
    parts = ["one", "two", "three"]
    assert [_fitted(parts, width, " | ") for width in (17, 16, 9, 8, 1)] == [
        "one | two | three",
        "one | two",
        "one | two",
        "one",
        "one",
    ]


# --- at a terminal ---

# Reads numbers of events from stdin, and shows these.
CHILD = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_cli_training_display import EVENTS, TrainingDisplay, training_display
training_display._process_peak = lambda: 0
with TrainingDisplay() as display:
    for line in sys.stdin:
        display(EVENTS[int(line)])
print("all is done", file=sys.stderr)
"""
EVENTS = [
    step(1),
    step(1000),
    log(1000),
    validation(1000, exact_match=0.5, answers=10, seconds=0.0),
    Event("saved", 1000, STEPS, {"path": "/run/step-001000.safetensors"}),
    step(1001),
    Event("finished", 1001, STEPS, {}),
]
BAR, VALIDATION, SAVED = (
    "━",
    "step 1,000: validation loss 0.2500, exact match 50.0% of 10 answers (best)",
    "step 1,000: saved step-001000.safetensors",
)


class Terminal:
    """A training at a pseudo-terminal, and what its screen shows: enough of a terminal for what rich writes."""

    def __init__(self, columns: int = 80, **environment: str) -> None:
        self._end, other = pty.openpty()
        self.raw = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=other,
            env={
                **{name: value for name, value in os.environ.items() if name != "NO_COLOR"},
                "TERM": "xterm",
                "COLUMNS": str(columns),
                "LINES": "24",
                "PYTHONIOENCODING": "utf-8",
                **environment,
            },
            start_new_session=True,
        )
        os.close(other)

    def show(self, *numbers: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("".join(f"{number}\n" for number in numbers).encode())
        self.process.stdin.flush()

    def wait_for(self, text: str) -> None:
        """Reads until the screen shows a text."""
        end = time.monotonic() + 120
        while text not in "\n".join(self.screen):
            if not self._read(max(0.0, end - time.monotonic())):
                pytest.fail(f"{text!r} was not shown, but {self.screen[-9:]}")

    def leave(self) -> int:
        """Ends the input, reads what is left; returns the exit code."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        while self._read(120):
            pass
        return self.process.wait(120)

    @property
    def screen(self) -> list[str]:
        rows, row, column = [""], 0, 0
        for control, letter, text in re.findall(r"\x1b\[([?\d;]*)([A-Za-z])|([^\x1b])", self.raw):
            if letter == "A":
                row = max(0, row - int(control or 1))
            elif letter == "K":
                rows[row] = ""
            elif text == "\r":
                column = 0
            elif text == "\n":
                row += 1
                rows += [""] * (row + 1 - len(rows))
            elif text:
                rows[row] = rows[row].ljust(column)[:column] + text + rows[row][column + 1 :]
                column += 1
        return [line.rstrip() for line in rows]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)

    def _read(self, seconds: float) -> bool:
        readable, _, _ = select.select([self._end], [], [], seconds)
        try:
            content = os.read(self._end, 1 << 16) if readable else b""
        except OSError:  # Linux's way to say that the other end is closed
            content = b""
        self.raw += content.decode(errors="replace")
        return bool(content)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """Starts terminals, and ends them."""
    terminals: list[Terminal] = []

    def start(*arguments: Any, **environment: str) -> Terminal:
        terminals.append(Terminal(*arguments, **environment))
        return terminals[-1]

    yield start
    for each in terminals:
        each.close()


def test_a_bar_at_a_terminal(terminal: Callable[..., Terminal]) -> None:
    shown = terminal()
    shown.wait_for("Starting")
    shown.show(0, 1, 2)
    shown.wait_for("loss 2.000 | rate 2.0e-04 | 400 tok/s | peak 3 GB")
    assert [line for line in shown.screen if line.startswith("step")] == [
        f"step 1,000/2,000 {BAR * 20}{'╺'}{BAR * 19} 50% 33:20 left"
    ]
    shown.show(3, 4, 5)
    shown.wait_for("step 1,001/2,000")
    shown.wait_for("at step 1,000")
    above, bar, figures, below = [line for line in shown.screen if line][-4:]
    assert shown.screen[:2] == [VALIDATION, SAVED] and above == SAVED
    assert bar.startswith("step 1,001/2,000 ━") and figures.startswith("loss 2.000")
    assert below == "validation loss 0.2500, exact match 50.0% at step 1,000"
    assert "\x1b[36m" in shown.raw and "\x1b[?25l" in shown.raw  # colours; and the cursor is hidden
    shown.show(6)
    assert shown.leave() == 0
    # Nothing is left of the bar, and the cursor is there again.
    assert [line for line in shown.screen if line] == [VALIDATION, SAVED, "all is done"]
    assert shown.raw.rindex("\x1b[?25h") > shown.raw.rindex("\x1b[?25l")


def test_ctrl_c_leaves_the_terminal_clean(terminal: Callable[..., Terminal]) -> None:
    shown = terminal()
    shown.show(0, 1, 2, 3)
    shown.wait_for("peak 3 GB")
    shown.process.send_signal(signal.SIGINT)
    assert shown.leave() == -signal.SIGINT
    left = [line for line in shown.screen if line]
    assert left[0] == VALIDATION and left[1].startswith("Traceback")  # of the child, which is no program of ours
    assert not any(BAR in line or "tok/s" in line for line in left)
    assert shown.raw.rindex("\x1b[?25h") > shown.raw.rindex("\x1b[?25l")


@pytest.mark.parametrize(
    ("columns", "bar", "figures"),
    [
        (50, f"step 1,001/2,000 {BAR * 8}", "loss 2.000 | rate 2.0e-04 | 400 tok/s | peak 3 GB"),
        (34, "step 1,001/2,000 50% 33:18 left", "loss 2.000 | rate 2.0e-04"),
        (12, "step 1,001/2", "loss 2.000"),
    ],
)
def test_narrow_terminals(terminal: Callable[..., Terminal], columns: int, bar: str, figures: str) -> None:
    shown = terminal(columns)
    shown.show(0, 1, 2, 3, 5)
    shown.wait_for("step 1,001/2")
    shown.wait_for(f"{figures}\nvalidation ")  # the last line of what is drawn at a time
    last = [line for line in shown.screen if line][-3:]
    assert last[0].startswith(bar) and last[1] == figures
    assert max(map(len, shown.screen)) <= columns


def test_no_colour_where_it_is_not_wanted(terminal: Callable[..., Terminal]) -> None:
    shown = terminal(NO_COLOR="1")
    shown.show(0, 1, 2)
    shown.wait_for("tok/s")
    assert shown.leave() == 0
    assert not re.search(r"\x1b\[[\d;]*m", shown.raw)


def test_a_dumb_terminal_gets_plain_lines(terminal: Callable[..., Terminal]) -> None:
    shown = terminal(TERM="dumb")
    shown.show(*range(len(EVENTS)))
    assert shown.leave() == 0
    assert "\x1b" not in shown.raw
    assert [line for line in shown.screen if line] == [
        "step 1,000/2,000 | loss 0.5000 | rate 2.0e-04 | 1,234 tok/s | peak 3 GB | 33:20 left",
        VALIDATION,
        SAVED,
        "all is done",
    ]


def test_rich_is_not_loaded_for_nothing() -> None:
    code = "import sys, gm_mlx.cli.training_display, gm_mlx.cli.main; print({'rich', 'mlx'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
