"""The tokenizer's vocabulary for llama.cpp: that of a SentencePiece model, or of a byte-level ``tokenizer.json``.

The second kind is read in ``byte_level``. Of the first kind, BPE models can be written: llama.cpp's ``llama`` tokenizer
merges the pair with the best score first, which is what SentencePiece's BPE does. It knows no normalization of text and
no unigram models, so tokenizers with either are refused.

SentencePiece's Python package gives pieces and scores, but not the types of all pieces, so they are read from the model
file itself, a Protocol Buffers message: ``pieces`` (field 1) of piece (1), score (2) and type (3); ``trainer_spec`` (2)
with ``model_type`` (3); ``normalizer_spec`` (3) with ``precompiled_charsmap`` (2).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

from gm_mlx.chat_template import to_jinja
from gm_mlx.convert.to_gguf.byte_level import read_byte_level
from gm_mlx.errors import UserError
from gm_mlx.processor import Processor
from gm_mlx.tokenizer import Tokenizer

BPE = 2  # of trainer_spec.model_type; unigram models have 1 or, being the default, nothing
# Types of tokens, the same numbers in SentencePiece and in llama.cpp.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
PADDING_SCORE = -10000.0
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
END_OF_TURN = ("<end_of_turn>", "<|end_of_turn|>", "<|im_end|>")


def tokenizer_metadata(processor: Processor, num_rows: int) -> dict[str, Any]:
    """The keys ``tokenizer.*`` of a file.

    Args:
        processor: the model's processor.
        num_rows: rows of the embedding. llama.cpp wants a token for each, so unused ones are added.

    Raises:
        UserError: the tokenizer is not of a kind that llama.cpp's ``llama`` tokenizer computes alike.
    """
    tokenizer, template = processor.tokenizer, processor.template
    vocabulary = _sentencepiece if "tokenizer.model" in tokenizer.files else _byte_level
    keys = vocabulary(tokenizer, num_rows)
    unknown = next((token for token, kind in enumerate(keys["token_type"]) if kind == UNKNOWN), None)
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "unknown_token_id": unknown,
        "padding_token_id": tokenizer.pad_id,
        "eot_token_id": next((token for name in END_OF_TURN if (token := tokenizer.id_of(name)) is not None), None),
    }
    return {
        **{f"tokenizer.ggml.{key}": value for key, value in keys.items()},
        **{f"tokenizer.ggml.{key}": token for key, token in ids.items() if token is not None},
        "tokenizer.ggml.add_bos_token": template.bos,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": tokenizer.prefix_space,
        "tokenizer.chat_template": to_jinja(template),
    }


def _sentencepiece(tokenizer: Tokenizer, num_rows: int) -> dict[str, Any]:
    pieces = list(_pieces(tokenizer.files["tokenizer.model"]))
    texts, scores, types = [], [], []
    for token in range(num_rows):
        text, score, kind = pieces[token] if token < len(pieces) else ("", PADDING_SCORE, UNUSED)
        if token >= len(pieces) and (added := tokenizer.piece_of(token)):
            text, kind = added, USER_DEFINED
        if tokenizer.is_special(token) and kind != UNKNOWN:
            kind = CONTROL
        # User-defined pieces are looked for in the text as it is, before its spaces are replaced.
        texts.append((text.replace(SPACE, " ") if kind == USER_DEFINED else text) or f"[PAD{token}]")
        scores.append(score)
        types.append(kind)
    return {"model": "llama", "pre": "default", "tokens": texts, "scores": scores, "token_type": types}


def _byte_level(tokenizer: Tokenizer, num_rows: int) -> dict[str, Any]:
    content = tokenizer.files["tokenizer.json"]
    pre, merges = read_byte_level(content)
    added = {token["id"] for token in json.loads(content).get("added_tokens", [])}
    texts, types = [], []
    for token in range(num_rows):
        text = tokenizer.piece_of(token)
        texts.append(text or f"[PAD{token}]")
        ordinary = USER_DEFINED if token in added else NORMAL
        types.append(CONTROL if tokenizer.is_special(token) else ordinary if text else UNUSED)
    return {"model": "gpt2", "pre": pre, "tokens": texts, "token_type": types, "merges": merges}


def _pieces(model: bytes) -> Iterator[tuple[str, float, int]]:
    """Text, score and type of each piece of a serialized SentencePiece model that llama.cpp computes alike."""
    try:
        fields = list(_fields(model))
        trainer = dict(_fields(next((value for number, value in fields if number == 2), b"")))
        normalizer = dict(_fields(next((value for number, value in fields if number == 3), b"")))
        pieces = [dict(_fields(value)) for number, value in fields if number == 1]
    except (IndexError, KeyError, TypeError, struct.error):
        raise UserError("tokenizer.model: not a SentencePiece model; copy it again from the original folder") from None
    if trainer.get(3, 1) != BPE:
        raise UserError("tokenizer.model: a unigram model, which llama.cpp tokenizes otherwise; it cannot be written")
    if normalizer.get(2):
        raise UserError("tokenizer.model: normalizes text, which llama.cpp does not; it cannot be written")
    for piece in pieces:
        yield piece[1].decode(), struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0], piece.get(3, NORMAL)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a Protocol Buffers message: int for a varint, else bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while at < len(message):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            yield number, varint()
            continue
        size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        if at + size > len(message):
            raise IndexError("a field is longer than its message")
        yield number, message[at : at + size]
        at += size
