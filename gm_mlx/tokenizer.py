"""Text to token ids and back, for SentencePiece models and for ``tokenizer.json`` files.

What is special here:

- ``encode`` treats its input as plain text. A user who types ``<start_of_turn>`` or ``<image>`` gets the tokens that
  spell those characters, never the control token of that name, and no BOS or EOS is added.
- Every piece is a byte string, and text is the UTF-8 decoding of the joined bytes. Streaming and decoding at once
  therefore share one path and cannot disagree, and half a character is never shown.
- The leading space that Llama-type tokenizers put before a text is switched off in the backend and added by ``encode``
  itself, so that an answer can be tokenized as the continuation of a prompt.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gm_mlx.errors import UserError

# Names that are control tokens even where a tokenizer lists them as ordinary user-defined symbols, as Gemma's does.
CONTROL_NAMES = (
    *("<pad>", "<bos>", "<eos>", "<unk>", "<mask>", "<s>", "</s>"),
    *("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image>", "<image_soft_token>"),
    *("<|endoftext|>", "<|end_of_turn|>", "<|im_start|>", "<|im_end|>"),
)
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json")

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
# A later copy of an embedded protobuf message is merged into the first: these bytes at the end of a model mean
# normalizer_spec { add_dummy_prefix: false, remove_extra_whitespaces: false }.
_KEEP_SPACES = b"\x1a\x04\x18\x00\x20\x00"


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer in a form that does not depend on the library behind it; made by ``load_tokenizer``.

    Attributes:
        bos_id: Id that opens a sequence, or None.
        eos_id: Id that ends a text, or None.
        pad_id: Id that fills up a batch, or None.
        vocab_size: Largest id + 1. A model may have more embedding rows than that.
        prefix_space: Whether a text is encoded as if a space stood before it (Llama yes, Gemma no).
        files: The files the tokenizer was read from, by name; ``save`` writes them unchanged.
    """

    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    vocab_size: int
    prefix_space: bool
    _encode: Callable[[str], list[int]] = field(repr=False)
    _id_of: Callable[[str], int | None] = field(repr=False)
    _piece_of: Callable[[int], str] = field(repr=False)
    _bytes_of: Callable[[int], bytes] = field(repr=False)
    _is_special: Callable[[int], bool] = field(repr=False)
    files: dict[str, bytes] = field(repr=False, default_factory=dict)

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Encodes plain text; no BOS, no EOS, no control ids.

        Args:
            text: Any text. Lone surrogates, which no tokenizer can hold, become question marks.
            continues: The text goes on after other text, so the tokenizer's own leading space is left out.
        """
        if not text:
            return []
        if self.prefix_space and not continues:
            text = " " + text
        return self._encode(text.encode("utf-8", errors="replace").decode("utf-8"))

    def decode(self, ids: Iterable[int], skip_special: bool = True, *, continues: bool = False) -> str:
        """Decodes ids; the exact concatenation of what a ``Detokenizer`` streams.

        Args:
            ids: Token ids. Ids outside of the vocabulary (image slots, padded embedding rows) give no text.
            skip_special: Leave control tokens out; otherwise their names are written.
            continues: The ids go on after other text, so a leading space is part of the text.
        """
        stream = Detokenizer(self, skip_special=skip_special, continues=continues)
        return "".join([*(stream.add(token) for token in ids), stream.finish()])

    def id_of(self, piece: str) -> int | None:
        """Returns the id of exactly this piece or control token, or None."""
        return self._id_of(piece)

    def piece_of(self, token: int) -> str | None:
        """Returns the name of an id, or None outside of the vocabulary."""
        return self._piece_of(token) if 0 <= token < self.vocab_size else None

    def is_special(self, token: int) -> bool:
        """Tells whether an id is a control token, which ``encode`` never yields and ``decode`` leaves out."""
        return 0 <= token < self.vocab_size and self._is_special(token)

    def token_bytes(self, token: int, skip_special: bool = True) -> bytes:
        """Returns what one id adds to the text, as bytes: possibly nothing, possibly part of a character."""
        if not 0 <= token < self.vocab_size:
            return b""
        if self._is_special(token):
            return b"" if skip_special else self._piece_of(token).encode()
        return self._bytes_of(token)

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's own files into a folder that exists."""
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)


class Detokenizer:
    """Turns a stream of ids into a stream of text.

    A character that is spread over several byte pieces is held back until its last byte has come; bytes that are not
    UTF-8 become U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, continues: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drop_space = tokenizer.prefix_space and not continues

    def add(self, token: int) -> str:
        """Takes the next id and returns the text that it completes, which may be empty."""
        content = self._tokenizer.token_bytes(token, self._skip_special)
        if content and self._drop_space:
            self._drop_space = False
            content = content.removeprefix(b" ")
        return self._utf8.decode(content)

    def finish(self) -> str:
        """Returns what is left at the end: an unfinished character as U+FFFD, or nothing."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(folder: str | Path, controls: Iterable[str] = ()) -> Tokenizer:
    """Loads the tokenizer of a model folder: ``tokenizer.model`` if there is one, else ``tokenizer.json``.

    Args:
        folder: The model folder. ``tokenizer_config.json`` is read too if it is there, for added and special tokens,
            and so is ``added_tokens.json``, where transformers kept added tokens before 4.34.
        controls: Further tokens that text must never produce, such as a chat template's turn markers.

    Raises:
        UserError: No tokenizer in the folder, or a file that cannot be read.
    """
    folder = Path(folder)
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    return make_tokenizer(files, folder, controls)


def make_tokenizer(files: dict[str, bytes], folder: Path, controls: Iterable[str] = ()) -> Tokenizer:
    """Makes a tokenizer of the content of its files; see ``load_tokenizer``.

    Args:
        files: The files' content by name, of which at least one is a tokenizer.
        folder: Where they came from, for error messages.
        controls: As for ``load_tokenizer``.

    Raises:
        UserError: As for ``load_tokenizer``.
    """
    settings = _settings(folder, files)
    protected = {*CONTROL_NAMES, *controls, *settings.special}
    if "tokenizer.model" in files:
        return _from_sentencepiece(folder / "tokenizer.model", files, settings, protected)
    if "tokenizer.json" in files:
        return _from_tokenizers(folder / "tokenizer.json", files, settings, protected)
    raise UserError(f"{folder}: no tokenizer.model or tokenizer.json here; copy it from the original model's folder")


@dataclass(frozen=True)
class _Settings:
    """What two other files add: names of BOS, EOS and PAD, extra ids, and which of them are special."""

    names: dict[str, str]
    added: dict[str, int]
    special: set[str]


def _settings(folder: Path, files: dict[str, bytes]) -> _Settings:
    try:
        older = {content: int(token) for content, token in json.loads(files.get("added_tokens.json", b"{}")).items()}
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{folder / 'added_tokens.json'}: not a table of tokens and their ids ({error!r})") from error
    try:
        config = json.loads(files.get("tokenizer_config.json", b"{}"))
        # A token is written as its text or as {"content": its text, ...}.
        names = {
            key.removesuffix("_token"): token["content"] if isinstance(token, dict) else token
            for key, token in config.items()
            if key in ("bos_token", "eos_token", "pad_token", "unk_token") and token
        }
        entries = config.get("added_tokens_decoder", {})
        added = {entry["content"]: int(token) for token, entry in entries.items()}
        special = {entry["content"] for entry in entries.values() if entry.get("special")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'tokenizer_config.json'}: not a tokenizer configuration ({error!r})") from error
    return _Settings(names, older | added, special | set(names.values()))


def _from_sentencepiece(path: Path, files: dict[str, bytes], settings: _Settings, protected: set[str]) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    model = files["tokenizer.model"]
    try:
        original = SentencePieceProcessor(model_proto=model)
        size = original.get_piece_size()
    except Exception as error:  # the binding raises whatever its C++ side threw
        raise UserError(f"{path}: not a SentencePiece model; copy it again from the original folder") from error
    if not size:
        raise UserError(f"{path}: not a SentencePiece model; copy it again from the original folder")
    prefix_space = original.encode_as_pieces("a")[0].startswith(_SPACE)
    backend = SentencePieceProcessor(model_proto=_as_control(model, protected) + _KEEP_SPACES)
    by_id = {token: piece for piece, token in settings.added.items() if token >= size}

    def id_of(piece: str) -> int | None:
        token = backend.piece_to_id(piece)
        if backend.id_to_piece(token) == piece:
            return token
        return settings.added.get(piece)

    def piece_of(token: int) -> str:
        return backend.id_to_piece(token) if token < size else by_id.get(token, "")

    def bytes_of(token: int) -> bytes:
        piece = piece_of(token)
        if token < size and backend.is_byte(token):
            return bytes.fromhex(piece[3:5])
        return piece.replace(_SPACE, " ").encode()

    def is_special(token: int) -> bool:
        if token >= size:
            return by_id.get(token, "") in protected
        return backend.is_control(token) or backend.is_unknown(token)

    def special_id(key: str, own: int) -> int | None:
        named = id_of(settings.names[key]) if key in settings.names else None
        return named if named is not None else (own if own >= 0 else None)

    return Tokenizer(
        bos_id=special_id("bos", backend.bos_id()),
        eos_id=special_id("eos", backend.eos_id()),
        pad_id=special_id("pad", backend.pad_id()),
        vocab_size=max(size, *(token + 1 for token in by_id), 0),
        prefix_space=prefix_space,
        _encode=backend.encode,
        _id_of=id_of,
        _piece_of=piece_of,
        _bytes_of=bytes_of,
        _is_special=is_special,
        files=files,
    )


def _as_control(model: bytes, names: Iterable[str]) -> bytes:
    """Turns user-defined pieces (type 4) of a serialized SentencePiece model into control pieces (type 3).

    SentencePiece cuts user-defined pieces out of any text, control pieces never. A piece is serialized as
    ``0a <length> <text> 15 <score, 4 bytes> 18 <type>``, so one byte changes and no length does.
    """
    for name in names:
        text = name.encode()
        if len(text) > 127:  # its length would take two bytes; no control token has such a name
            continue
        pattern = re.escape(b"\x0a" + bytes([len(text)]) + text) + rb"\x15.{4}\x18\x04"
        model = re.sub(pattern, lambda match: match[0][:-1] + b"\x03", model, flags=re.DOTALL)
    return model


def _from_tokenizers(path: Path, files: dict[str, bytes], settings: _Settings, protected: set[str]) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    try:
        spec: dict[str, Any] = json.loads(files["tokenizer.json"])
        prefix_space = _without_prefix(spec)
        for token in spec.get("added_tokens", []):
            token["special"] = token["special"] or token["content"] in protected
        backend = Backend.from_str(json.dumps(spec))
    except Exception as error:  # the binding raises plain Exception for a file it cannot read
        raise UserError(f"{path}: not a tokenizer of the tokenizers library ({error})") from error
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # spell special tokens out instead of recognizing them

    added = {token["id"]: token["content"] for token in spec.get("added_tokens", [])}
    special = {token["id"] for token in spec.get("added_tokens", []) if token["special"]}
    byte_level = '"ByteLevel"' in json.dumps(spec.get("decoder"))

    def piece_of(token: int) -> str:
        return backend.id_to_token(token) or ""

    def bytes_of(token: int) -> bytes:
        piece = piece_of(token)
        if token in added:
            return piece.encode()
        if byte_level:
            return bytes(BYTE_OF_CHAR[char] for char in piece)
        byte = _BYTE_PIECE.fullmatch(piece)
        return bytes.fromhex(byte[1]) if byte else piece.replace(_SPACE, " ").encode()

    def special_id(key: str) -> int | None:
        return backend.token_to_id(settings.names[key]) if key in settings.names else None

    return Tokenizer(
        bos_id=special_id("bos"),
        eos_id=special_id("eos"),
        pad_id=special_id("pad"),
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
        prefix_space=prefix_space,
        _encode=lambda text: backend.encode(text, add_special_tokens=False).ids,
        _id_of=backend.token_to_id,
        _piece_of=piece_of,
        _bytes_of=bytes_of,
        _is_special=special.__contains__,
        files=files,
    )


def _without_prefix(node: Any) -> bool:
    """Switches every leading-space rule of a ``tokenizer.json`` off, in place; tells whether there was one."""
    children = node if isinstance(node, list) else [node.get(key) for key in _PREFIX_HOLDERS] if node else []
    found = [_without_prefix(child) for child in children]
    for kind, key, off in _PREFIX_RULES:
        if isinstance(node, dict) and node.get("type") == kind and key in node:
            found.append(node[key] not in (off, False))
            node[key] = off
    return any(found)


_PREFIX_HOLDERS = ("normalizer", "pre_tokenizer", "normalizers", "pretokenizers")
_PREFIX_RULES = (
    ("Prepend", "prepend", ""),
    ("Metaspace", "prepend_scheme", "never"),
    ("Metaspace", "add_prefix_space", False),  # the older spelling
    ("ByteLevel", "add_prefix_space", False),
)


def _byte_alphabet() -> dict[str, int]:
    """Returns the printable characters by which byte-level BPE (GPT-2, Qwen, Phi) writes the 256 bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTE_OF_CHAR = _byte_alphabet()
