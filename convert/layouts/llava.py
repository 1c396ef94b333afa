"""The original LLaVA-1.5, and LLaVA-Gemma, which is built on it (llava/model/llava_arch.py).

The tower is there only if it was trained; LLaVA itself loads it from its id.
"""

from __future__ import annotations

from gm_mlx import source_names
from gm_mlx.convert.layouts.layout import Layout

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
    names=source_names.LLAVA,
    tower_id="mm_vision_tower",
    projector_type="mm_projector_type",
    refused=REFUSED,
)
