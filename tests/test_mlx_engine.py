"""The MLX engine: what it computes again and what not, how answers end, and that nothing leaves it inconsistent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from fixtures import picture, tiny_config, tiny_folder, tiny_model
from PIL.Image import Image

from gm_mlx import mlx_engine
from gm_mlx.chat_template import GEMMA, V1
from gm_mlx.config import MoEConfig
from gm_mlx.engine import GREEDY, Engine, Piece, Sampling
from gm_mlx.errors import UserError
from gm_mlx.mlx_engine import MLXEngine
from gm_mlx.model import Model
from gm_mlx.processor import Message

IMAGE_TOKENS = 4
SHORT = Sampling(max_tokens=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("engine") / "tiny")


@pytest.fixture
def engine(folder: Path) -> MLXEngine:
    return MLXEngine(folder)


class Counts:
    """What the model was really asked to compute."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.encoded = 0
        self.positions: list[int] = []
        encode, hidden = Model.encode_images, Model.hidden

        def count_images(model: Model, pixels: mx.array) -> mx.array:
            self.encoded += len(pixels)
            return encode(model, pixels)

        def count_positions(model: Model, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            self.positions.append(x.shape[1])
            return hidden(model, x, *args, **kwargs)

        monkeypatch.setattr(Model, "encode_images", count_images)
        monkeypatch.setattr(Model, "hidden", count_positions)

    def take(self) -> tuple[int, int]:
        """Images encoded and positions prefilled since the last call; decoding goes one by one and does not count."""
        taken = self.encoded, sum(count for count in self.positions if count > 1)
        self.encoded, self.positions = 0, []
        return taken


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    return Counts(monkeypatch)


def user(text: str, images: int = 0) -> Message:
    return {"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def ask(
    engine: Engine, messages: Sequence[Message], images: Sequence[Image] = (), sampling: Sampling = SHORT
) -> tuple[str, Piece]:
    pieces = list(engine.stream(messages, images, sampling))
    return "".join(piece.text for piece in pieces), pieces[-1]


def generated_ids(engine: MLXEngine, prompt_tokens: int) -> list[Any]:
    return engine._keys[prompt_tokens:]


def prompt_length(engine: MLXEngine, messages: Sequence[Message], images: int) -> int:
    return len(engine.processor.encode(messages, images).ids)


def test_an_answer_and_its_stats(engine: MLXEngine, folder: Path) -> None:
    messages = [user("What colour is the shape?", 1)]
    text, last = ask(engine, messages, [picture()])
    stats = last.stats
    assert len(text.split()) == stats.generated_tokens == 8
    assert stats.prompt_tokens == prompt_length(engine, messages, 1)
    assert (stats.image_tokens, stats.cached_tokens, stats.images_encoded) == (IMAGE_TOKENS, 0, 1)
    assert stats.finish_reason == "length"
    assert min(stats.encode_seconds, stats.prefill_seconds, stats.decode_seconds) > 0
    assert stats.peak_memory_bytes > 900_000  # the weights alone
    assert (engine.name, engine.model, engine.context_length) == ("mlx", str(folder), 512)


def test_the_answer_is_the_models(engine: MLXEngine) -> None:
    """Against the whole sequence computed anew for each token, without engine, cache or chunks."""
    messages, image = [user("How many?", 1)], picture(3)
    text, _ = ask(engine, messages, [image])
    model, processor = engine._model, engine.processor
    ids = processor.encode(messages, 1).ids
    features = model.encode_images(mx.array(processor.pixels([image])))
    for _ in range(8):
        logits = model.logits(model.hidden(model.embed(np.array([ids]), features)))[0, -1]
        ids.append(int(mx.argmax(logits[: processor.tokenizer.vocab_size])))  # type: ignore[arg-type]
    assert text == processor.tokenizer.decode(ids[-8:], continues=True)


def test_greedy_answers_repeat_and_depend_on_the_image(folder: Path) -> None:
    answers = [ask(MLXEngine(folder), [user("What?", 1)], [picture(seed)])[0] for seed in (0, 0, 1)]
    assert answers[0] == answers[1] != answers[2]


def test_a_seed_repeats_an_answer(engine: MLXEngine) -> None:
    hot = Sampling(max_tokens=12, temperature=2.0, seed=5)
    messages = [user("What?")]
    first = ask(engine, messages, sampling=hot)[0]
    assert ask(engine, messages, sampling=hot)[0] == first
    assert ask(engine, messages, sampling=replace(hot, seed=6))[0] != first


# Reuse between calls


def test_the_second_question_computes_only_what_is_new(engine: MLXEngine, counts: Counts) -> None:
    image = picture()
    messages = [user("What colour is the shape?", 1)]
    answer, last = ask(engine, messages, [image])
    first = last.stats
    assert counts.take() == (1, first.prompt_tokens)

    messages += [assistant(answer), user("And how many are there?")]
    text, last = ask(engine, messages, [image])
    second = last.stats
    # All of the first prompt and its answer but the answer's last token, which was chosen and never fed.
    assert second.cached_tokens == first.prompt_tokens + first.generated_tokens - 1
    assert second.images_encoded == 0
    assert counts.take() == (0, second.prompt_tokens - second.cached_tokens)
    assert text == ask(fresh(engine), messages, [image])[0]


def fresh(engine: MLXEngine) -> MLXEngine:
    return MLXEngine(engine.model)


def test_an_answer_that_stopped_by_itself_is_reused_with_its_end(engine: MLXEngine, counts: Counts) -> None:
    messages = [user("What colour?")]
    _, last = ask(engine, messages)
    words = generated_ids(engine, last.stats.prompt_tokens)
    end = engine.processor.tokenizer.id_of("<end_of_turn>")
    make_say(engine, words[3], end)
    engine.reset()
    counts.take()
    answer, last = ask(engine, messages)
    first = last.stats
    assert first.finish_reason == "stop"
    messages += [assistant(answer), user("Next?")]
    _, last = ask(engine, messages)
    assert last.stats.cached_tokens == first.prompt_tokens + first.generated_tokens
    # Over both turns each position of the conversation once; the answer's came one by one.
    assert counts.take()[1] == last.stats.prompt_tokens - first.generated_tokens


def make_say(engine: MLXEngine, word: int, instead: int | None) -> None:
    """Make the model say one token in the place of another."""
    assert instead is not None
    weight = engine._model.language_model.lm_head.weight
    weight[instead], weight[word] = weight[word] + 0, mx.zeros_like(weight[word])


def test_the_same_text_about_another_image_is_computed_anew(engine: MLXEngine, counts: Counts) -> None:
    messages = [user("What colour is the shape?", 1)]
    before = engine.processor.encode(messages, 1).ids.index(engine.processor.image_token_id)
    ask(engine, messages, [picture(0)])
    counts.take()
    text, last = ask(engine, messages, [picture(1)])
    assert last.stats.cached_tokens == before
    assert counts.take() == (1, last.stats.prompt_tokens - before)
    assert text == ask(fresh(engine), messages, [picture(1)])[0]


def test_the_same_question_again_leaves_one_position_to_compute(engine: MLXEngine) -> None:
    messages = [user("What?", 1)]
    first, _ = ask(engine, messages, [picture()])
    again, last = ask(engine, messages, [picture()])
    assert again == first
    assert last.stats.cached_tokens == last.stats.prompt_tokens - 1


def test_a_second_image_is_encoded_alone(engine: MLXEngine, counts: Counts) -> None:
    messages = [user("What?", 1)]
    answer, _ = ask(engine, messages, [picture(0)])
    counts.take()
    messages += [assistant(answer), user("And this?", 1)]
    text, last = ask(engine, messages, [picture(0), picture(1)])
    assert counts.take()[0] == 1
    assert last.stats.image_tokens == 2 * IMAGE_TOKENS
    assert text == ask(fresh(engine), messages, [picture(0), picture(1)])[0]


def test_image_features_are_kept_and_the_oldest_forgotten(
    engine: MLXEngine, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlx_engine, "REMEMBERED_IMAGES", 2)
    one = Sampling(max_tokens=1)
    encoded = []
    for seed in (0, 1, 0, 2, 0, 1):
        ask(engine, [user("What?", 1)], [picture(seed)], one)
        encoded.append(counts.take()[0])
    assert encoded == [1, 1, 0, 1, 0, 1]
    # More images than are remembered, and one of them twice.
    text, last = ask(engine, [user("Which?", 4)], [picture(seed) for seed in (5, 6, 7, 5)])
    assert last.stats.images_encoded >= 3
    assert text == ask(fresh(engine), [user("Which?", 4)], [picture(seed) for seed in (5, 6, 7, 5)])[0]


@pytest.mark.parametrize("options", [{}, {"kv_bits": 8}, {"max_kv_size": 400}, {"prefill_chunk": 5}])
def test_a_long_conversation_equals_one_without_memory(folder: Path, options: dict[str, Any]) -> None:
    """With 8-bit keys too: the cached ones are the very numbers that would be computed again."""
    remembering = MLXEngine(folder, **options)
    messages: list[Message] = []
    for turn, question in enumerate(["What colour?", "How many?", "Is it a circle?"]):
        messages.append(user(question, images=int(turn == 0)))
        answer, _ = ask(remembering, messages, [picture()])
        # Chunk borders fall elsewhere in a fresh engine; with these options that changes no choice.
        assert answer == ask(MLXEngine(folder, **options), messages, [picture()])[0]
        messages.append(assistant(answer))


def test_a_full_rotating_cache_starts_over(folder: Path) -> None:
    engine = MLXEngine(folder, max_kv_size=24)
    question = [user("What colour is the shape in the picture?", 1)]
    first, last = ask(engine, question, [picture()])
    assert last.stats.prompt_tokens > 24
    again, last = ask(engine, question, [picture()])
    assert last.stats.cached_tokens == 0
    assert again == first


# How answers end


def test_stop_ids(folder: Path) -> None:
    engine = MLXEngine(folder)
    text, last = ask(engine, [user("What?")])
    ids = generated_ids(engine, last.stats.prompt_tokens)
    for stop_at in (5, 2):  # the second set has several ids
        engine.processor.stop_ids |= {ids[stop_at]}
        stopped, last = ask(engine, [user("What?")])
        length = min(ids.index(stop) for stop in engine.processor.stop_ids if stop in ids)
        assert last.stats.finish_reason == "stop"
        assert last.stats.generated_tokens == length + 1
        assert stopped == engine.processor.tokenizer.decode(ids[:length], continues=True)
        assert text.startswith(stopped) and text != stopped


def test_stop_strings_are_never_shown_not_even_in_part(tmp_path: Path, folder: Path) -> None:
    """A stop string that begins in one token and ends in the next."""
    text, _ = ask(MLXEngine(folder), [user("What?")])
    words = text.split(" ")
    stop = f"{words[3][-1]} {words[4][:1]}"
    template = replace(GEMMA, stop_strings=("never said", stop))
    engine = MLXEngine(tiny_folder(tmp_path, template=template))
    pieces = list(engine.stream([user("What?")], sampling=SHORT))
    shown = "".join(piece.text for piece in pieces)
    assert shown == text[: text.index(stop)]
    assert pieces[-1].stats.finish_reason == "stop"
    assert pieces[-1].stats.generated_tokens <= 5


def test_text_held_back_for_a_stop_string_comes_at_the_end(tmp_path: Path, folder: Path) -> None:
    text, _ = ask(MLXEngine(folder), [user("What?")])
    template = replace(GEMMA, stop_strings=(text[-3:] + "!",))
    assert ask(MLXEngine(tiny_folder(tmp_path, template=template)), [user("What?")])[0] == text


def test_other_templates(tmp_path: Path) -> None:
    engine = MLXEngine(tiny_folder(tmp_path, template=V1, model=tiny_model(config=tiny_config("clip"))))
    messages = [user("What?", 1)]
    answer, first = ask(engine, messages, [picture()])
    messages += [assistant(answer), user("And?")]
    _, second = ask(engine, messages, [picture()])
    assert second.stats.cached_tokens >= first.stats.prompt_tokens


def test_a_piece_never_holds_half_a_character(tmp_path: Path) -> None:
    model = tiny_model()
    folder = tiny_folder(tmp_path, model=model)
    engine = MLXEngine(folder)
    tokenizer = engine.processor.tokenizer
    _, last = ask(engine, [user("What?")])
    words = generated_ids(engine, last.stats.prompt_tokens)
    for word, byte in zip(dict.fromkeys(words), "é".encode(), strict=False):
        make_say(engine, word, tokenizer.id_of(f"<0x{byte:02X}>"))
    engine.reset()
    pieces = list(engine.stream([user("What?")], sampling=Sampling(max_tokens=2)))
    assert "".join(piece.text for piece in pieces) in ("é", "\ufffd\ufffd", "\ufffd")
    assert all(len(piece.text.encode()) != 1 for piece in pieces)


def test_the_context_is_a_limit(tmp_path: Path) -> None:
    engine = MLXEngine(tiny_folder(tmp_path, model=tiny_model(config=tiny_config(max_position_embeddings=20))))
    messages = [user("Hi", 1)]
    length = prompt_length(engine, messages, 1)
    assert 10 < length < 20
    _, last = ask(engine, messages, [picture()], Sampling(max_tokens=100))
    assert last.stats.finish_reason == "length"
    assert last.stats.generated_tokens == 20 - length
    long = [user("What colour is the shape in the picture?", 1)]
    with pytest.raises(UserError, match=rf"prompt has {prompt_length(engine, long, 1)} tokens but .* context is 20; "):
        engine.stream(long, [picture()])  # at once, not at the first piece


def test_slots_and_images_that_differ(engine: MLXEngine) -> None:
    with pytest.raises(UserError, match="2 image slots but 1 image was given"):
        engine.stream([user("What?", 2)], [picture()])


# Answers that are broken off


def broken_off(engine: MLXEngine, messages: Sequence[Message], taken: int) -> str:
    pieces = engine.stream(messages, [picture()], SHORT)
    text = "".join(piece.text for piece in islice(pieces, taken))
    pieces.close()  # type: ignore[attr-defined]
    return text


@pytest.mark.parametrize("options", [{}, {"kv_bits": 8}, {"max_kv_size": 400}])
@pytest.mark.parametrize("taken", [0, 1, 4])
def test_a_closed_answer_leaves_a_true_record(folder: Path, options: dict[str, Any], taken: int) -> None:
    engine = MLXEngine(folder, **options)
    messages = [user("What colour?", 1)]
    part = broken_off(engine, messages, taken)
    assert len(part.split()) == taken
    messages += [assistant(part or "is"), user("Go on")]
    text, last = ask(engine, messages, [picture()])
    if taken:
        # The prompt and the words that were shown; the next one was computed ahead but never became known.
        assert last.stats.cached_tokens == prompt_length(engine, messages[:1], 1) + taken
    assert text == ask(MLXEngine(folder, **options), messages, [picture()])[0]


class Interrupting:
    """A layer that is interrupted in one of its calls, as by Ctrl-C."""

    def __init__(self, layer: Any, at_call: int, error: type[BaseException]) -> None:
        self.layer, self.calls, self.at_call, self.error = layer, 0, at_call, error

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self.calls == self.at_call:
            raise self.error
        return self.layer(*args)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("at_call", [1, 2, 3, 6])  # in the first or second chunk of the prompt, or in decoding
def test_an_interruption_between_two_layers(folder: Path, at_call: int, error: type[BaseException]) -> None:
    engine = MLXEngine(folder, prefill_chunk=16)
    layers: list[Any] = engine._model.language_model.model.layers  # type: ignore[assignment]
    messages = [user("What colour is the shape?", 1)]
    ask(engine, [user("What colour?", 1)], [picture()])
    last = layers[-1]
    layers[-1] = Interrupting(last, at_call, error)
    with pytest.raises(error):
        ask(engine, messages, [picture(1)])
    assert len({layer.offset for layer in engine._cache}) == 1 + (error is KeyboardInterrupt)
    layers[-1] = last
    text, _ = ask(engine, messages, [picture(1)])
    assert text == ask(MLXEngine(folder), messages, [picture(1)])[0]


def test_an_answer_cannot_go_on_after_another_has_begun(engine: MLXEngine) -> None:
    first = engine.stream([user("What?")], sampling=SHORT)
    next(first)
    second = engine.stream([user("How many?")], sampling=SHORT)
    begun = next(second).text
    with pytest.raises(RuntimeError, match="another answer was begun"):
        next(first)
    rest = "".join(piece.text for piece in second)
    assert begun + rest == ask(fresh(engine), [user("How many?")])[0]


def test_pieces_come_while_the_answer_is_made(engine: MLXEngine) -> None:
    pieces = engine.stream([user("What?")], sampling=SHORT)
    first = next(pieces)
    assert first.text and first.stats.generated_tokens == 1 and first.stats.finish_reason is None


# Routing, notices, progress, and folders that do not fit


def test_routing_of_a_prompt(engine: MLXEngine) -> None:
    messages = [user("What colour is the shape?", 1)]
    length = prompt_length(engine, messages, 1)
    (routing,) = engine.trace_routing(messages, [picture()])
    assert routing.layer == 0
    assert routing.probabilities.shape == (1, length, 4)
    assert routing.experts.shape == routing.weights.shape == (1, length, 2)
    np.testing.assert_allclose(np.array(routing.weights.sum(-1)), 1, rtol=1e-6)
    chosen = np.array(routing.experts[0])
    best = np.argsort(-np.array(routing.probabilities[0]), axis=-1, kind="stable")[:, :2]
    np.testing.assert_array_equal(chosen, best)
    assert len(np.unique(chosen[:, 0])) > 1
    other = engine.trace_routing(messages, [picture(1)])[0].probabilities
    same = np.isclose(np.array(other[0]), np.array(routing.probabilities[0]), atol=1e-6).all(-1)
    slot = engine.processor.encode(messages, 1).ids.index(engine.processor.image_token_id)
    assert same[:slot].all() and not same[slot:].any()  # all that comes after the image has seen it


def test_routing_of_a_dense_model_and_of_many_sparse_layers(tmp_path: Path) -> None:
    dense = MLXEngine(tiny_folder(tmp_path / "dense", model=tiny_model(config=tiny_config(moe=None))))
    assert dense.trace_routing([user("What?")]) == []
    config = tiny_config(moe=MoEConfig(mode="dense", top_k=3), num_hidden_layers=3)
    sparse = MLXEngine(tiny_folder(tmp_path / "sparse", model=tiny_model(config=config)))
    trace = sparse.trace_routing([user("What?")])
    assert [routing.layer for routing in trace] == [0, 1, 2]
    assert {routing.experts.shape[-1] for routing in trace} == {3}


def test_tracing_disturbs_no_conversation(engine: MLXEngine) -> None:
    messages = [user("What?", 1)]
    ask(engine, messages, [picture()])
    engine.trace_routing([user("Something else", 1)], [picture(1)])
    _, last = ask(engine, messages, [picture()])
    assert last.stats.cached_tokens == last.stats.prompt_tokens - 1


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_the_notice_of_a_model_folder_comes_once_and_with_a_large_image(copy: Path) -> None:
    notice = {"text": "made for drawings", "min_image_side": 200}
    (copy / "gm.json").write_text(json.dumps({"source": "a test", "notice": notice}))
    engine = MLXEngine(copy)
    assert engine.notices() == []
    assert engine.notices([picture(size=(199, 20))]) == []
    assert engine.notices([picture(), picture(size=(20, 200))]) == ["made for drawings"]
    assert engine.notices([picture(size=(300, 300))]) == []


@pytest.mark.parametrize("text", ["{}", '{"source": "x"}', '{"notice": null}'])
def test_folders_without_a_notice(copy: Path, text: str) -> None:
    (copy / "gm.json").write_text(text)
    assert MLXEngine(copy).notices([picture(size=(999, 999))]) == []


@pytest.mark.parametrize("text", ["", "[]", '{"notice": "x"}', '{"notice": {"text": "x"}}'])
def test_damaged_notices(copy: Path, text: str) -> None:
    (copy / "gm.json").write_text(text)
    with pytest.raises(UserError, match=r"gm\.json: notice: needs text and min_image_side"):
        MLXEngine(copy)


def test_a_large_model_on_a_cpu_is_told_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlx_engine, "SLOW_ON_CPU", 200_000)
    engine = MLXEngine(folder, model_name="org/large")
    (line,) = engine.notices()
    assert line.startswith("org/large has 0.0 billion parameters") and "llama.cpp" in line
    assert engine.notices() == []
    monkeypatch.setattr(mlx_engine, "runs_on_cpu", lambda: False)
    assert MLXEngine(folder).notices() == []


def test_progress(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlx_engine, "LOAD_STEP_BYTES", 200_000)
    told: list[tuple[str, int, int]] = []
    engine = MLXEngine(folder, prefill_chunk=16, progress=lambda *event: told.append(event))
    assert {phase for phase, _, _ in told} == {"load"}
    assert len(told) > 2 and [done for _, done, _ in told] == sorted({done for _, done, _ in told})
    assert told[-1][1] == told[-1][2]
    told.clear()
    _, last = ask(engine, [user("What colour is it?", 1)], [picture()])
    length = last.stats.prompt_tokens
    assert told == [("encode", 1, 1), ("prefill", 16, length), ("prefill", length, length)]


def test_no_compiler_runs_on_a_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(mx, "disable_compile", lambda: calls.append("off"))
    MLXEngine(folder)
    assert calls == ["off"]
    monkeypatch.setattr(mlx_engine, "runs_on_cpu", lambda: False)
    MLXEngine(folder)
    assert calls == ["off"]


def test_closing_gives_memory_back(folder: Path) -> None:
    engine = MLXEngine(folder)
    ask(engine, [user("What?", 1)], [picture()])
    held = mx.get_active_memory()
    engine.close()
    assert mx.get_active_memory() < held - 900_000


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("image_token_index", 499, "image_token_index is 499 where config.json has 511"),
        ("tokens_per_image", 5, "tokens_per_image is 5 where config.json has 4"),
        ("image", {"size": 8, "mode": "pad", "mean": [0, 0, 0], "std": [1, 1, 1]}, "image.size is 8 where"),
    ],
)
def test_a_processor_for_another_model(copy: Path, key: str, value: Any, message: str) -> None:
    path = copy / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=message) as error:
        MLXEngine(copy)
    assert str(error.value).startswith(f"{path}: ")


def test_a_tokenizer_larger_than_the_embedding(tmp_path: Path) -> None:
    config = replace(tiny_config(vocab_size=300), image_token_index=5000)
    with pytest.raises(UserError, match=r"the tokenizer has \d+ tokens where config\.json's vocab_size is 300"):
        MLXEngine(tiny_folder(tmp_path, model=tiny_model(config=config)))


def test_prefill_chunks_are_counted_from_one(folder: Path) -> None:
    with pytest.raises(UserError, match="prefill_chunk: 0 is not 1 or more"):
        MLXEngine(folder, prefill_chunk=0)


def test_it_is_an_engine(engine: MLXEngine) -> None:
    protocol: Engine = engine  # checked by mypy
    pieces: Iterator[Piece] = protocol.stream([user("Hi")], (), GREEDY)
    assert isinstance(next(pieces), Piece)
