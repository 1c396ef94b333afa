"""PanGu-pi's layers against PyTorch, and what their config refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from eve_models import TEXT
from eve_reference import fast_gelu, pangu
from mlx.utils import tree_flatten
from torch_reference import randomise, relative_error

from gm_mlx._mlx_lm import KVCache
from gm_mlx.activations import ACTIVATIONS
from gm_mlx.config import MoEConfig, TextConfig
from gm_mlx.decoder import DecoderStack
from gm_mlx.errors import UserError
from gm_mlx.pangu import SeriesMLP

DENSE = replace(TEXT, moe=None)
NAMES = {".attn_linear.0.": ".attn_linear.linear_1.", ".attn_linear.2.": ".attn_linear.linear_2."}


def pair(text: TextConfig = DENSE) -> tuple[DecoderStack, Any]:
    torch.manual_seed(0)
    reference = randomise(pangu(text))
    weights = []
    for name, tensor in reference.state_dict().items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        weights.append((name, mx.array(tensor.numpy())))
    model = DecoderStack(text)
    model.load_weights(weights, strict=True)
    return model, reference


@pytest.mark.parametrize("series", [0, 2, 4])
def test_both_kinds_of_layers_equal_pytorch(series: int) -> None:
    model, reference = pair(replace(DENSE, series_layers=series))
    ids = np.random.default_rng(1).integers(0, 300, (2, 9))
    with torch.no_grad():
        wanted = reference(torch.from_numpy(ids)).last_hidden_state
    assert relative_error(model(model.embed_tokens(mx.array(ids))), wanted) <= 1e-5


def test_a_cache_changes_nothing() -> None:
    model, _ = pair()
    x = model.embed_tokens(mx.array(np.random.default_rng(1).integers(0, 300, (1, 9))))
    cache = [KVCache() for _ in model.layers]
    parts = [model(x[:, :4], cache), *(model(x[:, i : i + 1], cache) for i in range(4, 9))]
    assert relative_error(mx.concatenate(parts, axis=1), np.array(model(x))) <= 1e-5


def test_gradients_equal_pytorch() -> None:
    model, reference = pair()
    x = np.random.default_rng(1).normal(size=(1, 7, 64)).astype(np.float32)

    def loss(parameters: Any) -> mx.array:
        model.update(parameters)
        return model(mx.array(x)).square().sum()

    found = dict(tree_flatten(mx.grad(loss)(model.parameters())))
    reference(inputs_embeds=torch.from_numpy(x)).last_hidden_state.square().sum().backward()
    checked = 0
    for name, parameter in reference.named_parameters():
        if parameter.grad is not None:
            for old, new in NAMES.items():
                name = name.replace(old, new)
            assert relative_error(found[name], parameter.grad.numpy()) <= 1e-3, name
            checked += "attn_linear" in name or "gate_proj2" in name
    assert checked == 6


def test_the_fast_gelu_is_the_quick_one() -> None:
    x = np.linspace(-30, 30, 4001, dtype=np.float32)
    ours = np.array(ACTIVATIONS["quick_gelu"](mx.array(x)))
    assert np.abs(ours - fast_gelu(torch.from_numpy(x)).numpy()).max() < 1e-5


def test_only_the_first_layers_have_second_gates_and_only_the_others_shortcuts() -> None:
    layers = DecoderStack(DENSE).layers
    assert [isinstance(layer.mlp, SeriesMLP) for layer in layers] == [True, True, False, False]
    assert ["attn_linear" in layer for layer in layers] == [False, False, True, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"series_layers": 5}, "series_layers: 5 is more than the 4 layers"),
        ({"gated": False}, "series_layers: 2 is for gated networks only"),
        ({"parallel_block": True}, "shortcut_size: a parallel block"),
        ({"moe": MoEConfig()}, "series_layers: experts have one gate, and layer 0 has experts"),
    ],
)
def test_what_has_no_place_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(DENSE, **changes)


def test_experts_may_stand_behind_the_series_layers() -> None:
    assert replace(DENSE, moe=MoEConfig(mode="second_half")).sparse_layers == [2, 3]
