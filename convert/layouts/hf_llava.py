"""Hugging Face's LLaVA (``LlavaForConditionalGeneration``), with the names of all its versions.

Files say ``language_model.model.layers``, ``language_model.lm_head``, ``vision_tower.vision_model`` and
``multi_modal_projector``. Since transformers 4.52 the model itself says ``model.language_model.layers``, ``lm_head``
and ``model.vision_tower``, and since 5.12 the tower has no ``vision_model`` level; what is on disk depends on the
version and on ``save_original_format``, piece by piece. So what some version leaves out of a name is optional here.
"""

from __future__ import annotations

from gm_mlx.convert.layouts.layout import BUFFERS, Layout, Names

NAMES: Names = (
    *BUFFERS,
    (r"(?:model\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(.*)", r"vision_tower.vision_model.\1"),
    (r"(?:model\.)?multi_modal_projector\.(.*)", r"multi_modal_projector.\1"),
    (r"(?:(?:model\.)?language_model\.)?(lm_head\..*)", r"language_model.\1"),
    (r"(?:model\.)?language_model\.(?:model\.)?(.*)", r"language_model.model.\1"),
)

HF_LLAVA = Layout(
    title="Hugging Face LLaVA",
    marks=r"(?:model\.)?multi_modal_projector\..*",
    names=NAMES,
    text="text_config",
    vision="vision_config",
    feature_layer="vision_feature_layer",
    feature_strategy="vision_feature_select_strategy",
    strategies={"default": "default", "full": "full"},
    refused={
        "model_type": (None, "llava"),
        "multimodal_projector_bias": (None, True),
        "image_grid_pinpoints": (None, []),
    },
)
