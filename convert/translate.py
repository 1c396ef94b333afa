"""From a PyTorch checkpoint to gm-mlx's names, shapes and config. Nothing is read yet but names, shapes and configs.

The layout is found in tensor names and ``config.json``, never in a folder's name. Tensors get their names from tables;
what no table knows, and what a model of that config would lack, is an error: a weight that is left out by mistake gives
a model that talks nonsense without a word.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from gm_mlx.config import MODEL_TYPE, PROJECTOR_TYPES, ModelConfig
from gm_mlx.convert.checkpoint import Checkpoint, open_checkpoint
from gm_mlx.convert.experts import moe_config, name_networks, stack_experts
from gm_mlx.convert.fused_attention import split_attention
from gm_mlx.convert.layouts import LAYOUTS
from gm_mlx.convert.layouts.decoders import GEMMA, Decoder
from gm_mlx.convert.layouts.layout import Layout
from gm_mlx.convert.layouts.towers import STORED
from gm_mlx.convert.lora import merge_lora
from gm_mlx.convert.preparation import choose_template, find_tokenizer, image_config, image_token, make_processor
from gm_mlx.convert.text_config import EMBEDDING, HEAD, HEAD_BIAS, find_decoder, text_config
from gm_mlx.convert.towers import find_tower, used_tensors
from gm_mlx.convert.values import Values
from gm_mlx.errors import UserError
from gm_mlx.processor import Processor
from gm_mlx.source_names import renamed
from gm_mlx.tensors import Tensor
from gm_mlx.weights import unread_model

DIGEST_ROWS = 8192  # of an embedding in float32 at a time


@dataclass
class Translation:
    """A checkpoint as gm-mlx knows models.

    Attributes:
        config: the model.
        tensors: its tensors by gm-mlx's names: experts stacked [E, out, in], patch embedding [D, P, P, 3].
        processor: how images and text become its input.
        provenance: what was decided on the way and why, for ``gm.json``.
        files: the tensor files that are read.
        notes: what the user should know, one line each.
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    processor: Processor
    provenance: dict[str, Any]
    files: list[Path]
    notes: list[str] = field(default_factory=list)


def translate(
    checkpoint: Checkpoint,
    *,
    vision: Path | None = None,
    base: Path | None = None,
    template: str | None = None,
    scale_image_features: bool | None = None,
) -> Translation:
    """Translate a checkpoint of any known layout.

    Args:
        checkpoint: what ``open_checkpoint`` found.
        vision: a folder with a CLIP or SigLIP model, for a checkpoint without its tower (see ``missing_tower``) or in
            the place of the tower that is stored.
        base: the language model that a projector (stage 1) or a LoRA adapter belongs to.
        template: the chat template's name, if it is not to be chosen from the checkpoint.
        scale_image_features: see ``ModelConfig``; by default what the code that wrote the checkpoint does.

    Raises:
        UserError: the checkpoint is of a kind that is not supported, is not whole, or contradicts its config. The
            message names the file, the key or tensor, and the remedy.
    """
    source = _complete(checkpoint, base)
    config = Values(source.folders[0] / "config.json", source.config)
    layout = _find_layout(config, source.tensors)
    config.refuse(layout.refused)
    projector_type = PROJECTOR_TYPES[0]
    if layout.projector_type:
        config.refuse({layout.projector_type: (None, *PROJECTOR_TYPES)})
        projector_type = config.get(layout.projector_type, str, projector_type)
    decoder_config = config.inner(layout.text) if layout.text else config
    decoder, notes = find_decoder(decoder_config, source.tensors)
    tensors = split_attention(_rename(source, layout, decoder), "language_model.")
    notes += _head_bias(config, layout, tensors)

    text, more = text_config(decoder, decoder_config, tensors)
    notes += more
    text["tie_word_embeddings"] = _ties(decoder, decoder_config, tensors)
    if text["tie_word_embeddings"]:
        tensors.pop(HEAD, None)
    text["moe"], more = moe_config(config, tensors, text["num_hidden_layers"], layout.moe_kind)
    notes += more
    tower = find_tower(layout, config, tensors, vision)
    scale, more = _image_scale(decoder, layout, config, scale_image_features)
    notes += more

    tokenizer = find_tokenizer(source.folders)
    token = config.get("image_token_index", int) or config.get("image_token_id", int, 32000 if layout.text else None)
    model_config = _model_config(
        config.file,
        {
            "text_config": text,
            "vision_config": tower.config,
            "image_token_index": image_token(tokenizer) if token is None or token < 0 else token,
            "vision_feature_layer": config.get(layout.feature_layer, int, -2),
            "vision_feature_select_strategy": _strategy(layout, config),
            **tower.read,
            "projector_hidden_act": config.get("projector_hidden_act", str, "gelu"),
            "scale_image_features": scale,
            "projector_type": projector_type,
        },
    )
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(STORED)}
    tensors = (name_networks if layout.moe_kind == "evf" else stack_experts)(tensors)
    tensors |= used_tensors(tower.tensors, model_config)
    tensors = {name: _convolution(tensor) if len(tensor.shape) == 4 else tensor for name, tensor in tensors.items()}
    unread_model(model_config, tensors, config.file.parent)

    chat, more = choose_template(
        template, decoder, tokenizer, source.folders, plain=source.stage_1, own_jinja=bool(layout.text)
    )
    notes += more
    image_folders = [*source.folders[:1], *([vision] if vision is not None else [])]
    # Eve's tower puts any image on a square.
    image = image_config(tower.config, "pad" if tower.read else config.get("image_aspect_ratio", str), image_folders)
    processor = make_processor(model_config, tokenizer, chat, image, source.folders)
    provenance = {
        "layout": layout.title,
        "decoder": decoder.title,
        "vision_source": tower.source,
        "vision_model": config.get(layout.tower_id, str) if layout.tower_id else None,
        "scale_image_features": scale,
        "activation": {"config": _said_activation(decoder_config), "used": text["hidden_act"]},
        "vocab_cut": tokenizer.vocab_size,
        "template": chat.name,
        "image_mode": image.mode,
    }
    return Translation(model_config, tensors, processor, provenance, [*source.files, *tower.files], notes)


@dataclass
class _Source:
    """A checkpoint with what it was trained on.

    Attributes:
        config: its config.
        tensors: all tensors by the names that they have in files.
        files: the files that those are in.
        folders: where tokenizer and settings are looked for, the checkpoint's own first.
        stage_1: the language model has not been trained on images.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    files: list[Path]
    folders: list[Path]
    stage_1: bool


def _complete(checkpoint: Checkpoint, base: Path | None) -> _Source:
    """Put a projector or an adapter on its base model."""
    folder = checkpoint.folder
    if checkpoint.config.get("model_type") == MODEL_TYPE:
        raise UserError(f"{folder / 'config.json'}: model_type is {MODEL_TYPE!r}: it is a gm-mlx model already")
    if checkpoint.tensors:
        if base is not None:
            raise UserError(f"{folder}: holds a whole model, which needs no --base; leave it out")
        tensors = checkpoint.tensors
        if any(".lora_" in name for name in tensors):
            tensors = merge_lora(tensors, {}, checkpoint.adapter_config, {})
        return _Source(checkpoint.config, tensors, checkpoint.files, [folder], stage_1=False)
    kind = "an adapter" if checkpoint.adapter or checkpoint.non_lora else "a projector"
    if base is None:
        named = checkpoint.adapter_config.get("base_model_name_or_path") or checkpoint.config.get("_name_or_path")
        hint = f" ({named})" if isinstance(named, str) and named else ""
        raise UserError(f"{folder}: holds {kind} and no language model; give the folder of its base{hint} with --base")
    under = open_checkpoint(base)
    if not under.tensors:
        raise UserError(f"{base}: holds no whole model; give the folder of a language model with --base")
    tensors = under.tensors
    if checkpoint.adapter or checkpoint.non_lora:
        tensors = merge_lora(tensors, checkpoint.adapter, checkpoint.adapter_config, checkpoint.non_lora)
    return _Source(
        # What the base says counts where the checkpoint, which was trained later, says nothing.
        config={**under.config, **checkpoint.config},
        tensors=tensors | checkpoint.projector,
        files=[*checkpoint.files, *under.files],
        folders=[folder, base],
        stage_1=not (checkpoint.adapter or checkpoint.non_lora),
    )


def _find_layout(config: Values, tensors: Mapping[str, Tensor]) -> Layout:
    for layout in LAYOUTS:
        if layout.matches(tensors):
            return layout
    known = ", ".join(layout.title for layout in LAYOUTS)
    raise UserError(
        f"{config.file.parent}: no tensor in it is a projector's, so it is no vision-language model of a known layout "
        f"({known}); a language model alone is what --base takes, and --new-projector"
    )


def _rename(source: _Source, layout: Layout, decoder: Decoder) -> dict[str, Tensor]:
    """All tensors by gm-mlx's names, experts one by one."""
    tensors: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    unknown = []
    for name, tensor in source.tensors.items():
        try:
            new = renamed(name, layout.names)
            if new is not None and new.startswith("language_model."):
                new = renamed(new, decoder.names)
        except KeyError:
            unknown.append(name)
            continue
        if new is None:
            continue
        if new in tensors:
            raise UserError(
                f"{source.folders[0]}: tensors {origin[new]!r} and {name!r} are the same part of a model; "
                "remove the one that is not meant"
            )
        tensors[new], origin[new] = tensor, name
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UserError(
            f"{source.folders[0]}: {len(unknown)} tensors are not part of a {decoder.title} in the layout of "
            f"{layout.title} ({', '.join(unknown[:3])}{more}); its config.json may be another model's"
        )
    return tensors


def _head_bias(config: Values, layout: Layout, tensors: dict[str, Tensor]) -> list[str]:
    """Drop the bias of Phi-2's head where MoE-LLaVA does, which builds that head without; with notes for the user."""
    if HEAD_BIAS not in tensors:
        return []
    if layout.text:  # Hugging Face's LLaVA builds its head without, and then such a tensor is another model's
        raise UserError(
            f"{config.file.parent}: tensor lm_head.bias: a head with a bias is not supported by this version; "
            "MoE-LLaVA's models of Phi-2 have none and can be converted"
        )
    del tensors[HEAD_BIAS]
    return ["the language model's lm_head.bias is left out, as MoE-LLaVA's code leaves it out"]


def _ties(decoder: Decoder, config: Values, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the head is the embedding. A stored head of a tied model must be a copy of it."""
    tied = config.get("tie_word_embeddings", bool, decoder.tied)
    if HEAD not in tensors:
        if not tied:
            raise config.error(
                "tie_word_embeddings", "is false but the checkpoint has no lm_head.weight; fetch it again"
            )
        return True
    if tied and not _equal(tensors[HEAD], tensors[EMBEDDING]):
        raise config.error(
            "tie_word_embeddings",
            f"is {'true' if 'tie_word_embeddings' in config.table else 'missing, which means true'} but lm_head.weight "
            "is not the embedding; set it to false to keep the head as it is",
        )
    return tied


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers; they are read one after the other."""
    return a.shape == b.shape and _digest(a) == _digest(b)


def _digest(tensor: Tensor) -> bytes:
    array = tensor.read()
    digest = hashlib.blake2b()
    for start in range(0, len(array), DIGEST_ROWS):
        # Adding zero makes zeros of both signs one.
        digest.update(memoryview(array[start : start + DIGEST_ROWS].astype(mx.float32) + 0.0))  # type: ignore[arg-type]
    return digest.digest()


def _image_scale(decoder: Decoder, layout: Layout, config: Values, chosen: bool | None) -> tuple[bool, list[str]]:
    """Whether image features are multiplied by Gemma's sqrt(hidden_size), as transformers before 5.4 does."""
    if decoder is not GEMMA:
        return False, []
    if chosen is not None:
        return chosen, []
    version = config.get("transformers_version", str, "")
    match = re.match(r"(\d+)\.(\d+)", version)
    if not layout.text or match is None or (int(match[1]), int(match[2])) < (5, 4):
        return True, []
    return False, [
        f"the checkpoint was saved by transformers {version}, which does not scale image features for Gemma; if it was "
        "trained with one before 5.4, convert it with --scale-image-features"
    ]


def _said_activation(config: Values) -> Any:
    return config.table.get("hidden_activation") or config.table.get("hidden_act")


def _strategy(layout: Layout, config: Values) -> str:
    said = config.get(layout.feature_strategy, str, next(iter(layout.strategies)))
    if said not in layout.strategies:
        raise config.error(layout.feature_strategy, f"is {said!r} and not one of {', '.join(layout.strategies)}")
    return layout.strategies[said]


def _model_config(file: Path, fields: dict[str, Any]) -> ModelConfig:
    try:
        return ModelConfig.from_dict(fields)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _convolution(tensor: Tensor) -> Tensor:
    """A convolution's weight [out, in, H, W] as MLX has it: [out, H, W, in]; one of a single pixel as a matrix."""
    out, channels, height, width = tensor.shape
    if height == width == 1:
        return Tensor(tensor.dtype, (out, channels), lambda: tensor.read().reshape(out, channels))
    return Tensor(tensor.dtype, (out, height, width, channels), lambda: tensor.read().transpose(0, 2, 3, 1))
