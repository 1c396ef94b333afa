"""Adapters' folders: written and read again, peft's own, in llama.cpp, and those that cannot be used."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import raw_llama
from lora_adapters import IDS, PARTS, PREFIXES, Adapter, draw
from lora_models import CONFIGS, EVERYTHING, TABLES, config_of, error, everything, logits, model_of, trained
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file
from test_gguf_text import error as gguf_error
from test_gguf_text import random_config, reference, weights_of, write

from gm_mlx.config import ModelConfig
from gm_mlx.convert.to_gguf.lora import convert_adapter
from gm_mlx.errors import UserError
from gm_mlx.lora.attach import DEFAULT_ADAPTER, add_lora, parts, wrappers
from gm_mlx.lora.config import LoRAConfig
from gm_mlx.lora.folder import find_adapter, load_adapter, read_adapter, save_adapter
from gm_mlx.lora.merge import fuse
from gm_mlx.model import Model
from gm_mlx.weights import named_arrays

BASE = "org/tiny"


def saved(folder: Path, model: Model, **options: Any) -> Path:
    save_adapter(model, folder, base=BASE, **options)
    return folder


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_saved_and_loaded_says_the_same(config: str, dora: bool, peft: bool, tmp_path: Path) -> None:
    model = trained(model_of(config), everything(config, dora))
    folder = saved(tmp_path / "adapter", model, peft=peft)
    other = model_of(config)
    wrapped = load_adapter(other, folder)
    assert [one.path for one in wrapped] == list(wrappers(model))
    assert np.array_equal(logits(other), logits(model))
    assert not tree_flatten(wrappers(other)[wrapped[0].path].adapters[0].trainable_parameters())


@pytest.mark.parametrize("table", TABLES)
def test_trained_on_few_bits_and_used_on_many(table: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", trained(model_of("gemma", table)))
    plain = trained(model_of())
    for model in (model_of(), model_of("gemma", table)):
        load_adapter(model, folder)
        found = logits(model)
        assert np.isfinite(found).all()
        if not model.config.extra:
            assert np.array_equal(found, logits(plain))


def test_what_is_in_the_folder(tmp_path: Path) -> None:
    lora = LoRAConfig(rank=4, alpha=6.0, rslora=True, dropout=0.1, router=True, rank_pattern={"up_proj": 2})
    folder = saved(tmp_path / "shapes", trained(model_of(), lora), gm={"data": "drawings"})
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "gm.json"
    ]  # fmt: skip
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 6.0, 0.1)
    assert (config["use_rslora"], config["use_dora"], config["base_model_name_or_path"]) == (True, False, BASE)
    layers = "model.language_model.layers"
    assert config["rank_pattern"] == {f"{layers}.0.mlp.switch_mlp.up_proj": 2, f"{layers}.1.mlp.up_proj": 2}
    assert config["alpha_pattern"] == {}
    assert f"{layers}.0.mlp.gate" in config["target_modules"]
    shapes = {name: array.shape for name, array in load_file(folder / "adapter_model.safetensors").items()}
    assert shapes[f"base_model.model.{layers}.0.self_attn.k_proj.lora_A.weight"] == (4, 64)
    assert shapes[f"base_model.model.{layers}.0.self_attn.k_proj.lora_B.weight"] == (32, 4)
    assert shapes[f"base_model.model.{layers}.0.mlp.switch_mlp.up_proj.lora_A.weight"] == (4, 2, 64)
    assert shapes[f"base_model.model.{layers}.0.mlp.switch_mlp.up_proj.lora_B.weight"] == (4, 128, 2)
    gm = json.loads((folder / "gm.json").read_text())
    assert (gm["base"]["name"], gm["data"]) == (BASE, "drawings")
    assert ModelConfig.from_dict(gm["base"]["config"]) == model_of().config
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: gm-mlx\nbase_model: org/tiny\n")
    assert "| experts | 12 | 2, 4 |" in card
    assert "--adapter shapes" in card
    assert "gguf" not in card  # llama.cpp has no LoRA for projectors
    text_alone = saved(tmp_path / "text", trained(model_of(), LoRAConfig(targets=["attention", "experts"])))
    assert "gm-mlx convert text --to gguf-lora" in (text_alone / "README.md").read_text()


def test_peft_names(tmp_path: Path) -> None:
    """One by one, each expert is a module, and exceptions name it so."""
    lora = LoRAConfig(targets=["experts"], rank_pattern={"up_proj": 2}, alpha_pattern={"down_proj": 5.0})
    folder = saved(tmp_path / "adapter", trained(model_of(), lora), peft=True)
    shapes = {name: array.shape for name, array in load_file(folder / "adapter_model.safetensors").items()}
    prefix = "base_model.model.model.language_model.layers.0.mlp.experts"
    assert shapes[f"{prefix}.3.up_proj.lora_A.weight"] == (2, 64)
    assert len(shapes) == 3 * 4 * 2
    config = json.loads((folder / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {
        name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in shapes
    }
    assert config["rank_pattern"] == {name: 2 for name in config["target_modules"] if name.endswith("up_proj")}
    assert config["alpha_pattern"] == {name: 5.0 for name in config["target_modules"] if name.endswith("down_proj")}


def test_one_of_several_adapters(tmp_path: Path) -> None:
    model = trained(model_of(), LoRAConfig(targets=["q_proj"]), adapter="first")
    alone = logits(model)
    trained(model, EVERYTHING, seed=1, adapter="second")
    other = model_of()
    load_adapter(other, saved(tmp_path / "first", model, adapter="first"))
    assert np.array_equal(logits(other), alone)
    load_adapter(other, saved(tmp_path / "second", model, adapter="second"))
    assert np.array_equal(logits(other), logits(model))
    with pytest.raises(ValueError, match="no adapter 'third'"):
        saved(tmp_path / "third", model, adapter="third")


def test_weights(tmp_path: Path) -> None:
    """Half of one and twice the other, as one adapter with B times a half and one with B times two."""
    first, second = (saved(tmp_path / str(seed), trained(model_of(), EVERYTHING, seed)) for seed in (0, 1))
    model = model_of()
    load_adapter(model, first, 0.5)
    load_adapter(model, second, 2.0)
    other = model_of()
    for folder, factor in ((first, 0.5), (second, 2.0)):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        save_file({n: a * factor if re.search(r"lora_(embedding_)?B", n) else a for n, a in tensors.items()}, path)
        load_adapter(other, folder)
    assert error(logits(model), logits(other)) <= 1e-5
    assert error(logits(fuse(model)), logits(other)) <= 1e-5


def test_trained_on(tmp_path: Path) -> None:
    lora = LoRAConfig(rslora=True, dropout=0.25, targets=["attention", "experts"])
    folder = saved(tmp_path / "adapter", trained(model_of(), lora))
    model = model_of()
    load_adapter(model, folder, adapter=DEFAULT_ADAPTER, trainable=True)
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    assert len(names) == 2 * 11 and all(".adapters.0.lora_" in name for name in names)
    assert {low.dropout_rate for wrapper in wrappers(model).values() for low in wrapper.adapters} == {0.25}
    again = saved(tmp_path / "again", model)
    other = model_of()
    load_adapter(other, again)
    assert error(logits(other), logits(model)) <= 1e-6


# Adapters of peft, by every layout's names; ``draw`` knows in float64 what they come to.
@pytest.mark.parametrize("layout", PREFIXES)
@pytest.mark.parametrize("part", PARTS)
def test_peft_adapters(part: str, layout: str, tmp_path: Path) -> None:
    for seed in (0, 4):
        config = random_config(seed)
        weights = weights_of(config, seed)
        if part == "dense network" and len(config.text_config.sparse_layers) == config.text_config.num_hidden_layers:
            continue
        adapter = draw(config, weights, PARTS[part], layout=layout, rank=lambda module: 3 + len(module) % 2)
        check(tmp_path / str(seed), config, weights, adapter)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True, "strength": lambda module, rank: 6 / rank**0.5},
        {
            "alpha_pattern": {r"deepspeed_experts\.2\.up_proj": 9, "gate.wg": 3},
            "strength": lambda module, rank: (
                (9 if "experts.2.up" in module else 3 if module.endswith("gate") else 6) / rank
            ),
        },
    ],
)
def test_strengths(settings: dict[str, Any], tmp_path: Path) -> None:
    config = config_of()
    weights = weights_of(config)
    check(tmp_path, config, weights, draw(config, weights, ".*", rank=lambda module: 2 + len(module) % 3, **settings))


def test_some_experts(tmp_path: Path) -> None:
    config = config_of()
    weights = weights_of(config)
    check(tmp_path, config, weights, draw(config, weights, r"mlp\.experts\.[02]\.up_proj|mlp\.experts\.3\..*"))


def check(tmp_path: Path, config: ModelConfig, weights: dict[str, np.ndarray], adapter: Adapter) -> None:
    """The model with the adapter is the model with the weights that it makes."""
    model, wanted = Model(config), Model(config)
    model.load_weights([(name, mx.array(array)) for name, array in weights.items()])
    load_adapter(model, adapter.write(tmp_path / "adapter"))
    full = {name: array for name, array in adapter.merged.items() if not re.search(r"gate\.[uv]$", name)}
    if config.text_config.moe and config.text_config.moe.router_rank:  # merged in full, or as they were
        for name in [name for name in weights if name.endswith("gate.u")]:
            path = name.removesuffix(".u")
            full.setdefault(f"{path}.weight", (weights[name] @ weights[f"{path}.v"]).T)
        moe = dataclasses.replace(config.text_config.moe, router_rank=0)
        wanted = Model(dataclasses.replace(config, text_config=dataclasses.replace(config.text_config, moe=moe)))
    wanted.load_weights([(name, mx.array(np.asarray(array, np.float32))) for name, array in full.items()])
    ids = mx.array([IDS])
    assert error(np.array(model(ids)), np.array(wanted(ids))) <= 5e-5


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("seed", [0, 4, 7])
def test_in_llama_cpp(seed: int, peft: bool, tmp_path: Path) -> None:
    """Our folder, converted: llama.cpp's logits are those of the merged weights in float64."""
    config = random_config(seed)
    weights = weights_of(config, seed)
    model = Model(config)
    model.load_weights([(name, mx.array(array)) for name, array in weights.items()])
    targets = ["attention", "experts"]
    if len(config.text_config.sparse_layers) < config.text_config.num_hidden_layers:
        targets.append("dense_ffn")
    lora = LoRAConfig(
        targets=targets, router=True, rslora=True, rank_pattern={"v_proj": 3}, alpha_pattern={"gate": 5.0}
    )
    folder = saved(tmp_path / "adapter", trained(model, lora), peft=peft)
    base, out = write(tmp_path / "base", config, weights), tmp_path / "adapter.gguf"
    convert_adapter(folder, base, out)
    fused = fuse(model)
    merged = {name: np.array(array, np.float64) for name, array in named_arrays(fused).items()}
    wanted = reference(fused.config.text_config, merged, IDS)
    found = gguf_error(raw_llama.logits(base, [IDS], [(out, 1.0)]), wanted)
    without = gguf_error(raw_llama.logits(base, [IDS]), wanted)
    assert found.typical < 0.01 and without.typical > 20 * found.typical, (found, without)


def rewritten(folder: Path, **changes: Any) -> Path:
    """A folder with other values in its JSON files, by file and key."""
    for file, values in changes.items():
        path = folder / f"{file}.json"
        table = json.loads(path.read_text()) | values
        path.write_text(json.dumps({key: value for key, value in table.items() if value is not None}))
    return folder


def test_another_model(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", trained(model_of(), LoRAConfig(targets=["q_proj"])))
    config = model_of().config
    other = dataclasses.replace(config, text_config=dataclasses.replace(config.text_config, rope_theta=1e6))
    with pytest.raises(
        UserError, match=r"gm.json: the adapter is for org/tiny, whose text_config.rope_theta is 10000.0"
    ) as said:
        load_adapter(Model(other), folder)
    assert "where this model's is 1000000.0; name the base" in str(said.value)
    # How it is packed, in what form the routers are and how it trains are not what an adapter is for.
    moe = dataclasses.replace(config.text_config.moe, router_rank=2, aux_loss_coef=0.5)  # type: ignore[type-var]
    same = dataclasses.replace(config, text_config=dataclasses.replace(config.text_config, moe=moe), extra={"x": 1})
    load_adapter(Model(same), folder)
    # Another program's adapter says nothing of its base but its shapes.
    (folder / "gm.json").unlink()
    load_adapter(Model(other), folder)
    wide = dataclasses.replace(config, text_config=dataclasses.replace(config.text_config, head_dim=64))
    with pytest.raises(UserError, match=r"q_proj.lora_A.*do not fit the base's \[128, 64\]; name the base"):
        load_adapter(Model(wide), folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter_config": {"lora_alpha": None}}, "adapter_config.json: has no lora_alpha"),
        ({"adapter_config": {"lora_alpha": "6"}}, "lora_alpha '6' is not a number"),
        ({"adapter_config": {"peft_type": "LOHA"}}, "peft_type 'LOHA' is not supported"),
        ({"adapter_config": {"layer_replication": [[0, 1]]}}, "layer_replication is set"),
        ({"gm": {"base": 3}}, "gm.json: base has no name and config; fetch the adapter again"),
        ({"gm": {"base": {"name": "x", "config": {"a": 1}}}}, "gm.json: base.config: text_config: missing"),
    ],
)
def test_damaged_settings(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = rewritten(saved(tmp_path / "adapter", trained(model_of())), **changes)
    model = model_of()
    with pytest.raises(UserError, match=message) as said:
        load_adapter(model, folder)
    assert "\n" not in str(said.value)
    assert wrappers(model) == {}


Q = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
UP = "base_model.model.model.language_model.layers.0.mlp.switch_mlp.up_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{Q}.lora_A.weight": None}, r"q_proj\.lora_B.*the other LoRA factor is missing"),
        ({f"{Q}.lora_A.weight": np.full((4, 64), np.nan, np.float32)}, "q_proj.*is not finite; the training"),
        ({f"{Q}.lora_A.weight": np.ones((4, 64), np.int32)}, "q_proj.*has dtype I32; save the adapter unquantized"),
        ({f"{Q}.lora_A.weight": np.ones((4, 63), np.float32)}, r"\[64, 4\] and \[4, 63\] do not fit .* \[64, 64\]"),
        ({f"{Q}.lora_magnitude_vector": np.ones(63, np.float32)}, r"DoRA's lengths are \[63\]"),
        ({f"{UP}.lora_A.weight": np.ones((3, 4, 64), np.float32)}, "switch_mlp.up_proj.*do not fit"),
        ({"base_model.model.language_model.model.norm.weight": np.ones(64, np.float32)}, "norm.*trained whole; merge"),
        ({f"{Q[:-6]}qkv.lora_{kind}.weight": np.ones((1, 1), np.float32) for kind in "AB"}, "no matrix .*qkv; name"),
        ({Q.replace("layers.0", "layers.9") + f".lora_{kind}.weight": np.ones((1, 1), np.float32) for kind in "AB"},
         "has no matrix .*layers.9"),
    ],
)  # fmt: skip
def test_damaged_tensors(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", trained(model_of(), LoRAConfig(rank=4, targets=["q_proj", "experts"])))
    path = folder / "adapter_model.safetensors"
    save_file({name: array for name, array in {**load_file(path), **changes}.items() if array is not None}, path)
    model = model_of()
    with pytest.raises(UserError, match=message) as said:
        load_adapter(model, folder)
    assert "\n" not in str(said.value)
    assert wrappers(model) == {}


def test_dora_of_some_experts(tmp_path: Path) -> None:
    lora = LoRAConfig(targets=["experts"], dora=True)
    folder = saved(tmp_path / "adapter", trained(model_of(), lora), peft=True)
    path = folder / "adapter_model.safetensors"
    save_file({n: a for n, a in load_file(path).items() if "experts.1.up_proj.lora_magnitude" not in n}, path)
    with pytest.raises(UserError, match=r"switch_mlp\.up_proj: some of its experts have DoRA and some have not"):
        load_adapter(model_of(), folder)


def test_what_is_no_adapter(tmp_path: Path) -> None:
    for name, message in {
        "adapter_model.bin": "a pickle, adapter_model.bin; save it with peft again",
        "adapters.safetensors": "an adapter of mlx-lm",
        "model.safetensors": "a whole model and no adapter",
        "notes.txt": "has no adapter_model.safetensors; name the folder of an adapter",
    }.items():
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).touch()
        with pytest.raises(UserError, match=message):
            read_adapter(folder)
    good = saved(tmp_path / "adapter", trained(model_of()))
    with pytest.raises(UserError, match="a weight of nan is not possible"):
        load_adapter(model_of(), good, float("nan"))
    (good / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config.json: cannot be read .*; fetch the adapter again"):
        read_adapter(good)
    (good / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"adapter_config\.json: not found"):
        read_adapter(good)
    for name, message in {
        "a.gguf": "an adapter for GGUF files",
        "no such": "no such folder; name an adapter's folder",
    }.items():
        with pytest.raises(UserError, match=message):
            find_adapter(name)


def test_replaced_only_by_force(tmp_path: Path) -> None:
    model = trained(model_of(), LoRAConfig(targets=["q_proj"]))
    folder = saved(tmp_path / "adapter", model)
    with pytest.raises(UserError, match=r"exists.*--force"):
        saved(folder, model)
    saved(folder, model, force=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    with pytest.raises(UserError, match="holds something else"):
        saved(tmp_path / "mine", model, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "mine"]


def test_parts_are_those_that_were_added(tmp_path: Path) -> None:
    model = model_of()
    added = parts(add_lora(model, EVERYTHING))
    assert parts(load_adapter(model_of(), saved(tmp_path / "adapter", model))) == added
