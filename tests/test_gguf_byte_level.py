"""Byte-level BPE in a GGUF file: llama.cpp tokenizes as the tokenizers library does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from fixtures import tiny_config, tiny_model
from gguf_files import as_tensors, tiny_processor
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_byte_pairs import RUNS, TEXTS, nfc, write_ranks, write_vocabulary

from gm_mlx.chat_template import PHI
from gm_mlx.convert.to_gguf.byte_level import QWEN_WORDS, read_byte_level
from gm_mlx.convert.to_gguf.folder import gguf_pair
from gm_mlx.convert.to_gguf.tokenizer import CONTROL, NORMAL, UNUSED, USER_DEFINED, tokenizer_metadata
from gm_mlx.convert.to_gguf.types import find_target
from gm_mlx.convert.to_gguf.write import write_gguf
from gm_mlx.convert.tokenizers import WORDS, converted_files
from gm_mlx.errors import UserError
from gm_mlx.processor import Processor
from gm_mlx.tokenizer import make_tokenizer
from gm_mlx.weights import named_arrays

ROWS = 1600
KINDS = ("phi", "qwen", "stablelm")
Pair = tuple[Processor, llama_cpp.Llama]
# What goes wrong first: contractions, digits, runs of spaces and line ends, scripts, half and whole emoji.
SNIPPETS = [
    *TEXTS,
    *RUNS[:3],
    "'Re",
    "'LL",
    "I'M",
    "12345",
    " 7",
    "  ",
    "\r\n",
    "\n\n\n",
    "\t",
    "é",
    "🙂",
    "ſ",
    "İ",
    "\u3000",
    "²",
]
TEXT = st.text(max_size=60) | st.lists(st.sampled_from(SNIPPETS), max_size=8).map("".join)


def processor_of(kind: str, folder: Path) -> Processor:
    """MoE-LLaVA's tokenizer of a family, trained on a few lines."""
    write = {
        "phi": write_vocabulary,
        "qwen": lambda folder: write_ranks(folder, "qwen.tiktoken"),
        "stablelm": lambda folder: write_ranks(folder, "arcade100k.tiktoken"),
    }[kind]
    files = converted_files(write(folder))
    tokenizer = make_tokenizer(files, folder, PHI.controls)
    other = tiny_processor(tiny_config(), folder / "other")
    return replace(other, tokenizer=tokenizer, template=PHI, image_token_id=-200, stop_ids=frozenset())


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Processors, and llama.cpp with the same vocabularies."""
    config = tiny_config(vocab_size=ROWS)
    tensors, found = as_tensors(named_arrays(tiny_model(0, config))), {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        processor = processor_of(kind, folder)
        pair = gguf_pair(config, tensors, processor, name="tiny")
        write_gguf(folder / "model.gguf", pair.text, find_target("F32", {}))
        found[kind] = (processor, llama_cpp.Llama(str(folder / "model.gguf"), vocab_only=True, verbose=False))
    return found


@pytest.mark.parametrize("kind", KINDS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=TEXT)
@example(text=" ".join(SNIPPETS))
def test_tokenizes_as_the_tokenizers_library_does(pairs: dict[str, Pair], kind: str, text: str) -> None:
    processor, model = pairs[kind]
    data = nfc(text).encode("utf-8", errors="replace")
    ours = processor.tokenizer.encode(data.decode())
    assert (model.tokenize(data, add_bos=False, special=False) if data else []) == ours
    assert b"".join(processor.tokenizer.token_bytes(token) for token in ours) == data


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_has_a_token(kind: str, pairs: dict[str, Pair]) -> None:
    processor, model = pairs[kind]
    keys = tokenizer_metadata(processor, ROWS)
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    tokenizer = processor.tokenizer
    assert len(tokens) == len(types) == len(set(tokens)) == model.n_vocab() == ROWS
    assert tokens[: tokenizer.vocab_size] == [
        tokenizer.piece_of(token) or f"[PAD{token}]" for token in range(tokenizer.vocab_size)
    ]
    assert types[tokenizer.eos_id or 0] == CONTROL and model.token_eos() == tokenizer.eos_id
    assert types[0] == NORMAL and types[-1] == UNUSED
    assert (USER_DEFINED in types) == (kind == "phi")  # runs of spaces
    assert keys["tokenizer.ggml.pre"] == ("gpt-2" if kind == "phi" else "qwen2")


def test_words_are_cut_as_the_converter_says() -> None:
    assert QWEN_WORDS == WORDS


def spec(folder: Path) -> dict[str, Any]:
    return json.loads(converted_files(write_ranks(folder))["tokenizer.json"])


REFUSED: list[tuple[str, Any, str]] = [
    ("normalizer", {"type": "NFKC"}, "normalizes text by 'NFKC'"),
    ("normalizer", {"type": "Sequence", "normalizers": []}, "normalizes text by 'Sequence'"),
    ("pre_tokenizer", {"type": "Metaspace"}, "is not byte-level BPE"),
    ("pre_tokenizer", {"type": "ByteLevel", "use_regex": False}, "is not byte-level BPE"),
    ("pre_tokenizer", None, "is not byte-level BPE"),
    ("added_tokens", [{"content": "<a>", "id": 9, "special": True, "lstrip": True}], "'<a>' swallows"),
]


@pytest.mark.parametrize("key, value, message", REFUSED)
def test_refuses_what_llama_cpp_tokenizes_otherwise(key: str, value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_byte_level(json.dumps({**spec(tmp_path), key: value}).encode())


def test_refuses_a_token_that_no_merges_lead_to(tmp_path: Path) -> None:
    table = spec(tmp_path)
    table["model"]["ignore_merges"] = True
    read_byte_level(json.dumps(table).encode())
    last = table["model"]["merges"].pop()
    with pytest.raises(UserError, match="no merges lead to"):
        read_byte_level(json.dumps(table).encode())
    table["model"]["ignore_merges"] = False
    assert last not in read_byte_level(json.dumps(table).encode())[1]
