"""A conversation as llama.cpp reads it: token ids and images in order, with keys to recognize what was read before.

Files that gm-mlx wrote carry their processor, so a prompt has the same ids here as on MLX, and images are made square
by gm-mlx. Other files bring a chat template (``gm_mlx.llama.template``), and mtmd knows what their images need.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Protocol

from PIL.Image import Image

from gm_mlx.chat_template import Message
from gm_mlx.errors import UserError
from gm_mlx.gguf_file import GGUFHeader
from gm_mlx.images import ImageSource, image_hash, load_image
from gm_mlx.llama.template import JinjaTemplate
from gm_mlx.llama.vision import Picture, Text, Vision
from gm_mlx.llama.vocab import Vocabulary
from gm_mlx.prefix import Key
from gm_mlx.processor import Processor, StopMatcher

PROCESSOR = "gm.processor"
AGAIN = "convert the model again"


@dataclass
class Prompt:
    """A tokenized conversation.

    Attributes:
        parts: token ids and pictures, in order.
        hashes: one per image.
        keys: one per row, for ``gm_mlx.prefix``: the token's id, or the picture's hash and the row's number in it.
    """

    parts: list[list[int] | Picture]
    hashes: list[str]

    def __post_init__(self) -> None:
        self.keys: list[Key] = []
        for part in self.parts:
            if isinstance(part, Picture):
                name = f"{self.hashes[part.image]}/{part.number}"
                self.keys += [(name, row) for row in range(part.rows)]
            else:
                self.keys += part

    @property
    def image_rows(self) -> int:
        """Rows that stand for images."""
        return sum(part.rows for part in self.parts if isinstance(part, Picture))

    @property
    def ids(self) -> list[int]:
        """Ids of its text."""
        return [token for part in self.parts if not isinstance(part, Picture) for token in part]

    def position(self, row: int) -> int:
        """The position of a row. They differ behind images that take fewer positions than rows; none lies in one."""
        position = 0
        for part in self.parts:
            if row <= 0:
                break
            if isinstance(part, Picture):
                row, position = row - part.rows, position + part.positions
            else:
                position += min(row, len(part))
                row -= len(part)
        return position


class Answer(Protocol):
    """Turns generated ids into text; see ``gm_mlx.processor.AnswerStream``."""

    def add(self, token: int) -> tuple[str, bool]: ...

    def finish(self) -> str: ...


class OurPrompts:
    """Prompts for a file that gm-mlx wrote.

    Args:
        header: the text model's file.
        vocabulary: its tokens.
    """

    def __init__(self, header: GGUFHeader, vocabulary: Vocabulary) -> None:
        try:
            self.processor = Processor.from_dict(json.loads(header.metadata[PROCESSOR]), vocabulary.tokenizer())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{header.path}: {PROCESSOR} is not JSON ({error}); {AGAIN}") from None
        except UserError as error:
            raise UserError(f"{header.path}: {PROCESSOR}: {error}") from None
        self.notice: str | None = None

    def build(self, messages: Sequence[Message], images: Sequence[Image], vision: Vision | None) -> Prompt:
        """Tokenize a conversation; raises ``UserError`` where slots and images differ in number."""
        return self.from_ids(self.processor.encode(messages, len(images)).ids, images, vision)

    def from_ids(self, ids: Sequence[int], images: Sequence[Image], vision: Vision | None) -> Prompt:
        """A prompt of token ids, in which each image slot is a run of the image token's id."""
        processor = self.processor
        side = processor.image.size if processor.image else 0
        parts: list[list[int] | Picture] = []
        number = 0
        for is_image, run in groupby(ids, key=lambda token: token == processor.image_token_id):
            if not is_image:
                parts.append(list(run))
                continue
            for _ in range(len(list(run)) // processor.tokens_per_image):
                assert vision is not None
                chunks = vision.chunks([images[number]], side)
                picture = next(part for part in chunks.parts() if isinstance(part, Picture))
                if picture.rows != processor.tokens_per_image:
                    raise UserError(
                        f"the mmproj file makes {picture.rows} tokens of an image and the model expects "
                        f"{processor.tokens_per_image}; name the mmproj file that came with the model"
                    )
                parts.append(replace(picture, image=number))
                number += 1
        return Prompt(parts, [image_hash(image) for image in images])

    def answer(self) -> Answer:
        """A fresh filter from generated ids to an answer's text."""
        return self.processor.answer_stream()

    def banned(self) -> list[int]:
        """Ids that are never generated."""
        return [self.processor.image_token_id]

    def open_image(self, source: ImageSource) -> Image:
        """Open an image as the model wants it."""
        return self.processor.open_image(source)


class ForeignPrompts:
    """Prompts for any other file, by its own chat template.

    Args:
        header: the text model's file.
        vocabulary: its tokens.
    """

    def __init__(self, header: GGUFHeader, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._template = JinjaTemplate.from_header(header, vocabulary)
        self.notice = self._template.notice

    def build(self, messages: Sequence[Message], images: Sequence[Image], vision: Vision | None) -> Prompt:
        """Tokenize a conversation; raises ``UserError`` where slots and images differ in number."""
        vocabulary = self._vocabulary
        parts = self._template.render(messages, len(images))
        first = parts[0].text if parts and isinstance(parts[0], Text) else ""
        start = (
            [vocabulary.bos] if vocabulary.adds_bos and not first.startswith(vocabulary.name_of(vocabulary.bos)) else []
        )
        if vision is None:
            texts = [vocabulary.encode(part.text, special=part.special) for part in parts if isinstance(part, Text)]
            return Prompt(_joined([start, *texts]), [])
        mixed = [part if isinstance(part, Text) else images[part] for part in parts]
        order = [part for part in parts if not isinstance(part, Text)]
        # mtmd numbers images as they come in the prompt, which a template may change.
        found = [
            replace(part, image=order[part.image]) if isinstance(part, Picture) else part
            for part in vision.chunks(mixed).parts()
        ]
        return Prompt(_joined([start, *found]), [image_hash(image) for image in images])

    def answer(self) -> Answer:
        """A fresh filter from generated ids to an answer's text."""
        return ForeignAnswer(self._vocabulary, self._template.stop_strings)

    def banned(self) -> list[int]:
        """Ids that are never generated."""
        return []

    def open_image(self, source: ImageSource) -> Image:
        """Open an image, upright."""
        return load_image(source)


class ForeignAnswer:
    """Text of generated ids up to a token that ends answers, or a string that does."""

    def __init__(self, vocabulary: Vocabulary, stop_strings: Sequence[str]) -> None:
        import codecs

        self._vocabulary = vocabulary
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = StopMatcher(stop_strings)
        self._begun = False

    def add(self, token: int) -> tuple[str, bool]:
        """Take the next id; returns the new text and whether the answer has ended."""
        if self._vocabulary.ends_answer(token):
            return self.finish(), True
        return self._shown(self._utf8.decode(self._vocabulary.bytes_of(token)))

    def finish(self) -> str:
        """End the answer; returns the text held back so far."""
        text, stopped = self._shown(self._utf8.decode(b"", final=True))
        return text if stopped else text + self._stop.flush()

    def _shown(self, text: str) -> tuple[str, bool]:
        # An answer does not begin with the space that tokenizers put in front of its first word.
        text, self._begun = (text if self._begun else text.removeprefix(" ")), self._begun or bool(text)
        return self._stop.push(text)


def _joined(parts: Sequence[Any]) -> list[list[int] | Picture]:
    """Parts without empty texts and with neighbouring texts as one."""

    def runs() -> Iterator[list[int] | Picture]:
        for is_text, run in groupby(parts, key=lambda part: isinstance(part, list)):
            if not is_text:
                yield from run
            elif ids := [token for part in run for token in part]:
                yield ids

    return list(runs())
