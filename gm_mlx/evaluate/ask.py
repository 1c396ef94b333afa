"""Puts a benchmark's questions to a model, one after the other.

Not in batches: questions about one image follow each other, and the engine keeps what it has read of the image, so that
the second one costs a few positions of text. A batch would read the image anew for each of them; and every engine
answers this way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from gm_mlx.engine import Engine, Sampling
from gm_mlx.errors import UserError
from gm_mlx.evaluate.answers import AnswersFile
from gm_mlx.evaluate.question import Question
from gm_mlx.images import ImageSource, Mode, load_image, square
from gm_mlx.train.rows import image_key, image_source

if TYPE_CHECKING:
    from PIL.Image import Image


def ask(
    engine: Engine,
    file: AnswersFile,
    *,
    max_tokens: int,
    image_mode: Mode | None = None,
    exif: bool = True,
    skip_bad: bool = False,
    progress: Callable[[int], None] | None = None,
    notice: Callable[[str], None] | None = None,
) -> None:
    """Ask what has no answer yet, and write each answer to the file at once.

    Args:
        engine: the model.
        file: what is asked, and where answers go; begun.
        max_tokens: longest answer.
        image_mode: how images are made square, instead of the model's way.
        exif: see ``Benchmark``.
        skip_bad: note what cannot be asked, and go on.
        progress: told how many questions have been answered.
        notice: told what a user should see.

    Raises:
        UserError: a question cannot be asked, as with a damaged image or a prompt that is too long. It names the row.
    """
    if image_mode is not None and engine.image_config is None:
        raise UserError(f"--image-mode: how {engine.model} reads images cannot be chosen; leave it out")
    opened = partial(_opened, engine, image_mode, exif)
    sampling = Sampling(max_tokens=max_tokens)
    last: tuple[str, Image] | None = None
    while not file.is_complete:
        question = file.next_question
        try:
            images = []
            if question.image is not None:
                if last is None or last[0] != image_key(question.image):
                    last = image_key(question.image), opened(image_source(question.image))
                images = [last[1]]
            for line in engine.notices(images):
                if notice is not None:
                    notice(line)
            text, metadata = _answer(engine, question, images, sampling)
        except UserError as error:
            if not skip_bad:
                raise UserError(f"{question.where}: {error}; leave such questions out with --skip-bad") from None
            text, metadata = "", {"error": str(error)}
        file.add(text, engine.model, metadata)
        if progress is not None:
            progress(len(file.lines))


def _answer(
    engine: Engine, question: Question, images: Sequence[Image], sampling: Sampling
) -> tuple[str, dict[str, Any]]:
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question.text}]
    pieces = list(engine.stream([{"role": "user", "content": content}], images, sampling))
    return "".join(piece.text for piece in pieces).strip(), {"finish_reason": pieces[-1].stats.finish_reason}


def _opened(engine: Engine, mode: Mode | None, exif: bool, source: ImageSource) -> Image:
    """An image as the benchmark wants it. One that is square and as large as the tower reads stays as it is then."""
    image = engine.open_image(source) if exif else load_image(source, exif=False)
    if mode is None or engine.image_config is None:
        return image
    from PIL import Image as PIL

    return PIL.fromarray(square(image, replace(engine.image_config, mode=mode)))
