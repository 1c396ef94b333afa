"""The mixture of experts against a loop over tokens in PyTorch, forwards and backwards."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from torch_reference import TEXT, moe_pair, relative_error, tokens, weights

from gm_mlx.config import MoEConfig
from gm_mlx.decoder import DecoderStack
from gm_mlx.moe import MLP, SparseMLP
from gm_mlx.router import Routing, load_balancing_loss


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize(("num_experts", "top_k"), [(2, 1), (2, 2), (4, 1), (4, 2), (4, 3), (4, 4)])
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (1, 600)])
def test_equals_the_loop(shape: tuple[int, int], num_experts: int, top_k: int, norm_topk_prob: bool) -> None:
    layer, reference = moe_pair(num_experts=num_experts, top_k=top_k, norm_topk_prob=norm_topk_prob)
    x = tokens(*shape)
    trace: list[Routing] = []
    ours = layer(mx.array(x), trace)
    assert relative_error(ours, reference(torch.from_numpy(x))) <= 1e-4
    assert trace[0].layer == 3
    assert trace[0].experts.reshape(-1, top_k).tolist() == reference.trace
    assert relative_error(trace[0].probabilities.reshape(-1, num_experts), reference.probabilities) <= 1e-4
    assert load_balancing_loss(trace).item() == pytest.approx(reference.load_balancing_loss().item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (2, 40)])
def test_residual_mode_equals_the_loop(shape: tuple[int, int]) -> None:
    layer, reference = moe_pair(use_residual=True)
    x = tokens(*shape)
    assert relative_error(layer(mx.array(x)), reference(torch.from_numpy(x))) <= 1e-4


def test_exact_ties_go_to_the_lower_experts() -> None:
    layer, reference = moe_pair()
    gate = torch.zeros(4, TEXT.hidden_size)
    gate[1:] = torch.randint(-2, 3, (TEXT.hidden_size,))  # whole numbers: equal in any order of summation
    reference.gate.weight.data = gate
    layer.gate.weight = mx.array(gate.numpy())
    x = np.random.default_rng(2).integers(-2, 3, (1, 80, TEXT.hidden_size)).astype(np.float32)
    trace: list[Routing] = []
    ours = layer(mx.array(x), trace)
    assert relative_error(ours, reference(torch.from_numpy(x))) <= 1e-4
    assert trace[0].experts.reshape(-1, 2).tolist() == reference.trace
    assert {tuple(chosen) for chosen in reference.trace} >= {(0, 1), (1, 2)}


def test_dispatch_sorted_and_unsorted_agree() -> None:
    """mlx-lm's SwitchGLU sorts tokens by expert from 64 assignments up."""
    layer, _ = moe_pair()
    x = mx.array(tokens(1, 60))  # 120 assignments together, 40 in each third
    whole = layer(x)
    thirds = mx.concatenate([layer(x[:, i : i + 20]) for i in (0, 20, 40)], axis=1)
    assert relative_error(whole, np.array(thirds)) < 1e-6


@pytest.mark.parametrize("use_residual", [False, True])
@pytest.mark.parametrize("length", [5, 70])
def test_gradients_equal_autograd(length: int, use_residual: bool) -> None:
    layer, reference = moe_pair(use_residual=use_residual)
    x, target = tokens(1, length), np.random.default_rng(9).normal(size=(1, length, TEXT.hidden_size))

    def loss(layer: SparseMLP, x: mx.array) -> mx.array:
        trace: list[Routing] = []
        error = (layer(x, trace) - mx.array(target.astype(np.float32))).square().mean()
        return error + 0.5 * load_balancing_loss(trace)

    layer.train()
    gradients = dict(tree_flatten(nn.value_and_grad(layer, loss)(layer, mx.array(x))[1]))
    input_gradient = mx.grad(lambda x: loss(layer, x))(mx.array(x))

    theirs = torch.from_numpy(x).requires_grad_()
    error = (reference(theirs) - torch.from_numpy(target.astype(np.float32))).square().mean()
    (error + 0.5 * reference.load_balancing_loss()).backward()
    with torch.no_grad():
        for parameter in reference.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    expected = weights(reference)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert np.abs(expected[name]).max() > 0, name
        assert relative_error(gradient, expected[name]) <= 1e-4, name
    assert theirs.grad is not None
    assert relative_error(input_gradient, theirs.grad) <= 1e-4


def test_half_precision_in_half_precision_out() -> None:
    layer, _ = moe_pair(use_residual=True)
    nn.quantize(layer, group_size=32, bits=8)  # MLX's CPU backend has no half-precision gather_mm
    exact = layer(mx.array(tokens(1, 20)))
    layer.set_dtype(mx.bfloat16)
    trace: list[Routing] = []
    ours = layer(mx.array(tokens(1, 20)).astype(mx.bfloat16), trace)
    assert ours.dtype == mx.bfloat16
    assert trace[0].probabilities.dtype == trace[0].weights.dtype == mx.float32
    assert relative_error(ours, np.array(exact)) < 0.05


@pytest.mark.parametrize(
    ("moe", "sparse"),
    [
        (None, []),
        (MoEConfig(mode="sparse"), [0, 2, 4]),
        (MoEConfig(mode="first_half"), [0, 1]),
        (MoEConfig(mode="second_half"), [2, 3, 4]),
        (MoEConfig(mode="dense"), [0, 1, 2, 3, 4]),
        (MoEConfig(mode="custom", layers_idx=(4, 1)), [1, 4]),
        (MoEConfig(mode="custom"), []),
    ],
)
def test_layer_modes(moe: MoEConfig | None, sparse: list[int]) -> None:
    stack = DecoderStack(replace(TEXT, num_hidden_layers=5, moe=moe))
    assert [i for i, block in enumerate(stack.layers) if isinstance(block.mlp, SparseMLP)] == sparse
    assert all(isinstance(block.mlp, MLP) for i, block in enumerate(stack.layers) if i not in sparse)
    trace: list[Routing] = []
    stack(mx.zeros((1, 2, TEXT.hidden_size)), trace=trace)
    assert [routing.layer for routing in trace] == sparse
