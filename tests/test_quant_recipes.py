"""Recipes as tables, sizes that are those of files, and models built in memory as a folder would give them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from fixtures import tiny_config, tiny_folder, tiny_model

from gm_mlx.config import ModelConfig, MoEConfig, TextConfig
from gm_mlx.errors import UserError
from gm_mlx.folder import read_model_folder, write_model_folder
from gm_mlx.hub import find_model
from gm_mlx.model import Model
from gm_mlx.presets import PRESETS
from gm_mlx.quant.build import build_model, dequantized, file_dtype
from gm_mlx.quant.recipes import RECIPES, plan, quantizable, recipe_table
from gm_mlx.quant.sizes import component_sizes, file_bytes, total
from gm_mlx.weights import apply_quantization, load_model, named_arrays, quantizable_layers

RESIDUAL = tiny_config(moe=MoEConfig(use_residual=True, router_rank=2))
PHI = tiny_config(gated=False, attention_bias="all", norm="layer", parallel_block=True, hidden_act="gelu_pytorch_tanh")
CONFIGS = {
    "llava-gm-2b": PRESETS["llava-gm-2b"],
    "gm-tiny": PRESETS["gm-tiny"],
    "siglip": tiny_config(),
    "clip": tiny_config("clip", tie_word_embeddings=True),
    "residual": RESIDUAL,
    "phi": PHI,
    "dense": tiny_config(moe=None),
}
TABLES = [name for name in RECIPES if name != "mixed"]


@pytest.mark.parametrize("name", CONFIGS)
def test_recipes_speak_of_the_layers_that_a_model_has(name: str) -> None:
    layers = quantizable_layers(Model(CONFIGS[name]))
    assert {path: layer.arrays["weight"] for path, layer in quantizable(CONFIGS[name]).items()} == {
        path: layer.weight.shape for path, layer in layers.items()
    }
    for recipe in TABLES:
        model = Model(CONFIGS[name])
        apply_quantization(model, recipe_table(CONFIGS[name], recipe))
        bits = {path: getattr(layer, "bits", None) for path, layer in model.named_modules() if path in layers}
        for path, layer in quantizable(CONFIGS[name]).items():
            wanted = RECIPES[recipe].precisions[layer.component]
            assert bits[path] == (wanted and wanted.bits), (recipe, path)


def test_routers_and_norms_are_in_no_recipe() -> None:
    for recipe in RECIPES.values():
        assert not {"routers", "norms"} & set(recipe.precisions)


@pytest.mark.parametrize(("recipe", "gigabytes", "bits"), [("q4", 3.609, 5.23), ("q4-all", 3.108, 4.50)])
def test_sizes_of_2b(recipe: str, gigabytes: float, bits: float) -> None:
    size = total(component_sizes(PRESETS["llava-gm-2b"], recipe_table(PRESETS["llava-gm-2b"], recipe)))
    # Gemma's vocabulary is padded by 64 rows; of CLIP, the last layer and the norm behind it are not in the model.
    assert size.parameters == 5_224_155_136 + 64 * 2048 + 303_507_456 - 12_598_272 + 6_295_552
    assert size.bytes / 1e9 == pytest.approx(gigabytes, abs=1e-3)
    assert size.bits_per_weight == pytest.approx(bits, abs=5e-3)


@pytest.mark.parametrize("recipe", TABLES)
def test_sizes_are_those_of_the_file(recipe: str, tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source")
    config, tensors = tiny_config(), read_model_folder(source)
    table = recipe_table(config, recipe)
    write_model_folder(
        tmp_path / "out", config, tensors, processor=None, gm={}, card="", quantization=table, dtype="float16"
    )
    written = read_model_folder(tmp_path / "out")
    sizes = component_sizes(config, table)
    assert total(sizes).bytes == sum(tensor.read().nbytes for tensor in written.values())
    experts = sum(tensor.read().nbytes for name, tensor in written.items() if ".switch_mlp." in name)
    assert sizes["experts"].bytes == experts
    file = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert file <= file_bytes(config, table) < file + 10_000


def test_rows_that_do_not_divide(tmp_path: Path) -> None:
    # Rows of 96 take groups of 32 and rows of 80 none; MXFP4 has groups of 32 only.
    config = tiny_config(intermediate_size=96, head_dim=40)
    asked = plan(config, "q4")
    down = "language_model.model.layers.0.mlp.switch_mlp.down_proj"
    out = "language_model.model.layers.0.self_attn.o_proj"
    assert asked.table[down] == {"group_size": 32, "bits": 4, "mode": "affine"}
    assert asked.table[out] is False
    assert "takes groups of 32: its rows of 96" in asked.adjusted[down]
    assert "stays in floats: its rows of 80" in asked.adjusted[out]
    model = tiny_model(config=config)
    apply_quantization(model, asked.table)
    assert "scales" in model.layers[0].mlp.switch_mlp.down_proj
    assert "scales" not in model.layers[0].self_attn.o_proj
    assert down not in plan(config, "mxfp4").adjusted


def test_a_model_that_cannot_be_quantized() -> None:
    config = tiny_config(hidden_size=48, intermediate_size=48, num_attention_heads=1, head_dim=48)
    narrow = dataclasses.replace(config.vision_config, hidden_size=24, intermediate_size=24, num_attention_heads=1)
    with pytest.raises(UserError, match="no layer of this model has rows that divide"):
        plan(dataclasses.replace(config, vision_config=narrow), "q8")


def test_unknown_and_measured_recipes() -> None:
    with pytest.raises(UserError, match=r"recipe 'q5' is not one of q4, q8"):
        recipe_table(tiny_config(), "q5")
    with pytest.raises(UserError, match="--target-size"):
        recipe_table(tiny_config(), "mixed")


def test_tiny_is_what_gm_tiny_ships_with() -> None:
    shipped = ModelConfig.load(find_model())
    stored = read_model_folder(find_model())
    config, _ = dequantized(shipped, stored)
    made, there = Model(config), Model(config)
    apply_quantization(made, recipe_table(config, "tiny"))
    apply_quantization(there, shipped.extra["quantization"], lambda path: f"{path}.scales" in stored)
    assert {n: a.shape for n, a in named_arrays(made).items()} == {n: a.shape for n, a in named_arrays(there).items()}


IDS = np.array([[2, 40, 41, 42, 43, 44]])


@pytest.mark.parametrize("recipe", ["q4", "mxfp4", "q3-experts", "tiny"])
def test_built_in_memory_as_from_a_folder(recipe: str, tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source")
    config, tensors = tiny_config(), read_model_folder(source)
    table, dtype = recipe_table(config, recipe), file_dtype(tensors)
    assert dtype == "float16"
    out = tmp_path / "out"
    write_model_folder(out, config, tensors, processor=None, gm={}, card="", quantization=table, dtype=dtype)
    loaded, built = load_model(out), build_model(config, tensors, table, dtype)
    arrays = named_arrays(loaded)
    assert arrays.keys() == named_arrays(built).keys()
    for name, array in named_arrays(built).items():
        assert array.dtype == arrays[name].dtype
        assert mx.array_equal(array, arrays[name]).item(), name
    assert mx.array_equal(built(mx.array(IDS)), loaded(mx.array(IDS))).item()


def test_half_precision_sources_keep_their_dtype(tmp_path: Path) -> None:
    tensors = read_model_folder(tiny_folder(tmp_path / "source"))
    write_model_folder(tmp_path / "half", tiny_config(), tensors, processor=None, gm={}, card="", dtype="bfloat16")
    assert file_dtype(read_model_folder(tmp_path / "half")) is None


@pytest.mark.parametrize("recipe", ["q8", "mxfp4"])
def test_dequantized_is_what_the_packed_model_computes_with(recipe: str, tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source")
    config, tensors = tiny_config(), read_model_folder(source)
    out = tmp_path / "out"
    table = recipe_table(config, recipe)
    write_model_folder(out, config, tensors, processor=None, gm={}, card="", quantization=table)
    packed = ModelConfig.load(out)
    plain, floats = dequantized(packed, read_model_folder(out))
    assert "quantization" not in plain.extra
    assert {name: tensor.shape for name, tensor in floats.items()} == {n: t.shape for n, t in tensors.items()}
    for name, tensor in floats.items():
        read = tensor.read()
        assert (read.shape, tensor.dtype) == (tensor.shape, "F32"), name
        assert mx.abs(read - tensors[name].read()).max().item() < (0.01 if recipe == "q8" else 0.5), name
    ours, theirs = build_model(plain, floats)(mx.array(IDS)), load_model(out)(mx.array(IDS))
    assert mx.abs(ours - theirs).max().item() < 1e-3 * mx.abs(theirs).max().item()


def test_loading_a_quantized_model_holds_no_unpacked_weights(tmp_path: Path) -> None:
    config = tiny_config(hidden_size=256, intermediate_size=1024, head_dim=128)
    source = tiny_folder(tmp_path / "source", model=tiny_model(config=config))
    table = recipe_table(config, "q4-all")
    out = tmp_path / "out"
    write_model_folder(
        out, config, read_model_folder(source), processor=None, gm={}, card="", quantization=table, dtype="float16"
    )
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load_model(out)
    mx.eval(model.parameters())
    held = mx.get_peak_memory() - before
    file = (out / "model.safetensors").stat().st_size
    halves = 2 * total(component_sizes(config)).parameters
    assert file < 0.35 * halves
    assert held < 1.3 * file


def test_llama_type_decoders_have_their_recipes_too() -> None:
    text = TextConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=512,
        hidden_act="silu",
        norm_plus_one=False,
        scale_embeddings=False,
        tie_word_embeddings=False,
        moe=MoEConfig(),
    )
    config = dataclasses.replace(tiny_config(), text_config=text)
    table = recipe_table(config, "q4")
    assert table.get("language_model.lm_head", table)["bits"] == 8  # the table's defaults count where it has no entry
