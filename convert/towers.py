"""The vision tower: the one that is stored in a checkpoint, or one from a folder of its own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gm_mlx.config import ModelConfig
from gm_mlx.convert.checkpoint import Checkpoint, open_checkpoint
from gm_mlx.convert.layouts.eve import EVE
from gm_mlx.convert.layouts.layout import Layout
from gm_mlx.convert.layouts.towers import (
    CLIP,
    FAMILIES,
    HF_LLAVA_DEFAULT,
    KNOWN_TOWERS,
    NAMES,
    SIGLIP,
    STORED,
    UNUSED,
    UNUSED_HEAD,
)
from gm_mlx.convert.timm_tower import TIMM, TIMM_KEY, TIMM_READ, TIMM_VALUE, is_timm, split_tower, timm_config
from gm_mlx.convert.values import Values
from gm_mlx.errors import UserError
from gm_mlx.source_names import renamed
from gm_mlx.tensors import Tensor

TOWER_NAME = re.compile(r"(?:.*\.)?(?:vision|image)_tower\..*")
TOWER_IDS = ("mm_image_tower", "mm_vision_tower")


@dataclass(frozen=True)
class Tower:
    """A vision tower.

    Attributes:
        config: the fields of VisionConfig.
        tensors: its tensors under gm-mlx's names, all that it has.
        source: "checkpoint" or "folder".
        files: the files of a tower that has a folder of its own.
        read: fields of ModelConfig that say what of the tower is read, where that is the tower's own.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    source: str
    files: list[Path] = field(default_factory=list)
    read: dict[str, Any] = field(default_factory=dict)


def missing_tower(checkpoint: Checkpoint) -> str | None:
    """The id or path of the tower that a checkpoint's config names, if the checkpoint does not hold a tower itself.

    Fetch it and give its folder to ``translate``; a checkpoint that names no tower gives None.
    """
    held = (checkpoint.tensors, checkpoint.projector, checkpoint.non_lora)
    if any(TOWER_NAME.fullmatch(name) for tensors in held for name in tensors):
        return None
    config = Values(checkpoint.folder / "config.json", checkpoint.config)
    return next((name for key in TOWER_IDS if (name := config.get(key, str))), None)


def find_tower(layout: Layout, config: Values, tensors: Mapping[str, Tensor], vision: Path | None) -> Tower:
    """The tower of a checkpoint.

    Args:
        layout: the checkpoint's layout.
        config: its config.
        tensors: its tensors under gm-mlx's names.
        vision: a folder with a CLIP or SigLIP model, which wins over a stored tower.

    Raises:
        UserError: there is no tower, or it is none that can be built.
    """
    if vision is not None:
        tower = _from_folder(vision)
        if layout is not EVE or config.get(TIMM_KEY, str) != TIMM_VALUE:
            return tower
        if tower.config["model_type"] != SIGLIP.model_type:
            raise config.error(TIMM_KEY, f"is {TIMM_VALUE!r}, and {vision} has no SigLIP; give another --vision")
        return _as_timm(tower)
    stored = {name: tensor for name, tensor in tensors.items() if name.startswith(STORED)}
    if not stored:
        tower_id = config.get(layout.tower_id, str) if layout.tower_id else None
        raise UserError(
            f"{config.file.parent}: holds no vision tower; give the folder of {tower_id or 'its tower'} with --vision"
        )
    if is_timm(stored):
        return _as_timm(Tower(timm_config(config.file.parent, stored), split_tower(stored), "checkpoint"))
    if not layout.vision:
        return Tower(_known_tower(layout, config, stored), stored, "checkpoint")
    described = config.inner(layout.vision)
    if not described.table:
        described = Values(config.file, HF_LLAVA_DEFAULT, described.prefix)
    return Tower(_vision_config(described), stored, "checkpoint")


def used_tensors(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A tower's tensors without what stands behind the last layer that is read.

    Args:
        tensors: the tower's tensors under gm-mlx's names.
        config: the model.
    """
    unused = UNUSED_HEAD if config.vision_config.post_norm else UNUSED
    used = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix(STORED)
        layer = re.match(r"encoder\.layers\.(\d+)\.", inner)
        if not re.fullmatch(unused, inner) and not (layer and int(layer[1]) >= config.num_vision_layers_used):
            used[name] = tensor
    return used


def _as_timm(tower: Tower) -> Tower:
    """A SigLIP as Eve's code runs it."""
    return replace(tower, config={**tower.config, **TIMM}, read=dict(TIMM_READ))


def _from_folder(folder: Path) -> Tower:
    checkpoint = open_checkpoint(folder)
    config = Values(folder / "config.json", checkpoint.config)
    described = config.inner("vision_config") if "vision_config" in config.table else config
    # The table of a whole CLIP may leave out which kind of tower it is; the model around it says so too.
    if "model_type" not in described.table and "model_type" in config.table:
        table = {**described.table, "model_type": config.table["model_type"]}
        described = Values(config.file, table, described.prefix)
    tensors: dict[str, Tensor] = {}
    for name, tensor in checkpoint.tensors.items():
        try:
            new = renamed(name, NAMES)
        except KeyError:
            raise UserError(
                f"{folder}: tensor {name!r} is not one of a CLIP or SigLIP; give another --vision"
            ) from None
        if new is not None:
            tensors[new] = tensor
    return Tower(_vision_config(described), tensors, "folder", checkpoint.files)


def _vision_config(values: Values) -> dict[str, Any]:
    """The fields of VisionConfig; what a config leaves out is what its class in transformers assumes."""
    model_type = values.get("model_type", str, CLIP.model_type)
    family = next((each for each in FAMILIES if model_type in each.model_types), None)
    if family is None:
        known = ", ".join(kind for each in FAMILIES for kind in each.model_types)
        raise values.error("model_type", f"is {model_type!r}, a tower that this version cannot convert; it can {known}")
    fields = {key: values.get(key, type(default), default) for key, default in family.defaults.items()}
    return {"model_type": family.model_type, **fields}


def _known_tower(layout: Layout, config: Values, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of VisionConfig from the tower's shapes, and from its id where they say nothing."""
    tower_id = config.get(layout.tower_id, str, "")
    last_part = tower_id.rstrip("/").rsplit("/", 1)[-1]
    matches = ((tower, re.fullmatch(tower.name, last_part)) for tower in KNOWN_TOWERS)
    tower, match = next(((tower, match) for tower, match in matches if match), (None, None))
    if tower is None or match is None:
        raise config.error(
            layout.tower_id, f"is {tower_id!r}, a tower that this version does not know; give its folder with --vision"
        )
    try:
        size, _, _, patch = tensors[STORED + "embeddings.patch_embedding.weight"].shape
        positions, _ = tensors[STORED + "embeddings.position_embedding.weight"].shape
        width, _ = tensors[STORED + "encoder.layers.0.mlp.fc1.weight"].shape
    except (KeyError, ValueError):
        raise UserError(f"{config.file.parent}: its vision tower is not whole; give the tower with --vision") from None
    layers = {int(m[1]) for name in tensors if (m := re.match(r".*\.encoder\.layers\.(\d+)\.", name))}
    image_size = int(match[1]) if match[1] else tower.image_size
    if (image_size // patch) ** 2 + (tower.family is CLIP) != positions or size % tower.head_dim:
        side = patch * math.isqrt(positions)
        raise config.error(
            layout.tower_id,
            f"is {tower_id!r}, but the stored tower is {size} wide and reads about {side} pixels; give its folder with "
            "--vision",
        )
    shapes = {
        "hidden_size": size,
        "intermediate_size": width,
        "num_hidden_layers": max(layers) + 1,
        "num_attention_heads": size // tower.head_dim,
        "image_size": image_size,
        "patch_size": patch,
    }
    return {"model_type": tower.family.model_type, **tower.family.defaults, **shapes}
