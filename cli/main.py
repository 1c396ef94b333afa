"""The ``gm-mlx`` program: its commands, and how errors become one line and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from gm_mlx import __version__
from gm_mlx.cli.bench import bench
from gm_mlx.cli.chat import chat
from gm_mlx.cli.console import Debug, one_line, say
from gm_mlx.cli.convert import convert
from gm_mlx.cli.evaluate import evaluate
from gm_mlx.cli.fuse import fuse
from gm_mlx.cli.imatrix import imatrix
from gm_mlx.cli.info import info
from gm_mlx.cli.lora import lora
from gm_mlx.cli.quantize import quantize
from gm_mlx.cli.train import train
from gm_mlx.cli.verify import verify
from gm_mlx.errors import UserError

# Older typer raises the installed click's errors, newer typer those of a click of its own: ask for where it has them.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

# Plain help: typer's boxes would import rich, a third of the time that --help takes.
app = typer.Typer(
    name="gm-mlx",
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"gm-mlx {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def gm_mlx(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Ask questions about pictures, on your own machine."""
    if context.invoked_subcommand is None:
        print(context.get_help())


app.command()(bench)
app.command()(chat)
app.command()(convert)
app.command()(evaluate)
app.command()(fuse)
app.command()(imatrix)
app.command()(info)
app.command()(lora)
app.command()(quantize)
app.command()(train)
app.command()(verify)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line.

    Args:
        argv: The arguments after the program's name; ``sys.argv`` if None.

    Returns:
        The exit code: 0, 2 for what the user can put right, 130 after Ctrl-C, 1 for everything else and where
        ``verify`` finds a difference.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Read here and not from the parser, which may be what fails; the parser knows the option only to accept it.
    debug = "--debug" in arguments
    command = typer.main.get_command(app)
    try:
        with command.make_context("gm-mlx", arguments) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as leave:
        return leave.exit_code
    except UsageError as error:
        return _failed(f"error: {_usage(error)}", 2, debug)
    except UserError as error:
        return _failed(f"error: {error}", 2, debug)
    except KeyboardInterrupt:
        return _failed("interrupted", 130, debug)
    except BrokenPipeError:
        # The reader of our output has left (`| head`). Python would complain when it flushes stdout at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        name = type(error).__name__
        return _failed(f"unexpected {name}: {error}; run again with --debug to see where it came from", 1, debug)
    return 0


def _failed(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    say(f"gm-mlx: {one_line(message)}")
    return code


def _usage(error: Exception) -> str:
    """Returns a parser's message with the command whose help explains it."""
    context = getattr(error, "ctx", None)
    message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
    return f"{message}; see {context.command_path if context else 'gm-mlx'} --help"


if __name__ == "__main__":
    sys.exit(main())
