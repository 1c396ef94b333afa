"""Training data for tests: rows, files of every format, and a processor for each template."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fixtures import picture
from tiny_tokenizer import TURNS, write_sentencepiece, write_tokenizers

from gm_mlx.chat_template import GEMMA, OPENCHAT, PLAIN, V1, ChatTemplate
from gm_mlx.images import ImageConfig
from gm_mlx.processor import Processor
from gm_mlx.tokenizer import load_tokenizer
from gm_mlx.train.rows import Content, Problem, Row, Where

SLOT, TOKENS_PER_IMAGE = -200, 4
# The tiny tokenizers have no token with OpenChat's name; another control token stands in for it.
OPENCHAT_LIKE = dataclasses.replace(OPENCHAT, answer_end=TURNS[1], controls=(TURNS[1],))
TEMPLATES = {template.name: template for template in (GEMMA, V1, PLAIN, OPENCHAT_LIKE)}


def processor(folder: Path, template: ChatTemplate = GEMMA, kind: str = "gemma", **changes: Any) -> Processor:
    """A processor with a tiny tokenizer: "gemma", "llama" (SentencePiece) or "phi" (tokenizer.json)."""
    if kind == "phi":
        write_tokenizers(folder, "byte_level")
    else:
        write_sentencepiece(folder, prefix_space=kind == "llama", user_defined=kind == "gemma")
    fields = {"image": ImageConfig(8, "pad"), "image_token_id": SLOT, "tokens_per_image": TOKENS_PER_IMAGE, **changes}
    return Processor(load_tokenizer(folder, template.controls), template, **fields)


def row(*turns: Content, images: Sequence[str] = (), number: int = 1, system: str | None = None) -> Row:
    """A row that nobody read from a file."""
    return Row.of(Where("data.jsonl", "line", number), system, turns, images)


def png(seed: int = 0) -> bytes:
    """The content of an image file."""
    out = io.BytesIO()
    picture(seed).save(out, "PNG")
    return out.getvalue()


def data_url(seed: int = 0) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(seed)).decode()}"


def images_in(folder: Path, count: int) -> list[str]:
    """Writes image files; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        (folder / f"{seed}.png").write_bytes(png(seed))
    return [str(folder / f"{seed}.png") for seed in range(count)]


def llava(question: str, answer: str, **keys: Any) -> dict[str, Any]:
    """A LLaVA record of one turn."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "x", **keys, "conversations": turns}


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    """JSON lines; a text is written as it is."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def rows_of(found: Sequence[Row | Problem]) -> list[Row]:
    """What was found, when all of it is good."""
    assert not [str(item) for item in found if isinstance(item, Problem)]
    return [item for item in found if isinstance(item, Row)]
