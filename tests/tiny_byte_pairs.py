"""Tiny byte-level BPE files for tests, trained in a second: tiktoken's rank files, and vocab.json with merges.txt."""

from __future__ import annotations

import base64
import functools
import json
import unicodedata
from pathlib import Path

from tiny_tokenizer import TEXT

from gm_mlx.convert.tokenizers import WORDS
from gm_mlx.tokenizer import BYTE_OF_CHAR

TEXTS = [
    *TEXT,
    "Was ist das für ein Vögelchen? C'est un café à Zürich, où l'été finit déjà. ¿Qué color tiene el ñandú?",
    "Это маленький красный круг на синем фоне, а это большой зелёный треугольник.",
    "这张图片里有什么？一只红色的小猫坐在桌子上。この写真には何が写っていますか。이 사진에는 무엇이 있습니까?",
    "ما هذا الشكل في الصورة؟ इस चित्र में क्या है? ภาพนี้คืออะไร",
    "I'm sure they're HERE, it'll work; WE'VE won, DON'T ask who'd say it's 12345 or 67890.",
    "🙂🙃 👩‍👩‍👧‍👦 🇨🇭 ❤️ e\u0301te\u0301 a\u0308rger",
    "def f(x):\n    if x > 1:\n        return x * 2\n\n\n\t\tpass  # \r\n\r\n   \n",
]
# Phi-2 has runs of spaces and tabs as added tokens, the longest first, and MoE-LLaVA added <|extra_0|> for padding.
RUNS = [*(" " * size for size in range(31, 1, -1)), *("\t" * size for size in range(9, 1, -1))]


@functools.cache
def trained(words: str | None = WORDS, size: int = 1200) -> tuple[dict[str, int], list[str]]:
    """Trains byte-level BPE.

    Args:
        words: How text is cut into words; GPT-2's way if it is None.
        size: How many tokens to make, the 256 bytes included.

    Returns:
        Ids by the tokens' spelling, and merges, both in the order in which they were learnt.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    split = [] if words is None else [pre_tokenizers.Split(Regex(words), "isolated")]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [" ".join(pair) for pair in model["merges"]]


def ranks() -> dict[bytes, int]:
    """The tokens of ``trained`` as tiktoken has them."""
    return {bytes(BYTE_OF_CHAR[char] for char in name): rank for name, rank in trained()[0].items()}


def rank_lines(tokens: dict[bytes, int]) -> bytes:
    """The content of a rank file."""
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in tokens.items()]
    return b"".join(lines)


def write_ranks(folder: Path, name: str = "qwen.tiktoken", tokens: dict[bytes, int] | None = None) -> Path:
    """Writes a rank file and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(rank_lines(ranks() if tokens is None else tokens))
    return folder


def write_vocabulary(folder: Path, kind: str = "CodeGenTokenizer", size: int = 1200) -> Path:
    """Writes vocab.json, merges.txt, added_tokens.json and tokenizer_config.json as MoE-LLaVA's Phi-2 has them."""
    vocabulary, merges = trained(None if kind == "CodeGenTokenizer" else WORDS, size)
    vocabulary = {**vocabulary, "<|endoftext|>": len(vocabulary)}
    added = {name: len(vocabulary) + index for index, name in enumerate([*RUNS, "<|extra_0|>"])}
    config = {"tokenizer_class": kind, "pad_token": "<|extra_0|>", "unk_token": "<|extra_0|>"}
    config |= {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "add_prefix_space": False}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)
