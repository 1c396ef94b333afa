"""Wrong files are refused before llama.cpp sees them, with one line that names the file, the key and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_gguf import our_folder, text_keys, text_tensors, vision_keys, vision_tensors, write, write_mmproj, write_text

from gm_mlx.errors import UserError
from gm_mlx.gguf_file import GGUFHeader, GGUFTensor
from gm_mlx.llama import check
from gm_mlx.llama.check import check_mmproj, check_pair, check_text_model, part_paths

TOKENS = text_keys()["tokenizer.ggml.tokens"]
GEMMA4 = {"gemma4.context_length": 8, "gemma4.embedding_length": 8, "gemma4.block_count": 2}


def changed(keys: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Keys with other values; None takes one out."""
    return {key: value for key, value in {**keys, **changes}.items() if value is not None}


def test_sound_files(tmp_path: Path) -> None:
    text, mmproj = write_text(tmp_path / "x.gguf"), write_mmproj(tmp_path / "mmproj.gguf")
    check_pair(check_text_model(text), check_mmproj(mmproj))
    _, folder = our_folder(tmp_path)
    check_pair(check_text_model(folder / "model.gguf"), check_mmproj(folder / "mmproj.gguf"))


TEXT_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"llama.block_count": None}, "the key llama.block_count is missing"),
    ({"llama.embedding_length": None}, "the key llama.embedding_length is missing"),
    ({"llama.context_length": None}, "the key llama.context_length is missing"),
    ({"tokenizer.ggml.tokens": None}, "the key tokenizer.ggml.tokens is missing"),
    ({"tokenizer.ggml.model": None}, "the key tokenizer.ggml.model is missing"),
    ({"tokenizer.ggml.model": "no_vocab"}, "has no vocabulary"),
    ({"llama.block_count": "2"}, "llama.block_count is string and not uint32"),
    ({"llama.block_count": 0}, "llama.block_count is 0"),
    ({"llama.block_count": 513}, "llama.block_count is 513"),
    ({"llama.embedding_length": 0}, "llama.embedding_length is 0"),
    ({"llama.expert_count": 1025}, "llama.expert_count is 1025"),
    ({"llama.expert_count": 4}, "llama.expert_used_count is 0 of 4 experts"),
    ({"llama.expert_count": 4, "llama.expert_used_count": 5}, "llama.expert_used_count is 5 of 4 experts"),
    ({"llama.expert_used_count": 2}, "llama.expert_used_count is 2 of 0 experts"),
    ({"llama.attention.head_count": [2, 2, 2]}, "llama.attention.head_count has 3 values for 2 layers"),
    ({"llama.attention.head_count": [2, -2]}, r"llama.attention.head_count is \[2, -2\]"),
    ({"llama.feed_forward_length": "x" * 99}, "llama.feed_forward_length is 'x+\\.\\.\\."),
    ({"llama.rope.scaling.type": "cubic"}, "llama.rope.scaling.type is 'cubic'"),
    ({"tokenizer.ggml.tokens": [*TOKENS[:-1], TOKENS[0]]}, "tokenizer.ggml.tokens has the same token twice"),
    ({"tokenizer.ggml.tokens": TOKENS[:-1]}, "tokenizer.ggml.scores has \\d+ values for \\d+ tokens"),
    ({"tokenizer.ggml.scores": ["a"] * len(TOKENS)}, "tokenizer.ggml.scores is array of string"),
    ({"tokenizer.ggml.token_type": [1.0] * len(TOKENS)}, "tokenizer.ggml.token_type is array of float32"),
    ({"tokenizer.ggml.eos_token_id": len(TOKENS)}, "tokenizer.ggml.eos_token_id is \\d+, and there are \\d+ tokens"),
    ({"tokenizer.ggml.bos_token_id": "x"}, "tokenizer.ggml.bos_token_id is 'x'"),
    ({"tokenizer.ggml.add_bos_token": 1}, "tokenizer.ggml.add_bos_token is neither true nor false"),
    ({"tokenizer.chat_template": 1}, "tokenizer.chat_template is uint32 and not a text"),
    ({"gm.processor": 1}, "gm.processor is uint32 and not string"),
    ({"split.count": 70000}, "split.count is 70000"),
    ({"general.type": "adapter"}, "no model but a file of type 'adapter'; name the model that it is for"),
    ({"general.type": "mmproj"}, "a vision model; name the text model with --model, and this one with --mmproj"),
]


@pytest.mark.parametrize(("changes", "message"), TEXT_FAULTS)
def test_text_models(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "x.gguf", "llama", changed(text_keys(), changes), text_tensors(len(TOKENS)))
    with pytest.raises(UserError, match=f"^{path}: {message}") as error:
        check_text_model(path)
    assert "\n" not in str(error.value)


def test_as_many_tokens_as_embeddings(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", "llama", text_keys(), text_tensors(len(TOKENS) + 1))
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.tokens has \d+ tokens for \d+ embeddings"):
        check_text_model(path)


@pytest.mark.parametrize("pattern", [None, [False, False], [True]])
def test_a_gemma4_file_needs_a_sliding_window_layer(tmp_path: Path, pattern: list[bool] | None) -> None:
    vocabulary = {key: value for key, value in text_keys().items() if key.startswith("tokenizer")}
    key = "gemma4.attention.sliding_window_pattern"
    path = write(tmp_path / "x.gguf", "gemma4", changed({**GEMMA4, **vocabulary}, {key: pattern}), {})
    with pytest.raises(UserError, match=f"{key} names no sliding-window layer among 2, and llama.cpp needs one"):
        check_text_model(path)


VISION_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"clip.has_vision_encoder": None}, "reads no images"),
    ({"clip.has_vision_encoder": False}, "reads no images"),
    ({"clip.has_vision_encoder": 1}, "clip.has_vision_encoder is uint32 and not bool"),
    ({"clip.vision.image_size": None}, "the key clip.vision.image_size is missing"),
    ({"clip.vision.image_size": 16.0}, "clip.vision.image_size is float32 and not uint32"),
    ({"clip.vision.image_size": 4}, "clip.vision.image_size is 4 with patches of 8"),
    ({"clip.vision.image_size": 10000}, "clip.vision.image_size is 10000 with patches of 8"),
    ({"clip.vision.patch_size": 0}, "clip.vision.patch_size is 0"),
    ({"clip.vision.block_count": 1 << 20}, "clip.vision.block_count is 1048576"),
    ({"clip.vision.attention.layer_norm_epsilon": 1}, "clip.vision.attention.layer_norm_epsilon is uint32"),
    ({"clip.vision.embedding_length": 64}, "clip.vision.embedding_length is 64, and patches are embedded into 32"),
    ({"clip.vision.image_mean": [1, 2, 3]}, "clip.vision.image_mean is array of int32 and not array of float32"),
    ({"clip.use_gelu": "yes"}, "clip.use_gelu is string and not bool"),
    ({"clip.projector_type": 3}, "clip.projector_type is uint32 and not string"),
]


@pytest.mark.parametrize(("changes", "message"), VISION_FAULTS)
def test_vision_models(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "x.gguf", "clip", changed(vision_keys(), changes), vision_tensors())
    with pytest.raises(UserError, match=f"^{path}: {message}"):
        check_mmproj(path)


@pytest.mark.parametrize("name", check.LLAVA_TENSORS)
def test_tensors_that_llama_cpp_takes_for_granted(tmp_path: Path, name: str) -> None:
    tensors = vision_tensors()
    del tensors[name]
    path = write(tmp_path / "x.gguf", "clip", vision_keys(), tensors)
    with pytest.raises(UserError, match=f"^{path}: tensor '{name}' is missing; download it again"):
        check_mmproj(path)


def test_files_in_each_others_place(tmp_path: Path) -> None:
    text, mmproj = write_text(tmp_path / "x.gguf"), write_mmproj(tmp_path / "mmproj.gguf")
    with pytest.raises(UserError, match=r"mmproj\.gguf: a vision model; name the text model with --model"):
        check_text_model(mmproj)
    with pytest.raises(UserError, match=r"x\.gguf: no vision model but one of type 'llama'; name the mmproj file"):
        check_mmproj(text)


def header(path: str, metadata: dict[str, Any]) -> GGUFHeader:
    return GGUFHeader(Path(path), metadata, dict[str, GGUFTensor](), {})


@pytest.mark.parametrize(
    ("mine", "theirs", "width", "message"),
    [
        ("a", "b", 8, "it was written with another model"),
        ("a", None, 16, "its features have 16 values, and 8 are due"),
        ("a", "a", 16, "its features have 16 values, and 8 are due"),
        ("a", "a", 8, None),
        (None, None, 16, None),  # other people's projectors may say what they like; llama.cpp knows
    ],
)
def test_files_of_two_models(mine: str | None, theirs: str | None, width: int, message: str | None) -> None:
    text = {"general.architecture": "gemma4", "gemma4.embedding_length": 8, "gm.pair": mine}
    vision = {"clip.vision.projection_dim": width, "gm.pair": theirs}
    pair = [header("t.gguf", changed({}, text)), header("v.gguf", changed({}, vision))]
    if message is None:
        check_pair(*pair)
        return
    with pytest.raises(UserError, match=rf"^v\.gguf: does not belong to t\.gguf \({message}\); name the mmproj file"):
        check_pair(*pair)


def split(folder: Path, number: int, count: int = 2) -> Path:
    keys = {**text_keys(), "split.no": number, "split.count": count}
    path = folder / f"x-{number + 1:05}-of-{count:05}.gguf"
    return write(path, "llama", keys, {"w": np.zeros(8, np.float32)})


def test_split_models(tmp_path: Path) -> None:
    first = split(tmp_path, 0)
    with pytest.raises(UserError, match=r"x-00002-of-00002\.gguf: cannot be read \(No such file"):
        check_text_model(first)
    second = split(tmp_path, 1)
    check_text_model(first)
    assert list(part_paths(first)) == [first, second]
    with pytest.raises(UserError, match=r"part of a model in 2 files; name the first, which ends in -00001-of-00002\."):
        check_text_model(second)
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"x-00002-of-00002\.gguf: is cut short"):
        check_text_model(first)
    renamed = first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(UserError, match="part of a model in 2 files"):
        check_text_model(renamed)
