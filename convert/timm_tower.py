"""Eve's SigLIP, which has timm's names, one matrix for queries, keys and values, and a last norm that counts.

``gm_mlx.source_names.EVE`` gives its tensors Hugging Face's names, but for that matrix. What the code does with such a
tower, it does whatever the config says (eve/model/multimodal_encoder/siglip_vit.py): all layers run, all patches are
read behind the last norm, and the GELU is timm's exact one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from gm_mlx.convert.fused_attention import QKV, split_attention
from gm_mlx.convert.layouts.towers import SIGLIP, STORED
from gm_mlx.errors import UserError
from gm_mlx.tensors import Tensor

# The config key that says that a tower which is not stored is run like that.
TIMM_KEY, TIMM_VALUE = "vision_tower_type", "siglip"
TIMM = {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "post_norm": True}
TIMM_READ = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
HEAD_DIMS = {1152: 72}  # channels of a head by width (so400m); all others have 64
POSITIONS = STORED + "embeddings.position_embedding.weight"


def is_timm(names: Iterable[str]) -> bool:
    """Whether a tower's tensors were timm's."""
    return any(QKV in name for name in names)


def split_tower(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A tower's tensors with a matrix each for queries, keys and values, and positions [N, D] for [1, N, D]."""
    split = split_attention(tensors, STORED)
    if positions := split.get(POSITIONS):
        shape = positions.shape[-2:]
        split[POSITIONS] = Tensor(positions.dtype, shape, partial(_reshaped, positions, shape))
    return split


def timm_config(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of VisionConfig, from the tensors' shapes.

    Args:
        folder: the checkpoint's, for errors.
        tensors: the tower's, not split yet.

    Raises:
        UserError: a tensor is missing.
    """
    try:
        size, _, patch, _ = tensors[STORED + "embeddings.patch_embedding.weight"].shape
        positions = tensors[POSITIONS].shape[-2]
        width, _ = tensors[STORED + "encoder.layers.0.mlp.fc1.weight"].shape
    except (KeyError, ValueError, IndexError):
        raise UserError(f"{folder}: its vision tower is not whole; give the tower with --vision") from None
    layers = {int(m[1]) for name in tensors if (m := re.match(r".*\.encoder\.layers\.(\d+)\.", name))}
    return {
        "model_type": SIGLIP.model_type,
        "hidden_size": size,
        "intermediate_size": width,
        "num_hidden_layers": max(layers) + 1,
        "num_attention_heads": size // HEAD_DIMS.get(size, 64),
        "image_size": patch * math.isqrt(positions),
        "patch_size": patch,
        **TIMM,
    }


def _reshaped(tensor: Tensor, shape: tuple[int, ...]) -> mx.array:
    return tensor.read().reshape(shape)
