"""The models that the papers describe, by name, as configs: to count, to time and to try before weights exist."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gm_mlx.config import ModelConfig, MoEConfig, TextConfig, VisionConfig

CLIP_L_336 = VisionConfig(
    model_type="clip_vision_model",
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)


SIGLIP_L_384 = VisionConfig(
    model_type="siglip_vision_model",
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=384,
    patch_size=16,
    hidden_act="gelu",
    layer_norm_eps=1e-6,
    post_norm=True,
)

# Eve's elastic vision FFN, its router's weight and its loss as the paper has them.
EVF = MoEConfig(kind="evf", num_experts=2, top_k=1, norm_topk_prob=False, aux_loss_coef=0.001)


def _llava_gm(text: TextConfig) -> ModelConfig:
    """LLaVA-GM as its paper describes it: CLIP-L/336, true Gemma sizes, 4 experts, top-2, layers 0, 2, 4, ...

    Gemma's vocabulary has no image token, so one row is added, padded to 64 as LLaVA-Gemma's authors do.
    """
    return ModelConfig(text_config=text, vision_config=CLIP_L_336, image_token_index=256000, scale_image_features=True)


GEMMA_2B = TextConfig(
    hidden_size=2048,
    intermediate_size=16384,
    num_hidden_layers=18,
    num_attention_heads=8,
    num_key_value_heads=1,
    head_dim=256,
    vocab_size=256064,
    moe=MoEConfig(),
)
# Where decoders differ from Gemma as Llama does.
LIKE_LLAMA: dict[str, Any] = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "norm_plus_one": False,
    "scale_embeddings": False,
}


def _moe_llava(image_token: int, text: TextConfig) -> ModelConfig:
    """MoE-LLaVA: CLIP-L/336, 4 experts, top-2, layers 0, 2, 4, ...; an image's slots take an id that is no token's."""
    return ModelConfig(replace(text, moe=MoEConfig()), CLIP_L_336, image_token)


PRESETS = {
    "llava-gm-2b": _llava_gm(GEMMA_2B),
    "llava-gm-7b": _llava_gm(
        TextConfig(
            hidden_size=3072,
            intermediate_size=24576,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=16,
            head_dim=256,
            vocab_size=256064,
            moe=MoEConfig(),
        )
    ),
    "moe-llava-stablelm-1.6b": _moe_llava(
        100289,
        TextConfig(
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=24,
            num_attention_heads=32,
            num_key_value_heads=32,
            head_dim=64,
            vocab_size=100352,
            rms_norm_eps=1e-5,
            max_position_embeddings=4096,
            norm="layer",
            attention_bias="qkv",
            partial_rotary_factor=0.25,
            **LIKE_LLAMA,
        ),
    ),
    "moe-llava-qwen-1.8b": _moe_llava(
        151851,
        TextConfig(
            hidden_size=2048,
            intermediate_size=5504,
            num_hidden_layers=24,
            num_attention_heads=16,
            num_key_value_heads=16,
            head_dim=128,
            vocab_size=151936,
            attention_bias="qkv",
            **LIKE_LLAMA,
        ),
    ),
    "moe-llava-phi2-2.7b": _moe_llava(
        50296,
        TextConfig(
            hidden_size=2560,
            intermediate_size=10240,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            head_dim=80,
            vocab_size=51200,
            rms_norm_eps=1e-5,
            max_position_embeddings=2048,
            norm="layer",
            attention_bias="all",
            partial_rotary_factor=0.4,
            parallel_block=True,
            gated=False,
            **{**LIKE_LLAMA, "hidden_act": "gelu_pytorch_tanh"},
        ),
    ),
    # A Mistral, whose window of 4096 positions is its context.
    "moe-llava-openchat-7b": _moe_llava(
        32002,
        TextConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=32002,
            rms_norm_eps=1e-5,
            max_position_embeddings=4096,
            **LIKE_LLAMA,
        ),
    ),
    "llava-1.5-7b": ModelConfig(
        text_config=TextConfig(
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            head_dim=128,
            vocab_size=32000,
            rms_norm_eps=1e-5,
            max_position_embeddings=4096,
            **LIKE_LLAMA,
        ),
        vision_config=CLIP_L_336,
        image_token_index=32000,
    ),
    "llava-gemma-2b": _llava_gm(replace(GEMMA_2B, moe=None)),
    # PanGu-pi-1.5B-Pro: depth, width, vocabulary and the split at layer 15 are from Eve's code. Heads of 128 are those
    # of its smaller sister, and an FFN this wide gives the 1.5 B of its name, and with the tower the 1.8 B of Eve's.
    "eve-1.8b": ModelConfig(
        text_config=TextConfig(
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_attention_heads=16,
            num_key_value_heads=16,
            head_dim=128,
            vocab_size=48000,
            max_position_embeddings=2048,
            attention_bias="qkv",
            series_layers=15,
            shortcut_size=128,
            moe=EVF,
            **LIKE_LLAMA,
        ),
        vision_config=SIGLIP_L_384,
        image_token_index=48000,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        projector_type="ldpnet",
    ),
    "gm-tiny": ModelConfig(
        text_config=TextConfig(
            hidden_size=256,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=64,
            vocab_size=768,
            max_position_embeddings=1024,
            moe=MoEConfig(router_rank=3),
        ),
        vision_config=VisionConfig(
            model_type="siglip_vision_model",
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=3,
            image_size=64,
            patch_size=8,
            hidden_act="gelu_pytorch_tanh",
            layer_norm_eps=1e-6,
        ),
        image_token_index=6,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ),
}
