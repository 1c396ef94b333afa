"""The vocabulary in a GGUF file: llama.cpp tokenizes as SentencePiece does."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import llama_cpp
import pytest
import sentencepiece
from fixtures import tiny_config
from gguf_files import gguf_folder, tiny_processor
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import TEXT, TURNS, sentencepiece_model, write_sentencepiece, write_tokenizers

from gm_mlx.chat_template import GEMMA, V1
from gm_mlx.convert.to_gguf.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, tokenizer_metadata
from gm_mlx.errors import UserError
from gm_mlx.processor import Processor
from gm_mlx.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Processor, llama_cpp.Llama]:
    """A processor, and llama.cpp with the same vocabulary."""
    folder = gguf_folder(tmp_path_factory.mktemp("tokenizer") / "gguf")
    model = llama_cpp.Llama(str(folder / "model.gguf"), vocab_only=True, verbose=False)
    return tiny_processor(tiny_config(), folder.with_name("processor")), model


@given(text=st.text(max_size=60) | st.lists(st.sampled_from([*TEXT, *TURNS, "  ", "\n", "é", "🙂", "\0"])).map("".join))
def test_tokenizes_as_sentencepiece_does(pair: tuple[Processor, llama_cpp.Llama], text: str) -> None:
    processor, model = pair
    data = text.encode("utf-8", errors="replace")
    ours = processor.tokenizer.encode(data.decode())
    assert (model.tokenize(data, add_bos=False, special=False) if data else []) == ours


def test_every_row_has_a_token(tmp_path: Path) -> None:
    processor = tiny_processor(tiny_config(), tmp_path)
    keys = tokenizer_metadata(processor, 512)
    own = processor.tokenizer.vocab_size
    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    tokens, scores, types = (keys[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    assert len(tokens) == len(scores) == len(types) == 512 and len(set(tokens)) == 512
    for token in range(own):
        assert tokens[token] == model.id_to_piece(token)
        assert scores[token] == model.get_score(token)
        kind = UNKNOWN if model.is_unknown(token) else CONTROL if model.is_control(token) else NORMAL
        assert types[token] == (BYTE if model.is_byte(token) else kind)
    assert set(types[own:]) == {UNUSED} and tokens[own] == f"[PAD{own}]"
    ids = {name: keys[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "unknown", "padding", "eot")}
    assert ids == {"bos": 2, "eos": 1, "unknown": 3, "padding": 0, "eot": model.piece_to_id("<end_of_turn>")}
    assert keys["tokenizer.ggml.add_bos_token"] is True and keys["tokenizer.ggml.add_space_prefix"] is False


def test_user_defined_markers_become_control_tokens(tmp_path: Path) -> None:
    """As Gemma's tokenizer has them: a user who types one must not end a turn."""
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path, user_defined=True), GEMMA.controls)
    processor = replace(tiny_processor(tiny_config(), tmp_path / "other"), tokenizer=tokenizer)
    types = tokenizer_metadata(processor, 512)["tokenizer.ggml.token_type"]
    assert {types[tokenizer.id_of(name) or 0] for name in TURNS} == {CONTROL}


def test_a_leading_space_is_llama_cpps_business(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path, prefix_space=True), ())
    processor = replace(tiny_processor(tiny_config(), tmp_path / "other"), tokenizer=tokenizer, template=V1)
    assert tokenizer_metadata(processor, 512)["tokenizer.ggml.add_space_prefix"] is True


def trained(folder: Path, **options: object) -> Processor:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 3), model_writer=out, vocab_size=400, hard_vocab_limit=False, byte_fallback=True,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, minloglevel=2, control_symbols=list(TURNS), **options,
    )  # fmt: skip
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    return replace(tiny_processor(tiny_config(), folder.with_name("o")), tokenizer=load_tokenizer(folder, ()))


def test_refuses_what_llama_cpp_tokenizes_otherwise(tmp_path: Path) -> None:
    unigram = trained(tmp_path / "unigram", model_type="unigram", normalization_rule_name="identity")
    with pytest.raises(UserError, match="unigram"):
        tokenizer_metadata(unigram, 512)
    normalizing = trained(tmp_path / "nfkc", model_type="bpe", normalization_rule_name="nfkc")
    with pytest.raises(UserError, match="normalizes"):
        tokenizer_metadata(normalizing, 512)
    fast = load_tokenizer(write_tokenizers(tmp_path / "fast", "metaspace"), ())
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        tokenizer_metadata(replace(unigram, tokenizer=fast), 512)
    broken = replace(fast, files={"tokenizer.model": sentencepiece_model()[:-7]})
    with pytest.raises(UserError, match="not a SentencePiece model"):
        tokenizer_metadata(replace(unigram, tokenizer=broken), 512)
