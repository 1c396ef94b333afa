"""What other programs call the parts of a LLaVA, and gm-mlx's names for them: tables of patterns.

A renamed tensor is ``vision_tower.vision_model.`` and Hugging Face's name inside the tower,
``multi_modal_projector.`` and gm-mlx's name inside the projector, or ``language_model.`` and the decoder's own name, in
which DeepSpeed's experts are ``mlp.experts.<number>.`` and their router is ``mlp.gate.``.

Converting reads checkpoints by these tables, and LoRA adapters, which name the modules that they were trained on.
"""

from __future__ import annotations

import re

Names = tuple[tuple[str, str | None], ...]
"""Patterns of whole tensor names, each with the name that it gets. The first match counts; None leaves a tensor out."""

# Buffers that old versions of PyTorch models stored; all are computed from the config.
BUFFERS: Names = (
    (r".*\brotary_emb\.inv_freq", None),
    (r".*\bposition_ids", None),
    (r".*\.attn\.(?:bias|masked_bias)", None),
)

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

# The other way: what a module of ours is called in the model that transformers has in memory, from version 5.12 on. It
# is what peft, which wraps that model, calls it.
HF_MODULES: Names = (
    (r"vision_tower\.vision_model\.(.*)", r"model.vision_tower.\1"),
    (r"(multi_modal_projector\..*)", r"model.\1"),
    (r"language_model\.model\.(.*)", r"model.language_model.\1"),
    (r"language_model\.(lm_head)", r"\1"),
)
PHI_MODULES: Names = (
    (r"language_model\.model\.(.*\.self_attn)\.o_proj", r"model.language_model.\1.dense"),
    *HF_MODULES,
)


def _projector(prefix: str) -> Names:
    """LLaVA's MLP and MobileVLM's LDP and LDPv2 (mobilevlm/model/vision_projector.py), by what they are called.

    All are made of ``nn.Sequential``: what lies between the numbers has no weights. LDP is one more module ``model``.
    """
    new, block = "multi_modal_projector", r"\.model\.mb_block\.%d\.block\."
    names: list[tuple[str, str | None]] = [
        (rf"{prefix}(?:\.0|\.model\.mlp\.1|\.mlp\.mlp\.0)\.(weight|bias)", rf"{new}.linear_1.\1"),
        (rf"{prefix}(?:\.2|\.model\.mlp\.3|\.mlp\.mlp\.2)\.(weight|bias)", rf"{new}.linear_2.\1"),
        (rf"{prefix}\.peg\.peg\.0\.(weight|bias)", rf"{new}.peg.\1"),
    ]
    for number in (0, 1):
        old, ours = prefix + block % (number + 1), f"{new}.blocks.{number}"
        names += [
            (rf"{old}0\.0\.weight", f"{ours}.depthwise.weight"),
            (rf"{old}0\.1\.(weight|bias)", rf"{ours}.norm_1.\1"),
            (rf"{old}1\.(fc[12])\.(weight|bias)", rf"{ours}.squeeze.\1.\2"),
            (rf"{old}2\.0\.weight", f"{ours}.pointwise.weight"),
            (rf"{old}2\.1\.(weight|bias)", rf"{ours}.norm_2.\1"),
        ]
    return tuple(names)


# The original LLaVA-1.5, and LLaVA-Gemma, which is built on it (llava/model/llava_arch.py). The decoder's names are
# those of the language model alone. MobileVLM is the same but for its projector. The first Qwen calls its inner model
# ``transformer``, and so do the parts that were put into it.
ROOT = r"(?:model|transformer)\."
LLAVA: Names = (
    *BUFFERS,
    (rf"{ROOT}vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(.*)", r"vision_tower.vision_model.\1"),
    *_projector(rf"(?:{ROOT})?mm_projector"),
    (r"(.*)", r"language_model.\1"),
)

# MoE-LLaVA: LLaVA's names, other ones for tower and projector, and DeepSpeed's for the experts. In a sparse layer
# ``deepspeed_moe.gate.wg`` is the router, and ``deepspeed_moe.experts.deepspeed_experts.<number>`` holds an FFN each,
# with the dense FFN's own names (deepspeed/moe/layer.py).
MOE_LLAVA: Names = (
    *BUFFERS,
    (r"(.*\.mlp)\.deepspeed_moe\.gate\.wg\.weight", r"language_model.\1.gate.weight"),
    (r"(.*\.mlp)\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+\..*)", r"language_model.\1.experts.\2"),
    (rf"{ROOT}image_tower\.(?:image_tower\.)?(?:vision_model\.)?(.*)", r"vision_tower.vision_model.\1"),
    *_projector(rf"(?:{ROOT})?mm_projector\.image_spatial_proj"),
    *LLAVA,
)

# Eve: MoE-LLaVA's names, and a SigLIP tower with those of timm (eve/model/multimodal_encoder/siglip_vit.py), in which
# queries, keys and values are one matrix.
EVE: Names = (
    (r"model\.image_tower\.patch_embed\.proj\.(.*)", r"vision_tower.vision_model.embeddings.patch_embedding.\1"),
    (r"model\.image_tower\.pos_embed", "vision_tower.vision_model.embeddings.position_embedding.weight"),
    (
        r"model\.image_tower\.blocks\.(\d+)\.norm([12])\.(.*)",
        r"vision_tower.vision_model.encoder.layers.\1.layer_norm\2.\3",
    ),
    (
        r"model\.image_tower\.blocks\.(\d+)\.attn\.proj\.(.*)",
        r"vision_tower.vision_model.encoder.layers.\1.self_attn.out_proj.\2",
    ),
    (
        r"model\.image_tower\.blocks\.(\d+)\.attn\.qkv\.(.*)",
        r"vision_tower.vision_model.encoder.layers.\1.self_attn.qkv.\2",
    ),
    (r"model\.image_tower\.blocks\.(\d+\.mlp\..*)", r"vision_tower.vision_model.encoder.layers.\1"),
    (r"model\.image_tower\.norm\.(.*)", r"vision_tower.vision_model.post_layernorm.\1"),
    (r"model\.image_tower\.attn_pool\..*", None),
    *MOE_LLAVA,
)

# Decoders whose names inside are not Llama's. Phi:
PHI_NAMES: Names = (
    (r"language_model\.(model\.layers\.\d+\.self_attn)\.dense\.(weight|bias)", r"language_model.\1.o_proj.\2"),
    (r"language_model\.model\.final_layernorm\.(weight|bias)", r"language_model.model.norm.\1"),
)
# The first Qwen. ``c_attn`` is three matrices in one, which ``convert.fused_attention`` takes apart. In an FFN, dense
# or an expert, ``w2`` is the gate.
QWEN_LAYER, QWEN_FFN = r"language_model\.transformer\.h\.(\d+)", r"(\.mlp\.(?:mlp\.|experts\.\d+\.)?)"
QWEN_NAMES: Names = (
    (r"language_model\.transformer\.wte\.weight", "language_model.model.embed_tokens.weight"),
    (r"language_model\.transformer\.ln_f\.weight", "language_model.model.norm.weight"),
    (rf"{QWEN_LAYER}\.ln_1\.weight", r"language_model.model.layers.\1.input_layernorm.weight"),
    (rf"{QWEN_LAYER}\.ln_2\.weight", r"language_model.model.layers.\1.post_attention_layernorm.weight"),
    (rf"{QWEN_LAYER}\.attn\.c_attn\.(weight|bias)", r"language_model.model.layers.\1.self_attn.qkv.\2"),
    (rf"{QWEN_LAYER}\.attn\.c_proj\.weight", r"language_model.model.layers.\1.self_attn.o_proj.weight"),
    (rf"{QWEN_LAYER}{QWEN_FFN}w1\.weight", r"language_model.model.layers.\1\2up_proj.weight"),
    (rf"{QWEN_LAYER}{QWEN_FFN}w2\.weight", r"language_model.model.layers.\1\2gate_proj.weight"),
    (rf"{QWEN_LAYER}{QWEN_FFN}c_proj\.weight", r"language_model.model.layers.\1\2down_proj.weight"),
    (rf"{QWEN_LAYER}\.mlp\.(gate|coefficient)\.(.*)", r"language_model.model.layers.\1.mlp.\2.\3"),
    (r"(language_model\.lm_head\.weight)", r"\1"),
)
# For a module of any decoder, whatever else it is called.
ANY_DECODER: Names = (*PHI_NAMES, *QWEN_NAMES, (r"(.*)", r"\1"))

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
