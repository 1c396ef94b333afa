"""Chat templates as data: how a conversation becomes a prompt.

A template is a handful of strings that is stored in the model folder, so a model carries its own and nothing is guessed
from its name. Rendering yields segments and not one string: the template's own text may hold control tokens, a user's
text never does, and an image slot is not text at all. ``to_jinja`` writes the same template for other tools.

Sources: the conversation templates of LLaVA (v1, plain), LLaVA-Gemma (gemma) and MoE-LLaVA (openchat, phi).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from gm_mlx.errors import UserError

Message = Mapping[str, Any]
"""``{"role": "system" | "user" | "assistant", "content": text or parts}``; a part is ``{"type": "text", "text": ...}``
or ``{"type": "image"}``."""

BOS = "{bos_token}"
EOS = "{eos_token}"  # stands in a template's strings for whatever the tokenizer calls its end-of-text token


@dataclass(frozen=True)
class Segment:
    """A stretch of a rendered conversation.

    Attributes:
        kind: ``template``: text of ours, in which control tokens count; ``text``: a user's or a model's words, in
            which nothing counts; ``image``: one image slot.
        text: The text, empty for an image slot.
        answer: Part of an answer or of its end marker: what a model is trained to write.
        apart: Tokenized apart from the segment before it, so that all ids up to here stay what they are.
    """

    kind: Literal["template", "text", "image"]
    text: str = ""
    answer: bool = False
    apart: bool = False


@dataclass(frozen=True)
class ChatTemplate:
    """The strings around the turns of a conversation.

    Attributes:
        name: For people; nothing depends on it.
        bos: Whether the prompt starts with the tokenizer's BOS.
        system: System text used when the conversation has none of its own; empty for none.
        system_end: Follows the system text.
        system_in_user: The system text stands inside the first user turn, after ``user_start``, for models that know
            no system turn.
        user_start: Opens a user turn.
        image_end: Follows the images that stand in front of a message, unless the message starts with it.
        user_end: Closes a user turn.
        assistant_start: Opens an answer; the last thing in a prompt.
        answer_start: Stands before the answer's text, and is part of what the model writes.
        answer_end: Ends an answer; part of what the model writes.
        answer_after: Follows a finished answer; not written by the model.
        controls: Substrings of the fields above that are control tokens, one id each.
        stop_strings: Text at which generation stops, in addition to the stop ids.
    """

    name: str
    bos: bool = True
    system: str = ""
    system_end: str = ""
    system_in_user: bool = False
    user_start: str = ""
    image_end: str = "\n"
    user_end: str = ""
    assistant_start: str = ""
    answer_start: str = ""
    answer_end: str = EOS
    answer_after: str = ""
    controls: tuple[str, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.answer_end:
            raise UserError(f"chat_template '{self.name}': answer_end is empty, so no answer would ever end; set it")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ChatTemplate:
        """Builds a template from JSON values; unknown keys and wrong types are a ``UserError``."""
        types = {key: type(value) for key, value in asdict(cls(name="")).items()}
        known: dict[str, Any] = {}
        for key, value in values.items():
            if key not in types:
                raise UserError(f"chat_template: unknown key '{key}'; known are {', '.join(types)}")
            wanted = list if types[key] is tuple else types[key]
            if not isinstance(value, wanted) or (wanted is list and not all(isinstance(item, str) for item in value)):
                raise UserError(f"chat_template: '{key}' is {value!r}; it must be a {_JSON_NAMES[wanted]}")
            known[key] = tuple(value) if wanted is list else value
        if "name" not in known:
            raise UserError("chat_template: the key 'name' is missing; add one, for example \"gemma\"")
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


_JSON_NAMES: dict[type, str] = {str: "string", bool: "boolean", list: "list of strings"}

GEMMA = ChatTemplate(
    name="gemma",
    system_end="\n\n",
    system_in_user=True,
    user_start="<start_of_turn>user\n",
    user_end="<end_of_turn>\n",
    assistant_start="<start_of_turn>model\n",
    answer_end="<end_of_turn>",
    answer_after="\n",
    controls=("<start_of_turn>", "<end_of_turn>"),
)
V1 = ChatTemplate(
    name="v1",
    system="A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    system_end=" ",
    user_start="USER: ",
    user_end=" ",
    assistant_start="ASSISTANT:",
    answer_start=" ",
    stop_strings=("</s>",),
)
PLAIN = ChatTemplate(name="plain", image_end="", answer_end="\n", stop_strings=("\n",))
# MoE-LLaVA's other templates are v1 but for their end of an answer. Its Phi-2, Qwen and StableLM have no BOS.
OPENCHAT_END = "<|end_of_turn|>"
OPENCHAT = replace(V1, name="openchat", answer_end=OPENCHAT_END, controls=(OPENCHAT_END,), stop_strings=(OPENCHAT_END,))
PHI_END = "<|endoftext|>"
PHI = replace(V1, name="phi", bos=False, answer_end=PHI_END, controls=(PHI_END,), stop_strings=(PHI_END,))
# Families that are written as another is; Eve's is MobileVLM's, which is v1.
SAME = {"vicuna": V1, "mistral": V1, "eve": V1, "qwen": PHI, "stablelm": PHI}

TEMPLATES = {template.name: template for template in (GEMMA, V1, PLAIN, OPENCHAT, PHI)}
TEMPLATES |= {name: replace(template, name=name) for name, template in SAME.items()}


def render(
    template: ChatTemplate, messages: Sequence[Message], num_images: int = 0, add_generation_prompt: bool = True
) -> list[Segment]:
    """Renders a conversation as segments.

    Images are matched to the ``{"type": "image"}`` parts in order. A conversation without such parts gets all of its
    images in front of its first user message. Images in front of a message are followed by ``image_end``, as in
    LLaVA's ``<image>\\nquestion``; anywhere else a slot stands exactly where it was put.

    Args:
        template: The template.
        messages: Optionally a system message, then user and assistant messages in turn.
        num_images: How many images the caller has.
        add_generation_prompt: Open an answer after a conversation that ends with a user message.

    Raises:
        UserError: Messages of another form or order, or as many slots as images do not exist.
    """
    system, turns = checked_turns(messages)
    parts = placed_parts(turns, num_images)
    system = template.system if system is None else system
    system_text = [Segment("text", system), Segment("template", template.system_end)] if system else []
    segments = [Segment("template", BOS)] if template.bos else []
    if not template.system_in_user:
        segments += system_text
    for index, (message, content) in enumerate(zip(turns, parts, strict=True)):
        if message["role"] == "assistant":
            answer = template.answer_start + "".join(part for part in content if part)
            segments += [
                Segment("text", answer, answer=True, apart=True),
                Segment("template", template.answer_end, answer=True, apart=True),
                Segment("template", template.answer_after, apart=True),
            ]
            continue
        segments.append(Segment("template", template.user_start, apart=index > 0))
        if index == 0 and template.system_in_user:
            segments += system_text
        segments += _user_segments(template, content)
        segments.append(Segment("template", template.user_end))
        if add_generation_prompt or index + 1 < len(turns):
            segments.append(Segment("template", template.assistant_start))
    return [segment for segment in segments if segment.text or segment.kind == "image"]


def placed_parts(turns: Sequence[Message], num_images: int) -> list[list[str | None]]:
    """Returns each turn's content as texts and image slots (None), of which there are as many as images."""
    parts = [_parts(message) for message in turns]
    if not any(part is None for message in parts for part in message):
        parts[0] = [*[None] * num_images, *parts[0]]
    slots = sum(part is None for message in parts for part in message)
    if slots != num_images:
        raise UserError(
            f"the conversation has {_count(slots, 'image slot')} but {_count(num_images, 'image')} "
            f"{'was' if num_images == 1 else 'were'} given; give one image per slot"
        )
    return parts


def checked_turns(messages: Sequence[Message]) -> tuple[str | None, list[Message]]:
    """Splits the system text off and checks that users and assistants take turns."""
    if not messages:
        raise UserError("the conversation is empty; give at least one user message")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or "content" not in message or "role" not in message:
            raise UserError(f"message {number}: not an object with the keys 'role' and 'content'")
    turns = list(messages)
    system = None
    if turns[0]["role"] == "system":
        system = "".join(part for part in _parts(turns.pop(0)) if part)
    skipped = len(messages) - len(turns)
    for index, message in enumerate(turns):
        due = "assistant" if index % 2 else "user"
        if message["role"] != due:
            raise UserError(
                f"message {index + skipped + 1}: its role is {message['role']!r} where {due!r} is due; user and "
                "assistant messages must alternate, after a system message or none"
            )
    if not turns:
        raise UserError("the conversation has a system message only; add a user message")
    return system, turns


def _parts(message: Message) -> list[str | None]:
    """Returns a message's content as texts and image slots (None)."""
    content = message["content"]
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list | tuple):
        raise UserError(f"{message['role']} message: its content must be a text or a list of parts, not {content!r}")
    image_allowed = message["role"] == "user"
    parts: list[str | None] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image" and image_allowed:
            parts.append(None)
        elif kind == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        else:
            raise UserError(
                f"{message['role']} message: {part!r} does not belong there; use {_PARTS_OF[image_allowed]}"
            )
    return parts


_PARTS_OF = {False: '{"type": "text", "text": ...}', True: '{"type": "image"} or {"type": "text", "text": ...}'}


def _user_segments(template: ChatTemplate, parts: list[str | None]) -> list[Segment]:
    segments = [Segment("image") if part is None else Segment("text", part) for part in parts]
    in_front = next((index for index, part in enumerate(parts) if part is not None), len(parts))
    follows = parts[in_front] if in_front < len(parts) else None
    if in_front and not (follows or "").startswith(template.image_end):
        segments.insert(in_front, Segment("template", template.image_end))
    return segments


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def to_text(segments: Sequence[Segment], bos_token: str, eos_token: str, image_token: str = "<image>") -> str:
    """Writes segments as one string, for people and for tools that know strings only."""
    write = {
        "image": lambda text: image_token,
        "text": lambda text: text,
        "template": lambda text: text.replace(BOS, bos_token).replace(EOS, eos_token),
    }
    return "".join(write[segment.kind](segment.text) for segment in segments)


def to_jinja(template: ChatTemplate, image_token: str = "<image>") -> str:
    """Writes the template as the text of a ``chat_template.jinja``, as Hugging Face tools read it.

    The text renders the same string as ``to_text(render(...))`` for a conversation whose image slots are explicit.
    It needs the variables ``messages``, ``add_generation_prompt``, ``bos_token`` and ``eos_token``.
    """
    values = {key: _jinja_literal(value) for key, value in asdict(template).items()}
    values["image_token"] = _jinja_literal(image_token)
    return re.sub("@([a-z_]+)@", lambda match: values[match[1]], _JINJA)


def _jinja_literal(value: Any) -> str:
    """Returns a jinja expression for a field, with EOS as the variable of that name."""
    if isinstance(value, str):
        return " + eos_token + ".join(json.dumps(part, ensure_ascii=False) for part in value.split(EOS))
    return json.dumps(value)


# @field@ stands for the field's value. Every tag trims the white space around it, so the layout here is free.
# "media_marker": llama.cpp's server puts the text of its own marker where an image was.
_JINJA = """\
{%- macro text_of(content) -%}
  {%- if content is string -%} {{- content -}}
  {%- else -%} {%- for part in content -%} {{- part.text -}} {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}

{%- macro user_content(content) -%}
  {%- if content is string -%} {{- content -}}
  {%- else -%}
    {%- set state = namespace(in_front=true, images=false) -%}
    {%- for part in content -%}
      {%- if part.type in ("image", "media_marker") -%}
        {%- set state.images = state.images or state.in_front -%}
        {{- part.text if part.type == "media_marker" else @image_token@ -}}
      {%- else -%}
        {%- if state.in_front and state.images and not part.text.startswith(@image_end@) -%} {{- @image_end@ -}}
        {%- endif -%}
        {%- set state.in_front = false -%}
        {{- part.text -}}
      {%- endif -%}
    {%- endfor -%}
    {%- if state.in_front and state.images -%} {{- @image_end@ -}} {%- endif -%}
  {%- endif -%}
{%- endmacro -%}

{%- set system = @system@ -%}
{%- set turns = messages -%}
{%- if messages[0].role == "system" -%}
  {%- set system = text_of(messages[0].content) -%}
  {%- set turns = messages[1:] -%}
{%- endif -%}
{%- if system -%} {%- set system = system + @system_end@ -%} {%- endif -%}

{%- if @bos@ -%} {{- bos_token -}} {%- endif -%}
{%- if not @system_in_user@ -%} {{- system -}} {%- endif -%}
{%- for message in turns -%}
  {%- if message.role == "assistant" -%}
    {{- @answer_start@ + text_of(message.content) + @answer_end@ + @answer_after@ -}}
  {%- else -%}
    {{- @user_start@ -}}
    {%- if loop.first and @system_in_user@ -%} {{- system -}} {%- endif -%}
    {{- user_content(message.content) + @user_end@ -}}
    {%- if add_generation_prompt or not loop.last -%} {{- @assistant_start@ -}} {%- endif -%}
  {%- endif -%}
{%- endfor -%}
"""
