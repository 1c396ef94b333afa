"""Records of four kinds as conversations.

``llava``: LLaVA's own, ``{"image": ..., "conversations": [{"from": "human", "value": "<image>\\n..."}, ...]}``.
``messages``: OpenAI's and TRL's, ``{"messages": [{"role": ..., "content": ...}], "images": [...]}``.
``texts``: the Cauldron's, ``{"images": [...], "texts": [{"user": ..., "assistant": ...}]}``.
``pairs``: one question and its answer, ``{"image": ..., "question": ..., "answer": ...}``.

Sources: LLaVA's ``preprocess_multimodal`` and MoE-LLaVA's, which leaves an image where it stands.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote

from gm_mlx.chat_template import checked_turns
from gm_mlx.errors import UserError
from gm_mlx.train.rows import Content

IMAGE = "<image>"
COLUMNS = {"image": "image", "question": "question", "answer": "answer"}
ROLES = {
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "system": "system", "developer": "system",
}  # fmt: skip


class Conversation(NamedTuple):
    """A record's content.

    Attributes:
        system: its system text.
        turns: what user and assistant say, the user first, an answer last.
        images: one per slot of the turns: the name of a file, or its content.
    """

    system: str | None
    turns: list[Content]
    images: list[str | bytes]


class _Message(NamedTuple):
    role: str
    parts: list[str | _Slot]


class _Slot(NamedTuple):
    """Where an image goes; the next of the record's images, unless the slot brings its own."""

    image: str | bytes | None = None


def kind_of(record: object, columns: Mapping[str, str] = COLUMNS) -> str | None:
    """The kind of a record, as far as its keys tell."""
    if not isinstance(record, Mapping):
        return None
    if isinstance(turns := record.get("conversations"), list) and turns:
        return "llava" if isinstance(turns[0], Mapping) and "from" in turns[0] else "messages"
    if "messages" in record or "texts" in record:
        return "messages" if "messages" in record else "texts"
    return "pairs" if {columns["question"], columns["answer"]} <= record.keys() else None


def conversation(record: object, kind: str, columns: Mapping[str, str] = COLUMNS) -> Conversation:
    """Read a record.

    Args:
        record: what JSON, CSV or a table gave.
        kind: one of ``KINDS``.
        columns: for ``pairs``: the keys that hold "image" (empty for none), "question" and "answer".

    Raises:
        UserError: why it cannot be learnt from; the text does not name the place.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"{_short(record)} where an object is due")
    if record.get("video") or record.get("videos"):
        raise UserError("has a video; only images can be learnt from")
    messages, images = KINDS[kind](record, columns)
    return _assembled(messages, images)


def _llava(record: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[list[_Message], list[str | bytes]]:
    messages = []
    for number, turn in enumerate(_wanted(record, "conversations", list), 1):
        name, text = (_wanted(turn, key, str, f"turn {number}: ") for key in ("from", "value"))
        messages.append(_Message(_role(name, number), _split(text)))
    return messages, _images(record)


def _messages(record: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[list[_Message], list[str | bytes]]:
    messages = []
    key = "messages" if "messages" in record else "conversations"
    for number, message in enumerate(_wanted(record, key, list), 1):
        role = _role(_wanted(message, "role", str, f"message {number}: "), number)
        # What would be trained on in another way than it was meant is refused, not ignored.
        if message.get("weight") == 0:
            raise UserError(f"message {number}: weight 0 (not to be learnt) is not supported; take the message out")
        if message.get("tool_calls") or message.get("function_call"):
            raise UserError(f"message {number}: calls a tool, which is not supported")
        content = _wanted(message, "content", (str, list), f"message {number}: ")
        parts = _split(content) if isinstance(content, str) else [_part(part, number) for part in content]
        messages.append(_Message(role, parts))
    return messages, _images(record)


def _part(part: object, number: int) -> str | _Slot:
    if isinstance(part, Mapping):
        kind, text = part.get("type"), part.get("text")
        if kind in ("text", "input_text", "output_text") and isinstance(text, str):
            return text
        if kind in ("image", "image_url", "input_image"):
            # A table fills the keys that a part lacks with None.
            given = [part[key] for key in ("image_url", "image", "url", "path") if part.get(key) is not None]
            return _Slot(_image(given[0]) if given else None)
    raise UserError(f"message {number}: {_short(part)} is no part of a message; use text, image_url or image")


def _texts(record: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[list[_Message], list[str | bytes]]:
    messages = [
        _Message(role, _split(_wanted(turn, role, str, f"text {number}: ")))
        for number, turn in enumerate(_wanted(record, "texts", list), 1)
        for role in ("user", "assistant")
    ]
    return messages, _images(record)


def _pairs(record: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[list[_Message], list[str | bytes]]:
    question, answer = (_wanted(record, columns[key], str) for key in ("question", "answer"))
    if columns["image"] and columns["image"] not in record:
        raise UserError(f"the key {columns['image']!r} is missing; leave it empty where a question has no image")
    images = _listed(record.get(columns["image"]))
    return [_Message("user", _split(question)), _Message("assistant", _split(answer))], images


_Kind = Callable[[Mapping[str, Any], Mapping[str, str]], tuple[list[_Message], list[str | bytes]]]
KINDS: dict[str, _Kind] = {"llava": _llava, "messages": _messages, "texts": _texts, "pairs": _pairs}


def _assembled(messages: list[_Message], images: list[str | bytes]) -> Conversation:
    """Check the order of the messages, and bring images and slots together."""
    for number, message in enumerate(messages, 1):
        if message.role != "user" and any(isinstance(part, _Slot) for part in message.parts):
            raise UserError(f"message {number}: an image in a message that is not the user's")
        if message.role == "assistant" and not "".join(map(str, message.parts)).strip():
            raise UserError(f"message {number}: the answer is empty")
    system, turns = checked_turns([{"role": role, "content": _plain(parts)} for role, parts in messages])
    if len(turns) % 2:
        alone = len(turns) == 1
        raise UserError("there is no answer to learn" if alone else "ends with a question; add the answer")
    said = [message.parts for message in messages if message.role != "system"]
    slots = [part for parts in said for part in parts if isinstance(part, _Slot)]
    if images and not any(slot.image is None for slot in slots):
        said[0] = [*[_Slot()] * len(images), *said[0]]  # as LLaVA's own data has it: images before the question
        slots = [*[_Slot()] * len(images), *slots]
    empty = sum(slot.image is None for slot in slots)
    if empty != len(images):
        raise UserError(
            f"{empty} times {IMAGE} but {len(images)} image{'' if len(images) == 1 else 's'}; give one image for each"
        )
    given = iter(images)
    return Conversation(
        system,
        [_content(parts) for parts in said],
        [next(given) if slot.image is None else slot.image for slot in slots],
    )


def _plain(parts: Sequence[str | _Slot]) -> str:
    return "".join(part for part in parts if isinstance(part, str))


def _content(parts: Sequence[str | _Slot]) -> Content:
    if not any(isinstance(part, _Slot) for part in parts):
        return _plain(parts)
    return [part if isinstance(part, str) else None for part in parts]


def _split(text: str) -> list[str | _Slot]:
    """Texts and slots: each ``<image>`` in a plain text is a slot."""
    parts: list[str | _Slot] = []
    for piece in text.split(IMAGE):
        parts += [_Slot(), piece]
    return [part for part in parts[1:] if part != ""]


def _role(name: str, number: int) -> str:
    if name not in ROLES:
        raise UserError(f"message {number}: unknown role {_short(name)}; known are {', '.join(ROLES)}")
    return ROLES[name]


def _wanted(record: object, key: str, kind: type | tuple[type, ...], place: str = "") -> Any:
    if not isinstance(record, Mapping):
        raise UserError(f"{place}{_short(record)} where an object is due")
    if record.get(key) is None:
        raise UserError(f"{place}the key {key!r} is missing")
    if not isinstance(record[key], kind):
        names = " or ".join(_NAMES[one] for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise UserError(f"{place}{key!r} is {_short(record[key])}; it must be a {names}")
    return record[key]


_NAMES: dict[type, str] = {str: "text", list: "list"}


def _images(record: Mapping[str, Any]) -> list[str | bytes]:
    return _listed(record.get("images")) or _listed(record.get("image"))


def _listed(value: object) -> list[str | bytes]:
    return [_image(item) for item in (value if isinstance(value, list) else [value]) if item not in (None, "")]


def _image(value: object) -> str | bytes:
    """A path, or the content of an image file."""
    if isinstance(value, Mapping):
        given = [value[key] for key in ("bytes", "path", "url", "image") if value.get(key) is not None]
        value = given[0] if given else value
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise UserError(f"the image is {_short(value)}; it must be the path of a file or a data URL")
    scheme, _, rest = value.partition(":")
    if scheme == "data":
        return _data(rest)
    if scheme in ("http", "https"):
        raise UserError(f"{_short(value)}: images are not fetched from the network; download it and name the file")
    return unquote(rest.removeprefix("//")) if scheme == "file" else value


def _data(rest: str) -> bytes:
    header, _, content = rest.partition(",")
    try:
        if header.endswith(";base64"):
            return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        pass
    raise UserError("a data URL that is not valid base64; write data:image/png;base64,...")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
