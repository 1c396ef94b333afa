"""Reading ``.tiktoken`` files, and finding the merges that lead to their tokens.

A rank file has a line for every token: its bytes in base64, a space, and its rank, which is its id too. Tiktoken joins
the two neighbours whose joined bytes have the lowest rank, again and again. The ``tokenizers`` library joins neighbours
that a list of merges has, in the list's order. So every token needs the two parts that it is joined from: those which
tiktoken's own procedure leaves of its bytes before the last step. In a longer text the same two parts come together,
because no step across a token's edge comes before the step that completes it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path

from gm_mlx.errors import UserError

# Qwen's file has 2.6 MB and 151,643 tokens, StableLM's 1.7 MB and 100,256; the longest token is 128 spaces.
MOST_BYTES = 32 << 20
MOST_TOKEN_BYTES = 512


def read_ranks(file: Path) -> dict[bytes, int]:
    """Tokens and their ranks, which are 0, 1, 2 and so on without a gap.

    Raises:
        UserError: the file is not a sound rank file; the message names the line.
    """
    bounded(file, "rank file")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        token, rank = _entry(file, number, line)
        if token in ranks:
            raise UserError(f"{file}: line {number} repeats the token {token!r}; fetch the file again")
        ranks[token] = rank
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"{file}: its {len(ranks)} ranks are not 0, 1, 2 and so on; fetch the file again")
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise UserError(f"{file}: the byte {missing:#04x} is no token, so not all text can be read; fetch it again")
    return ranks


def bounded(file: Path, what: str = "tokenizer's file") -> Path:
    """A file, if it is not too large for what it is said to be."""
    if file.is_file() and file.stat().st_size > MOST_BYTES:
        raise UserError(f"{file}: larger than {MOST_BYTES >> 20} MB, so no {what}; fetch it again")
    return file


def _entry(file: Path, number: int, line: bytes) -> tuple[bytes, int]:
    try:
        encoded, rank = line.split()
        token = base64.b64decode(encoded, validate=True)
        if not rank.isdigit() or len(rank) > 8 or not 0 < len(token) <= MOST_TOKEN_BYTES:
            raise ValueError
    except (ValueError, binascii.Error):
        raise UserError(f"{file}: line {number} is not a token in base64 and its rank; fetch the file again") from None
    return token, int(rank)


def merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs of tokens that are joined, in the order of what they make.

    A token to which no merges lead is not among them: tiktoken gives it only where it is a whole piece of text.
    """
    pairs = (last_merge(token, ranks) for token in sorted(ranks, key=ranks.__getitem__))
    return [pair for pair in pairs if pair]


def last_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that a token is joined from, or None for a single byte or a token that joining does not reach."""
    if len(token) == 1:
        return None
    parts = [token[at : at + 1] for at in range(len(token))]
    never = len(ranks)
    joined = [ranks.get(token[at : at + 2], never) for at in range(len(token) - 1)]
    while len(parts) > 2:
        at = joined.index(min(joined))
        if joined[at] == never:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del joined[at]
        if at > 0:
            joined[at - 1] = ranks.get(parts[at - 1] + parts[at], never)
        if at < len(joined):
            joined[at] = ranks.get(parts[at] + parts[at + 1], never)
    return parts[0], parts[1]
