"""What other programs call the parts of a LLaVA, and gm-mlx's names for them: tables of patterns.

A renamed tensor is ``vision_tower.vision_model.`` and Hugging Face's name inside the tower,
``multi_modal_projector.linear_<1 or 2>.``, or ``language_model.`` and the decoder's own name, in which DeepSpeed's
experts are ``mlp.experts.<number>.`` and their router is ``mlp.gate.``.

Converting reads checkpoints by these tables, and LoRA adapters, which name the modules that they were trained on.
"""

from __future__ import annotations

import re

Names = tuple[tuple[str, str | None], ...]
"""Patterns of whole tensor names, each with the name that it gets. The first match counts; None leaves a tensor out."""

# Buffers that old versions of PyTorch models stored; all are computed from the config.
BUFFERS: Names = ((r".*\brotary_emb\.inv_freq", None), (r".*\bposition_ids", None))

# Hugging Face's LLaVA (LlavaForConditionalGeneration), with the names of all its versions. Files say
# ``language_model.model.layers``, ``language_model.lm_head``, ``vision_tower.vision_model`` and
# ``multi_modal_projector``. Since transformers 4.52 the model itself says ``model.language_model.layers``, ``lm_head``
# and ``model.vision_tower``, and since 5.12 the tower has no ``vision_model`` level; what is on disk depends on the
# version and on ``save_original_format``, piece by piece. So what some version leaves out of a name is optional here.
HF_LLAVA: Names = (
    *BUFFERS,
    (r"(?:model\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(.*)", r"vision_tower.vision_model.\1"),
    (r"(?:model\.)?multi_modal_projector\.(.*)", r"multi_modal_projector.\1"),
    (r"(?:(?:model\.)?language_model\.)?(lm_head\..*)", r"language_model.\1"),
    (r"(?:model\.)?language_model\.(?:model\.)?(.*)", r"language_model.model.\1"),
)

# The original LLaVA-1.5, and LLaVA-Gemma, which is built on it (llava/model/llava_arch.py). The decoder's names are
# those of the language model alone. The projector is a ``nn.Sequential``: 0 and 2 are its linears, 1 is the GELU
# between them.
LLAVA: Names = (
    *BUFFERS,
    (r"model\.vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(.*)", r"vision_tower.vision_model.\1"),
    (r"(?:model\.)?mm_projector\.0\.(weight|bias)", r"multi_modal_projector.linear_1.\1"),
    (r"(?:model\.)?mm_projector\.2\.(weight|bias)", r"multi_modal_projector.linear_2.\1"),
    (r"(.*)", r"language_model.\1"),
)

# MoE-LLaVA: LLaVA's names, other ones for tower and projector, and DeepSpeed's for the experts. In a sparse layer
# ``deepspeed_moe.gate.wg`` is the router, and ``deepspeed_moe.experts.deepspeed_experts.<number>`` holds an FFN each,
# with the dense FFN's own names (deepspeed/moe/layer.py).
MOE_LLAVA: Names = (
    *BUFFERS,
    (r"(.*\.mlp)\.deepspeed_moe\.gate\.wg\.weight", r"language_model.\1.gate.weight"),
    (r"(.*\.mlp)\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+\..*)", r"language_model.\1.experts.\2"),
    (r"model\.image_tower\.(?:image_tower\.)?(?:vision_model\.)?(.*)", r"vision_tower.vision_model.\1"),
    (r"(?:model\.)?mm_projector\.image_spatial_proj\.0\.(weight|bias)", r"multi_modal_projector.linear_1.\1"),
    (r"(?:model\.)?mm_projector\.image_spatial_proj\.2\.(weight|bias)", r"multi_modal_projector.linear_2.\1"),
    *LLAVA,
)

# A tensor of an expert that is a module of its own; gm-mlx stacks those of a layer under ``mlp.switch_mlp``.
EXPERT = re.compile(r"(.*\.mlp)\.experts\.(\d+)\.(.*)")


def renamed(name: str, names: Names) -> str | None:
    """The name that a table gives to a tensor, or None if the tensor is left out.

    Raises:
        KeyError: the table does not know the name.
    """
    for pattern, new in names:
        if match := re.fullmatch(pattern, name):
            return None if new is None else match.expand(new)
    raise KeyError(name)
