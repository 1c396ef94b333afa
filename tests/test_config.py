"""config.json: what is read, refused and written back, and whether the presets are the models they are named after."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from gm_mlx.config import LAYER_MODES, ModelConfig, MoEConfig, TextConfig, VisionConfig
from gm_mlx.config_checks import ACTIVATIONS
from gm_mlx.errors import UserError
from gm_mlx.model import Model
from gm_mlx.presets import PRESETS

sizes = st.integers(1, 4096)
moe_configs = st.integers(1, 16).flatmap(
    lambda num_experts: st.builds(
        MoEConfig,
        num_experts=st.just(num_experts),
        top_k=st.integers(1, num_experts),
        mode=st.sampled_from([*LAYER_MODES, "custom"]),
        layers_idx=st.lists(st.integers(0, 40)),
        norm_topk_prob=st.booleans(),
        router_rank=st.integers(0, 8),
        use_residual=st.booleans(),
        aux_loss_coef=st.floats(0, 1),
    )
)
configs = st.builds(
    ModelConfig,
    text_config=st.builds(
        TextConfig,
        **dict.fromkeys(
            ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
            sizes,
        ),
        head_dim=sizes.map(lambda size: 2 * size),
        vocab_size=sizes,
        hidden_act=st.sampled_from(ACTIVATIONS),
        rms_norm_eps=st.floats(1e-8, 1e-3),
        rope_theta=st.floats(1, 1e7),
        max_position_embeddings=sizes,
        tie_word_embeddings=st.booleans(),
        moe=st.none() | moe_configs,
    ),
    vision_config=st.builds(
        VisionConfig,
        model_type=st.sampled_from(["clip_vision_model", "siglip_vision_model"]),
        **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size"), sizes),
        num_hidden_layers=st.integers(3, 40),
        hidden_act=st.sampled_from(ACTIVATIONS),
        layer_norm_eps=st.floats(1e-8, 1e-3),
    ),
    image_token_index=st.integers(0, 300_000),
    vision_feature_layer=st.integers(-4, 3),
    vision_feature_select_strategy=st.sampled_from(["default", "full"]),
    projector_hidden_act=st.sampled_from(ACTIVATIONS),
    scale_image_features=st.booleans(),
    extra=st.dictionaries(
        st.sampled_from(["architectures", "torch_dtype", "pad_token_id"]), st.integers() | st.just("x")
    ),
)


@given(configs)
def test_round_trip_through_json(config: ModelConfig) -> None:
    back = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert back.extra == config.extra
    assert back.to_dict() == config.to_dict()


def tiny() -> dict[str, Any]:
    """gm-tiny's config.json as a fresh dict."""
    return json.loads(json.dumps(PRESETS["gm-tiny"].to_dict()))


def changed(path: str, value: Any) -> dict[str, Any]:
    """gm-tiny's config with one key set, or removed when the value is ``...``."""
    data = tiny()
    *tables, key = path.split(".")
    table = data
    for name in tables:
        table = table[name]
    if value is ...:
        del table[key]
    else:
        table[key] = value
    return data


def test_what_describes_and_does_not_shape_is_kept() -> None:
    data = changed("architectures", ["LlavaGM"]) | {"torch_dtype": "bfloat16"}
    data["text_config"]["attention_dropout"] = 0.0
    config = ModelConfig.from_dict(data)
    assert config == PRESETS["gm-tiny"]
    assert config.extra == {"architectures": ["LlavaGM"], "torch_dtype": "bfloat16"}
    assert config.to_dict()["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("hiden_size", 3, "unknown key 'hiden_size'"),
        ("text_config.hiden_size", 3, "text_config.hiden_size: unknown key"),
        ("text_config.moe.experts", 3, "text_config.moe.experts: unknown key"),
        ("vision_config.class_token", True, "vision_config.class_token: unknown key"),
        ("text_config", ..., "text_config: missing"),
        ("vision_config", [], "vision_config: missing"),
        ("image_token_index", ..., "image_token_index: missing"),
        ("text_config.vocab_size", ..., "text_config.vocab_size: missing"),
        ("vision_config.patch_size", ..., "vision_config.patch_size: missing"),
        ("model_type", "llava", "model_type: 'llava' is not 'llava_gm'"),
        ("text_config.vocab_size", "768", "text_config.vocab_size: '768' is not a whole number"),
        ("text_config.vocab_size", 768.0, "text_config.vocab_size: 768.0 is not a whole number"),
        ("text_config.vocab_size", True, "text_config.vocab_size: True is not a whole number"),
        ("text_config.vocab_size", None, "text_config.vocab_size: None is not a whole number"),
        ("text_config.vocab_size", -1, "text_config.vocab_size: -1 is negative"),
        ("text_config.rope_theta", "1e4", "text_config.rope_theta: '1e4' is not a number"),
        ("text_config.hidden_act", "relu", "text_config: activation 'relu' is not one of"),
        ("text_config.hidden_act", ["gelu"], "text_config.hidden_act: ['gelu'] is not a string"),
        ("text_config.moe", 4, "text_config.moe: 4 is not a table"),
        ("text_config.moe.top_k", 0, "text_config.moe.top_k: 0 is not between 1 and num_experts=4"),
        ("text_config.moe.top_k", 5, "text_config.moe.top_k: 5 is not between 1 and num_experts=4"),
        ("text_config.moe.mode", "half", "text_config.moe.mode: 'half' is not one of"),
        ("text_config.moe.mode", [0], "text_config.moe.mode: [0] is not a string"),
        ("text_config.moe.layers_idx", 3, "text_config.moe.layers_idx: 3 is not a list of whole numbers"),
        ("text_config.moe.norm_topk_prob", "false", "text_config.moe.norm_topk_prob: 'false' is not true or false"),
        ("vision_config.model_type", "vit", "vision_config.model_type: 'vit' is not"),
        ("vision_config.layer_norm_eps", True, "vision_config.layer_norm_eps: True is not a number"),
        ("scale_image_features", "no", "scale_image_features: 'no' is not true or false"),
        ("image_token_index", -200, "image_token_index: -200 is negative"),
        ("vision_feature_layer", [-2], "vision_feature_layer: [-2] is not a whole number"),
        ("vision_feature_layer", -6, "vision_feature_layer: -6 is outside a tower of 4 layers"),
        ("vision_feature_layer", 5, "vision_feature_layer: 5 is outside a tower of 4 layers"),
        ("vision_feature_select_strategy", "cls", "vision_feature_select_strategy: 'cls' is not"),
        ("projector_hidden_act", "swish9", "projector_hidden_act: activation 'swish9' is not"),
        ("spatial_pool_stride", 0, "spatial_pool_stride: 0 is not 1 or more"),
        ("spatial_pool_stride", -2, "spatial_pool_stride: -2 is negative"),
        ("spatial_pool_stride", 2.0, "spatial_pool_stride: 2.0 is not a whole number"),
        ("spatial_pool_stride", 3, "spatial_pool_stride: 3 does not divide the 8 patches of an image's side"),
    ],
)
def test_what_would_be_another_model_is_refused_by_name(path: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        ModelConfig.from_dict(changed(path, value))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_custom_layers_must_exist() -> None:
    config = ModelConfig.from_dict(changed("text_config.moe", {"mode": "custom", "layers_idx": [4]}))
    with pytest.raises(UserError, match=r"layers_idx: \[4\] leaves the 4 layers"):
        _ = config.text_config.sparse_layers


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not found"),
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[1]", "the config is not a JSON object"),
        ("{}", "text_config: missing"),
    ],
)
def test_load_names_the_file(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError) as caught:
        ModelConfig.load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: {message}")


def test_load_reads_what_to_dict_wrote(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["llava-gm-7b"].to_dict()))
    assert ModelConfig.load(tmp_path) == PRESETS["llava-gm-7b"]


@pytest.mark.parametrize(
    ("is_clip", "strategy", "tokens"),
    [(True, "default", 9), (True, "full", 10), (False, "default", 8), (False, "full", 9)],
)
def test_tokens_per_image(is_clip: bool, strategy: Any, tokens: int) -> None:
    config = PRESETS["gm-tiny"]
    kind: Any = "clip_vision_model" if is_clip else "siglip_vision_model"
    vision = replace(config.vision_config, model_type=kind, image_size=29, patch_size=9)
    assert replace(config, vision_config=vision, vision_feature_select_strategy=strategy).num_image_tokens == tokens


def grid_of(is_clip: bool, side: int, **join: Any) -> ModelConfig:
    """gm-tiny with a tower of ``side`` x ``side`` patches."""
    kind: Any = "clip_vision_model" if is_clip else "siglip_vision_model"
    vision = replace(PRESETS["gm-tiny"].vision_config, model_type=kind, image_size=4 * side + 3, patch_size=4)
    return replace(PRESETS["gm-tiny"], vision_config=vision, **join)


@pytest.mark.parametrize(("is_clip", "strategy"), [(True, "default"), (False, "full")])
@given(side=st.integers(1, 40), stride=st.integers(1, 40))
def test_pooling_divides_the_grid(is_clip: bool, strategy: str, side: int, stride: int) -> None:
    join: dict[str, Any] = {"vision_feature_select_strategy": strategy, "spatial_pool_stride": stride}
    if side % stride:
        with pytest.raises(UserError, match=f"spatial_pool_stride: {stride} does not divide the {side} patches"):
            grid_of(is_clip, side, **join)
        return
    config = grid_of(is_clip, side, **join)
    assert (config.num_image_tokens, config.num_image_features) == ((side // stride) ** 2, side**2)
    back = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config and back.spatial_pool_stride == stride


@pytest.mark.parametrize(("is_clip", "strategy", "features"), [(True, "full", 65), (False, "default", 63)])
def test_only_a_whole_grid_is_pooled(is_clip: bool, strategy: str, features: int) -> None:
    assert grid_of(is_clip, 8, vision_feature_select_strategy=strategy).num_image_tokens == features
    with pytest.raises(UserError) as caught:
        grid_of(is_clip, 8, vision_feature_select_strategy=strategy, spatial_pool_stride=2)
    assert str(caught.value).startswith("spatial_pool_stride: 2 averages a grid of patches, but vision_feature_select")
    assert f"{strategy!r} gives {features} features of 8 x 8 patches" in str(caught.value)


def test_a_config_without_the_stride_does_not_pool() -> None:
    assert ModelConfig.from_dict(changed("spatial_pool_stride", ...)) == PRESETS["gm-tiny"]


@pytest.mark.parametrize(("layer", "used"), [(-1, 4), (-2, 3), (-5, 0), (0, 0), (3, 3), (4, 4)])
def test_tower_layers_behind_the_feature_layer_are_not_used(layer: int, used: int) -> None:
    assert replace(PRESETS["gm-tiny"], vision_feature_layer=layer).num_vision_layers_used == used


# What is published, and what MoE-LLaVA's layout gives for Gemma's sizes: a decoder with four experts in every other
# layer, plus a CLIP-L/336 and a projector. Tensors are counted as they are stored in PyTorch, experts one by one.
PUBLISHED = {
    "llava-gm-2b": {"dense": 2_506_172_416, "moe": 5_224_155_136, "file": 5_533_958_144, "tensors": 649, "layers": 18},
    "llava-gm-7b": {
        "dense": 8_537_680_896,
        "moe": 18_050_534_400,
        "file": 18_366_630_912,
        "tensors": 789,
        "layers": 28,
    },
}
CLIP_LAST_LAYER = 4 * (1024 * 1024 + 1024) + 2 * 2 * 1024 + (4096 * 1024 + 4096) + (1024 * 4096 + 1024)
CLIP_POST_LAYERNORM = 2 * 1024
UNUSED_TENSORS = 16 + 2  # the two above


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_parameter_counts(name: str) -> None:
    published = PUBLISHED[name]
    text = replace(PRESETS[name].text_config, vocab_size=256_000)  # without the image token's padding

    def shapes(text: TextConfig) -> dict[str, tuple[int, ...]]:
        # Lazy arrays: only their shapes are ever made.
        model = Model(replace(PRESETS[name], text_config=text))
        return {path: value.shape for path, value in cast(Any, tree_flatten(model.parameters()))}

    def count(shapes: dict[str, tuple[int, ...]], prefix: str = "") -> int:
        return sum(prod(shape) for path, shape in shapes.items() if path.startswith(prefix))

    sparse = shapes(text)
    assert count(shapes(replace(text, moe=None)), "language_model") == published["dense"]
    assert count(sparse, "language_model") == published["moe"]
    assert count(sparse) == published["file"] - CLIP_LAST_LAYER - CLIP_POST_LAYERNORM
    stacked = 3 * (published["layers"] // 2)
    assert len(sparse) + 3 * stacked == published["tensors"] - UNUSED_TENSORS


def test_presets_reserve_a_padded_row_for_the_image_token() -> None:
    for name in PUBLISHED:
        assert PRESETS[name].image_token_index == 256_000
        assert PRESETS[name].text_config.vocab_size == 256_064
