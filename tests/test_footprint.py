"""Parameters, arithmetic and memory, against figures worked out by hand for all families and against models built."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from eve_models import CONFIG as EVE
from fixtures import tiny_config, tiny_folder, tiny_model

from gm_mlx.config import ModelConfig, MoEConfig, TextConfig
from gm_mlx.devices import DEVICES
from gm_mlx.errors import UserError
from gm_mlx.folder import read_model_folder
from gm_mlx.footprint import activation_bytes, footprint, kv_bytes_per_token, planned_bytes, stored_bytes
from gm_mlx.generate import make_cache, prefill
from gm_mlx.inventory import COMPONENTS, model_layers
from gm_mlx.model import Model
from gm_mlx.presets import CLIP_L_336, PRESETS
from gm_mlx.quant.recipes import recipe_table
from gm_mlx.quant.sizes import component_sizes, total
from gm_mlx.weights import apply_quantization, named_arrays, num_parameters, quantizable_layers, save_model

LLAMA: dict[str, Any] = {
    "norm_plus_one": False,
    "scale_embeddings": False,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
PHI: dict[str, Any] = {
    **LLAMA,
    "norm": "layer",
    "attention_bias": "all",
    "partial_rotary_factor": 0.4,
    "parallel_block": True,
    "gated": False,
    "hidden_act": "gelu_pytorch_tanh",
}


def text(layers: int, size: int, ffn: int, heads: int, kv: int, head: int, vocab: int, **more: Any) -> TextConfig:
    return TextConfig(
        hidden_size=size,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=head,
        vocab_size=vocab,
        **more,
    )


FAMILIES = {
    "gemma-2b": text(18, 2048, 16384, 8, 1, 256, 256000),
    "gemma-7b": text(28, 3072, 24576, 16, 16, 256, 256000),
    "stablelm-1.6b": text(
        24, 2048, 5632, 32, 32, 64, 100352, norm="layer", attention_bias="qkv", partial_rotary_factor=0.25, **LLAMA
    ),
    "qwen-1.8b": text(24, 2048, 5504, 16, 16, 128, 151936, attention_bias="qkv", **LLAMA),
    "phi-2": text(32, 2560, 10240, 32, 32, 80, 51200, **PHI),
    "mistral-7b": text(32, 4096, 14336, 32, 8, 128, 32002, **LLAMA),
}
# Parameters of the decoder: dense, with 4 experts in every other layer, and active then; of the projector; KV bytes of
# a token. The totals of StableLM, Qwen and Phi are those of MoE-LLaVA's published files.
KNOWN = {
    "gemma-2b": (2_506_172_416, 5_224_155_136, 3_412_215_808, 6_295_552, 18_432),
    "gemma-7b": (8_537_680_896, 18_050_534_400, 11_708_746_752, 12_589_056, 458_752),
    "stablelm-1.6b": (1_644_515_328, 2_890_321_920, 2_059_849_728, 6_295_552, 196_608),
    "qwen-1.8b": (1_836_828_672, 3_054_323_712, 2_242_725_888, 6_295_552, 196_608),
    "phi-2": (2_779_632_640, 5_296_993_280, 3_618_862_080, 9_180_160, 327_680),
    "mistral-7b": (7_241_748_480, 15_697_727_488, 10_060_582_912, 20_979_712, 131_072),
}
FILES = {
    "stablelm-1.6b": 3_200_124_928,
    "qwen-1.8b": 3_364_126_720,
    "phi-2": 5_609_680_896,
    "mistral-7b": 16_022_214_656,
    "gemma-2b": 5_533_958_144,
    "gemma-7b": 18_366_630_912,
}
CLIP_L_PARAMETERS = 303_507_456


def model_config(family: str, moe: MoEConfig | None = None) -> ModelConfig:
    decoder = replace(FAMILIES[family], moe=moe)
    return ModelConfig(text_config=decoder, vision_config=CLIP_L_336, image_token_index=0)


def decoder_parameters(config: ModelConfig) -> tuple[int, int]:
    layers = [layer for layer in model_layers(config) if layer.component not in ("tower", "projector")]
    return sum(layer.total for layer in layers), sum(layer.active for layer in layers)


@pytest.mark.parametrize("family", KNOWN)
def test_known_counts(family: str) -> None:
    dense, sparse, active, projector, kv_bytes = KNOWN[family]
    config = model_config(family, MoEConfig())
    assert decoder_parameters(model_config(family)) == (dense, dense)
    assert decoder_parameters(config) == (sparse, active)
    counted = footprint(config)
    assert counted.components["projector"].total == projector
    assert counted.kv_bytes_per_token == kv_bytes
    # The published files hold the tower's last layer and its last norm too, which LLaVA does not run.
    whole = replace(config, vision_feature_layer=-1)
    assert footprint(whole).components["tower"].total + 2 * 1024 == CLIP_L_PARAMETERS
    assert footprint(whole).total + 2 * 1024 == FILES[family]


def test_eve_s_counts() -> None:
    """PanGu-pi-1.5B-Pro with a vision FFN in 11 of 22 layers, SigLIP-L/16 at 384 pixels, and LDP."""
    size, width, vocab, inside = 2048, 5632, 48000, 128
    matrix, attention = size * width, 4 * size**2 + 3 * size
    dense = (
        2 * vocab * size + 22 * (attention + 2 * size) + size + 15 * 4 * matrix + 7 * (3 * matrix + 2 * inside * size)
    )
    # Layers 0, 2, ... 14 have four matrices in an FFN, 16, 18 and 20 have three.
    vision_ffns, routers = (8 * 4 + 3 * 3) * matrix, 11 * 2 * size
    eve = PRESETS["eve-1.8b"]
    assert decoder_parameters(replace(eve, text_config=replace(eve.text_config, moe=None))) == (dense, dense)
    assert decoder_parameters(eve) == (dense + vision_ffns + routers, dense + routers)

    block = 9 * size + 2 * 2 * size + 2 * size * 512 + 512 + size + size**2
    linears = 1024 * size + size + size**2 + size
    tower = (3 * 16 * 16 + 1 + 576) * 1024 + 24 * (4 * 1024**2 + 2 * 1024 * 4096 + 13 * 1024) + 2 * 1024
    counted = footprint(eve)
    assert counted.components["projector"].total == linears + 2 * block
    assert counted.components["tower"].total == tower
    assert round(counted.active / 1e9, 1) == 1.8  # Eve-1.8B
    once = 2 * 2 * size * 512 * 2  # squeeze-and-excitation sees one position of each block
    products = 2 * 576 * (1024 * size + size**2) + (576 + 144) * 2 * (9 * size + size**2) + once
    assert counted.flops.projector == products


VARIANTS = {
    "eve": EVE,
    "ldpnetv2": replace(EVE, projector_type="ldpnetv2"),
    "siglip": tiny_config("siglip"),
    "clip": tiny_config("clip"),
    "class token": replace(tiny_config("clip"), vision_feature_select_strategy="full"),
    "pooled": replace(tiny_config("clip"), spatial_pool_stride=2),
    "tied": tiny_config(tie_word_embeddings=True),
    "dense": tiny_config(moe=None),
    "low-rank": tiny_config(moe=MoEConfig(router_rank=3)),
    "residual": tiny_config(moe=MoEConfig(use_residual=True, top_k=1)),
    "split": tiny_config(moe=MoEConfig(expert_size=32)),
    "all sparse": tiny_config(moe=MoEConfig(mode="dense", num_experts=3)),
    "stablelm": tiny_config(norm="layer", attention_bias="qkv", **LLAMA | {"tie_word_embeddings": False}),
    "phi": tiny_config(**{**PHI, "partial_rotary_factor": 0.5}, moe=MoEConfig(use_residual=True)),
    **PRESETS,
    **{family: model_config(family, MoEConfig()) for family in FAMILIES},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_inventory_is_the_model(name: str) -> None:
    """Full-size models too: building one computes nothing."""
    config = VARIANTS[name]
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = Model(config)
    arrays = {path: array.shape for path, array in named_arrays(model).items()}
    layers = model_layers(config)
    assert {f"{layer.path}.{array}": shape for layer in layers for array, shape in layer.arrays.items()} == arrays
    assert {layer.path for layer in layers if layer.quantizable} == quantizable_layers(model).keys()
    assert {layer.component for layer in layers} <= set(COMPONENTS)
    assert footprint(config).total == num_parameters(model)
    assert mx.get_peak_memory() - before < 1 << 20


TABLES: dict[str, dict[str, Any]] = {
    "4 bits": {"group_size": 32, "bits": 4},
    "3 bits": {"group_size": 32, "bits": 3, "mode": "affine"},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
    "mixed": {
        "group_size": 32,
        "bits": 8,
        "language_model.lm_head": False,
        "language_model.model.layers.0.self_attn.q_proj": {"group_size": 64, "bits": 2},
        "multi_modal_projector.linear_2": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    },
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["siglip", "phi"])
def test_planned_bytes_are_those_of_the_file(table: str, dtype: str, variant: str, tmp_path: Path) -> None:
    config = VARIANTS[variant]
    model = tiny_model(config=config)
    routers = {name: array for name, array in named_arrays(model).items() if ".mlp.gate." in name}
    model.set_dtype(getattr(mx, dtype))
    model.load_weights(list(routers.items()), strict=False)
    apply_quantization(model, TABLES[table])
    save_model(model, tmp_path)
    tensors = read_model_folder(tmp_path)
    layers = model_layers(config)
    assert planned_bytes(layers, TABLES[table], dtype) == stored_bytes(layers, tensors)
    counted = footprint(config, stored=tensors)
    assert counted.bytes == sum(array.nbytes for array in named_arrays(model).values())
    assert asdict(counted) == asdict(footprint(config, quantization=TABLES[table], dtype=dtype))


@pytest.mark.parametrize("recipe", ["q4", "q8", "q4-all"])
def test_recipes_of_the_presets(recipe: str) -> None:
    config = PRESETS["llava-gm-2b"]
    table = recipe_table(config, recipe)
    assert footprint(config, quantization=table).bytes == total(component_sizes(config, table)).bytes


def test_flops_by_hand() -> None:
    """A model small enough to write every product down."""
    config = tiny_config("clip", moe=MoEConfig(), vocab_size=500)
    counted = footprint(config, images=2, text_tokens=7)
    prompt = 2 * 4 + 7
    patches, positions, vision = 4, 5, 32  # one of two tower layers runs
    linear = 4 * vision * vision + 2 * vision * 64
    attention = 2 * positions**2 * vision
    assert counted.flops.tower == 2 * 2 * (patches * 8 * 8 * 3 * vision + positions * linear + attention)
    assert counted.flops.projector == 2 * 2 * 4 * (vision * 64 + 64 * 64)
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64
    ffn = 3 * 64 * 128
    per_token = 2 * layer + 2 * ffn + 64 * 4 + ffn  # two of four experts in layer 0, a router, a dense layer 1
    pairs = prompt * (prompt + 1) // 2
    assert counted.flops.decoder == 2 * (prompt * per_token + 2 * pairs * 2 * 64)
    assert counted.flops.head == 2 * 64 * 500
    assert counted.flops.token == 2 * (per_token + 2 * (prompt + 1) * 2 * 64 + 64 * 500)
    assert counted.flops.prefill == sum(asdict(counted.flops).values()) - counted.flops.token


def test_pooled_images_are_projected_whole_and_read_small() -> None:
    config = PRESETS["llava-gm-2b"]
    whole, pooled = footprint(config, images=2), footprint(replace(config, spatial_pool_stride=2), images=2)
    assert (whole.prompt_tokens, pooled.prompt_tokens) == (2 * 576 + 64, 2 * 144 + 64)
    assert (pooled.total, pooled.active, pooled.bytes) == (whole.total, whole.active, whole.bytes)
    assert (pooled.flops.tower, pooled.flops.projector) == (whole.flops.tower, whole.flops.projector)
    assert pooled.flops.decoder * 3 < whole.flops.decoder
    assert pooled.flops.decoder == footprint(config, images=0, text_tokens=2 * 144 + 64).flops.decoder
    assert pooled.memory.kv_cache < whole.memory.kv_cache


def test_without_an_image_there_is_no_tower() -> None:
    flops = footprint(PRESETS["llava-gm-2b"], images=0).flops
    assert (flops.tower, flops.projector) == (0, 0)


def test_memory_is_the_sum_of_its_parts() -> None:
    config = PRESETS["llava-gm-2b"]
    counted = footprint(config, text_tokens=60, context=1000)
    assert (counted.prompt_tokens, counted.context) == (636, 1000)
    assert counted.memory.weights == counted.bytes
    assert counted.memory.kv_cache == 1024 * 18_432  # the cache grows by 256 positions
    assert counted.memory.peak == sum(asdict(counted.memory).values())
    assert kv_bytes_per_token(config, 4) == 2 * 18_432
    assert footprint(config, text_tokens=60).context == 636 + 512
    assert footprint(config, text_tokens=8000 - 576).context == 8192


@pytest.mark.parametrize("shape", [{}, {"moe": None}, {"head_dim": 128, "num_key_value_heads": 4}])
def test_activations_are_estimated_within_a_factor(shape: dict[str, Any]) -> None:
    """What MLX says it needed for a prefill, beside the estimate: half of it to all, and some kilobytes."""
    config = tiny_config(
        **{"num_attention_heads": 4, "hidden_size": 256, "intermediate_size": 1024, "vocab_size": 512, **shape}
    )
    model = tiny_model(config=config)
    mx.eval(model.parameters())
    x = mx.random.normal((1, 256, 256))
    cache = make_cache(model)
    mx.eval(x)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    prefill(model, x, cache)
    used = mx.get_peak_memory() - before - 256 * kv_bytes_per_token(config, 4)
    estimate = activation_bytes(config, 0, 256, 256, 4)
    assert estimate / 3 < used < 1.2 * estimate


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"images": -1}, "images: -1"),
        ({"text_tokens": 0}, "tokens: 0"),
        ({"context": 100}, "less than the prompt's 640 tokens"),
        ({"context": 10_000}, "8192 positions"),
        ({"images": 20}, "8192 positions"),
    ],
)
def test_a_question_that_cannot_be_asked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        footprint(PRESETS["llava-gm-2b"], **options)


def test_json(tmp_path: Path) -> None:
    facts = footprint(tiny_config(), stored=read_model_folder(tiny_folder(tmp_path))).to_dict()
    assert facts["bits_per_weight"] == 32
    assert facts["memory"]["peak"] > facts["memory"]["weights"] == facts["bytes"]
    assert sum(share["active"] for share in facts["components"].values()) == facts["parameters"]["active"]


def test_devices_leave_room_for_others() -> None:
    assert all(0.4 < device.share < 0.8 and device.reason for device in DEVICES.values())
    assert all(f"{device.memory >> 30}gb" in name for name, device in DEVICES.items())
    assert np.isclose(DEVICES["mac-16gb"].usable, 10_922.67 * 2**20, rtol=1e-4)
