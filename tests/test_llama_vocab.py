"""llama.cpp's vocabulary gives the ids of SentencePiece, and text comes back byte by byte."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_gguf import text_keys, text_tensors, write
from tiny_tokenizer import write_sentencepiece

from gm_mlx.chat_template import GEMMA
from gm_mlx.convert.to_gguf.tokenizer import tokenizer_metadata
from gm_mlx.gguf_file import read_header
from gm_mlx.hub import find_model
from gm_mlx.llama.model import LlamaModel
from gm_mlx.llama.vocab import Vocabulary
from gm_mlx.llama.worker import Worker
from gm_mlx.processor import Processor
from gm_mlx.tokenizer import Detokenizer, Tokenizer, load_tokenizer

ROWS = 900  # more than any of the tokenizers has tokens


class Both(NamedTuple):
    """The same tokenizer in both libraries."""

    ours: Tokenizer
    theirs: Tokenizer


@pytest.fixture(scope="module", params=["gm-tiny", "gemma", "llama"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    folder = tmp_path_factory.mktemp("vocab")
    if request.param == "gm-tiny":
        tokenizer = load_tokenizer(find_model(), GEMMA.controls)
    else:
        write_sentencepiece(folder, prefix_space=request.param == "llama", user_defined=request.param == "gemma")
        tokenizer = load_tokenizer(folder, GEMMA.controls)
    processor = Processor(tokenizer, GEMMA, None, -200, 0)
    keys = {key: value for key, value in text_keys().items() if not key.startswith("tokenizer")}
    path = write(folder / "x.gguf", "llama", {**keys, **tokenizer_metadata(processor, ROWS)}, text_tensors(ROWS))
    header = read_header(path)
    model = LlamaModel(header, worker=Worker(), keep_spaces=True)
    yield Both(Vocabulary(header, model.vocab).tokenizer(), tokenizer)
    model.close()


def test_what_a_tokenizer_says_of_itself(both: Both) -> None:
    for name in ("bos_id", "eos_id", "pad_id", "vocab_size", "prefix_space"):
        assert getattr(both.ours, name) == getattr(both.theirs, name)
    for token in range(-1, ROWS + 1):
        assert both.ours.is_special(token) == both.theirs.is_special(token)
        assert both.ours.token_bytes(token) == both.theirs.token_bytes(token), token
        if both.theirs.is_special(token):
            assert both.ours.id_of(both.theirs.piece_of(token) or "") == token
    assert both.ours.id_of("no such piece") is None


WORDS = (
    *("<start_of_turn>", "<end_of_turn>", "<bos>", "<image>", "<0x41>"),
    *("▁", "red circle", "  ", "\n\n", "é", "🎉", "\0"),
)
TEXTS = st.text(max_size=40) | st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=12).map("".join)


@given(text=TEXTS, continues=st.booleans())
@example(text=" a  b ", continues=False)
@example(text="<start_of_turn>user\n", continues=False)
@example(text="\ud800", continues=False)
@example(text="x" * 5000, continues=True)
def test_ids_are_those_of_sentencepiece(both: Both, text: str, continues: bool) -> None:
    ids = both.ours.encode(text, continues=continues)
    assert ids == both.theirs.encode(text, continues=continues)
    assert both.ours.decode(ids, continues=continues) == both.theirs.decode(ids, continues=continues)


@given(ids=st.lists(st.integers(0, ROWS), max_size=12), special=st.booleans())
def test_any_ids_are_the_same_text(both: Both, ids: list[int], special: bool) -> None:
    assert _texts(both.ours, ids, special) == _texts(both.theirs, ids, special)


def _texts(tokenizer: Tokenizer, ids: list[int], special: bool) -> list[str]:
    stream = Detokenizer(tokenizer, skip_special=special)
    return [*(stream.add(token) for token in ids), stream.finish()]
