"""The tokenizer's vocabulary for llama.cpp: pieces, scores and types of a SentencePiece model of the BPE kind.

llama.cpp's ``llama`` tokenizer merges the pair with the best score first, which is what SentencePiece's BPE does. It
knows no normalization of text and no unigram models, so tokenizers with either are refused.

SentencePiece's Python package gives pieces and scores, but not the types of all pieces, so they are read from the model
file itself, a Protocol Buffers message: ``pieces`` (field 1) of piece (1), score (2) and type (3); ``trainer_spec`` (2)
with ``model_type`` (3); ``normalizer_spec`` (3) with ``precompiled_charsmap`` (2).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from gm_mlx.chat_template import to_jinja
from gm_mlx.errors import UserError
from gm_mlx.processor import Processor

BPE = 2  # of trainer_spec.model_type; unigram models have 1 or, being the default, nothing
# Types of tokens, the same numbers in SentencePiece and in llama.cpp.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
PADDING_SCORE = -10000.0
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
END_OF_TURN = "<end_of_turn>"


def tokenizer_metadata(processor: Processor, num_rows: int) -> dict[str, Any]:
    """The keys ``tokenizer.*`` of a file.

    Args:
        processor: the model's processor.
        num_rows: rows of the embedding. llama.cpp wants a token for each, so unused ones are added.

    Raises:
        UserError: the tokenizer is not of a kind that llama.cpp's ``llama`` tokenizer computes alike.
    """
    tokenizer, template = processor.tokenizer, processor.template
    model = tokenizer.files.get("tokenizer.model")
    if model is None:
        raise UserError(
            "the tokenizer is a tokenizer.json, and GGUF files are written from a SentencePiece tokenizer.model; put "
            "the original model's tokenizer.model into the source's folder"
        )
    pieces = list(_pieces(model))
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
    unknown = next((token for token, kind in enumerate(types) if kind == UNKNOWN), None)
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "unknown_token_id": unknown,
        "padding_token_id": tokenizer.pad_id,
        "eot_token_id": tokenizer.id_of(END_OF_TURN),
    }
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        **{f"tokenizer.ggml.{key}": token for key, token in ids.items() if token is not None},
        "tokenizer.ggml.add_bos_token": template.bos,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": tokenizer.prefix_space,
        "tokenizer.chat_template": to_jinja(template),
    }


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
