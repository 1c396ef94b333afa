"""A folder with a model for llama.cpp: ``model.gguf``, ``mmproj.gguf`` and what tells where they come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gm_mlx.config import ModelConfig
from gm_mlx.convert.to_gguf.pieces import GGUFModel
from gm_mlx.convert.to_gguf.text import text_model
from gm_mlx.convert.to_gguf.tokenizer import tokenizer_metadata
from gm_mlx.convert.to_gguf.types import Target, find_target
from gm_mlx.convert.to_gguf.vision import PositionLayout, vision_model
from gm_mlx.convert.to_gguf.write import file_bytes, write_gguf
from gm_mlx.gguf_files import MODEL_FILE
from gm_mlx.new_folder import SIDE_FILES_BYTES, check_out, check_space, new_folder
from gm_mlx.processor import Processor
from gm_mlx.tensors import Tensor
from gm_mlx.weights import json_text

VERSION = 1  # of the keys "gm.*"
MMPROJ_FILE = "mmproj.gguf"
PLAIN_FILE = "plain.gguf"  # what a quantizer starts from; gone when it is done


@dataclass(frozen=True)
class Quantizer:
    """What makes the decoder's file from one that is not quantized.

    Attributes:
        run: called with the plain file and the file to be; returns notes for the user.
        num_bytes: about how large the result is.
    """

    run: Callable[[Path, Path], list[str]]
    num_bytes: int


@dataclass(frozen=True)
class GGUFPair:
    """Both files of a model, not written yet."""

    text: GGUFModel
    vision: GGUFModel


def gguf_pair(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    processor: Processor,
    *,
    name: str,
    gm: Mapping[str, Any] = {},
    licence: str | None = None,
    layout: PositionLayout = "cls_first",
) -> GGUFPair:
    """A model as llama.cpp runs it.

    Args:
        config: the model's config.
        tensors: its tensors by gm-mlx's names, none of them quantized.
        processor: its processor; see ``tokenizer`` for the kinds of tokenizers.
        name: the model's name, for people.
        gm: what ``gm.json`` will say.
        licence: the licence's identifier, if known.
        layout: where a CLIP tower's class token has its position embedding; see ``vision``.

    Raises:
        UserError: llama.cpp cannot compute this model exactly, and why.
    """
    assert processor.image is not None
    text = text_model(config, tensors)
    vision = vision_model(config, tensors, processor.image, layout)
    table = config.to_dict()
    shared = {"gm.version": VERSION, "gm.pair": _pair_key(table, gm)}
    general = {"general.name": name, **({"general.license": licence} if licence else {}), **_source(gm)}
    text.metadata = {
        **general,
        "general.type": "model",
        **text.metadata,
        ".vocab_size": config.text_config.vocab_size,
        **tokenizer_metadata(processor, config.text_config.vocab_size),
        **shared,
        "gm.config": json.dumps(table),
        "gm.processor": json.dumps(processor.to_dict(), ensure_ascii=False),
    }
    vision.metadata = {**general, "general.type": "mmproj", **vision.metadata, **shared}
    return GGUFPair(text, vision)


def _pair_key(table: Mapping[str, Any], gm: Mapping[str, Any]) -> str:
    """The same for both files of a model and another for any other model's, as far as its sources tell."""
    told = json.dumps([table, gm.get("sources"), gm.get("seed"), gm.get("upcycle")], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _source(gm: Mapping[str, Any]) -> dict[str, str]:
    """Hugging Face's page of the source, where the model comes from there."""
    checkpoint = gm.get("sources", {}).get("checkpoint", {})
    if "revision" not in checkpoint:
        return {}
    return {"general.source.huggingface.repository": checkpoint["name"]}


def plain_target(text: GGUFModel) -> Target:
    """What a quantizer starts from: the floats that the decoder has already, so that nothing is rounded twice."""
    embedding = next(piece for piece in text.pieces if piece.name == "token_embd.weight")
    return find_target(embedding.tensor.dtype, {})


def write_gguf_folder(
    out: Path,
    pair: GGUFPair,
    *,
    gm: Mapping[str, Any],
    card: str,
    target: Target,
    quantizer: Quantizer | None = None,
    force: bool = False,
    extra_files: Mapping[str, bytes] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[str]:
    """Write a folder that appears when it is complete.

    Args:
        out: the folder.
        pair: from ``gguf_pair``.
        gm: provenance, for ``gm.json``.
        card: the text of ``README.md``.
        target: the types of the tensors.
        quantizer: makes the decoder's file, where gguf-py cannot; see ``plain_target`` for what it starts from.
        force: replace a model folder that is there.
        extra_files: more files for the folder, by name.
        progress: called as ``progress("write", bytes written, bytes in all)``.

    Returns:
        Notes for the user about types of tensors.

    Raises:
        UserError: ``out`` is not free, the disk is full or too small, or a value does not fit the type. Nothing is left
            behind, whatever the exception.
    """
    out = check_out(out, force=force)
    plain = plain_target(pair.text)
    files = {
        MODEL_FILE: (pair.text, plain if quantizer else target),
        MMPROJ_FILE: (pair.vision, target),
    }
    total = sum(file_bytes(model, kind) for model, kind in files.values())
    needed = total + (quantizer.num_bytes if quantizer else 0)
    check_space(out, needed + needed // 100 + SIDE_FILES_BYTES)
    done = 0

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress("write", done, total)

    notes: list[str] = []
    with new_folder(out, force=force) as folder:
        for name, (model, kind) in files.items():
            first = PLAIN_FILE if quantizer is not None and name == MODEL_FILE else name
            notes += write_gguf(folder / first, model, kind, wrote)
        if quantizer is not None:
            notes += quantizer.run(folder / PLAIN_FILE, folder / MODEL_FILE)
            (folder / PLAIN_FILE).unlink()
        texts = {"gm.json": json_text(dict(gm)), "README.md": card}
        for name, content in ({key: text.encode() for key, text in texts.items()} | dict(extra_files or {})).items():
            (folder / name).write_bytes(content)
    return notes
