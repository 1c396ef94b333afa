"""The conversation at a terminal: messages, commands with a slash, and Ctrl-C that stops an answer only."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gm_mlx.cli.console import Progress, checked_text, note, one_line, printable, say, stats_line, styled
from gm_mlx.cli.line_input import LineInput
from gm_mlx.cli.transcript import save_transcript, with_paths
from gm_mlx.engine import Sampling, Stats
from gm_mlx.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from gm_mlx.vlm import VLM

HOW_TO_LEAVE = "Ctrl-D or /exit leaves"


class Command(NamedTuple):
    """A command of the conversation: what its help says and what it does with the rest of the line."""

    arguments: str
    help: str
    run: Callable[[Repl, str], None]


class Repl:
    """A conversation with a model, read from a terminal and answered there.

    Args:
        vlm: The model.
        system: The system message, if any.
        sampling: How answers are chosen.
        open_image: Opens an image file for the model.
        progress: The engine's progress callback.
        show_stats: Print a line of counts after each answer.
        read_line: Returns the next message; raises ``EOFError`` at the end and ``KeyboardInterrupt`` on Ctrl-C.
            By default a ``LineInput``.
    """

    def __init__(
        self,
        vlm: VLM,
        system: str | None,
        sampling: Sampling,
        open_image: Callable[[str], Image],
        progress: Progress,
        show_stats: bool = False,
        read_line: Callable[[], str] | None = None,
    ) -> None:
        self._engine = vlm.engine
        self._conversation = vlm.conversation(system)
        self._sampling = sampling
        self._open_image = open_image
        self._progress = progress
        self._show_stats = show_stats
        self._input: AbstractContextManager[Callable[[], str]]
        self._input = LineInput(list(COMMANDS)) if read_line is None else nullcontext(read_line)
        self._attached: list[tuple[str, Image]] = []  # absolute path and image, for the next message
        self._paths: list[str] = []  # of the conversation's images, in order
        self._stats: Stats | None = None
        self._leaves = False

    def run(self, images: Sequence[str] = ()) -> None:
        """Talks until the user leaves.

        Args:
            images: Files to attach to the first message.
        """
        print(styled(f"{self._engine.model} - /help lists commands, {HOW_TO_LEAVE}", "dim", sys.stdout))
        self._tell_notices([])
        if images:
            self._attach(images)
        with self._input as read_line:
            while not self._leaves:
                try:
                    self._handle(read_line())
                except EOFError:
                    print()
                    return
                except KeyboardInterrupt:
                    print()
                    note(HOW_TO_LEAVE)
                except UnicodeDecodeError:
                    say("error: the line is not UTF-8 text; check the terminal's encoding")
                except UserError as error:
                    say(f"error: {one_line(str(error))}")

    def _handle(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if not line:
            return
        if command := COMMANDS.get(name):
            command.run(self, rest.strip())
        elif dropped := _dropped_files(line):
            self._attach(dropped)
        elif line.startswith("/"):
            raise UserError(f"no command {name}; /help lists them")
        else:
            self._ask(checked_text(line, "the message"))

    def _ask(self, question: str) -> None:
        images = [image for _, image in self._attached]
        self._tell_notices(images)
        held, shown, stopped = len(self._conversation.images), "", False
        self._stats = None
        # The conversation keeps what was said when the iterator is closed, so it must be closed here and now.
        with closing(self._conversation.ask(question, images, self._sampling)) as pieces:  # type: ignore[type-var]
            try:
                with self._progress.waiting("encode" if images else "prefill"):
                    for piece in pieces:
                        self._progress.stop()
                        self._stats = piece.stats
                        text = printable(piece.text)
                        print(text, end="", flush=True)
                        shown = text or shown
            except KeyboardInterrupt:
                stopped = True
        if not shown.endswith("\n"):
            print()
        if len(self._conversation.images) > held:
            self._paths += [path for path, _ in self._attached]
            self._attached = []
        if stopped:
            note("stopped" + ("; the images wait for the next message" if self._attached else ""))
        if self._show_stats and self._stats:
            say(styled(stats_line(self._stats), "dim", sys.stderr))

    def _tell_notices(self, images: Sequence[Image]) -> None:
        for line in self._engine.notices(images):
            note(line)

    def _attach(self, paths: Sequence[str]) -> None:
        """Attaches all of the files or, when one of them is no image, none."""
        opened = [(path, self._open_image(path)) for path in map(os.path.abspath, paths)]
        self._attached += opened
        names = [f"{os.path.basename(path)} ({image.width}x{image.height})" for path, image in opened]
        note(f"for the next message: {', '.join(names)}")

    def _image(self, rest: str) -> None:
        if not rest:
            raise UserError("/image needs a file")
        self._attach(_files(rest))

    def _clear(self, rest: str) -> None:
        self._conversation.clear()
        self._attached, self._paths, self._stats = [], [], None
        note("the conversation starts anew")

    def _save(self, rest: str, replace: bool = False) -> None:
        files = _files(rest) if rest else []
        if len(files) != 1:
            raise UserError("/save needs one file, whose name ends in .md or .json")
        if not self._conversation.messages:
            raise UserError("nothing to save: nothing was said")
        messages = with_paths(self._conversation.messages, self._paths)
        save_transcript(Path(files[0]), self._engine.model, messages, replace)
        note(f"saved to {files[0]}")

    def _save_over(self, rest: str) -> None:
        self._save(rest, replace=True)

    def _tell_stats(self, rest: str) -> None:
        if self._stats is None:
            raise UserError("no answer yet to give times of")
        print(stats_line(self._stats))
        prompt, answer = self._stats.prompt_tokens, self._stats.generated_tokens
        print(
            f"prompt {prompt} tokens ({self._stats.cached_tokens} cached) + answer {answer} "
            f"of {self._engine.context_length} | images {len(self._paths)}"
        )

    def _help(self, rest: str) -> None:
        for name, command in COMMANDS.items():
            print(f"{name + ' ' + command.arguments:15}  {command.help}")
        print('Several lines: paste them, or put """ before and after. Tab completes.')
        print(f"Ctrl-C stops an answer, {HOW_TO_LEAVE}.")

    def _exit(self, rest: str) -> None:
        self._leaves = True


COMMANDS = {
    "/image": Command("FILE...", "attach images to the next message, as dropping them here does", Repl._image),
    "/clear": Command("", "forget the conversation", Repl._clear),
    "/save": Command("FILE", "write the conversation to a .md or .json file", Repl._save),
    "/save!": Command("FILE", "the same, over a file that exists", Repl._save_over),
    "/stats": Command("", "times and memory of the last answer", Repl._tell_stats),
    "/help": Command("", "this list", Repl._help),
    "/exit": Command("", "leave", Repl._exit),
}


def _files(text: str) -> list[str]:
    """Returns the files that a line names, quoted or escaped as in a shell.

    A name with blanks that is typed as it is, is taken for one file if there is one.
    """
    whole = os.path.expanduser(text)
    if os.path.exists(whole):
        return [whole]
    try:
        return [os.path.expanduser(word) for word in shlex.split(text)]
    except ValueError as error:
        raise UserError(f"{text}: a quote is not closed") from error


def _dropped_files(line: str) -> list[str]:
    """Returns the files of a line that consists of absolute paths of files, as dropping them on a terminal types it."""
    if line[0] not in "/'\"":
        return []
    try:
        paths = _files(line)
    except UserError:  # ordinary text may have any number of quotes
        return []
    return paths if all(os.path.isabs(path) and os.path.isfile(path) for path in paths) else []
