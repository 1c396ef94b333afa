"""``gm-mlx chat`` at a real pseudo-terminal: keys, signals and the history file."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image


class Session:
    """``gm-mlx chat`` with the fake engine at a pseudo-terminal."""

    def __init__(self, arguments: list[str], **environment: str) -> None:
        self.terminal, other = pty.openpty()
        self.shown = ""
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "fake_engine.py"), "chat", *arguments],
            stdin=other,
            stdout=other,
            stderr=other,
            env={**os.environ, "TERM": "xterm", "NO_COLOR": "1", "COLUMNS": "80", **environment},
            start_new_session=True,
        )
        os.close(other)

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def wait_for(self, text: str) -> None:
        """Reads until a text is shown; what was read up to there is not looked at again."""
        end = time.monotonic() + 120
        while text not in self.shown:
            readable, _, _ = select.select([self.terminal], [], [], max(0.0, end - time.monotonic()))
            try:
                content = os.read(self.terminal, 4096) if readable else b""
            except OSError:  # Linux's way to say that the other end is closed
                content = b""
            if not content:
                pytest.fail(f"{text!r} was not shown after {self.shown!r}")
            self.shown += content.decode(errors="replace")
        self.shown = self.shown.split(text, 1)[1]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self.terminal)


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Session]]:
    """Starts sessions in an empty folder, and ends them."""
    sessions: list[Session] = []
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")

    def start(*arguments: str, **environment: str) -> Session:
        sessions.append(Session(list(arguments), XDG_STATE_HOME=str(tmp_path / "state"), **environment))
        return sessions[-1]

    yield start
    for each in sessions:
        each.close()


def test_a_session_at_a_terminal(session: Callable[..., Session], tmp_path: Path) -> None:
    Image.new("RGB", (8, 6)).save(tmp_path / "picture.png")
    talk = session(FAKE_PIECE_SECONDS="0.5")
    talk.wait_for(">>> ")
    talk.type("one " * 60 + "\r")
    talk.wait_for("0 images: one one")
    talk.type("\x03")  # Ctrl-C while the answer streams
    talk.wait_for("note: stopped")
    talk.wait_for(">>> ")
    talk.type("\x03")  # and once more, where there is nothing to stop
    talk.wait_for("note: Ctrl-D or /exit leaves")
    talk.wait_for(">>> ")
    talk.type(f"/im\t{tmp_path}/pic\t\r")  # both words are completed
    talk.wait_for("note: for the next message: picture.png (8x6)")
    talk.wait_for(">>> ")
    talk.type('"""first line\r')
    talk.wait_for("... ")
    talk.type('second line"""\r')
    talk.wait_for("1 images: first line second line")
    talk.wait_for(">>> ")
    talk.type("\x04")  # Ctrl-D
    assert talk.process.wait(120) == 0
    history = tmp_path / "state" / "gm-mlx" / "history"
    assert history.stat().st_mode & 0o777 == 0o600
    assert "second line" in history.read_text()
    assert os.listdir() == []


def test_ctrl_c_while_the_model_loads(session: Callable[..., Session], tmp_path: Path) -> None:
    talk = session(FAKE_LOAD_SECONDS="60")
    talk.wait_for("loading now")
    talk.type("\x03")
    talk.wait_for("gm-mlx: interrupted\r\n")
    assert talk.process.wait(120) == 130
    assert "Traceback" not in talk.shown
    assert os.listdir() == [] and not (tmp_path / "state").exists()
