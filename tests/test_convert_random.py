"""Random models in the shape of presets."""

from __future__ import annotations

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from fixtures import tiny_config

from gm_mlx.config import ModelConfig, MoEConfig
from gm_mlx.convert import random_model as module
from gm_mlx.convert.random_model import random_model, random_tensors
from gm_mlx.errors import UserError
from gm_mlx.model import Model
from gm_mlx.presets import PRESETS
from gm_mlx.weights import named_arrays, unread_model

ROUTER = "language_model.model.layers.0.mlp.gate.weight"


def values(config: ModelConfig, seed: int = 0, dtype: str = "float32") -> dict[str, np.ndarray]:
    tensors = random_tensors(config, seed, dtype)
    return {name: np.array(tensor.read().astype(mx.float32)) for name, tensor in tensors.items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_in_full_size_costs_nothing_until_it_is_read(preset: str) -> None:
    before = mx.get_active_memory()
    made = random_model(preset)
    unread_model(made.config, made.tensors, module.find_model())
    assert mx.get_active_memory() - before < 1_000_000
    assert {tensor.dtype for tensor in made.tensors.values()} == {"BF16"}
    assert made.config == PRESETS[preset]
    assert made.processor.tokens_per_image == made.config.num_image_tokens
    assert made.processor.image is not None and made.processor.image.size == made.config.vision_config.image_size
    assert made.provenance["preset"] == preset
    assert made.notes and not made.files


def test_values_depend_on_seed_and_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    one, again, other = values(config), values(config), values(config, seed=1)
    assert all(np.array_equal(one[name], again[name]) for name in one)
    matrices = [name for name in one if one[name].ndim > 1]
    assert not any(np.array_equal(one[name], other[name]) for name in matrices)
    deeper = values(replace(config, text_config=replace(config.text_config, num_hidden_layers=3)))
    assert all(np.array_equal(one[name], deeper[name]) for name in one)
    assert len({one[name].ravel()[:8].tobytes() for name in matrices}) == len(matrices)


def test_values_keep_activations_in_size() -> None:
    config = tiny_config("clip", MoEConfig(router_rank=3), norm_plus_one=False)
    made = values(config)
    for name, value in made.items():
        if value.ndim == 1:
            wanted = 1.0 if name.endswith("norm.weight") or ("norm" in name and name.endswith(".weight")) else 0.0
            assert (value == wanted).all(), name
            continue
        inputs = math.prod(value.shape[1:]) if "patch" in name else value.shape[-1]
        inputs = value.shape[0] if name.endswith((".u", ".v")) else inputs
        assert abs(value.mean()) < 0.3 * inputs**-0.5, name
        assert value.std() * inputs**0.5 == pytest.approx(1, abs=0.25 if value.size > 100 else 0.5), name
    model = Model(config)
    model.load_weights([(name, mx.array(value)) for name, value in made.items()])
    hidden = model.hidden(model.embed(np.array([[1, 2, 3]])))
    assert 0.3 < float(hidden.std()) < 3


def test_gemma_norms_are_offsets_from_one() -> None:
    made = values(tiny_config())
    assert (made["language_model.model.norm.weight"] == 0).all()


def test_large_tensors_are_made_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 1000)
    embedding = random_tensors(tiny_config(), 0, "bfloat16")["language_model.model.embed_tokens.weight"]
    value = np.array(embedding.read().astype(mx.float32))
    assert value.shape == (512, 64)
    assert len(np.unique(value.reshape(-1)[:32_000].reshape(32, 1000), axis=0)) == 32
    assert np.unique(value).size > 200  # no piece is left at zero


def test_dtypes() -> None:
    arrays = named_arrays(Model(tiny_config()))
    tensors = random_tensors(tiny_config(), 0, "float16")
    assert all(tensors[name].read().dtype == mx.float16 for name in arrays)
    assert tensors[ROUTER].dtype == "F16"


def test_an_unknown_preset() -> None:
    with pytest.raises(UserError, match="--preset llava-gm-3b: no such preset; choose one of llava-gm-2b"):
        random_model("llava-gm-3b")
