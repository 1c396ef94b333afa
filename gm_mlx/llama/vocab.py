"""A GGUF file's vocabulary as a ``gm_mlx.tokenizer.Tokenizer``, with llama.cpp doing the work.

So a processor made for SentencePiece runs on a GGUF file and gives the same ids: llama.cpp's ``llama`` tokenizer merges
as SentencePiece's BPE does. Control tokens in a user's text stay text, and the space that some tokenizers put in front
is added by ``Tokenizer.encode`` and not by llama.cpp, which is told so when the model is loaded.
"""

from __future__ import annotations

import ctypes
from functools import cached_property
from typing import Any

from gm_mlx.gguf_file import GGUFHeader
from gm_mlx.llama.binding import library
from gm_mlx.llama.model import SPACE_PREFIX
from gm_mlx.tokenizer import Tokenizer

TOKENS = "tokenizer.ggml.tokens"
TYPES = "tokenizer.ggml.token_type"
UNUSED = 5  # of TYPES
SHORT = 64  # bytes; longer pieces are rare and are asked for twice


class Vocabulary:
    """What llama.cpp knows about the tokens of a model.

    Args:
        header: the text model's file.
        handle: llama.cpp's vocabulary of it.
    """

    def __init__(self, header: GGUFHeader, handle: Any) -> None:
        self._c = library()
        self._header = header
        self._handle = handle
        self._buffer = ctypes.create_string_buffer(SHORT)

    @cached_property
    def size(self) -> int:
        """The largest id in use + 1. Behind it are rows that only pad the embedding."""
        tokens, types = self._header.metadata[TOKENS], self._header.metadata.get(TYPES, [])
        padding = 0
        for kind, text in zip(reversed(types), reversed(tokens), strict=False):
            if kind != UNUSED or not text.startswith("[PAD"):
                break
            padding += 1
        return len(tokens) - padding

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {piece: token for token, piece in enumerate(self._header.metadata[TOKENS][: self.size])}

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text, without BOS and EOS; ``special`` also finds control tokens by their names in it."""
        content = text.encode("utf-8", errors="replace")
        room = len(content) + 1
        ids = (self._c.llama_token * room)()
        count = self._c.llama_tokenize(self._handle, content, len(content), ids, room, False, special)
        if count < 0:
            ids = (self._c.llama_token * -count)()
            count = self._c.llama_tokenize(self._handle, content, len(content), ids, -count, False, special)
        return list(ids[:count])

    def bytes_of(self, token: int, *, special: bool = False) -> bytes:
        """What a token adds to a text; for a control token nothing, or its name with ``special``."""
        convert, buffer = self._c.llama_token_to_piece, self._buffer
        length = convert(self._handle, token, buffer, len(buffer), 0, special)
        if length < 0:
            buffer = ctypes.create_string_buffer(-length)
            length = convert(self._handle, token, buffer, -length, 0, special)
        return buffer.raw[:length]

    def is_special(self, token: int) -> bool:
        """Whether a token stands for no text."""
        hidden = self._c.LLAMA_TOKEN_ATTR_CONTROL | self._c.LLAMA_TOKEN_ATTR_UNKNOWN
        return bool(self._c.llama_vocab_get_attr(self._handle, token) & hidden)

    def ends_answer(self, token: int) -> bool:
        """Whether a model says with this token that it has finished."""
        return bool(self._c.llama_vocab_is_eog(self._handle, token))

    @cached_property
    def bos(self) -> int | None:
        """The token that opens a sequence."""
        return self._known(self._c.llama_vocab_bos)

    @cached_property
    def eos(self) -> int | None:
        """The token that ends a text."""
        return self._known(self._c.llama_vocab_eos)

    @cached_property
    def adds_bos(self) -> bool:
        """Whether a prompt begins with BOS."""
        return self.bos is not None and bool(self._c.llama_vocab_get_add_bos(self._handle))

    def name_of(self, token: int | None) -> str:
        """A token as chat templates write it; empty for none."""
        return "" if token is None else self._header.metadata[TOKENS][token]

    def tokenizer(self) -> Tokenizer:
        """The vocabulary as the rest of gm-mlx knows tokenizers; the model must be loaded with ``keep_spaces``."""
        return Tokenizer(
            bos_id=self.bos,
            eos_id=self.eos,
            pad_id=self._known(self._c.llama_vocab_pad),
            vocab_size=self.size,
            prefix_space=bool(self._header.metadata.get(SPACE_PREFIX, True)),
            _encode=self.encode,
            _id_of=self._ids.get,
            _piece_of=self.name_of,
            _bytes_of=self.bytes_of,
            _is_special=self.is_special,
        )

    def _known(self, get: Any) -> int | None:
        token = get(self._handle)
        return token if 0 <= token < len(self._header.metadata[TOKENS]) else None
