"""Tiny tokenizers for tests, trained in a second: SentencePiece with byte fallback, and two kinds of tokenizer.json."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import sentencepiece

TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "What colour is the shape in the picture? It is a red circle.",
    "user model USER: ASSISTANT: A chat between a curious user and an artificial intelligence assistant.",
    "Hello world, how many small blue squares are there? There are 12 of them!",
]
TURNS = ("<start_of_turn>", "<end_of_turn>")


@functools.cache
def sentencepiece_model(prefix_space: bool = False, user_defined: bool = False) -> bytes:
    """Trains a model with Gemma's control tokens.

    Args:
        prefix_space: A text is encoded as if a space stood before it, as Llama's model does.
        user_defined: The turn markers are user-defined symbols, as in Gemma's model, and not control symbols.
    """
    out = io.BytesIO()
    markers: dict[str, Any] = {"user_defined_symbols" if user_defined else "control_symbols": list(TURNS)}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 3),
        model_writer=out,
        model_type="bpe",
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        add_dummy_prefix=prefix_space,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        minloglevel=2,
        **markers,
    )
    return out.getvalue()


def write_sentencepiece(folder: Path, prefix_space: bool = False, user_defined: bool = False) -> Path:
    """Writes ``tokenizer.model`` and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(prefix_space, user_defined))
    return folder


@functools.cache
def tokenizers_json(kind: str) -> str:
    """Trains a tokenizer.json: ``byte_level`` (GPT-2, Phi), ``prepend`` (Llama) or ``metaspace`` (newer Llama)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    special = ["<pad>", "<eos>", "<bos>", "<unk>", TURNS[0]]
    if kind == "byte_level":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        if kind == "prepend":
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        replace = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(replace)
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        alphabet = []
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False, max_token_length=12
    )
    backend.train_from_iterator(TEXT * 3, trainer)
    backend.add_tokens([AddedToken(TURNS[1], special=False, normalized=False), AddedToken("<tab>", normalized=False)])
    spec = json.loads(backend.to_str())
    # Byte pieces must be ordinary vocabulary entries, as they are in converted Llama tokenizers.
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(spec)


def write_tokenizers(folder: Path, kind: str) -> Path:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json`` and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizers_json(kind), encoding="utf-8")
    config = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
