"""The vocabulary of a ``tokenizer.json`` of the byte-level BPE kind for llama.cpp: Phi's, Qwen's and StableLM's.

llama.cpp's ``gpt2`` tokenizer cuts text into words, by a pattern that it has a name for (``tokenizer.ggml.pre``), and
merges within words as the tokenizers library does. Two differences are to be known:

- It does not normalize text. Qwen and StableLM normalize to NFC, where an accent behind its letter becomes part of the
  letter. What people type and what is on the web is NFC already, as a rule; for other text tokens differ.
- ``ignore_merges``: a word that is a token becomes that token even if merges do not lead to it. For these patterns
  llama.cpp has no such rule, so there must be no such token; this is checked.
"""

from __future__ import annotations

import json
from typing import Any

from gm_mlx.errors import UserError
from gm_mlx.tokenizer import BYTE_OF_CHAR

# How text is cut into words, by llama.cpp's name; patterns of a tokenizer.json, GPT-2's being built in.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {None: "gpt-2", QWEN_WORDS: "qwen2"}
NORMALIZERS = (None, "NFC")
REMEDY = "convert to a model folder instead"


def read_byte_level(content: bytes) -> tuple[str, list[str]]:
    """llama.cpp's name of the way in which text is cut into words, and the merges.

    Args:
        content: of a ``tokenizer.json`` that the tokenizers library reads.

    Raises:
        UserError: it is not byte-level BPE, or of a kind that llama.cpp tokenizes otherwise.
    """
    spec: dict[str, Any] = json.loads(content)
    model, normalizer = spec["model"], (spec.get("normalizer") or {}).get("type")
    pre = PRE_TOKENIZERS.get(_words(spec.get("pre_tokenizer") or {}))
    if model.get("type") != "BPE" or pre is None:
        raise UserError(
            "tokenizer.json: is not byte-level BPE with GPT-2's or Qwen's words, and only these can be written; "
            "put the original model's tokenizer.model into the source's folder if it has one"
        )
    if normalizer not in NORMALIZERS:
        raise UserError(f"tokenizer.json: normalizes text by {normalizer!r}, which llama.cpp does not; {REMEDY}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise UserError(f"tokenizer.json: model.{key} is {model[key]!r}, which llama.cpp has not; {REMEDY}")
    for token in spec.get("added_tokens", []):
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise UserError(f"tokenizer.json: {token['content']!r} swallows what is around it in text; {REMEDY}")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if model.get("ignore_merges"):
        _check_merges(spec)
    return pre, merges


def _words(pre_tokenizer: dict[str, Any]) -> str | None:
    """The pattern by which text is cut into words, None for GPT-2's, or "" for what is no byte-level BPE."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if not steps or steps[-1].get("type") != "ByteLevel":
        return ""
    if len(steps) == 1:
        return None if steps[0].get("use_regex", True) else ""
    first, last = steps[0], steps[-1]
    split = len(steps) == 2 and first.get("type") == "Split" and first.get("behavior") == "Isolated"
    if not split or first.get("invert") or last.get("use_regex", True):
        return ""
    return str(first["pattern"].get("Regex", ""))


def _check_merges(spec: dict[str, Any]) -> None:
    """Refuse tokens that no merges lead to."""
    from tokenizers import Tokenizer

    bare = {**spec, "normalizer": None, "pre_tokenizer": None, "post_processor": None, "added_tokens": []}
    backend = Tokenizer.from_str(json.dumps({**bare, "model": {**spec["model"], "ignore_merges": False}}))
    added = {token["content"] for token in spec.get("added_tokens", [])}
    for text, token in spec["model"]["vocab"].items():
        if text not in added and BYTE_OF_CHAR.keys() >= set(text):
            made = [each.id for each in backend.model.tokenize(text)]
            if made != [token]:
                raise UserError(f"tokenizer.json: no merges lead to {text!r}, so llama.cpp would not find it; {REMEDY}")
