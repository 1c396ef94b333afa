"""MoE-LLaVA: LLaVA's names, other ones for tower and projector, and DeepSpeed's for the experts.

This is LLaVA-GM's own layout: its paper trains with MoE-LLaVA's code. In a sparse layer DeepSpeed puts a module in the
place of ``mlp`` (deepspeed/moe/layer.py): ``deepspeed_moe.gate.wg`` is the router,
``deepspeed_moe.experts.deepspeed_experts.<number>`` holds an FFN each, with the dense FFN's own names. With
``use_residual`` there are a dense FFN ``mlp`` and ``coefficient`` beside it.
"""

from __future__ import annotations

from gm_mlx.convert.layouts import llava
from gm_mlx.convert.layouts.layout import BUFFERS, Layout, Names

NAMES: Names = (
    *BUFFERS,
    (r"(.*\.mlp)\.deepspeed_moe\.gate\.wg\.weight", r"language_model.\1.gate.weight"),
    (r"(.*\.mlp)\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+\..*)", r"language_model.\1.experts.\2"),
    (r"model\.image_tower\.(?:image_tower\.)?(?:vision_model\.)?(.*)", r"vision_tower.vision_model.\1"),
    (r"(?:model\.)?mm_projector\.image_spatial_proj\.0\.(weight|bias)", r"multi_modal_projector.linear_1.\1"),
    (r"(?:model\.)?mm_projector\.image_spatial_proj\.2\.(weight|bias)", r"multi_modal_projector.linear_2.\1"),
    *llava.NAMES,
)

MOE_LLAVA = Layout(
    title="MoE-LLaVA",
    marks=r".*\.deepspeed_moe\..*|(?:.*\.)?image_tower\..*|(?:.*\.)?mm_projector\.image_spatial_proj\..*",
    names=NAMES,
    tower_id="mm_image_tower",
    projector_type="image_projector_type",
    refused=llava.REFUSED,
)
