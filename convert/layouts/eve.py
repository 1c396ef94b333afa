"""Eve: MoE-LLaVA's layout with a PanGu-pi decoder, MobileVLM's projector and timm's SigLIP.

No weights of it are published. The names are those of its code (github.com/rangmiao/Eve): of two experts in a layer,
the first is the language FFN and the second the vision FFN.
"""

from __future__ import annotations

from gm_mlx import source_names
from gm_mlx.convert.layouts.layout import Layout
from gm_mlx.convert.layouts.llava import REFUSED

EVE = Layout(
    title="Eve",
    marks=r".*\.layers\.\d+\.attn_linear\..*|.*\.gate_proj2\..*|(?:.*\.)?image_tower\.blocks\..*",
    names=source_names.EVE,
    tower_id="mm_image_tower",
    projector_type="image_projector_type",
    refused=REFUSED,
    moe_kind="evf",
)
