"""The original LLaVA-1.5, and LLaVA-Gemma, which is built on it (llava/model/llava_arch.py).

The decoder's names are those of the language model alone. The projector is a ``nn.Sequential``: 0 and 2 are its
linears, 1 is the GELU between them. The tower is there only if it was trained; LLaVA itself loads it from its id.
"""

from __future__ import annotations

from gm_mlx.convert.layouts.layout import BUFFERS, Layout, Names

NAMES: Names = (
    *BUFFERS,
    (r"model\.vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(.*)", r"vision_tower.vision_model.\1"),
    (r"(?:model\.)?mm_projector\.0\.(weight|bias)", r"multi_modal_projector.linear_1.\1"),
    (r"(?:model\.)?mm_projector\.2\.(weight|bias)", r"multi_modal_projector.linear_2.\1"),
    (r"(.*)", r"language_model.\1"),
)

# Markers around an image, several resolutions, a tower at several scales: parts of a model that are not built here.
REFUSED: dict[str, tuple[object, ...]] = {
    "mm_use_im_start_end": (None, False),
    "mm_patch_merge_type": (None, "flat"),
    "image_aspect_ratio": (None, "pad", "square"),
    "s2": (None, False),
}

LLAVA = Layout(
    title="LLaVA",
    marks=r"(?:.*\.)?mm_projector\.(?!image_spatial_proj\.|video_).*",
    names=NAMES,
    tower_id="mm_vision_tower",
    projector_type="mm_projector_type",
    refused=REFUSED,
)
