"""Tiny Eves: configs, checkpoints, and models in gm-mlx."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from checkpoints import VOCAB, write
from eve_reference import Eve

from gm_mlx.config import ModelConfig, TextConfig, VisionConfig
from gm_mlx.presets import EVF

# Four layers, of which two have second gates and two have vision FFNs: all four combinations occur.
TEXT = TextConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=VOCAB,
    hidden_act="silu",
    max_position_embeddings=1024,
    tie_word_embeddings=False,
    norm_plus_one=False,
    scale_embeddings=False,
    attention_bias="qkv",
    series_layers=2,
    shortcut_size=32,
    moe=EVF,
)
VISION = VisionConfig(
    model_type="siglip_vision_model",
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=1,
    image_size=32,
    patch_size=8,
    hidden_act="gelu",
    layer_norm_eps=1e-6,
    post_norm=True,
)
CONFIG = ModelConfig(
    text_config=TEXT,
    vision_config=VISION,
    image_token_index=400,  # the first id that the tiny tokenizer does not have
    vision_feature_layer=-1,
    vision_feature_select_strategy="full",
    projector_type="ldpnet",
)
DENSE = replace(CONFIG, text_config=replace(TEXT, moe=None))


def eve_json(config: ModelConfig = CONFIG, **changes: Any) -> dict[str, Any]:
    """``config.json`` of an Eve; ``changes`` that its table ``moe`` has go there."""
    text, moe = config.text_config, config.text_config.moe
    table = {
        "moe_enable": moe is not None,
        "moe_mode": "sparse",
        "moe_layers_idx": text.sparse_layers,
        "num_experts": [2 for _ in text.sparse_layers] or [1],
        "ep_size": 1,
        "top_k_experts": 1,
        "capacity_factor": 1.5,
        "eval_capacity_factor": 2.0,
        "min_capacity": 0,
        "use_residual": False,
        "router_aux_loss_coef": 0.001,
    }
    table |= {key: changes.pop(key) for key in list(changes) if key in table}
    return {
        "model_type": "moe_llava_zhizi" if moe else "llava_zhizi",
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "hidden_act": "silu",
        "rms_norm_eps": text.rms_norm_eps,
        "max_position_embeddings": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "bias": True,
        "tie_word_embeddings": False,
        "mm_image_tower": "vision_model/siglip/pytorch_model.bin",
        "vision_tower_type": "siglip",
        "image_projector_type": config.projector_type,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_vision_select_layer": -2,  # which the code does not look at for this tower
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        "mm_use_im_start_end": False,
        "moe": table,
        **changes,
    }


def eve_state(model: Eve) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint; each layer's rotary frequencies are among them, as the code stores them."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for layer in range(model.config.text_config.num_hidden_layers):
        state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.zeros(16)
    return state


def write_eve(folder: Path, model: Eve, file: str = "safetensors", **changes: Any) -> Path:
    """A checkpoint's folder."""
    return write(folder, eve_json(model.config, **changes), eve_state(model), file)
