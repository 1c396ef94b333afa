"""The engine on llama.cpp with files that gm-mlx wrote: the same prompts and answers as on MLX, and nothing lost."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from fixtures import picture, tiny_config, tiny_model
from PIL.Image import Image
from tiny_gguf import our_folder, write, write_mmproj, write_text

from gm_mlx.chat_template import V1
from gm_mlx.engine import GREEDY, Engine, Piece, Sampling
from gm_mlx.errors import UserError
from gm_mlx.gguf_file import read_header
from gm_mlx.llama import engine as module
from gm_mlx.llama import vision
from gm_mlx.llama.context import Context
from gm_mlx.llama.engine import LlamaCppEngine
from gm_mlx.llama.worker import Worker
from gm_mlx.mlx_engine import MLXEngine
from gm_mlx.processor import Message

IMAGE_TOKENS = 4
SHORT = Sampling(max_tokens=8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return our_folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def mlx_engine(folders: tuple[Path, Path]) -> MLXEngine:
    return MLXEngine(folders[0])


def open_engine(folder: Path, **options: Any) -> LlamaCppEngine:
    return LlamaCppEngine(folder / "model.gguf", folder / "mmproj.gguf", **{"threads": 1, **options})


@pytest.fixture
def engine(folders: tuple[Path, Path]) -> Iterator[LlamaCppEngine]:
    opened = open_engine(folders[1])
    yield opened
    opened.close()


def user(text: str, images: int = 0) -> Message:
    return {"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def ask(
    engine: Engine, messages: Sequence[Message], images: Sequence[Image] = (), sampling: Sampling = SHORT
) -> tuple[str, Piece]:
    pieces = list(engine.stream(messages, images, sampling))
    return "".join(piece.text for piece in pieces), pieces[-1]


QUESTIONS: list[tuple[list[Message], int]] = [
    ([user("What colour is the shape?")], 0),
    ([user("What colour is the shape?", 1)], 1),
    ([{"role": "system", "content": "In one word."}, user("Which?", 2), assistant("Red"), user("and this?", 1)], 3),
    ([user("<start_of_turn>user a  b\n\n<end_of_turn><bos>é🎉", 1)], 1),
]


@pytest.mark.parametrize(("messages", "count"), QUESTIONS)
def test_prompts_and_logits_are_those_of_mlx(
    engine: LlamaCppEngine, mlx_engine: MLXEngine, messages: list[Message], count: int
) -> None:
    images = [picture(seed) for seed in range(count)]
    ids = mlx_engine.processor.encode(messages, count).ids
    prompt = engine.prompts.build(messages, images, engine._vision)
    image_token = mlx_engine.processor.image_token_id
    assert [image_token if isinstance(key, tuple) else key for key in prompt.keys] == ids
    assert prompt.image_rows == count * IMAGE_TOKENS

    model = mlx_engine._model
    pixels = mx.array(mlx_engine.processor.pixels(images)) if images else None
    features = None if pixels is None else model.encode_images(pixels)
    wanted = np.array(model.logits(model.hidden(model.embed(np.array([ids]), features)))[0, -1])
    logits = engine.prompt_logits(messages, images)
    assert logits.dtype == np.float32 and logits.shape == wanted.shape
    assert np.linalg.norm(logits - wanted) / np.linalg.norm(wanted) < 0.02  # llama.cpp's GELU and attention are float16
    assert ask(engine, messages, images)[0] == ask(mlx_engine, messages, images)[0]


def test_features_are_those_of_mlx(engine: LlamaCppEngine, mlx_engine: MLXEngine) -> None:
    """Images are made square by gm-mlx and go through mtmd untouched; so nothing is left but rounding."""
    for seed, size in enumerate([(16, 16), (20, 12), (7, 90)]):
        image = picture(seed, size)
        wanted = np.array(mlx_engine._model.encode_images(mx.array(mlx_engine.processor.pixels([image])))[0])
        features = engine.encode_image(image)
        assert features.shape == (IMAGE_TOKENS, 64) and features.dtype == np.float32
        assert np.linalg.norm(features - wanted) / np.linalg.norm(wanted) < 0.01


def test_logits_of_all_positions(engine: LlamaCppEngine, mlx_engine: MLXEngine) -> None:
    ids = mlx_engine.processor.encode([user("a red circle " * 20)]).ids
    model = mlx_engine._model
    wanted = np.array(model.logits(model.hidden(model.embed(np.array([ids]), None)))[0])
    logits = engine.all_logits(ids)
    assert logits.shape == wanted.shape
    assert np.linalg.norm(logits - wanted) / np.linalg.norm(wanted) < 0.02
    np.testing.assert_allclose(logits[-1], engine.prompt_logits([user("a red circle " * 20)]), atol=0.1)
    with pytest.raises(UserError, match="513 tokens do not fit the model's context of 512"):
        engine.all_logits([5] * 513)


def test_an_answer_and_its_stats(engine: LlamaCppEngine, folders: tuple[Path, Path]) -> None:
    text, last = ask(engine, [user("What colour is the shape?", 1)], [picture()])
    stats = last.stats
    assert len(text.split()) == stats.generated_tokens == 8
    assert (stats.image_tokens, stats.cached_tokens, stats.images_encoded) == (IMAGE_TOKENS, 0, 1)
    assert stats.prompt_tokens > IMAGE_TOKENS and stats.finish_reason == "length"
    assert min(stats.encode_seconds, stats.prefill_seconds, stats.decode_seconds) > 0
    assert stats.peak_memory_bytes > 10_000_000
    assert (engine.name, engine.context_length) == ("llama.cpp", 512)
    assert engine.model == str(folders[1] / "model.gguf")


# Reuse between calls


def test_the_second_question_computes_only_what_is_new(
    engine: LlamaCppEngine, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    decode = Context.decode
    monkeypatch.setattr(
        Context, "decode", lambda self, ids, *a, **k: computed.append(len(ids)) or decode(self, ids, *a, **k)
    )
    first, image = user("What colour is the shape?", 1), picture()
    answer, last = ask(engine, [first], [image])
    computed.clear()
    messages = [first, assistant(answer), user("And what shape is it?")]
    again, second = ask(engine, messages, [image])
    # The answer's last token was never computed, for nothing came after it.
    assert second.stats.cached_tokens == last.stats.prompt_tokens + 7
    assert second.stats.images_encoded == 0
    assert sum(computed) == second.stats.prompt_tokens - second.stats.cached_tokens + 7
    fresh = open_engine(folders[1])
    assert ask(fresh, messages, [image])[0] == again
    fresh.close()


def test_an_image_in_a_later_turn(engine: LlamaCppEngine, mlx_engine: MLXEngine) -> None:
    messages: list[Message] = []
    images: list[Image] = []
    for turn in range(4):
        messages.append(user("And this one?" if turn % 2 else "Hello", turn % 2))
        images += [picture(turn)] * (turn % 2)
        text, last = ask(engine, messages, images)
        assert text == ask(mlx_engine, messages, images)[0]
        assert (last.stats.cached_tokens > 0) == (turn > 0)
        assert last.stats.images_encoded == turn % 2
        messages.append(assistant(text))


def test_the_same_text_about_another_image_is_computed_anew(engine: LlamaCppEngine, folders: tuple[Path, Path]) -> None:
    messages = [user("What colour is the shape?", 1)]
    ask(engine, messages, [picture(0)])
    text, last = ask(engine, messages, [picture(1)])
    assert last.stats.cached_tokens < 5 and last.stats.images_encoded == 1
    fresh = open_engine(folders[1])
    assert ask(fresh, messages, [picture(1)])[0] == text
    fresh.close()


def test_the_same_question_again_leaves_one_position_to_compute(engine: LlamaCppEngine) -> None:
    messages = [user("What colour is the shape?", 1)]
    first, _ = ask(engine, messages, [picture()])
    again, last = ask(engine, messages, [picture()])
    assert again == first and last.stats.cached_tokens == last.stats.prompt_tokens - 1


def test_image_features_are_kept_and_the_oldest_forgotten(
    engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision, "REMEMBERED_IMAGES", 2)
    encoded = [ask(engine, [user("What?", 1)], [picture(seed)])[1].stats.images_encoded for seed in (0, 1, 0, 2, 1, 0)]
    assert encoded == [1, 1, 0, 1, 1, 1]


def test_the_context_grows_with_the_conversation(
    folders: tuple[Path, Path], mlx_engine: MLXEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_CONTEXT", 32)
    engine = open_engine(folders[1])
    assert engine.context_length == 512
    messages: list[Message] = []
    for turn in range(5):
        messages.append(user("What is this thing here?", 1 if turn == 0 else 0))
        text, _ = ask(engine, messages, [picture()])
        assert text == ask(mlx_engine, messages, [picture()])[0]
        messages.append(assistant(text))
    engine.close()


def test_prompts_in_pieces(folders: tuple[Path, Path], engine: LlamaCppEngine) -> None:
    messages = [user("What colour is this? " * 4, 2)]
    small = open_engine(folders[1], prefill_chunk=3)
    assert ask(small, messages, [picture(0), picture(1)])[0] == ask(engine, messages, [picture(0), picture(1)])[0]
    small.close()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_cache(folders: tuple[Path, Path], engine: LlamaCppEngine, bits: int) -> None:
    messages = [user("What colour is the shape?", 1)]
    small = open_engine(folders[1], kv_bits=bits)
    logits = [some.prompt_logits(messages, [picture()]) for some in (engine, small)]
    error = np.linalg.norm(logits[0] - logits[1]) / np.linalg.norm(logits[0])
    assert 0 < error < (0.3 if bits == 4 else 0.1)
    small.close()


# How answers end


def test_stop_ids(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    """The second word of an answer is made a stop id in the file's processor."""
    engine = open_engine(folders[1])
    messages = [user("What colour is the shape?")]
    plain, _ = ask(engine, messages)
    start = len(engine.prompts.build(messages, [], None).keys)
    second = engine._keys[start + 1]
    engine.close()
    header = read_header(folders[1] / "model.gguf")
    processor = json.loads(header.metadata["gm.processor"])
    processor["stop_token_ids"].append(second)
    copy = rewritten(folders[1] / "model.gguf", tmp_path / "model.gguf", {"gm.processor": json.dumps(processor)})
    stopped = LlamaCppEngine(copy, threads=1)
    text, last = ask(stopped, messages)
    assert plain.startswith(text) and text.split() == plain.split()[:1]
    assert last.stats.finish_reason == "stop" and last.stats.generated_tokens == 2
    stopped.close()


def rewritten(source: Path, path: Path, changes: dict[str, Any]) -> Path:
    """A copy of a file with other values of some keys."""
    import gguf

    header, reader = read_header(source), gguf.GGUFReader(source)
    keys = {key: value for key, value in header.metadata.items() if key != "general.architecture"}
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    return write(path, header.metadata["general.architecture"], {**keys, **changes}, tensors)


def test_other_templates(tmp_path: Path) -> None:
    folders = our_folder(tmp_path, template=V1)
    engine, other = open_engine(folders[1]), MLXEngine(folders[0])
    messages: list[Message] = []
    for turn in range(3):
        messages.append(user("What is it?", 1 if turn == 0 else 0))
        text, last = ask(engine, messages, [picture()])
        assert text == ask(other, messages, [picture()])[0]
        assert turn == 0 or last.stats.cached_tokens > 20
        messages.append(assistant(text))
    engine.close()


@pytest.mark.parametrize("taken", [0, 1, 3, 7])
def test_a_closed_answer_leaves_a_true_record(folders: tuple[Path, Path], taken: int) -> None:
    engine, fresh = open_engine(folders[1]), open_engine(folders[1])
    messages = [user("What colour is the shape?", 1)]
    pieces = engine.stream(messages, [picture()], SHORT)
    text = "".join(piece.text for piece in islice(pieces, taken))
    pieces.close()  # type: ignore[attr-defined]
    more = [*messages, assistant(text), user("And now?")]
    assert ask(engine, more, [picture()])[0] == ask(fresh, more, [picture()])[0]
    for some in (engine, fresh):
        some.close()


@pytest.mark.parametrize("phase", ["encode", "prefill"])
@pytest.mark.parametrize("at", [1, 2, 4])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_while_a_prompt_is_read(
    folders: tuple[Path, Path], phase: str, at: int, error: type[BaseException]
) -> None:
    calls = 0

    def progress(now: str, done: int, total: int) -> None:
        nonlocal calls
        calls += now == phase
        if calls == at and now == phase:
            raise error

    engine = open_engine(folders[1], prefill_chunk=4, progress=progress)
    fresh = open_engine(folders[1], prefill_chunk=4)
    messages, images = (
        [
            user("What colours are these? ", 4),
        ],
        [picture(seed) for seed in range(4)],
    )
    with pytest.raises(error):
        ask(engine, messages, images)
    text, last = ask(engine, messages, images)
    assert text == ask(fresh, messages, images)[0]
    assert (last.stats.cached_tokens > 0) == (phase == "prefill" and error is KeyboardInterrupt)
    for some in (engine, fresh):
        some.close()


def test_ctrl_c_stops_llama_cpp(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes while a prompt is read; llama.cpp gives up, and the next answer is right."""
    engine, fresh = open_engine(folders[1]), open_engine(folders[1])
    messages = [user("What colour is the shape? " * 8)]
    run, codes = Worker.run, list[int]()

    def interrupted(self: Worker, call: Any, *arguments: Any) -> Any:
        def compute() -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            codes.append(call(*arguments))
            return codes[-1]

        return run(self, compute)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask(engine, messages)
    assert codes == [2]  # llama.cpp's word for having given up
    assert ask(engine, messages)[0] == ask(fresh, messages)[0]
    for some in (engine, fresh):
        some.close()


def test_an_answer_cannot_go_on_after_another_has_begun(engine: LlamaCppEngine) -> None:
    first = engine.stream([user("What?")], sampling=SHORT)
    next(first)
    second = engine.stream([user("Why?")], sampling=SHORT)
    next(second)
    with pytest.raises(RuntimeError, match="another answer was begun on this engine"):
        next(first)
    fresh, _ = ask(engine, [user("Why?")])
    assert fresh


def test_pieces_come_while_the_answer_is_made(engine: LlamaCppEngine) -> None:
    pieces = engine.stream([user("What?")], sampling=SHORT)
    piece = next(pieces)
    assert piece.stats.generated_tokens == 1 and piece.stats.finish_reason is None


def test_progress(folders: tuple[Path, Path]) -> None:
    seen: list[tuple[str, int, int]] = []
    engine = open_engine(folders[1], progress=lambda *state: seen.append(state), prefill_chunk=8)
    loading = [done for phase, done, _ in seen if phase == "load"]
    assert loading == sorted(loading) and loading[-1] == module_units()
    seen.clear()
    _, last = ask(engine, [user("What colour is the shape?", 1)], [picture()])
    assert seen[0] == ("encode", 1, 1)
    prefill = [(done, total) for phase, done, total in seen if phase == "prefill"]
    assert prefill[-1] == (last.stats.prompt_tokens, last.stats.prompt_tokens)
    assert [done for done, _ in prefill] == sorted({done for done, _ in prefill})
    engine.close()


def module_units() -> int:
    from gm_mlx.llama.model import LOAD_UNITS

    return LOAD_UNITS


# What is refused


def test_the_context_is_a_limit(folders: tuple[Path, Path]) -> None:
    engine = open_engine(folders[1], n_ctx=64)
    assert engine.context_length == 64
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens but the model's context is 64; shorten it"):
        engine.stream([user("What colour is it? " * 20)])
    messages = [user("What colour is it?", 1)]
    _, last = ask(engine, messages, [picture()], Sampling(max_tokens=500))
    assert last.stats.prompt_tokens + last.stats.generated_tokens == 64
    assert last.stats.finish_reason == "length"
    engine.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_ctx": 8}, "n_ctx: 8 is not 16 or more"),
        ({"n_ctx": 513}, "n_ctx: 513 is more than the model was made for; ask for at most 512"),
        ({"threads": 0}, "threads: 0 is not between 1 and 512"),
        ({"gpu_layers": -1}, "gpu_layers: -1 is not 0 or more"),
        ({"kv_bits": 5}, "kv_bits: 5 is not 4 or 8"),
        ({"prefill_chunk": 0}, "prefill_chunk: 0 is not 1 or more"),
        ({"max_kv_size": 100}, "max_kv_size: llama.cpp's cache forgets nothing; bound it with --context"),
    ],
)
def test_options_out_of_range(folders: tuple[Path, Path], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_engine(folders[1], **options)


def test_a_quantized_cache_that_the_model_does_not_allow(tmp_path: Path) -> None:
    model = tiny_model(config=tiny_config(moe=None, head_dim=24))
    folder = our_folder(tmp_path, model=model)[1]
    with pytest.raises(UserError, match=r"cannot be made: .*block size 32 does not divide.*; leave kv_bits out"):
        open_engine(folder, kv_bits=8)


def test_an_image_for_a_model_that_was_loaded_blind(folders: tuple[Path, Path]) -> None:
    engine = LlamaCppEngine(folders[1] / "model.gguf", threads=1)
    with pytest.raises(UserError, match=r"model\.gguf: was loaded without a vision model, .* --mmproj"):
        engine.stream([user("What?", 1)], [picture()])
    assert ask(engine, [user("What?")])[0]
    engine.close()


def test_slots_and_images_that_differ(engine: LlamaCppEngine) -> None:
    with pytest.raises(UserError, match="the conversation has 2 image slots but 1 image was given"):
        engine.stream([user("What?", 2)], [picture()])


def test_the_mmproj_of_another_model(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    other = our_folder(tmp_path, model=tiny_model(config=tiny_config(intermediate_size=160)))[1]
    with pytest.raises(
        UserError, match=r"mmproj\.gguf: does not belong to .*model\.gguf \(it was written with another"
    ):
        LlamaCppEngine(folders[1] / "model.gguf", other / "mmproj.gguf")
    foreign = write_mmproj(tmp_path / "wide.gguf", width=96)
    with pytest.raises(UserError, match=r"wide\.gguf: does not belong to .*\(its features have 96 values, and 64 are"):
        LlamaCppEngine(folders[1] / "model.gguf", foreign)
    with pytest.raises(UserError, match=r"wide\.gguf: .*mismatch between text model \(n_embd = 64\) and mmproj"):
        LlamaCppEngine(write_text(tmp_path / "text.gguf"), foreign)


def test_a_damaged_processor(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    for text, message in (("{", "gm.processor is not JSON"), ("{}", "gm.processor: the key 'image' is missing")):
        path = rewritten(folders[1] / "model.gguf", tmp_path / "x.gguf", {"gm.processor": text})
        with pytest.raises(UserError, match=rf"x\.gguf: {message}"):
            LlamaCppEngine(path)


def test_a_closed_engine(folders: tuple[Path, Path]) -> None:
    engine = open_engine(folders[1])
    answer = engine.stream([user("What?")], sampling=SHORT)
    next(answer)
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError):
        next(answer)


# Sampling


def test_the_answer_is_the_likeliest_token(engine: LlamaCppEngine) -> None:
    """Padding rows and the image token are never chosen; here they would be, were they not banned."""
    for question in ("What?", "Why?", "Is it red?", "a", "1 2 3"):
        logits = engine.prompt_logits([user(question)])
        best = int(np.argmax(logits[: engine._rows - len(set(engine._banned))]))
        list(engine.stream([user(question)], sampling=Sampling(max_tokens=2)))
        assert engine._keys[-1] == best


@functools.cache
def sampled(engine: LlamaCppEngine, sampling: Sampling) -> list[int]:
    """Many draws of an answer's first token."""
    from gm_mlx.llama.sampling import Sampler

    engine.prompt_logits([user("What?")])
    sampler = Sampler(sampling, engine._rows, engine._banned, [])
    drawn = [sampler.choose(engine._open()) for _ in range(300)]
    sampler.close()
    return drawn


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.6}, {"top_k": 3}, {"min_p": 0.3}, {"top_p": 0.9, "top_k": 4}, {"top_p": 0.8, "min_p": 0.2},
        {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-30},
    ],
)  # fmt: skip
def test_filters_keep_what_mlx_keeps(engine: LlamaCppEngine, options: dict[str, Any]) -> None:
    """Top-p, then min-p, then top-k on probabilities at temperature 1; the temperature comes last."""
    sampling = Sampling(**{"temperature": 3.0, "seed": 1, **options})
    logits = engine.prompt_logits([user("What?")]).astype(np.float64)
    logits[engine._banned] = -np.inf
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = np.argsort(-p)
    kept = order[: int(np.searchsorted(np.cumsum(p[order]), sampling.top_p)) + 1]
    kept = kept[p[kept] >= sampling.min_p * p.max()]
    kept = kept[: sampling.top_k or None]
    if sampling.temperature < 1:
        kept = kept[:1]
    drawn = sorted(set(sampled(engine, sampling)))
    assert p[drawn].min() >= p[kept].min()  # of tokens that are equally likely, any may be among the kept ones
    assert len(drawn) <= len(kept)
    assert len(kept) > 12 or drawn == sorted(kept.tolist())


def test_a_seed_repeats_an_answer(engine: LlamaCppEngine) -> None:
    hot = Sampling(max_tokens=12, temperature=2.0, seed=5)
    first = ask(engine, [user("What?")], sampling=hot)[0]
    assert ask(engine, [user("What?")], sampling=hot)[0] == first
    assert ask(engine, [user("What?")], sampling=replace(hot, seed=2**40))[0] != first
    unseeded = {ask(engine, [user("What?")], sampling=replace(hot, seed=None))[0] for _ in range(4)}
    assert len(unseeded) > 1


@pytest.mark.parametrize("context", [2, 64])
def test_the_penalty_is_that_of_mlx(engine: LlamaCppEngine, mlx_engine: MLXEngine, context: int) -> None:
    sampling = Sampling(max_tokens=16, repetition_penalty=1.5, repetition_context=context)
    messages = [user("What colour is the shape?", 1)]
    text = ask(engine, messages, [picture()], sampling)[0]
    assert text == ask(mlx_engine, messages, [picture()], sampling)[0]
    assert text != ask(engine, messages, [picture()], replace(GREEDY, max_tokens=16))[0]


# The layout of CLIP's class token


@pytest.mark.parametrize("layout", ["cls_first", "cls_last"])
def test_a_layout_that_the_library_does_not_want(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    folder = our_folder(tmp_path, model=tiny_model(config=tiny_config("clip")))[1]
    monkeypatch.setattr("gm_mlx.llama.probe.needed_layout", lambda: layout)
    engine = open_engine(folder)
    written = read_header(folder / "mmproj.gguf").metadata["gm.position_layout"]
    lines = engine.notices([picture()])
    assert [layout in line and "--clip-layout" in line for line in lines] == [True] * (written != layout)
    assert engine.notices() == []
    engine.close()


def test_towers_without_a_class_token_need_no_probe(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise AssertionError("probed")

    monkeypatch.setattr("gm_mlx.llama.probe.needed_layout", fail)
    engine = open_engine(folders[1])
    assert engine.notices() == []
    engine.close()


def test_it_is_an_engine(engine: LlamaCppEngine) -> None:
    checked: Engine = engine
    assert checked.open_image(picture()).size == (20, 12)
