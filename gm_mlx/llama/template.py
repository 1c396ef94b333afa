"""The chat template that a GGUF file carries: a Jinja program, run in a sandbox as Hugging Face runs it.

Images. A template knows its model's own way to write an image, but in llama.cpp mtmd writes what stands around one. So
a template never sees images: each is a mark in the message's text, at which the rendered prompt is cut.

Control tokens. The rendered prompt is one text, and llama.cpp finds control tokens in it by their names. A user who
types such a name must not give orders with it. Where a message holds one, marks stand for the words of all messages
while the template runs, and the words are tokenized as plain text in their places. Other prompts are tokenized in one
go, exactly as the model's makers do.

System messages. A template that has no place for one refuses it; then it goes in front of the first question.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from secrets import token_hex
from typing import Any

from gm_mlx.chat_template import Message, checked_turns, placed_parts
from gm_mlx.errors import UserError
from gm_mlx.gguf_file import GGUFHeader
from gm_mlx.llama.vision import Text
from gm_mlx.llama.vocab import Vocabulary

TEMPLATE = "tokenizer.chat_template"
MAX_TEMPLATE = 1 << 20  # characters
# As Vicuna and LLaVA-1.5 were trained, whose old GGUF files have no template.
PLAIN = (
    "{% for message in messages %}{% if message.role == 'assistant' %} {{ message.content }}{{ eos_token }}"
    "{% elif message.role == 'user' %}USER: {{ message.content }} ASSISTANT:{% else %}{{ message.content }} {% endif %}"
    "{% endfor %}"
)
PLAIN_STOPS = ("USER:",)
NO_TEMPLATE = "the model's file has no chat template; a plain one is used (USER: ... ASSISTANT:): answers may be bad"
BAD_TEMPLATE = "the model's chat template fails ({}); a plain one is used (USER: ... ASSISTANT:): answers may be bad"


class JinjaTemplate:
    """A chat template with the tokens that it needs.

    Args:
        source: the Jinja program.
        vocabulary: the model's tokens.
        stop_strings: what ends an answer beside control tokens.
        notice: what a user should know about it.

    Raises:
        UserError: the program is not sound, or renders no question.
    """

    def __init__(
        self, source: str, vocabulary: Vocabulary, stop_strings: Sequence[str] = (), notice: str | None = None
    ) -> None:
        from jinja2 import TemplateError

        self.stop_strings = tuple(stop_strings)
        self.notice = notice
        self._vocabulary = vocabulary
        try:
            self._program = _environment().from_string(source)
        except (TemplateError, RecursionError) as error:
            raise UserError(f"{TEMPLATE}: not a Jinja template ({error})") from None
        self._typed = False
        probe = [{"role": "user", "content": "QUESTION"}]
        if "QUESTION" not in self._try(probe):
            self._typed = True
            if "QUESTION" not in self._run(probe):
                raise UserError(f"{TEMPLATE}: leaves the question out")
        with_system = [{"role": "system", "content": "SYSTEM"}, *probe]
        self._has_system = "SYSTEM" in self._try(with_system)

    @classmethod
    def from_header(cls, header: GGUFHeader, vocabulary: Vocabulary) -> JinjaTemplate:
        """The template of a file, or a plain one with a notice."""
        source = header.metadata.get(TEMPLATE)
        if source is None:
            return cls(PLAIN, vocabulary, PLAIN_STOPS, NO_TEMPLATE)
        try:
            if len(source) > MAX_TEMPLATE:
                raise UserError("it is too long")
            return cls(source, vocabulary)
        except UserError as error:
            return cls(PLAIN, vocabulary, PLAIN_STOPS, BAD_TEMPLATE.format(error))

    def render(self, messages: Sequence[Message], num_images: int) -> list[Text | int]:
        """Render a conversation, as texts and numbers of images.

        Args:
            messages: as for ``gm_mlx.chat_template.render``.
            num_images: images that come with it.

        Raises:
            UserError: a malformed conversation, or images and slots that differ in number.
        """
        system, turns = checked_turns(messages)
        contents = placed_parts(turns, num_images)
        words = [part for content in contents for part in content if part is not None]
        guarded = any(self._has_control(text) for text in [*words, system or ""])
        mark = f"\u27e6{token_hex(8)}:"  # nobody can type what is drawn anew each time
        plain: list[str] = []

        def guard(text: str) -> str:
            if not guarded or not text:
                return text
            plain.append(text)
            return f"{mark}t{len(plain) - 1}\u27e7"

        def join(content: Sequence[str | None]) -> str:
            return "".join(f"{mark}i{next(numbers)}\u27e7" if part is None else guard(part) for part in content)

        numbers = iter(range(num_images))
        chat = [{"role": turn["role"], "content": join(content)} for turn, content in zip(turns, contents, strict=True)]
        if system and self._has_system:
            chat.insert(0, {"role": "system", "content": guard(system)})
        elif system:
            chat[0]["content"] = f"{guard(system)}\n\n{chat[0]['content']}"
        parts: list[Text | int] = []
        for piece in re.split(f"({re.escape(mark)}[it]\\d+\u27e7)", self._run(chat)):
            kind, number = (piece[len(mark)], int(piece[len(mark) + 1 : -1])) if piece.startswith(mark) else ("", 0)
            if kind == "i":
                parts.append(number)
            elif piece:
                parts.append(Text(plain[number]) if kind else Text(piece, special=True))
        shown = sorted(part for part in parts if isinstance(part, int))
        if shown != list(range(num_images)):
            raise UserError(f"the model's chat template shows {len(shown)} of {num_images} images; ask about fewer")
        return parts

    def _has_control(self, text: str) -> bool:
        """Whether a text holds the name of a control token."""
        return self._vocabulary.encode(text) != self._vocabulary.encode(text, special=True)

    def _run(self, messages: Sequence[dict[str, Any]]) -> str:
        from jinja2 import TemplateError

        if self._typed:
            messages = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
        names = {"bos_token": self._vocabulary.bos, "eos_token": self._vocabulary.eos}
        try:
            return self._program.render(
                messages=messages,
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **{name: self._vocabulary.name_of(token) for name, token in names.items()},
            )
        except (
            TemplateError,
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
            RecursionError,
        ) as error:
            raise UserError(f"{TEMPLATE}: {' '.join(str(error).split()) or type(error).__name__}") from None

    def _try(self, messages: Sequence[dict[str, Any]]) -> str:
        """Render what a template may refuse; then it is empty."""
        try:
            return self._run(messages)
        except UserError:
            return ""


def _environment() -> Any:
    """The sandbox that ``transformers`` runs chat templates in, with the same functions."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks answers for training; here it shows what it holds."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own way

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
