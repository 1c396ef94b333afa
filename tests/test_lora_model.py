"""LoRA on whole models: what is wrapped, what is trained, what it computes, and merged."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from fixtures import words
from lora_models import CONFIGS, EVERYTHING, TABLES, config_of, error, everything, logits, model_of, trained
from mlx.utils import tree_flatten

from gm_mlx import cpu
from gm_mlx.errors import UserError
from gm_mlx.lora.attach import add_lora, parts, remove_lora, wrappers
from gm_mlx.lora.config import LoRAConfig, choose_targets, lora_targets
from gm_mlx.lora.layers import LoRARouter, LoRASwitchLinear, float_weight
from gm_mlx.lora.merge import fuse
from gm_mlx.weights import PACKED, load_model, named_arrays, quantizable_layers, quantized_layers, save_model

BASES = [(config, table) for config in CONFIGS for table in (None, *TABLES)]
DORA = everything("gemma", dora=True)


@pytest.mark.parametrize("config", CONFIGS)
def test_targets_are_the_models_matrices(config: str) -> None:
    model = model_of(config)
    paths = set(quantizable_layers(model)) | {path for path, m in model.named_modules() if path.endswith(".gate")}
    assert lora_targets(model.config).keys() == paths
    for path, target in lora_targets(model.config).items():
        module: Any = model
        for name in path.split("."):
            module = module[int(name)] if isinstance(module, list) else module[name]
        shape = module.weight.shape if "weight" in module else float_weight(module).shape
        assert target.shape == (shape[::-1] if path.endswith("embed_tokens") else shape)


@pytest.mark.parametrize(("config", "table"), BASES)
def test_bit_by_bit_as_before_until_trained(config: str, table: str | None) -> None:
    model = model_of(config, table)
    before = logits(model), logits(model, 12)
    for dora in (False, True):
        add_lora(model, everything(config, dora))
        for found, wanted in zip((logits(model), logits(model, 12)), before, strict=True):
            assert np.array_equal(found, wanted)
    remove_lora(model)
    assert wrappers(model) == {}
    assert np.array_equal(logits(model), before[0])


def test_what_is_wrapped_and_shown() -> None:
    model = model_of()
    wrapped = add_lora(model, LoRAConfig())
    shown = {part.component: (part.modules, part.matrices, part.ranks) for part in parts(wrapped)}
    assert shown == {
        "projector": (2, 2, (8,)),
        "attention": (8, 8, (8,)),
        "dense_ffn": (3, 3, (8,)),
        "experts": (3, 12, (8,)),
    }
    arrays = dict(tree_flatten(model.trainable_parameters()))
    assert sum(part.parameters for part in parts(wrapped)) == sum(array.size for array in arrays.values())
    assert {name.partition(".adapters.")[0] for name in arrays} == {one.path for one in wrapped}
    assert {name.rpartition(".")[2] for name in arrays} == {"lora_a", "lora_b"}


def test_only_the_new_adapter_is_trained() -> None:
    model = trained(model_of(), adapter="old")
    add_lora(model, LoRAConfig(targets=["q_proj"], dora=True), adapter="new")
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    assert len(names) == 2 * 3
    assert all(".self_attn.q_proj.adapters.1." in name for name in names)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"targets": ["q_proj"]}, {"layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"}),
        ({"targets": ["layers.1.self_attn.[qv]_proj"]}, {"layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"}),
        ({"targets": ["dense_ffn"]}, {f"layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}),
        ({"targets": ["up_proj"]}, {"layers.0.mlp.switch_mlp.up_proj", "layers.1.mlp.up_proj"}),
        ({"targets": ["gate"]}, {"layers.0.mlp.gate"}),
        ({"targets": ["linear_1"], "router": True}, {"linear_1", "layers.0.mlp.gate"}),
        ({"targets": ["vision_tower.*.layers.1.mlp.fc1"]}, {"layers.1.mlp.fc1"}),
        ({"targets": [r"layers\.1\.self_attn\.k_proj"], "tower": True}, None),
        ({"targets": ["lm_head", "embed_tokens"]}, {"lm_head", "embed_tokens"}),
    ],
)
def test_targets(settings: dict[str, Any], found: set[str] | None) -> None:
    chosen = [target.path for target in choose_targets(config_of("low-rank router"), LoRAConfig(**settings))]
    if found is None:  # the tower is trained too, and the pattern finds its layers as well
        assert [path for path in chosen if "language_model" in path] == [
            "language_model.model.layers.1.self_attn.k_proj"
        ]
        assert len([path for path in chosen if "vision_tower" in path]) == 12
        return
    assert len(chosen) == len(found)
    assert all(any(path.endswith(f".{end}") for end in found) for path in chosen)


def test_a_dense_model_has_no_experts_to_wrap() -> None:
    config = dataclasses.replace(config_of(), text_config=dataclasses.replace(config_of().text_config, moe=None))
    assert {target.component for target in choose_targets(config, LoRAConfig())} == {
        "attention",
        "dense_ffn",
        "projector",
    }
    with pytest.raises(UserError, match=r"target 'experts': the model has nothing .* attention \(q_proj, k_proj"):
        choose_targets(config, LoRAConfig(targets=["experts"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["q_proj", "qkv"]}, r"target 'qkv': .* it has .*experts \(gate_proj, up_proj, down_proj\)"),
        ({"targets": ["("]}, r"'\(': not a pattern"),
        ({"rank": 0}, "rank: 0 is not"),
        ({"rank": 2.0}, "rank: 2.0 is not"),
        ({"alpha": 0}, "alpha: 0 is not"),
        ({"alpha": math.nan}, "alpha: nan is not"),
        ({"dropout": 1.0}, "dropout: 1.0 is not"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern: q_proj: -1 is not"),
        ({"rank_pattern": {"lm_head": 2}}, "pattern 'lm_head': is of none of the modules"),
        ({"alpha_pattern": {"lm_head": 2}}, "pattern 'lm_head': is of none of the modules"),
        ({"targets": ["embeddings"], "dora": True}, "dora: has no form for token embeddings"),
    ],
)
def test_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        choose_targets(config_of(), LoRAConfig(**settings))
    assert "\n" not in str(error.value)


def test_seeds() -> None:
    def drawn(seed: int, **settings: Any) -> dict[str, mx.array]:
        model = model_of()
        add_lora(model, LoRAConfig(**settings), seed)
        return dict(tree_flatten(model.trainable_parameters()))

    first, again, other, fewer = drawn(0), drawn(0), drawn(1), drawn(0, targets=["q_proj"])
    for name, array in first.items():
        assert mx.array_equal(array, again[name])
        if name.endswith("lora_a"):
            assert not mx.array_equal(array, other[name])
            assert mx.abs(array).max() <= array.shape[-1] ** -0.5
            assert mx.abs(array).max() > 0.9 * array.shape[-1] ** -0.5
        else:
            assert not array.any()
    assert all(mx.array_equal(array, first[name]) for name, array in fewer.items())
    arrays = [array for name, array in first.items() if name.endswith("lora_a")]
    assert len({array.tolist()[0][0] if array.ndim == 2 else array.tolist()[0][0][0] for array in arrays}) == len(
        arrays
    )


def test_ranks_and_strengths() -> None:
    config = dataclasses.replace(EVERYTHING, rslora=True)
    model = trained(model_of(), config)
    for path, wrapper in wrappers(model).items():
        (low,) = wrapper.adapters
        rank = (
            3
            if "switch_mlp.up_proj" in path
            else 2
            if path.endswith("layers.1.self_attn.q_proj") and "language" in path
            else 4
        )
        alpha = 9 if path.endswith("down_proj") else 6
        assert low.rank == rank or "vision_tower" in path
        assert low.scale == pytest.approx(alpha / low.rank**0.5)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("config", "table"), BASES)
def test_fused_is_the_same(config: str, table: str | None, dora: bool) -> None:
    model = trained(model_of(config, table), everything(config, dora))
    without = logits(model_of(config, table))
    wanted = logits(model)
    assert error(wanted, without) > 0.1
    packed = len(quantized_layers(model))
    fused = fuse(model, dequantize=True)
    assert fused is model and wrappers(model) == {}
    assert error(logits(fused), wanted) <= 1e-5 if table is None else 1e-4
    assert bool(packed) == (table is not None)
    if config == "low-rank router":
        assert fused.config.text_config.moe.router_rank == 0


@pytest.mark.parametrize("table", TABLES)
def test_packed_again_as_before(table: str, tmp_path: Path) -> None:
    """The merged weights, packed as the base was; what has no adapter is not touched."""
    lora = LoRAConfig(targets=["q_proj", "experts", "embed_tokens"], router=True)
    before = dict(named_arrays(model_of("low-rank router", table)))
    model = fuse(trained(model_of("low-rank router", table), lora))
    floats = fuse(trained(model_of("low-rank router", table), lora), dequantize=True)
    changed = {target.path for target in choose_targets(model.config, lora)}
    for path, layer in quantized_layers(model_of("low-rank router", table)).items():
        packed = quantized_layers(model)[path]
        how = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
        assert how == {"group_size": packed.group_size, "bits": packed.bits, "mode": packed.mode}
        wanted = [before[f"{path}.{name}"] for name in PACKED if f"{path}.{name}" in before]
        if path in changed:
            wanted = list(mx.quantize(quantizable_layers(floats)[path].weight, **how))
        found = [packed[name] for name in PACKED if packed.get(name) is not None]
        assert all(mx.array_equal(*pair) for pair in zip(found, wanted, strict=True))
    for made in (model, floats):
        folder = tmp_path / str(made is model)
        save_model(made, folder)
        assert error(logits(load_model(folder)), logits(made)) <= 1e-5


def test_two_adapters_add_up() -> None:
    """W + 0.5 of one change - 2 of the other, of LoRA and DoRA, in float64."""
    model = trained(model_of(), EVERYTHING, adapter="first")
    trained(model, dataclasses.replace(DORA, rank=2, rank_pattern={}), seed=1, adapter="second")
    plain = dict(named_arrays(model_of()))
    for wrapper in wrappers(model).values():
        for low in wrapper.adapters:
            low.weight = 0.5 if low.adapter == "first" else -2.0
    wanted = logits(model)
    expected = {}
    for path, wrapper in wrappers(model).items():
        total = weight = np.array(plain[f"{path}.weight"], np.float64)
        for low in wrapper.adapters:
            delta = low.scale * np.array(low.lora_b, np.float64) @ np.array(low.lora_a, np.float64)
            delta = delta.T if path.endswith("embed_tokens") else delta
            if "magnitude" in low:
                moved = weight + delta
                lengths = np.linalg.norm(moved, axis=-1, keepdims=True)
                delta = np.array(low.magnitude, np.float64)[..., None] * moved / lengths - weight
            total = total + low.weight * delta
        expected[f"{path}.weight"] = mx.array(total, mx.float32)
    other = model_of()
    other.load_weights(list(expected.items()), strict=False)
    assert error(logits(other), wanted) <= 2e-5
    assert error(logits(fuse(model)), wanted) <= 2e-5


@pytest.mark.parametrize("table", [None, "q4", "mxfp4"])
def test_on_the_cpus_fast_layers(table: str | None) -> None:
    model = trained(model_of("gemma", table))
    wanted = logits(model, 200)
    cpu.speed_up(model)
    assert error(logits(model, 200), wanted) <= 1e-5


def batch() -> tuple[mx.array, mx.array]:
    """Random words; the tiny model's head can say words only."""
    ids = mx.array(np.random.default_rng(0).choice(words(), (2, 48)))
    return ids[:, :-1], ids[:, 1:]


def loss(model: Any, ids: mx.array, wanted: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(ids), wanted, reduction="mean")


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("table", [None, "q4", "mxfp4"])
def test_it_learns_by_heart(table: str | None, dora: bool, fast: bool) -> None:
    """Adam on factors alone lowers the loss on one batch, through packed experts, the choice of experts and routers."""
    model = model_of("low-rank router", table)
    if fast:
        cpu.speed_up(model)
    add_lora(model, LoRAConfig(router=True, dropout=0.05, dora=dora))
    frozen = {name: array for name, array in named_arrays(model).items() if ".adapters." not in name}
    model.train()
    optimizer = optim.Adam(4e-3)
    step = nn.value_and_grad(model, loss)
    losses = []
    for _ in range(15):
        value, gradients = step(model, *batch())
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(value.item())
    assert min(losses[-3:]) < 0.6 * losses[0], losses
    after = named_arrays(model)
    assert all(mx.array_equal(array, after[name]) for name, array in frozen.items())
    for path, wrapper in wrappers(model).items():
        if path.startswith("language_model"):  # text alone, so no image went through the projector
            assert wrapper.adapters[0].lora_b.any(), path


@pytest.mark.parametrize("kind", [LoRASwitchLinear, LoRARouter])
def test_gradients_against_finite_differences(kind: type) -> None:
    """Of A and of B, through a whole model in 4 bits."""
    model = trained(model_of("gemma", "q4"), dataclasses.replace(EVERYTHING, targets=("experts",)))
    model.freeze()
    lows = [low for wrapper in wrappers(model).values() if isinstance(wrapper, kind) for low in wrapper.adapters]
    ids, wanted = batch()
    for low in lows:
        for name in ("lora_a", "lora_b"):
            low.unfreeze(keys=[name])
            value = low[name]
            ((_, gradient),) = tree_flatten(nn.value_and_grad(model, loss)(model, ids, wanted)[1])
            size = mx.linalg.norm(gradient.flatten()).item()
            values = []
            for step in (2e-3, -2e-3):  # along itself; a longer one may choose other experts
                low[name] = value + step / size * gradient
                values.append(loss(model, ids, wanted).item())
            low[name] = value
            assert (values[0] - values[1]) / 4e-3 == pytest.approx(size, rel=3e-2)
            low.freeze()
