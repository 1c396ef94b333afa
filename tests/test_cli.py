"""The program itself: help, exit codes, one line for each error, and a manual that names what there is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from gm_mlx import __version__
from gm_mlx.cli import main as cli
from gm_mlx.errors import UserError

ROOT = Path(__file__).parent.parent
HEAVY = ("mlx", "mlx_lm", "numpy", "PIL", "huggingface_hub", "transformers", "rich", "readline", "tokenizers")


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes ``gm-mlx info`` raise what it is called with."""

    def install(error: BaseException) -> None:
        def system_facts() -> None:
            raise error

        monkeypatch.setattr("gm_mlx.cli.info.system_facts", system_facts)

    return install


@pytest.mark.parametrize("arguments", [["--help"], ["chat", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from gm_mlx.cli.main import main; code = main(sys.argv[1:]);"
        f"print('imported:', [name for name in {HEAVY} if name in sys.modules], code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("imported: [] 0\n")
    assert done.stderr == ""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"gm-mlx {__version__}\n"


def test_without_a_command_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert [name for name in ("chat", "info") if f"  {name}  " not in out] == []


def test_arguments_default_to_those_of_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gm-mlx", "--version"])
    assert cli.main() == 0
    assert capsys.readouterr().out == f"gm-mlx {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["paint"], ["paint", "gm-mlx --help"]),
        (["chat", "--colour"], ["--colour", "gm-mlx chat --help"]),
        (["chat", "--top-k", "many"], ["--top-k", "integer"]),
        (["chat", "--kv-bits", "5"], ["--kv-bits", "'5'", "4", "8"]),
        (["chat", "--prompt"], ["--prompt"]),
        (["chat", "--prompt", "Hi", "--max-tokens", "0"], ["max_tokens", "1 or more"]),
        (["info", "gm-tiny", "gm-huge"], ["gm-huge", "gm-mlx info --help"]),
    ],
)
def test_a_wrong_command_line_is_one_line(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(r"gm-mlx: error: .+\n", said.err)
    assert [word for word in words if word not in said.err] == []


def test_what_the_user_can_put_right_is_one_line(
    fails: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    fails(UserError("model.bin: not\n  a model"))
    assert cli.main(["info"]) == 2
    assert capsys.readouterr().err == "gm-mlx: error: model.bin: not a model\n"


def test_an_error_of_ours_is_one_line_that_says_how_to_see_more(
    fails: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    fails(KeyError("layers"))
    assert cli.main(["info"]) == 1
    assert re.fullmatch(r"gm-mlx: unexpected KeyError: 'layers'; .*--debug.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [["--debug", "info"], ["info", "--debug"]])
@pytest.mark.parametrize(("error", "code"), [(UserError("no model"), 2), (KeyError("layers"), 1)])
def test_debug_shows_where_an_error_came_from(
    fails: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    error: Exception,
    code: int,
) -> None:
    fails(error)
    assert cli.main(arguments) == code
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and "system_facts" in "".join(lines)
    assert lines[-1].startswith("gm-mlx: ")


def test_ctrl_c_is_one_line_and_130(fails: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]) -> None:
    fails(KeyboardInterrupt())
    assert cli.main(["info"]) == 130
    assert capsys.readouterr() == ("", "gm-mlx: interrupted\n")


def test_a_reader_that_leaves_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "gm_mlx.cli.main", "chat", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def _commands() -> dict[str, set[str]]:
    """The options of each command, and of the program itself under its name."""
    program = typer.main.get_command(cli.app)
    commands = {program.name or "": program, **program.commands}  # type: ignore[attr-defined]
    return {
        name: {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        for name, command in commands.items()
    }


def test_the_manual_names_every_command_and_option_and_no_other() -> None:
    manual = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## `([^`]+)`\n(.*?)(?=^## |\Z)", manual, re.MULTILINE | re.DOTALL))
    written = {
        name.removeprefix("gm-mlx "): set(re.findall(r"^\| `(--[a-z-]+)", text, re.MULTILINE))
        for name, text in sections.items()
    }
    assert written == _commands()


def test_the_manual_uses_options_that_exist() -> None:
    manual = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    known = {"--help", *(option for options in _commands().values() for option in options)}
    known |= {"--no-scale-image-features", "--no-repack", "--no-grad-checkpoint"}  # the other halves of switches
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", manual)) <= known
