"""How the layouts that the converter reads name tensors and settings: tables of names, and ``config.json``.

They are written against the layouts' sources and not derived from the converter's own tables.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from gm_mlx.config import ModelConfig

TOWER_IDS = {"clip": "openai/clip-vit-large-patch14-28", "siglip": "google/siglip-so400m-patch14-32"}

# Patterns of transformers 5's names, and the names on disk; the first match counts.
Table = list[tuple[str, str]]
HF_OLD: Table = [
    (r"model\.vision_tower\.(.*)", r"vision_tower.vision_model.\1"),
    (r"model\.multi_modal_projector\.(.*)", r"multi_modal_projector.\1"),
    (r"model\.language_model\.(.*)", r"language_model.model.\1"),
    (r"lm_head\.(.*)", r"language_model.lm_head.\1"),
]
HF_MIXED: Table = [
    (r"model\.vision_tower\.(.*)", r"model.vision_tower.vision_model.\1"),
    (r"model\.multi_modal_projector\.(.*)", r"multi_modal_projector.\1"),
    (r"(model\.language_model\..*)", r"\1"),
    (r"lm_head\.(.*)", r"language_model.lm_head.\1"),
]
LLAVA: Table = [
    (r"model\.vision_tower\.(.*)", r"model.vision_tower.vision_tower.vision_model.\1"),
    (r"model\.multi_modal_projector\.linear_1\.(.*)", r"model.mm_projector.0.\1"),
    (r"model\.multi_modal_projector\.linear_2\.(.*)", r"model.mm_projector.2.\1"),
    (r"model\.language_model\.(.*)", r"model.\1"),
    (r"(lm_head\..*)", r"\1"),
]
MOE_LLAVA: Table = [
    (r"model\.vision_tower\.(.*)", r"model.image_tower.image_tower.vision_model.\1"),
    (r"model\.multi_modal_projector\.linear_1\.(.*)", r"model.mm_projector.image_spatial_proj.0.\1"),
    (r"model\.multi_modal_projector\.linear_2\.(.*)", r"model.mm_projector.image_spatial_proj.2.\1"),
    (r"model\.language_model\.(.*)\.mlp\.gate\.weight", r"model.\1.mlp.deepspeed_moe.gate.wg.weight"),
    (r"model\.language_model\.(.*)\.experts\.(.*)", r"model.\1.deepspeed_moe.experts.deepspeed_experts.\2"),
    *LLAVA[3:],
]
LANGUAGE_MODEL: Table = LLAVA[3:]
# Qwen's inner model is called ``transformer``, and tower and projector are in it.
QWEN: Table = [
    (r"model\.language_model\.(.*)\.mlp\.gate\.weight", r"transformer.\1.mlp.deepspeed_moe.gate.wg.weight"),
    (r"model\.language_model\.(.*)\.experts\.(.*)", r"transformer.\1.deepspeed_moe.experts.deepspeed_experts.\2"),
    (r"model\.language_model\.(.*)", r"transformer.\1"),
    *((pattern, name.replace("model.", "transformer.", 1)) for pattern, name in MOE_LLAVA[:3]),
    (r"(lm_head\..*)", r"\1"),
]

State = dict[str, torch.Tensor]


def moe_llava_names(family: str) -> Table:
    """MoE-LLaVA's names on a family."""
    return QWEN if family == "qwen" else MOE_LLAVA


def state_of(model: Any, table: Table, *, tower: bool = True) -> State:
    """A model's weights by the names of a layout; a tied head is left out, as files leave it out."""
    state: State = {}
    for name, tensor in model.state_dict().items():
        tied = name == "lm_head.weight" and model.config.tie_word_embeddings
        if not tied and (tower or "vision_tower" not in name):
            new = next(re.sub(pattern, to, name) for pattern, to in table if re.fullmatch(pattern, name))
            state[new] = tensor.detach().clone()
    return state


def text_json(config: ModelConfig, family: str) -> dict[str, Any]:
    """The decoder's keys as transformers 4 writes them."""
    text = config.text_config
    keys = {
        "model_type": family,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "hidden_act": text.hidden_act,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "tie_word_embeddings": text.tie_word_embeddings,
        "transformers_version": "4.37.0",
    }
    if family == "gemma":
        keys["head_dim"] = text.head_dim
    if family == "mistral":
        keys["sliding_window"] = None
    if family == "qwen1_5":  # names a window and does not use it
        keys |= {"sliding_window": 16, "use_sliding_window": False}
    if family == "stablelm":
        del keys["rms_norm_eps"]
        keys |= {"norm_eps": text.rms_norm_eps, "rope_pct": text.partial_rotary_factor, "use_qkv_bias": True}
    if family == "phi":
        del keys["rms_norm_eps"]
        keys |= {"layer_norm_eps": text.rms_norm_eps, "partial_rotary_factor": text.partial_rotary_factor}
        keys["hidden_act"] = "gelu_new"
    return qwen_json(keys) if family == "qwen" else keys


def qwen_json(keys: dict[str, Any]) -> dict[str, Any]:
    """The same in the words of Qwen's own code: ``intermediate_size`` counts two matrices."""
    words = {
        "rms_norm_eps": "layer_norm_epsilon",
        "rope_theta": "rotary_emb_base",
        "max_position_embeddings": "seq_length",
    }
    unknown = ("hidden_act", "num_key_value_heads", "rope_scaling")
    own = {words.get(key, key): value for key, value in keys.items() if key not in unknown}
    own["intermediate_size"] *= 2
    return own | {"kv_channels": 8, "no_bias": True, "use_dynamic_ntk": True, "use_logn_attn": True, "rotary_pct": 1.0}


def llava_json(config: ModelConfig, family: str, tower: str = "clip", **changes: Any) -> dict[str, Any]:
    """``config.json`` of original LLaVA."""
    return {
        **text_json(config, family),
        "model_type": f"llava_{family}",
        "mm_vision_tower": TOWER_IDS[tower],
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        "mm_use_im_start_end": False,
        **changes,
    }


def moe_llava_json(config: ModelConfig, family: str, tower: str = "clip", **changes: Any) -> dict[str, Any]:
    """``config.json`` of MoE-LLaVA; ``changes`` that its table ``moe`` has go there."""
    llava = llava_json(config, family, tower)
    llava["mm_image_tower"] = llava.pop("mm_vision_tower")
    llava["image_projector_type"] = llava.pop("mm_projector_type")
    moe, layers = config.text_config.moe, config.text_config.sparse_layers
    table = {
        "moe_enable": moe is not None,
        "moe_mode": moe.mode if moe else "sparse",
        "moe_layers_idx": layers,
        "num_experts": [moe.num_experts for _ in layers] if moe else [1],
        "ep_size": 1,
        "top_k_experts": moe.top_k if moe else 2,
        "capacity_factor": 1.5,
        "eval_capacity_factor": 2.0,
        "min_capacity": 0,
        "use_residual": moe.use_residual if moe else False,
        "router_aux_loss_coef": 0.01,
    }
    table |= {key: changes.pop(key) for key in list(changes) if key in table}
    return {**llava, "model_type": f"moe_llava_{family}", "moe": table, "mm_video_tower": None, **changes}
