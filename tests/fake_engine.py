"""An engine without a model: it answers at once, or as slowly as a test wants, and notes what it was asked.

Run as a program, it is ``gm-mlx`` with this engine, at the terminal of its standard input.
"""

from __future__ import annotations

import fcntl
import os
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL.Image import Image

from gm_mlx import vlm
from gm_mlx.cli.main import main
from gm_mlx.engine import GREEDY, Piece, Sampling, Stats
from gm_mlx.errors import UserError
from gm_mlx.images import load_image

TOKENS_PER_IMAGE = 4


class FakeEngine:
    """Answers "N images: " and the question's words, one piece each.

    Attributes:
        asked: messages, image sizes and sampling of each call.
        options: what it was loaded with.
        pending: what ``notices`` returns next.
        before_piece: called before each piece with its number.
    """

    name = "fake"
    context_length = 64

    def __init__(self, model: str | None = None, **options: Any) -> None:
        self.model = model or "gm-tiny"
        self.options = options
        self.progress = options.get("progress") or (lambda phase, done, total: None)
        self.asked: list[tuple[list[Any], list[tuple[int, int]], Sampling]] = []
        self.pending: list[str] = []
        self.before_piece: Callable[[int], None] = lambda number: None
        self.closed = False

    def stream(
        self, messages: Sequence[Any], images: Sequence[Image] = (), sampling: Sampling = GREEDY
    ) -> Iterator[Piece]:
        words = text_of(messages[-1]).split()
        if len(words) > self.context_length:
            raise UserError(f"the prompt has {len(words)} tokens but the model's context is {self.context_length}")
        self.asked.append((list(messages), [image.size for image in images], sampling))
        return self._answer([f"{len(images)} images:", *(f" {word}" for word in words)], len(images))

    def _answer(self, texts: list[str], num_images: int) -> Iterator[Piece]:
        stats = Stats(prompt_tokens=10, image_tokens=num_images * TOKENS_PER_IMAGE, cached_tokens=2)
        stats.encode_seconds, stats.prefill_seconds, stats.decode_seconds = 0.25, 0.5, 2.0
        for number, text in enumerate(texts):
            self.before_piece(number)
            stats.generated_tokens += 1
            yield Piece(text, stats)
        stats.finish_reason, stats.peak_memory_bytes = "stop", 3 << 20
        yield Piece("", stats)

    def open_image(self, source: Any) -> Image:
        return load_image(source)

    def notices(self, images: Sequence[Image] = ()) -> list[str]:
        lines, self.pending = self.pending, []
        return lines

    def close(self) -> None:
        self.closed = True


def text_of(message: Any) -> str:
    """The text of a message, without its image slots."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _at_a_terminal() -> int:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C typed there becomes a signal here

    def open_engine(model: str | None = None, **options: Any) -> FakeEngine:
        if "FAKE_LOAD_SECONDS" in os.environ:
            print("loading now", flush=True)
            time.sleep(float(os.environ["FAKE_LOAD_SECONDS"]))
        engine = FakeEngine(model, **options)
        engine.before_piece = lambda number: time.sleep(float(os.environ.get("FAKE_PIECE_SECONDS", "0")))
        return engine

    vlm.open_engine = open_engine  # type: ignore[assignment]
    return main()


if __name__ == "__main__":
    sys.exit(_at_a_terminal())
