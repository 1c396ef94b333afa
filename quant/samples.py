"""What to calibrate with: prompts with images, from a folder, from a file, or the built-in ones."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from gm_mlx.errors import UserError
from gm_mlx.images import FORMATS, load_image
from gm_mlx.processor import Processor
from gm_mlx.quant.drawings import draw

LARGEST_SIDE = 1024  # of a sample's image: no tower reads more, and hundreds of photographs would fill the memory
TEXT_ONLY = 8  # of the built-in samples, every eighth has no image

QUESTIONS = (
    "What is in the picture?",
    "What colour is the largest object?",
    "Is there a person in this image? Answer yes or no.",
    "How many objects can you count?",
    "Describe the image in one sentence.",
    "What is on the left of the picture?",
    "Is the background light or dark?",
    "Which shape stands in the middle?",
    "What does the text say?",
    "Was this photo taken indoors or outdoors?",
    "What stands out, and why? Explain in a few sentences.",
    "Are there more red things than blue ones? Answer with a single word.",
    "What could be the purpose of the thing at the bottom?",
)
TEXTS = (
    "Write a short note to a friend who moves to another town.",
    "What is the difference between a lake and a river?",
    "List three things to check before a long journey by car, with a reason for each.",
    "If a train leaves at 9:40 and takes 2 hours and 35 minutes, when does it arrive?",
    "Explain to a child why the sky is blue.",
)


@dataclass(frozen=True)
class Sample:
    """One prompt to calibrate with, and the RGB images that it is about."""

    prompt: str
    images: list[Image.Image] = field(default_factory=list)


def load_samples(path: Path | None, limit: int) -> list[Sample]:
    """Samples from a folder of images, from a file of prompts, or the built-in ones.

    Args:
        path: a folder: its images, evenly spread over their names, each with one of ``QUESTIONS``. A ``.jsonl`` file:
            its first lines ``{"prompt": text, "image": file or list of files or null}``, with files named from the
            file's own folder; other keys are left alone. None: drawings and questions, the same everywhere.
        limit: most samples to take.

    Raises:
        UserError: there is nothing at ``path``, or a line or an image cannot be read; the line is named.
    """
    if limit < 1:
        raise UserError(f"--samples {limit}: must be at least 1")
    if path is None:
        return [_built_in(index) for index in range(limit)]
    path = Path(path)
    try:
        if path.is_dir():
            return _from_folder(path, limit)
        if not path.is_file():
            raise UserError(f"{path}: no such file or folder; name a folder of images or a .jsonl file of prompts")
        if path.suffix.lower() != ".jsonl":
            raise UserError(f"{path}: neither a folder of images nor a .jsonl file of prompts")
        return _from_lines(path, limit)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def encode(processor: Processor, sample: Sample) -> tuple[np.ndarray, mx.array | None]:
    """A sample as the model reads it.

    Returns:
        Token ids int32 [1, L], with an answer opened at their end, and pixels float32 [N, size, size, 3], or None for
        a sample without images.

    Raises:
        UserError: the sample has images and the model reads text only.
    """
    prompt = processor.encode([{"role": "user", "content": sample.prompt}], len(sample.images))
    ids = np.array([prompt.ids], np.int32)
    return ids, mx.array(processor.pixels(sample.images)) if sample.images else None


def _built_in(index: int) -> Sample:
    if index % TEXT_ONLY == TEXT_ONLY - 1:
        return Sample(TEXTS[index // TEXT_ONLY % len(TEXTS)])
    return Sample(QUESTIONS[index % len(QUESTIONS)], [draw(index)])


def _from_folder(folder: Path, limit: int) -> list[Sample]:
    Image.init()
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in suffixes and file.is_file())
    if not files:
        raise UserError(f"{folder}: has no images; name a folder with JPEG or PNG files, or a .jsonl file of prompts")
    count = min(limit, len(files))
    spread = [files[index * len(files) // count] for index in range(count)]
    return [Sample(QUESTIONS[i % len(QUESTIONS)], [_open(file)]) for i, file in enumerate(spread)]


def _from_lines(path: Path, limit: int) -> list[Sample]:
    samples: list[Sample] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if len(samples) == limit:
                break
            if not line.strip():
                continue
            try:
                samples.append(_from_line(line.removeprefix(b"\xef\xbb\xbf"), path.parent))
            except UserError as error:
                raise UserError(f"{path} line {number}: {error}") from None
    if not samples:
        raise UserError(f"{path}: has no lines; each must be like {EXAMPLE}")
    return samples


EXAMPLE = '{"image": "cat.jpg", "prompt": "What is this?"}'


def _from_line(line: bytes, folder: Path) -> Sample:
    try:
        values = json.loads(line.decode())
    except (ValueError, RecursionError):
        raise UserError(f"not JSON; it must be like {EXAMPLE}") from None
    if not isinstance(values, dict) or not {"image", "prompt"} <= set(values):
        raise UserError(f'needs "prompt" and "image" (null for none), like {EXAMPLE}')
    prompt, images = values["prompt"], values["image"]
    if not isinstance(prompt, str) or not prompt.strip() or not _is_text(prompt):
        raise UserError('"prompt" must be a text that is not empty')
    files = [] if images is None else images if isinstance(images, list) else [images]
    if not all(isinstance(file, str) and file.splitlines() == [file] for file in files):  # one line, not empty
        raise UserError('"image" must be the name of a file, a list of names, or null')
    return Sample(prompt, [_open(folder / file) for file in files])


def _is_text(text: str) -> bool:
    """Whether the text can be encoded; JSON may hold half of a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _open(file: Path) -> Image.Image:
    image = load_image(file)
    if max(image.size) > LARGEST_SIDE:
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return image
