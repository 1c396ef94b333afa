"""Completion, the history's place and file, and messages of several lines."""

from __future__ import annotations

import builtins
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from gm_mlx.cli import line_input
from gm_mlx.cli.line_input import LineInput, completions, history_file

COMMANDS = ("/image", "/save", "/save!", "/stats")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("two words.png", "two.png", "it's.png", ".hidden.png"):
        (tmp_path / name).touch()
    (tmp_path / "more pictures").mkdir()
    (tmp_path / "more pictures" / "deep down.png").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("/", ["/image ", "/save ", "/save! ", "/stats "]),
        ("/sa", ["/save ", "/save! "]),
        ("/nope", []),
        ("what is tw", []),
        ("/image tw", ["two\\ words.png", "two.png"]),
        ("/image two.png tw", ["two\\ words.png", "two.png"]),
        ("/image two\\ w", ["words.png"]),
        ("/image 'two w", ["words.png'"]),
        ('/image "tw', ['"two words.png"', '"two.png"']),
        ("/image it", ["it\\'s.png"]),
        ("/image .", [".hidden.png"]),
        ("/image more", ["more\\ pictures/"]),
        ("/image 'more", ["'more pictures/"]),
        ("/image more\\ pictures/d", ["pictures/deep\\ down.png"]),
        ("/image ~/two.", ["~/two.png"]),
        ("/image nowhere/t", []),
    ],
)
def test_completions(line: str, found: list[str], folder: Path) -> None:
    assert completions(line, COMMANDS) == found


@pytest.mark.parametrize("typed", ["tw", "more\\ pictures/d", "'more pictures/d", "it", '"it'])
def test_a_completed_path_is_the_path(typed: str, folder: Path) -> None:
    blank = typed.rfind(" ") + 1  # readline puts a completion in place of what follows the last blank
    for found in completions(f"/image {typed}", COMMANDS):
        (path,) = shlex.split(typed[:blank] + found)
        assert (folder / path).exists()


def test_the_history_is_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", "/var/state")
    assert history_file() == Path("/var/state/gm-mlx/history")
    for unset in ("", "relative/path"):  # which the specification tells us to ignore
        monkeypatch.setenv("XDG_STATE_HOME", unset)
        assert history_file() == tmp_path / ".local" / "state" / "gm-mlx" / "history"


def test_a_history_that_cannot_be_kept_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with LineInput(COMMANDS):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def _typed(monkeypatch: pytest.MonkeyPatch, lines: Sequence[str]) -> LineInput:
    left = iter(lines)
    monkeypatch.setattr(builtins, "input", lambda prompt: next(left))
    return LineInput(COMMANDS)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["  What is this?  "], "What is this?"),
        (["pasted\nat once\n"], "pasted\nat once"),
        (['"""one', "", "  two  ", 'three"""'], "one\n\n  two  \nthree"),
        (['"""', "one", '"""'], "one"),
        (['"""one"""'], "one"),
        (['say """this"""'], 'say """this"""'),
    ],
)
def test_messages(lines: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _typed(monkeypatch, lines)() == message


def test_without_readline_it_is_just_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(line_input, "_readline", lambda: None)
    with _typed(monkeypatch, ["Hi"]) as read_line:
        assert read_line() == "Hi"
    assert list(tmp_path.iterdir()) == []
