"""Eve in the engine: pictures and words, one conversation and the next, and what is remembered between them."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from eve_models import CONFIG
from fixtures import picture, tiny_folder, tiny_model
from test_evf import twins

from gm_mlx.chat_template import V1
from gm_mlx.engine import Sampling
from gm_mlx.evf import LANGUAGE, VISION
from gm_mlx.generate import decode, make_cache, prefill
from gm_mlx.mlx_engine import MLXEngine
from gm_mlx.processor import Message
from gm_mlx.train.answers import greedy_answers

SHORT = Sampling(max_tokens=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("eve") / "eve", model=tiny_model(config=CONFIG), template=V1)


def user(text: str, images: int = 0) -> Message:
    return {"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}


def answer(engine: MLXEngine, messages: list[Message], images: int = 0) -> str:
    pictures = [picture(number) for number in range(images)]
    return "".join(piece.text for piece in engine.stream(messages, pictures, SHORT))


def test_words_alone_get_the_language_model_s_answer(folder: Path, tmp_path: Path) -> None:
    _, dense = twins()
    plain = MLXEngine(tiny_folder(tmp_path / "plain", model=dense, template=V1))
    eve = MLXEngine(folder)
    for question in ("What colour is it?", "Who are you?", "Is there a circle?"):
        assert answer(eve, [user(question)]) == answer(plain, [user(question)])


def test_an_answer_is_that_of_one_pass_over_everything(folder: Path) -> None:
    """Prefill in chunks and token by token, against all positions at once: text goes on as text about a picture."""
    engine = MLXEngine(folder, prefill_chunk=3)
    messages = [user("What colour is it?", 1)]
    text = answer(engine, messages, 1)
    model, processor = engine._model, engine.processor
    ids = processor.encode(messages, 1).ids
    features = model.encode_images(mx.array(processor.pixels([picture(0)])))
    found: list[int] = []
    for _ in range(8):
        whole = np.array([[*ids, *found]])
        x, positions = model.embed(whole, features), model.positions(whole)
        logits = model.logits(model.hidden(x, positions=positions)[:, -1:])[0, 0, : processor.tokenizer.vocab_size]
        found.append(int(mx.argmax(logits)))
    stream = processor.answer_stream()
    assert text == "".join(stream.add(token)[0] for token in found) + stream.finish()


def test_routing_of_a_prompt(folder: Path) -> None:
    engine = MLXEngine(folder)
    traced = engine.trace_routing([user("What is it?", 1)], [picture(0)])
    ids = np.array(engine.processor.encode([user("What is it?", 1)], 1).ids)
    assert [routing.layer for routing in traced] == [0, 2]
    for routing in traced:
        assert np.array_equal(np.array(routing.experts[0, :, 0]) == VISION, ids == CONFIG.image_token_index)
    assert all(
        (routing.experts == LANGUAGE).all() and (routing.weights == 1).all()
        for routing in engine.trace_routing([user("What is it?")])
    )


TALKS = {
    "a picture after words": [(user("Who are you?"), 0), (user("What is it?", 1), 1), (user("Is it red?"), 1)],
    "words after a picture": [(user("What is it?", 1), 1), (user("Is it red?"), 1), (user("Sure?"), 1)],
    "two pictures": [(user("What is it?", 1), 1), (user("And this?", 1), 2)],
}


@pytest.mark.parametrize("talk", TALKS)
def test_a_conversation_equals_one_without_memory(folder: Path, talk: str) -> None:
    engine = MLXEngine(folder)
    messages: list[Message] = []
    for question, images in TALKS[talk]:
        messages.append(question)
        text = answer(engine, messages, images)
        assert text == answer(MLXEngine(folder), messages, images)
        messages.append({"role": "assistant", "content": text})


def test_text_in_front_of_a_picture_is_reused_only_where_it_had_one(folder: Path) -> None:
    """Without pictures the same words have other keys and values: nothing of them may be left in the cache."""
    engine = MLXEngine(folder)
    conversation = [user("Who are you?"), {"role": "assistant", "content": "me"}]

    def cached(messages: list[Message], images: int) -> int:
        pieces = list(engine.stream(messages, [picture(number) for number in range(images)], SHORT))
        return pieces[-1].stats.cached_tokens

    assert cached([user("Who are you?")], 0) == 0
    assert cached([*conversation, user("And now?")], 0) > 0
    assert cached([*conversation, user("What is it?", 1)], 1) == 0
    assert cached([*conversation, user("Which colour?", 1)], 1) > 0
    assert cached([*conversation, user("And now?")], 0) == 0


def test_a_broken_off_answer_leaves_a_true_record(folder: Path) -> None:
    engine = MLXEngine(folder)
    stream = engine.stream([user("What is it?", 1)], [picture(0)], SHORT)
    next(stream)
    stream.close()
    assert answer(engine, [user("What is it?")]) == answer(MLXEngine(folder), [user("What is it?")])


def test_decoding_never_asks_the_vision_ffn(folder: Path) -> None:
    """A picture reaches later words through attention; the second network costs a token nothing."""
    model = MLXEngine(folder)._model
    ids = np.full((1, 10), 9)
    ids[:, 2:6] = CONFIG.image_token_index
    features = model.encode_images(mx.zeros((1, 32, 32, 3)))
    positions, cache = model.positions(ids), make_cache(model)
    logits = prefill(model, model.embed(ids, features), cache, 4, positions=positions)
    model.layers[0].mlp.vision_ffn = model.layers[2].mlp.vision_ffn = None
    assert len(list(decode(model, logits, cache, SHORT, positions=positions.next_token()))) == 8


def test_answers_in_batches_are_the_engine_s(folder: Path) -> None:
    engine = MLXEngine(folder)
    questions = ["What is it?", "Is it red?", "What is it?"]
    pixels = [engine.processor.pixels([picture(number)])[0] for number in range(3)]
    given = greedy_answers(engine._model, engine.processor, questions, pixels, max_tokens=8)
    for number, question in enumerate(questions):
        pieces = engine.stream([user(question, 1)], [picture(number)], SHORT)
        assert given[number] == "".join(piece.text for piece in pieces).strip()
