"""A conversation as a file to keep: Markdown to read, JSON to work with."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gm_mlx.errors import UserError
from gm_mlx.files import new_file

Messages = Sequence[dict[str, Any]]


def save_transcript(path: Path, model: str, messages: Messages, replace: bool = False) -> None:
    """Writes a conversation, the whole of it or nothing.

    Args:
        path: Its suffix says the form: ``.md`` or ``.json``.
        model: The model's name.
        messages: Messages with a ``path`` in their image parts; see ``with_paths``.
        replace: Write over a file that exists.

    Raises:
        UserError: Another suffix, a file that exists, or one that cannot be written.
    """
    form = FORMS.get(path.suffix.lower())
    if form is None:
        raise UserError(f"{path}: the name must end in {' or '.join(FORMS)}")
    if os.path.exists(path) and not (replace and path.is_file()):
        raise UserError(f"{path}: exists already; choose another name" + (", or /save! to replace it" * path.is_file()))
    try:
        with new_file(path) as partial:
            partial.write_text(form(model, messages), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place") from error


def with_paths(messages: Messages, paths: Sequence[str]) -> list[dict[str, Any]]:
    """Returns messages with the paths of the conversation's images in their slots, in order."""
    files = iter(paths)
    return [{**message, "content": list(_parts(message["content"], files))} for message in messages]


def _parts(content: str | Sequence[dict[str, Any]], files: Iterator[str]) -> Iterator[dict[str, Any]]:
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    for part in content:
        yield {**part, "path": next(files)} if part["type"] == "image" else part


def _json(model: str, messages: Messages) -> str:
    return json.dumps({"model": model, "messages": messages}, indent=2, ensure_ascii=False) + "\n"


def _markdown(model: str, messages: Messages) -> str:
    names = {"system": "System", "user": "You", "assistant": model}
    blocks = [f"# A conversation with {model}"]
    for message in messages:
        blocks.append(f"**{names[message['role']]}**")
        for part in message["content"]:
            image = part["type"] == "image"
            blocks.append(f"![{os.path.basename(part['path'])}](<{part['path']}>)" if image else part["text"])
    return "\n\n".join(blocks) + "\n"


FORMS: dict[str, Callable[[str, Messages], str]] = {".md": _markdown, ".json": _json}
