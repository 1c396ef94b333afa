"""MoE-LLaVA: LLaVA with DeepSpeed's experts, and other names for tower and projector.

This is LLaVA-GM's own layout: its paper trains with MoE-LLaVA's code. In a sparse layer DeepSpeed puts a module in the
place of ``mlp`` (deepspeed/moe/layer.py). With ``use_residual`` there are a dense FFN ``mlp`` and ``coefficient``
beside it.
"""

from __future__ import annotations

from gm_mlx import source_names
from gm_mlx.convert.layouts.layout import Layout
from gm_mlx.convert.layouts.llava import REFUSED

MOE_LLAVA = Layout(
    title="MoE-LLaVA",
    marks=r".*\.deepspeed_moe\..*|(?:.*\.)?image_tower\..*|(?:.*\.)?mm_projector\.image_spatial_proj\..*",
    names=source_names.MOE_LLAVA,
    tower_id="mm_image_tower",
    projector_type="image_projector_type",
    refused=REFUSED,
)
