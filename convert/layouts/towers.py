"""Vision towers: tensor names, config defaults, and what an id says that the tensors do not.

LLaVA's and MoE-LLaVA's configs name their tower and do not describe it. Of a tower that is stored in the checkpoint,
the shapes tell all but the number of heads, the side of the image and the kind of norm and activation; for the towers
that such models use, the id tells those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gm_mlx.source_names import BUFFERS, Names

STORED = "vision_tower.vision_model."

# Hugging Face's CLIPModel, CLIPVisionModel, SiglipModel and SiglipVisionModel, before and after transformers 5.12.
NAMES: Names = (
    *BUFFERS,
    (r"(?:text_model|text_projection|visual_projection)\..*|logit_scale|logit_bias", None),
    (r"(?:vision_model\.)?((?:embeddings|pre_layrnorm|encoder|post_layernorm|head)\..*)", STORED + r"\1"),
)
# Behind the last hidden state: no LLaVA reads them.
UNUSED_HEAD = r"head\..*"
UNUSED = rf"post_layernorm\..*|{UNUSED_HEAD}"


@dataclass(frozen=True)
class TowerFamily:
    """A kind of tower.

    Attributes:
        model_type: gm-mlx's and Hugging Face's name for it.
        model_types: the ``model_type`` of configs that hold one.
        defaults: those of its config class in transformers.
    """

    model_type: str
    model_types: tuple[str, ...]
    defaults: Mapping[str, Any]


CLIP = TowerFamily(
    model_type="clip_vision_model",
    model_types=("clip", "clip_vision_model"),
    defaults={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
)
SIGLIP = TowerFamily(
    model_type="siglip_vision_model",
    model_types=("siglip", "siglip_vision_model"),
    defaults={**CLIP.defaults, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
)
FAMILIES = (CLIP, SIGLIP)

# What LlavaConfig assumes when it has no vision_config at all.
HF_LLAVA_DEFAULT = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


@dataclass(frozen=True)
class KnownTower:
    """Towers whose id says what their tensors do not.

    Attributes:
        name: a pattern of the id's last part; its first group, if it took part, is the side of the image.
        family: the kind of tower.
        head_dim: channels of a head.
        image_size: the side of the image when the id does not give it.
    """

    name: str
    family: TowerFamily
    head_dim: int
    image_size: int


KNOWN_TOWERS = (
    KnownTower(r"clip-vit-(?:base|large)-patch\d+(?:-(\d+))?", CLIP, 64, 224),
    KnownTower(r"siglip2?-(?:base|large)-patch16-(\d+)", SIGLIP, 64, 224),
    KnownTower(r"siglip2?-so400m-patch1[46]-(\d+)", SIGLIP, 72, 384),
)
