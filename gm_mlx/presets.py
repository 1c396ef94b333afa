"""The models that the papers describe, by name, as configs: to count, to time and to try before weights exist."""

from __future__ import annotations

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


def _llava_gm(text: TextConfig) -> ModelConfig:
    """LLaVA-GM as its paper describes it: CLIP-L/336, true Gemma sizes, 4 experts, top-2, layers 0, 2, 4, ...

    Gemma's vocabulary has no image token, so one row is added, padded to 64 as LLaVA-Gemma's authors do.
    """
    return ModelConfig(text_config=text, vision_config=CLIP_L_336, image_token_index=256000, scale_image_features=True)


PRESETS = {
    "llava-gm-2b": _llava_gm(
        TextConfig(
            hidden_size=2048,
            intermediate_size=16384,
            num_hidden_layers=18,
            num_attention_heads=8,
            num_key_value_heads=1,
            head_dim=256,
            vocab_size=256064,
            moe=MoEConfig(),
        )
    ),
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
