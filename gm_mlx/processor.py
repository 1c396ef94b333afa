"""Between a user's message with image files and what a model reads: pixels, and token ids with image slots.

One image slot is ``tokens_per_image`` copies of ``image_token_id``, which the model replaces by image features. Answers
are tokenized apart from the prompt, so the ids of a conversation up to a user's turn are a prefix of the ids of every
longer conversation: a KV cache can be kept from turn to turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gm_mlx.chat_template import BOS, EOS, ChatTemplate, Message, Segment, render, to_jinja
from gm_mlx.errors import UserError
from gm_mlx.images import ImageConfig, ImageSource, load_image, preprocess
from gm_mlx.tokenizer import Detokenizer, Tokenizer, load_tokenizer

CONFIG_FILE = "processor_config.json"
JINJA_FILE = "chat_template.jinja"


@dataclass(frozen=True)
class Prompt:
    """A tokenized conversation.

    Attributes:
        ids: Token ids; every image slot is already ``tokens_per_image`` ids long.
        num_images: How many images the slots are for, in order.
    """

    ids: list[int]
    num_images: int


@dataclass
class Processor:
    """What a model folder says about its input, and the work it describes.

    Attributes:
        tokenizer: The tokenizer.
        template: The chat template.
        image: How an image becomes pixels, or None for a model that reads text only.
        image_token_id: The id that fills image slots. It may lie outside of the vocabulary (LLaVA's -200), and it must
            not be an id that text can produce.
        tokens_per_image: How many ids an image slot takes.
        stop_ids: Ids that end an answer. The tokenizer's EOS and the template's end of answer are always among them.
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    image: ImageConfig | None
    image_token_id: int
    tokens_per_image: int
    stop_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        names = {name: self.tokenizer.id_of(name) for name in self.template.controls}
        if self.template.bos:
            names[BOS] = self.tokenizer.bos_id
        if EOS in self.template.answer_end:
            names[EOS] = self.tokenizer.eos_id
        for name, token in names.items():
            if token is None:
                raise UserError(
                    f"chat_template '{self.template.name}': the tokenizer has no token {name}; take the template that "
                    "the model was trained with"
                )
        self._controls = {name: token for name, token in names.items() if token is not None}
        self._cut = re.compile("|".join(re.escape(name) for name in sorted(self._controls, key=len, reverse=True)))
        if self.tokenizer.piece_of(self.image_token_id) and not self.tokenizer.is_special(self.image_token_id):
            raise UserError(
                f"{CONFIG_FILE}: image_token_index {self.image_token_id} is the ordinary text token "
                f"{self.tokenizer.piece_of(self.image_token_id)!r}; use an id that text cannot produce, such as -200"
            )
        if (self.image is None) != (self.tokens_per_image < 1):
            raise UserError(f"{CONFIG_FILE}: tokens_per_image must be at least 1 with 'image' and 0 without it")
        ends = {token for name, token in self._controls.items() if name in self.template.answer_end}
        eos = set() if self.tokenizer.eos_id is None else {self.tokenizer.eos_id}
        self.stop_ids = frozenset(self.stop_ids | ends | eos)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Processor:
        """Reads ``processor_config.json`` and the tokenizer of a model folder.

        Raises:
            UserError: A file is missing, or a key is missing, unknown or of the wrong type.
        """
        path = Path(folder) / CONFIG_FILE
        try:
            parts = _parts(json.loads(path.read_bytes()))
        except FileNotFoundError as error:
            raise UserError(f"{path}: no such file, so no gm-mlx model folder; convert the model first") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not readable as JSON ({error}); convert or download the model again") from error
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        return cls(tokenizer=load_tokenizer(folder, controls=parts["template"].controls), **parts)

    @classmethod
    def from_dict(cls, config: object, tokenizer: Tokenizer) -> Processor:
        """Builds a processor from the contents of ``processor_config.json``, as ``to_dict`` returns them.

        Raises:
            UserError: A key is missing, unknown or of the wrong type.
        """
        return cls(tokenizer=tokenizer, **_parts(config))

    def with_template(self, template: ChatTemplate) -> Processor:
        """Returns the same processor with another chat template: only what that ends an answer with shall end it.

        Raises:
            UserError: The tokenizer lacks the template's control tokens. BOS is left out where it has none.
        """
        if self.tokenizer.bos_id is None:
            template = replace(template, bos=False)
        return replace(self, template=template, stop_ids=frozenset())

    def save(self, folder: str | Path) -> None:
        """Writes ``processor_config.json``, ``chat_template.jinja`` and the tokenizer's files; makes the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(
            json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        (folder / JINJA_FILE).write_text(to_jinja(self.template), encoding="utf-8")
        self.tokenizer.save(folder)

    def to_dict(self) -> dict[str, Any]:
        """Returns the contents of ``processor_config.json``; the tokenizer is not in it."""
        return {
            "image": None if self.image is None else self.image.to_dict(),
            "image_token_index": self.image_token_id,
            "tokens_per_image": self.tokens_per_image,
            "stop_token_ids": sorted(self.stop_ids),
            "chat_template": self.template.to_dict(),
        }

    def encode(self, messages: Sequence[Message], num_images: int = 0, add_generation_prompt: bool = True) -> Prompt:
        """Tokenizes a conversation.

        Args:
            messages: The conversation; see ``chat_template.render`` for its form and for where images go.
            num_images: How many images the conversation comes with.
            add_generation_prompt: Open an answer after a conversation that ends with a user message.

        Raises:
            UserError: A malformed conversation, or image slots and images that differ in number.
        """
        ids, _ = self._tokenize(self._render(messages, num_images, add_generation_prompt))
        return Prompt(ids, num_images)

    def encode_supervised(self, messages: Sequence[Message], num_images: int = 0) -> tuple[list[int], list[bool]]:
        """Tokenizes a finished conversation for training.

        Returns:
            The ids, and for each whether it belongs to an answer or to the end marker that the model must write.

        Raises:
            UserError: As for ``encode``, or the conversation does not end with an answer.
        """
        segments = self._render(messages, num_images, add_generation_prompt=False)
        if messages[-1]["role"] != "assistant":
            raise UserError("a training conversation must end with an assistant message; add the answer")
        return self._tokenize(segments)

    def open_image(self, source: ImageSource) -> Image.Image:
        """Opens an image as the configuration says: RGB, upright; see ``images.load_image`` for errors."""
        config = self._image_config()
        return load_image(source, exif=config.exif, scale_16bit=config.scale_16bit)

    def pixels(self, images: Iterable[ImageSource]) -> np.ndarray:
        """Opens and preprocesses images.

        Args:
            images: Paths, bytes or PIL images, in the order of their slots.

        Returns:
            float32 [N, size, size, 3]; N is 0 for no images.

        Raises:
            UserError: An image cannot be read, or the model reads text only.
        """
        config = self._image_config()
        out = [preprocess(self.open_image(image), config) for image in images]
        return np.stack(out) if out else np.zeros((0, config.size, config.size, 3), np.float32)

    def answer_stream(self) -> AnswerStream:
        """Returns a fresh filter from generated ids to answer text."""
        return AnswerStream(self)

    def _image_config(self) -> ImageConfig:
        if self.image is None:
            raise UserError("this model reads text only; leave the image out or choose a model that reads images")
        return self.image

    def _render(self, messages: Sequence[Message], num_images: int, add_generation_prompt: bool) -> list[Segment]:
        if num_images:
            self._image_config()
        return render(self.template, messages, num_images, add_generation_prompt)

    def _tokenize(self, segments: Sequence[Segment]) -> tuple[list[int], list[bool]]:
        """Turns segments into ids and the supervision mask.

        Text that is not interrupted by a control token, an image slot or a segment that stands apart is tokenized in
        one go, as LLaVA and Hugging Face do.
        """
        ids: list[int] = []
        mask: list[bool] = []
        run = ""
        run_is_answer = False
        after_text = False

        def emit(tokens: list[int], answer: bool) -> None:
            ids.extend(tokens)
            mask.extend([answer] * len(tokens))

        def flush() -> None:
            nonlocal run, after_text
            if run:
                emit(self.tokenizer.encode(run, continues=after_text), run_is_answer)
                run, after_text = "", True

        for segment in segments:
            if segment.apart:
                flush()
            if segment.kind == "image":
                flush()
                emit([self.image_token_id] * self.tokens_per_image, False)
                after_text = False
                continue
            run_is_answer = segment.answer
            for text, control in self._pieces(segment):
                run += text
                if control is not None:
                    flush()
                    emit([control], segment.answer)
                    after_text = False
        flush()
        return ids, mask

    def _pieces(self, segment: Segment) -> Iterable[tuple[str, int | None]]:
        """Cuts a segment into texts, each followed by a control id or, at the end, by None."""
        start = 0
        if segment.kind == "template" and self._controls:
            for match in self._cut.finditer(segment.text):
                yield segment.text[start : match.start()], self._controls[match[0]]
                start = match.end()
        yield segment.text[start:], None


class StopMatcher:
    """Cuts a stream of text at the first stop string, without ever showing a part of one.

    Text that could be the beginning of a stop string is held back until it is known not to be.
    """

    def __init__(self, stop_strings: Iterable[str]) -> None:
        self._stops = [stop for stop in stop_strings if stop]
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Takes new text; returns what may be shown and whether a stop string has been met."""
        if self.stopped:
            return "", True
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """Returns what was held back, at the end of a stream that met no stop string."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Returns how many characters at the end of the held text begin this stop string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)


class AnswerStream:
    """Turns generated ids into the text of an answer, as a message's content holds it.

    The template's ``answer_start`` is left out, and the answer ends at a stop id or a stop string. Joined, the pieces
    are a content that ``encode`` tokenizes to the generated ids again if the model wrote them as its tokenizer would.
    """

    def __init__(self, processor: Processor) -> None:
        self._stop_ids = processor.stop_ids
        self._text = Detokenizer(processor.tokenizer, continues=True)
        self._start = processor.template.answer_start
        self._head = ""
        self._stop = StopMatcher(processor.template.stop_strings)
        self.stopped = False

    def add(self, token: int) -> tuple[str, bool]:
        """Takes the next id; returns the new text and whether the answer has ended."""
        if self.stopped or token in self._stop_ids:
            return self.finish(), True
        shown, self.stopped = self._stop.push(self._strip(self._text.add(token)))
        return shown, self.stopped

    def finish(self) -> str:
        """Ends the answer, for example at its longest length; returns the text held back so far."""
        if self.stopped:
            return ""
        shown, _ = self._stop.push(self._strip(self._text.finish(), last=True))
        self.stopped = True
        return shown + self._stop.flush()

    def _strip(self, text: str, last: bool = False) -> str:
        """Leaves ``answer_start`` out of the beginning of the answer."""
        self._head += text
        if len(self._head) < len(self._start) and self._start.startswith(self._head) and not last:
            return ""
        shown = self._head.removeprefix(self._start)
        self._head = self._start = ""
        return shown


_KEYS = {
    "image": (dict, type(None)),
    "image_token_index": (int,),
    "tokens_per_image": (int,),
    "stop_token_ids": (list,),
    "chat_template": (dict,),
}


def _parts(config: object) -> dict[str, Any]:
    """Returns the fields of a ``Processor`` that its configuration holds."""
    values = _checked(config)
    return {
        "template": ChatTemplate.from_dict(values["chat_template"]),
        "image": None if values["image"] is None else ImageConfig.from_dict(values["image"]),
        "image_token_id": values["image_token_index"],
        "tokens_per_image": values["tokens_per_image"],
        "stop_ids": frozenset(values["stop_token_ids"]),
    }


def _checked(config: object) -> dict[str, Any]:
    if not isinstance(config, dict):
        raise UserError("not a JSON object; convert or download the model again")
    for key in [*config, *_KEYS]:
        if key not in _KEYS:
            raise UserError(f"unknown key '{key}'; known are {', '.join(_KEYS)}")
        if key not in config:
            raise UserError(f"the key '{key}' is missing; convert the model again")
        if not isinstance(config[key], _KEYS[key]) or isinstance(config[key], bool):
            raise UserError(f"'{key}' is {config[key]!r}; convert the model again")
    if not all(isinstance(token, int) for token in config["stop_token_ids"]):
        raise UserError("'stop_token_ids' must be a list of ids; convert the model again")
    return config
