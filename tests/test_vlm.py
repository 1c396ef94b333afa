"""The Python API."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from fixtures import picture, tiny_folder

import gm_mlx
from gm_mlx import VLM, Answer, Conversation, Sampling, UserError
from gm_mlx.engine import Piece

FEW = Sampling(max_tokens=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("vlm") / "tiny")


@pytest.fixture
def model(folder: Path) -> VLM:
    return gm_mlx.load(str(folder))


def test_importing_the_package_is_light() -> None:
    heavy = ("mlx.core", "mlx_lm", "numpy", "PIL", "huggingface_hub")
    code = f"import gm_mlx, sys; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_names() -> None:
    for name in gm_mlx.__all__:
        assert getattr(gm_mlx, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        gm_mlx.lode  # noqa: B018


def test_chat_and_stream_say_the_same(model: VLM) -> None:
    answer = model.chat("What colour is it?", images=[picture()], max_tokens=6)
    assert isinstance(answer, Answer)
    assert str(answer) == answer.text == f"{answer}"
    assert answer.stats.generated_tokens == 6 and answer.stats.finish_reason == "length"
    pieces = list(model.stream("What colour is it?", images=[picture()], max_tokens=6))
    assert "".join(piece.text for piece in pieces) == answer.text
    assert len(pieces) > 2


def test_images_come_as_paths_bytes_and_pictures(model: VLM, tmp_path: Path) -> None:
    image = picture()
    image.save(tmp_path / "a.png")
    content = io.BytesIO()
    image.save(content, "PNG")
    answers = [
        model.chat("What is it?", images=[source], max_tokens=6)
        for source in (image, tmp_path / "a.png", str(tmp_path / "a.png"), content.getvalue())
    ]
    assert len({answer.text for answer in answers}) == 1
    assert [answer.stats.images_encoded for answer in answers] == [1, 0, 0, 0]


def test_a_prompt_may_be_a_conversation(model: VLM) -> None:
    first = model.chat("What is it?", images=[picture()], max_tokens=6)
    messages = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "Sure?"},
    ]
    second = model.chat(messages, images=[picture()], max_tokens=6)
    assert second.stats.cached_tokens >= first.stats.prompt_tokens


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.chat("Hi", images=["nowhere.png"]), r"nowhere\.png: no such file"),
        (lambda model: model.stream("Hi", temperature=-1), "temperature: -1 is not 0 or more"),
        (lambda model: model.stream([]), "conversation is empty"),
        (lambda model: model.stream("Hi " * 600), "prompt has .* tokens but the model's context is 512"),
        (lambda model: gm_mlx.load("no-such-model"), "no-such-model: no such folder"),
        (lambda model: gm_mlx.load(model.engine.model, kv_bits=5), "kv_bits: 5 is not 4 or 8"),
    ],
)
def test_errors(model: VLM, call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(model)


def say(pieces: Iterator[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_a_conversation_grows_turn_by_turn(model: VLM) -> None:
    talk = model.conversation()
    first = say(talk.ask("What is it?", [picture()], FEW))
    last = list(talk.ask("And this?", [picture(1)], FEW))
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    assert talk.messages[1]["content"] == first
    assert len(talk.images) == 2
    assert last[-1].stats.images_encoded == 1
    # The same as one call with all messages; a later question finds all but its own words in the cache.
    again = say(model.engine.stream(talk.messages[:-1], talk.images, FEW))
    assert again == talk.messages[-1]["content"]
    third = list(talk.ask("Why?", sampling=FEW))
    assert third[-1].stats.images_encoded == 0
    assert third[-1].stats.cached_tokens >= last[-1].stats.prompt_tokens


def test_a_system_message_outlives_clearing(model: VLM) -> None:
    talk = model.conversation(system="Be brief.")
    with_system = say(talk.ask("What is it?", sampling=FEW))
    assert talk.messages[0] == {"role": "system", "content": "Be brief."}
    assert with_system != say(model.conversation().ask("What is it?", sampling=FEW))
    talk.clear()
    assert len(talk.messages) == 1 and talk.images == []
    assert say(talk.ask("What is it?", sampling=FEW)) == with_system


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_a_question_without_a_word_of_answer_is_forgotten(model: VLM, taken: int) -> None:
    talk = model.conversation()
    pieces = talk.ask("What is it?", [picture()], FEW)
    part = say(islice(pieces, taken))
    pieces.close()  # type: ignore[attr-defined]
    assert [message["content"] for message in talk.messages[1:]] == [part][:taken]
    assert len(talk.images) == min(taken, 1)
    following = say(talk.ask("Go on", sampling=FEW))
    assert talk.messages[-1]["content"] == following


class Failing:
    """An engine that says a few words and then fails."""

    def __init__(self, words: int, error: type[BaseException]) -> None:
        self.words, self.error = words, error

    def stream(self, *args: Any) -> Iterator[Piece]:
        for _ in range(self.words):
            yield Piece("word", gm_mlx.Stats())
        raise self.error


@pytest.mark.parametrize(("words", "kept"), [(0, []), (2, ["wordword"])])
def test_an_interrupted_answer_keeps_what_was_said(words: int, kept: list[str]) -> None:
    talk = Conversation(Failing(words, KeyboardInterrupt))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        say(talk.ask("Hi"))
    assert [message["content"] for message in talk.messages[1:]] == kept


def test_an_error_leaves_the_conversation_as_it_was(model: VLM) -> None:
    talk = model.conversation()
    say(talk.ask("What is it?", [picture()], FEW))
    before = list(talk.messages)
    with pytest.raises(UserError, match="context"):
        talk.ask("Hi " * 600, [picture(1)])
    with pytest.raises(UserError, match="no such file"):
        talk.ask("Hi", ["nowhere.png"])
    assert talk.messages == before and len(talk.images) == 1


def test_an_empty_answer_is_an_answer(model: VLM) -> None:
    engine: Any = model.engine
    first = next(model.stream("What is it?"))
    assert first.text
    engine.processor.stop_ids |= set(range(400))
    talk = model.conversation()
    assert say(talk.ask("What is it?", sampling=FEW)) == ""
    assert talk.messages[-1] == {"role": "assistant", "content": ""}


def test_close(model: VLM) -> None:
    model.close()
    with pytest.raises(AttributeError):
        model.chat("Hi")
