"""Hugging Face's LLaVA (``LlavaForConditionalGeneration``), of all versions of transformers."""

from __future__ import annotations

from gm_mlx import source_names
from gm_mlx.convert.layouts.layout import Layout

HF_LLAVA = Layout(
    title="Hugging Face LLaVA",
    marks=r"(?:model\.)?multi_modal_projector\..*",
    names=source_names.HF_LLAVA,
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
