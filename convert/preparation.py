"""The processor of a converted model: tokenizer, chat template, and how an image becomes pixels.

MoE-LLaVA and LLaVA choose the chat template by the name of the model's folder, and leave it to each of their scripts
whether images are padded. Here both are decided once, from what the checkpoint says, and written down.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gm_mlx.chat_template import BOS, GEMMA, OPENCHAT, PHI, PHI_END, PLAIN, TEMPLATES, V1, ChatTemplate
from gm_mlx.config import ModelConfig
from gm_mlx.convert.layouts.decoders import GEMMA as GEMMA_DECODER
from gm_mlx.convert.layouts.decoders import Decoder
from gm_mlx.convert.tokenizers import converted_files
from gm_mlx.convert.values import Values
from gm_mlx.errors import UserError
from gm_mlx.images import CLIP_MEAN, CLIP_STD, HALF, ImageConfig, Mode
from gm_mlx.processor import Processor
from gm_mlx.tokenizer import Tokenizer, load_tokenizer, make_tokenizer

# What a folder's own jinja template has in it if it is one of ours.
JINJA_MARKS = (("<start_of_turn>", GEMMA), ("ASSISTANT:", V1))

# Values of a preprocessor_config.json with which images are prepared as they are here.
PREPROCESSING: dict[str, tuple[object, ...]] = {
    "do_resize": (None, True),
    "do_rescale": (None, True),
    "do_normalize": (None, True),
    "resample": (None, 3),  # Pillow's bicubic filter
}


def find_tokenizer(folders: Sequence[Path]) -> Tokenizer:
    """The tokenizer of the first folder that has one, converted if it is none that is read as it is.

    Its ``vocab_size`` is the length to which MoE-LLaVA's loader cuts the embedding and the head.

    Raises:
        UserError: no folder has one, or its files are damaged.
    """
    controls = {name for template in TEMPLATES.values() for name in template.controls}
    for folder in folders:
        if any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
            return load_tokenizer(folder, controls)
        if files := converted_files(folder):
            return make_tokenizer(files, folder, controls)
    return load_tokenizer(folders[0])  # says what is missing


def choose_template(
    name: str | None, decoder: Decoder, tokenizer: Tokenizer, folders: Sequence[Path], *, plain: bool, own_jinja: bool
) -> tuple[ChatTemplate, list[str]]:
    """The chat template, with notes for the user.

    Args:
        name: the user's choice, a key of ``TEMPLATES``, or None.
        decoder: the decoder's family, which decides if nothing else does.
        tokenizer: the tokenizer, which must have the template's control tokens.
        folders: where the checkpoint's own jinja template may be.
        plain: the model has only learnt to continue an image with a caption (stage 1).
        own_jinja: a jinja template belongs to the whole model, as in Hugging Face's layout, and not to the language
            model that it was made from.

    Raises:
        UserError: there is no template of that name.
    """
    if name is not None and name not in TEMPLATES:
        raise UserError(f"--template {name}: no such template; choose one of {', '.join(TEMPLATES)}")
    notes = []
    if name is not None:
        template = TEMPLATES[name]
    elif plain:
        template = PLAIN
    else:
        template = _of_decoder(decoder, tokenizer)
        jinja = next((text for folder in folders if (text := _jinja(folder))), "") if own_jinja else ""
        marked = next((each for mark, each in JINJA_MARKS if mark in jinja), None)
        if jinja and marked is None:
            notes.append(
                f"the checkpoint's own chat template is none of {', '.join(TEMPLATES)}; {template.name!r} is used, and "
                "--template chooses another"
            )
        if marked is not None and _has_controls(marked, tokenizer):
            template = marked
    if template.bos and tokenizer.bos_id is None:
        notes.append(f"the tokenizer has no BOS token, so template {template.name!r} is used without")
        template = replace(template, bos=False)
    return template, notes


def image_config(vision: dict[str, Any], aspect_ratio: str | None, folders: Iterable[Path]) -> ImageConfig:
    """How images are prepared.

    Args:
        vision: the fields of VisionConfig.
        aspect_ratio: LLaVA's ``image_aspect_ratio``: "pad", or anything else for the tower's own way.
        folders: where a ``preprocessor_config.json`` may be; the first counts.

    Raises:
        UserError: the file asks for steps that are not done here, or for images of another size than the tower's.
    """
    is_clip = vision["model_type"] == "clip_vision_model"
    settings = _preprocessor(folders)
    settings.refuse(PREPROCESSING)
    crop = settings.get("do_center_crop", bool, is_clip)
    for key in ("size", "crop_size") if crop else ("size",):
        _check_sides(settings, key, vision["image_size"])
    mode: Mode = "crop" if crop else "resize"
    if aspect_ratio == "pad" or settings.get("do_pad", bool, False):
        mode = "pad"
    elif not crop and "shortest_edge" in str(settings.table.get("size")):
        raise settings.error("do_center_crop", "is false with a shortest_edge: images would not be square; correct it")
    own = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD} if is_clip else {"image_mean": HALF, "image_std": HALF}
    mean, std = (tuple(settings.get(key, list, values)) for key, values in own.items())
    try:
        return ImageConfig(vision["image_size"], mode, mean, std)  # type: ignore[arg-type]
    except UserError as error:
        raise UserError(f"{settings.file}: {error}") from None


def _check_sides(settings: Values, key: str, size: int) -> None:
    """A side is a number, or a table such as {"height": 336, "width": 336} or {"shortest_edge": 336}."""
    sides = settings.table.get(key)
    if sides is not None and set(sides.values() if isinstance(sides, dict) else [sides]) != {size}:
        raise settings.error(key, f"is {sides} where the tower reads images of {size} pixels; correct one of them")


def make_processor(
    config: ModelConfig, tokenizer: Tokenizer, template: ChatTemplate, image: ImageConfig, folders: Sequence[Path]
) -> Processor:
    """Put the parts together; the folders' ``generation_config.json`` may add tokens that end an answer.

    Raises:
        UserError: the tokenizer does not fit the model or the template.
    """
    tokens, rows = tokenizer.vocab_size, config.text_config.vocab_size
    if tokens > rows:
        raise UserError(
            f"{folders[0]}: the tokenizer has {tokens} tokens where the embedding has {rows} rows; put the tokenizer "
            "that the model was trained with into the folder"
        )
    stops: set[int] = set()
    for folder in folders:
        ends = Values.read(folder / "generation_config.json").table.get("eos_token_id")
        stops |= {token for token in (ends if isinstance(ends, list) else [ends]) if type(token) is int}
        if ends is not None:
            break
    try:
        return Processor(
            tokenizer, template, image, config.image_token_index, config.num_image_tokens, frozenset(stops)
        )
    except UserError as error:
        raise UserError(f"{folders[0]}: {error}") from None


def image_token(tokenizer: Tokenizer) -> int:
    """An id for image slots where a checkpoint has none (LLaVA's -200).

    The tokenizer's own ``<image>``, or the first id that it does not have: a padded row of the embedding or the one
    behind its end. The row is never read.
    """
    own = tokenizer.id_of("<image>")
    return own if own is not None and tokenizer.is_special(own) else tokenizer.vocab_size


def _of_decoder(decoder: Decoder, tokenizer: Tokenizer) -> ChatTemplate:
    if decoder is GEMMA_DECODER and _has_controls(GEMMA, tokenizer):
        return GEMMA
    if _has_controls(OPENCHAT, tokenizer):
        return OPENCHAT
    ends_like_phi = tokenizer.eos_id is not None and tokenizer.eos_id == tokenizer.id_of(PHI_END)
    return PHI if ends_like_phi else V1


def _has_controls(template: ChatTemplate, tokenizer: Tokenizer) -> bool:
    return all(tokenizer.id_of(name) is not None for name in template.controls if name != BOS)


def _jinja(folder: Path) -> str:
    """The text of a folder's own chat template, wherever transformers may have written it; empty if there is none."""
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = Values.read(folder / name).table.get("chat_template")
        if template:
            return template if isinstance(template, str) else str(template)
    return ""


def _preprocessor(folders: Iterable[Path]) -> Values:
    """The settings of an image processor; transformers 5 keeps them in processor_config.json."""
    settings = None
    for folder in folders:
        settings = Values.read(folder / "preprocessor_config.json")
        if not settings.table:
            settings = Values.read(folder / "processor_config.json").inner("image_processor")
        if settings.table:
            break
    assert settings is not None, "there is always the checkpoint's folder"
    return settings
