"""gm-tiny's tokenizer and the cache of generated scenes."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "train_gm_tiny"))

scenes: Any = importlib.import_module("scenes")
questions: Any = importlib.import_module("questions")
cache: Any = importlib.import_module("cache")
tokenizer: Any = importlib.import_module("tokenizer")


# --- tokenizer ---


@pytest.fixture(scope="module")
def pieces() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer.train())


def test_the_tokenizer_has_gemmas_special_ids(pieces: sentencepiece.SentencePieceProcessor) -> None:
    assert pieces.vocab_size() == 768
    assert [pieces.pad_id(), pieces.eos_id(), pieces.bos_id(), pieces.unk_id()] == [0, 1, 2, 3]
    names = ["<start_of_turn>", "<end_of_turn>", "<image>"]
    assert [pieces.piece_to_id(name) for name in names] == [4, 5, 6]
    assert all(pieces.is_control(i) for i in (4, 5, 6))
    assert tokenizer.train() == tokenizer.train()


def test_every_word_of_the_data_is_one_piece(
    pieces: sentencepiece.SentencePieceProcessor,
) -> None:
    asked = questions.heldout(3000, seed=1)
    texts = [text for _, question, answer, _ in asked for text in (question, answer)]
    inside = {word for text in texts for word in re.findall(r"(?<= )[a-z]+", text)}
    first = {re.match(r"[a-z]+|\d", text)[0] for text in texts}  # type: ignore[index]
    first |= {word.capitalize() for _, question, _, _ in asked for word in question.split()[:1]} | {"user", "model"}
    assert [word for word in sorted(inside) if len(pieces.encode(" " + word)) != 1] == []
    assert [word for word in sorted(first) if len(pieces.encode(word)) != 1] == []
    assert pieces.encode("user\n", out_type=str) == ["user", "\n"]
    assert pieces.encode("12", out_type=str) == ["1", "2"]


@pytest.mark.parametrize(
    "text",
    [
        "what is  the color? ",
        " leading",
        "user\nwhat\n\n",
        "ABC xyz {}<>%\t#",
        "naïve 😀 漢字",
        "the ﬁrst ½ Ａ",
        "10 25",
    ],
)
def test_any_text_comes_back_unchanged(pieces: sentencepiece.SentencePieceProcessor, text: str) -> None:
    ids = pieces.encode(text)
    assert pieces.unk_id() not in ids
    assert pieces.decode(ids) == text


def test_the_command_writes_the_model(tmp_path: Path) -> None:
    tokenizer.main(str(tmp_path / "new"))
    assert (tmp_path / "new" / "tokenizer.model").read_bytes() == tokenizer.train()


# --- cache ---


def test_the_cache_is_made_once_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cache.cached_scenes(tmp_path, 12, seed=3, per_scene=5, workers=1)
    monkeypatch.setattr(cache, "generate", None)
    read = cache.cached_scenes(tmp_path, 12, seed=3, per_scene=5, workers=1)
    scene = scenes.sample_scene(scenes.scene_rng("train", 3, 11))
    assert np.array_equal(read.images, made.images)
    assert np.array_equal(read.images[11], scenes.render(scene))
    assert np.array_equal(read.labels["centre_shape"][11], scenes.patch_labels(scene)["centre_shape"])
    assert read.captions[11] == questions.caption(scene)
    assert read.questions == made.questions
    assert len(list(tmp_path.iterdir())) == 2


def test_the_cache_is_made_anew_when_the_generator_or_a_setting_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.cached_scenes(tmp_path, 3, workers=1)
    cache.cached_scenes(tmp_path, 3, seed=1, workers=1)
    monkeypatch.setattr(cache, "SOURCES", cache.SOURCES[1:])
    cache.cached_scenes(tmp_path, 3, workers=1)
    assert len(list(tmp_path.glob("*.npz"))) == 3


def test_workers_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CHUNK", 3)
    alone, together = cache.generate(7, 0, 4, 1), cache.generate(7, 0, 4, 2)
    assert np.array_equal(alone.images, together.images)
    assert alone.questions == together.questions
