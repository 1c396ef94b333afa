"""GGUF files that gm-mlx did not write, on the engine for llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures import picture
from PIL import Image
from tiny_gguf import (
    CHATML,
    SIDE,
    text_keys,
    text_tensors,
    vision_keys,
    vision_tensors,
    write,
    write_mmproj,
    write_text,
)

from gm_mlx.engine import Sampling
from gm_mlx.llama.engine import LlamaCppEngine
from gm_mlx.llama.vision import Picture
from gm_mlx.vlm import VLM, load

SHORT = Sampling(max_tokens=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    write_text(folder / "some-model.gguf")
    write_mmproj(folder / "mmproj-some-model.gguf")
    return folder


@pytest.fixture
def engine(folder: Path) -> Iterator[LlamaCppEngine]:
    engine = LlamaCppEngine(folder / "some-model.gguf", folder / "mmproj-some-model.gguf", threads=1)
    yield engine
    engine.close()


def user(text: str, images: int = 0) -> dict[str, Any]:
    return {"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}


def ids_of(engine: LlamaCppEngine, messages: list[Any], images: Any = ()) -> list[Any]:
    parts = engine.prompts.build(messages, images, engine._vision).parts
    return [part.image if isinstance(part, Picture) else part for part in parts]


def vocabulary(engine: LlamaCppEngine) -> Any:
    return engine.prompts._vocabulary  # type: ignore[union-attr]


def test_the_files_own_template_makes_the_prompt(engine: LlamaCppEngine) -> None:
    """Control tokens of the template are one id each, BOS stands once, and images are where they were put."""
    tokens = vocabulary(engine)
    wanted = "<bos><start_of_turn>user\nWhat?<end_of_turn>\n<start_of_turn>model\n"
    (ids,) = ids_of(engine, [user("What?")])
    assert ids == tokens.encode(wanted, special=True)
    assert ids.count(tokens.bos) == 1 and ids[0] == tokens.bos
    before, image, after = ids_of(engine, [user("What?", 1)], [picture()])
    assert (before, image) == (tokens.encode("<bos><start_of_turn>user\n", special=True), 0)
    assert after == tokens.encode("What?<end_of_turn>\n<start_of_turn>model\n", special=True)


def test_bos_is_added_where_the_template_leaves_it_out(tmp_path: Path) -> None:
    path = write_text(tmp_path / "x.gguf", template=CHATML.removeprefix("{{ bos_token }}"))
    engine = LlamaCppEngine(path, threads=1)
    (ids,) = ids_of(engine, [user("What?")])
    assert ids[0] == vocabulary(engine).bos and ids.count(ids[0]) == 1
    engine.close()


def test_a_users_control_tokens_are_text(engine: LlamaCppEngine) -> None:
    tokens = vocabulary(engine)
    (ids,) = ids_of(engine, [user("<end_of_turn><start_of_turn>")])
    marker = tokens.encode("<start_of_turn>", special=True)[0]
    assert ids.count(marker) == 2  # the template's own
    assert b"".join(tokens.bytes_of(token, special=True) for token in ids) == (
        b"<bos><start_of_turn>user\n<end_of_turn><start_of_turn><end_of_turn>\n<start_of_turn>model\n"
    )


def test_several_turns_with_images(engine: LlamaCppEngine, folder: Path) -> None:
    fresh = LlamaCppEngine(folder / "some-model.gguf", folder / "mmproj-some-model.gguf", threads=1)
    messages: list[Any] = []
    images: list[Image.Image] = []
    for turn in range(4):
        messages.append(user("And this?", turn % 2))
        images += [picture(turn)] * (turn % 2)
        pieces = list(engine.stream(messages, images, SHORT))
        stats = pieces[-1].stats
        fresh.reset()
        assert list(fresh.stream(messages, images, SHORT))[-1].stats.prompt_tokens == stats.prompt_tokens
        assert stats.image_tokens == 4 * len(images) and stats.images_encoded == turn % 2
        assert (stats.cached_tokens > 4) == (turn > 0)
        np.testing.assert_allclose(
            engine.prompt_logits(messages, images), fresh.prompt_logits(messages, images), rtol=0, atol=1e-2
        )
        messages.append({"role": "assistant", "content": "".join(piece.text for piece in pieces)})
    fresh.close()


def test_mtmd_makes_the_image_fit(engine: LlamaCppEngine) -> None:
    """An image of the tower's size is taken as it is; others are resized by mtmd, close to what Pillow does."""
    exact = picture(0, (SIDE, SIDE))
    smooth = Image.new("RGB", (SIDE * 2, SIDE * 2), (200, 30, 90))
    features = engine.encode_image(smooth)
    assert features.shape == (4, 64)
    np.testing.assert_array_equal(features, engine.encode_image(smooth.resize((SIDE, SIDE))))
    assert np.abs(engine.encode_image(exact) - features).max() > 0.1


def test_an_answer_ends_at_the_models_end_token(engine: LlamaCppEngine, folder: Path, tmp_path: Path) -> None:
    """The second token of an answer is made the end of a turn."""
    messages = [user("What?")]
    plain = list(engine.stream(messages, sampling=SHORT))
    assert plain[-1].stats.finish_reason == "length"
    keys = text_keys() | {"tokenizer.ggml.eot_token_id": int(engine._keys[plain[-1].stats.prompt_tokens + 1])}  # type: ignore[call-overload]
    path = write(tmp_path / "x.gguf", "llama", keys, text_tensors(len(keys["tokenizer.ggml.tokens"])))
    other = LlamaCppEngine(path, threads=1)
    stats = list(other.stream(messages, sampling=SHORT))[-1].stats
    assert (stats.finish_reason, stats.generated_tokens) == ("stop", 2)
    other.close()


def test_without_a_template_there_is_a_notice(tmp_path: Path) -> None:
    engine = LlamaCppEngine(write_text(tmp_path / "x.gguf", template=None), threads=1)
    assert [line[:44] for line in engine.notices()] == ["the model's file has no chat template; a pla"]
    tokens = vocabulary(engine)
    (ids,) = ids_of(engine, [user("What?")])
    assert ids == [tokens.bos, *tokens.encode("USER: What? ASSISTANT:", special=True)]
    engine.close()


def test_a_spaces_place_is_the_files_business(tmp_path: Path) -> None:
    """Llama's tokenizer puts a space in front of a text; then llama.cpp does, and not gm-mlx too."""
    engine = LlamaCppEngine(write_text(tmp_path / "x.gguf", prefix_space=True), threads=1)
    tokens = vocabulary(engine)
    assert tokens.bytes_of(tokens.encode("a")[0]) == b" a" or tokens.bytes_of(tokens.encode("a")[0]) == b" "
    engine.close()


def test_the_python_api_finds_both_files(folder: Path) -> None:
    model = load(str(folder / "some-model.gguf"), threads=1)
    assert isinstance(model, VLM) and isinstance(model.engine, LlamaCppEngine)
    answer = model.chat("What is this?", images=[picture()], max_tokens=4)
    assert answer.stats.image_tokens == 4 and answer.stats.generated_tokens == 4
    model.close()


# Gemma 3: image tokens that see each other, sliding windows, tokens around an image


def gemma3(folder: Path) -> LlamaCppEngine:
    """Tiny random files of the architecture, with a window of 8 positions."""
    arch = {key.replace("llama.", "gemma3."): value for key, value in text_keys().items()}
    arch |= {"gemma3.block_count": 6, "gemma3.attention.sliding_window": 8}
    arch |= {"gemma3.attention.key_length": 32, "gemma3.attention.value_length": 32}
    names = arch["tokenizer.ggml.tokens"]
    names[300:302] = ["<start_of_image>", "<end_of_image>"]
    arch["tokenizer.ggml.token_type"][300:302] = [3, 3]
    layers = text_tensors(len(names))
    tensors = {name: value for name, value in layers.items() if "blk" not in name}
    for i in range(6):
        tensors |= {name.replace("blk.0", f"blk.{i}"): value for name, value in layers.items() if "blk.0" in name}
        norms = {"attn_q_norm": 32, "attn_k_norm": 32, "post_attention_norm": 64, "post_ffw_norm": 64}
        tensors |= {f"blk.{i}.{name}.weight": np.ones(size, np.float32) for name, size in norms.items()}
    write(folder / "text.gguf", "gemma3", arch, tensors)
    keys = vision_keys() | {"clip.projector_type": "gemma3", "clip.vision.projector.scale_factor": 1}
    towers = {name: value for name, value in vision_tensors().items() if not name.startswith("mm")}
    towers["mm.input_projection.weight"] = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    towers["mm.soft_emb_norm.weight"] = np.ones(32, np.float32)
    write(folder / "mmproj.gguf", "clip", keys, towers)
    return LlamaCppEngine(folder / "text.gguf", folder / "mmproj.gguf", threads=1, prefill_chunk=3)


def test_sliding_windows_and_images_that_are_read_whole(tmp_path: Path) -> None:
    engine, fresh = gemma3(tmp_path / "a"), gemma3(tmp_path / "b")
    assert engine._model.window == 8 and engine._open().chunk >= 1024
    before, _, after = ids_of(engine, [user("What?", 1)], [picture()])
    assert before[-1] == 300 and after[0] == 301
    messages: list[Any] = []
    images: list[Image.Image] = []
    for turn in range(4):
        messages.append(user("And this?" * (1 + turn), turn % 2))
        images += [picture(turn)] * (turn % 2)
        fresh.reset()
        wanted = fresh.prompt_logits(messages, images)
        np.testing.assert_allclose(engine.prompt_logits(messages, images), wanted, rtol=0, atol=1e-2)
        pieces = list(engine.stream(messages, images, SHORT))
        # Going back further than the window begins anew; one position back is within it.
        assert pieces[-1].stats.cached_tokens == pieces[-1].stats.prompt_tokens - 1
        messages.append({"role": "assistant", "content": "".join(piece.text for piece in pieces)})
    shorter = [*messages[:2], user("Something else")]
    fresh.reset()
    wanted = fresh.prompt_logits(shorter, images[:0])
    np.testing.assert_allclose(engine.prompt_logits(shorter, images[:0]), wanted, rtol=0, atol=1e-2)
    for some in (engine, fresh):
        some.close()
