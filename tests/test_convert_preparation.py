"""The processor of a converted model: tokenizer, chat template, image preparation."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_tokenizer import write_sentencepiece, write_tokenizers

from gm_mlx.chat_template import OPENCHAT_END, TEMPLATES
from gm_mlx.config import VisionConfig
from gm_mlx.convert.layouts.decoders import GEMMA, LLAMA, MISTRAL
from gm_mlx.convert.preparation import (
    choose_template,
    find_tokenizer,
    image_config,
    image_token,
    make_processor,
)
from gm_mlx.convert.values import Values
from gm_mlx.errors import UserError
from gm_mlx.images import CLIP_MEAN, CLIP_STD, HALF, ImageConfig
from gm_mlx.presets import PRESETS

CLIP = asdict(VisionConfig("clip_vision_model", 8, 8, 1, 1, image_size=28, patch_size=14))
SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}
CLIP_FILE = {
    "image_processor_type": "CLIPImageProcessor",
    "do_center_crop": True,
    "crop_size": {"height": 28, "width": 28},
    "size": {"shortest_edge": 28},
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
    "resample": 3,
}
SIGLIP_FILE = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": 28, "width": 28},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_resize": True,
    "resample": 3,
}


def write_json(folder: Path, name: str, content: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder


# Images


@pytest.mark.parametrize(
    ("vision", "aspect_ratio", "settings", "mode"),
    [
        (CLIP, None, None, "crop"),
        (CLIP, "square", None, "crop"),
        (CLIP, "pad", None, "pad"),
        (CLIP, "pad", CLIP_FILE, "pad"),
        (CLIP, None, CLIP_FILE, "crop"),
        (CLIP, None, {**CLIP_FILE, "crop_size": 28, "size": 28}, "crop"),
        (CLIP, None, {**CLIP_FILE, "image_processor_type": "LlavaImageProcessor", "do_pad": True}, "pad"),
        (CLIP, None, {**SIGLIP_FILE, "do_center_crop": False}, "resize"),
        (SIGLIP, None, None, "resize"),
        (SIGLIP, None, SIGLIP_FILE, "resize"),
        (SIGLIP, "pad", SIGLIP_FILE, "pad"),
    ],
)
def test_image_mode(tmp_path: Path, vision: dict[str, Any], aspect_ratio: str | None, settings: Any, mode: str) -> None:
    if settings is not None:
        write_json(tmp_path, "preprocessor_config.json", settings)
    config = image_config(vision, aspect_ratio, [tmp_path])
    given = CLIP_FILE if vision is CLIP and settings is None else settings or SIGLIP_FILE
    assert config == ImageConfig(28, mode, tuple(given["image_mean"]), tuple(given["image_std"]))  # type: ignore[arg-type]


def test_image_settings_of_the_first_folder_count(tmp_path: Path) -> None:
    first = write_json(tmp_path / "1", "processor_config.json", {"image_processor": {"image_mean": [0.1, 0.2, 0.3]}})
    second = write_json(tmp_path / "2", "preprocessor_config.json", SIGLIP_FILE)
    assert image_config(CLIP, None, [first, second]).mean == (0.1, 0.2, 0.3)
    assert image_config(CLIP, None, [tmp_path, second]).mean == HALF


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_size": {"height": 224, "width": 224}}, "crop_size is .* where the tower reads images of 28 pixels"),
        ({"size": {"shortest_edge": 32}}, "size is .* where the tower reads images of 28 pixels"),
        ({"resample": 2}, "resample is 2, which this version cannot convert"),
        ({"do_normalize": False}, "do_normalize is false"),
        ({"do_center_crop": False}, "do_center_crop is false with a shortest_edge"),
        ({"image_mean": [0.5, 0.5]}, "'mean' is"),
        ({"image_std": "half"}, "image_std is 'half' and not a list"),
    ],
)
def test_image_settings_that_cannot_be_kept_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_json(tmp_path, "preprocessor_config.json", {**CLIP_FILE, **change})
    with pytest.raises(UserError, match=message) as error:
        image_config(CLIP, None, [tmp_path])
    assert "preprocessor_config.json" in str(error.value)


def test_a_damaged_settings_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match=r"preprocessor_config.json: not valid JSON"):
        image_config(CLIP, None, [tmp_path])


# Templates


@pytest.mark.parametrize(("decoder", "name"), [(GEMMA, "gemma"), (LLAMA, "v1"), (MISTRAL, "v1")])
def test_a_family_has_its_template(tmp_path: Path, decoder: Any, name: str) -> None:
    tokenizer = find_tokenizer([write_sentencepiece(tmp_path)])
    template, notes = choose_template(None, decoder, tokenizer, [tmp_path], plain=False, own_jinja=False)
    assert (template, notes) == (TEMPLATES[name], [])


def test_stage_1_continues_images_with_captions(tmp_path: Path) -> None:
    tokenizer = find_tokenizer([write_sentencepiece(tmp_path)])
    template, _ = choose_template(None, GEMMA, tokenizer, [tmp_path], plain=True, own_jinja=False)
    assert template.name == "plain"


def test_openchat_is_known_by_its_token(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    write_json(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": {"500": {"content": OPENCHAT_END}}})
    tokenizer = find_tokenizer([tmp_path])
    template, _ = choose_template(None, MISTRAL, tokenizer, [tmp_path], plain=False, own_jinja=False)
    assert template.name == "openchat"
    assert template.answer_end == OPENCHAT_END


@pytest.mark.parametrize(
    ("file", "content", "name", "noted"),
    [
        ("chat_template.jinja", "{{ '<start_of_turn>' }}", "gemma", False),
        ("chat_template.json", {"chat_template": "{{ 'ASSISTANT:' }}"}, "v1", False),
        ("tokenizer_config.json", {"chat_template": "{{ 'ASSISTANT:' }}"}, "v1", False),
        ("tokenizer_config.json", {"chat_template": [{"template": "{{ '[INST]' }}"}]}, "gemma", True),
    ],
)
def test_the_checkpoint_s_own_jinja_counts(tmp_path: Path, file: str, content: Any, name: str, noted: bool) -> None:
    (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    tokenizer = find_tokenizer([write_sentencepiece(tmp_path)])
    template, notes = choose_template(None, GEMMA, tokenizer, [tmp_path], plain=False, own_jinja=True)
    assert template.name == name
    assert any("--template" in note for note in notes) is noted
    # That of the language model alone says nothing about the vision-language model.
    template, notes = choose_template(None, GEMMA, tokenizer, [tmp_path], plain=False, own_jinja=False)
    assert (template.name, notes) == ("gemma", [])


def test_the_user_s_template_wins(tmp_path: Path) -> None:
    tokenizer = find_tokenizer([write_sentencepiece(tmp_path)])
    template, _ = choose_template("v1", GEMMA, tokenizer, [tmp_path], plain=True, own_jinja=True)
    assert template.name == "v1"
    with pytest.raises(UserError, match="--template chatml: no such template; choose one of gemma, v1, plain"):
        choose_template("chatml", GEMMA, tokenizer, [tmp_path], plain=True, own_jinja=True)


def test_a_tokenizer_without_bos_gets_a_template_without(tmp_path: Path) -> None:
    write_tokenizers(tmp_path, "byte_level")
    write_json(tmp_path, "tokenizer_config.json", {"eos_token": "<eos>"})
    tokenizer = find_tokenizer([tmp_path])
    template, notes = choose_template(None, LLAMA, tokenizer, [tmp_path], plain=False, own_jinja=False)
    assert not template.bos
    assert "no BOS" in notes[0]


# Tokenizer and the whole


def test_the_first_folder_with_a_tokenizer_counts(tmp_path: Path) -> None:
    base = write_sentencepiece(tmp_path / "base")
    (tmp_path / "own").mkdir()
    assert find_tokenizer([tmp_path / "own", base]).files.keys() == {"tokenizer.model"}
    with pytest.raises(UserError, match=r"own: no tokenizer.model or tokenizer.json"):
        find_tokenizer([tmp_path / "own"])


def test_image_slots_take_an_id_that_text_cannot_have(tmp_path: Path) -> None:
    tokenizer = find_tokenizer([write_sentencepiece(tmp_path)])
    assert image_token(tokenizer) == tokenizer.vocab_size
    added = {"added_tokens_decoder": {"500": {"content": "<image>", "special": True}}}
    tokenizer = find_tokenizer([write_json(tmp_path, "tokenizer_config.json", added)])
    assert image_token(tokenizer) == 500


def test_the_processor_prepares_what_the_model_reads(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    write_json(tmp_path, "generation_config.json", {"eos_token_id": [1, 7]})
    config = replace(PRESETS["gm-tiny"], image_token_index=700)
    tokenizer = find_tokenizer([tmp_path])
    processor = make_processor(config, tokenizer, TEMPLATES["gemma"], ImageConfig(64, "pad"), [tmp_path])
    assert {1, 7} <= processor.stop_ids
    assert processor.pixels([Image.new("RGB", (9, 5))]).shape == (1, 64, 64, 3)
    prompt = processor.encode([{"role": "user", "content": "What is it?"}], 1)
    assert prompt.ids.count(config.image_token_index) == config.num_image_tokens


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    write_json(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": {"900": {"content": "<new>"}}})
    tokenizer = find_tokenizer([tmp_path])
    with pytest.raises(UserError, match="the tokenizer has 901 tokens where the embedding has 768 rows"):
        make_processor(PRESETS["gm-tiny"], tokenizer, TEMPLATES["gemma"], ImageConfig(64, "pad"), [tmp_path])


def test_an_image_token_that_text_can_produce_is_refused(tmp_path: Path) -> None:
    tokenizer = find_tokenizer([write_sentencepiece(tmp_path)])
    with pytest.raises(UserError, match=r"image_token_index 6 is the ordinary text token") as error:
        make_processor(PRESETS["gm-tiny"], tokenizer, TEMPLATES["gemma"], ImageConfig(64, "pad"), [tmp_path])
    assert str(tmp_path) in str(error.value)


# Values


@pytest.mark.parametrize(
    ("value", "kind", "fits"),
    [(1, int, True), (1, float, True), (1.5, float, True), ("1", int, False), (True, int, False), (True, float, False),
     (1, bool, False), (False, bool, True), ([], dict, False), ("a", str, True)],
)  # fmt: skip
def test_values_are_of_the_type_that_is_asked_for(value: Any, kind: type, fits: bool) -> None:
    values = Values(Path("config.json"), {"a": {"b": value}}).inner("a")
    if fits:
        assert values.get("b", kind) == value
    else:
        with pytest.raises(UserError, match=r"^config.json: a.b is .* and not .*; correct the file$"):
            values.get("b", kind)
    assert values.get("c", kind, "default") == "default"
