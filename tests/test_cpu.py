"""The CPU's fast path must be the stock layer, only faster: same values, gradients, parameters and files."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers
from torch_reference import CLIP, IMAGE_TOKEN, TEXT, relative_error

from gm_mlx import cpu
from gm_mlx._mlx_lm import SwitchLinear
from gm_mlx.config import ModelConfig, MoEConfig
from gm_mlx.cpu import activations, matrix
from gm_mlx.model import Model
from gm_mlx.moe import MLP, SparseMLP
from gm_mlx.router import Routing

TOLERANCE = 1e-5
WIDE = replace(TEXT, hidden_size=128, intermediate_size=256)

pytestmark = pytest.mark.skipif(mx.default_device().type != mx.DeviceType.cpu, reason="GPUs have kernels of their own")


def linear(bias: bool = True, **quantization: Any) -> nn.Module:
    layer = nn.Linear(128, 200, bias=bias)
    return nn.QuantizedLinear.from_linear(layer, **quantization)


def dense(activation: str = "gelu_pytorch_tanh", **quantization: Any) -> nn.Module:
    layer = MLP(replace(WIDE, hidden_act=activation))
    nn.quantize(layer, **quantization)
    return layer


def sparse(moe: MoEConfig | None = None, **quantization: Any) -> SparseMLP:
    layer = SparseMLP(WIDE, moe or MoEConfig(), layer=0)
    nn.quantize(layer, **quantization)
    return layer


LAYERS: list[Callable[..., nn.Module]] = [linear, dense, sparse]


def tokens(*shape: int) -> mx.array:
    return mx.random.normal((*shape, 128), key=mx.random.key(1))


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each product that the fast path computes."""
    seen: list[int] = []
    times = matrix.Matrix.times

    def spy(self: matrix.Matrix, x: np.ndarray) -> np.ndarray:
        seen.append(len(x))
        return times(self, x)

    monkeypatch.setattr(matrix.Matrix, "times", spy)
    return seen


@pytest.mark.parametrize("shape", [(32,), (1, 70), (2, 40)])
@pytest.mark.parametrize(
    ("bits", "group_size", "mode"),
    [
        *((bits, 64, "affine") for bits in (2, 3, 4, 5, 6, 8)),
        (3, 32, "affine"),
        (4, 32, "affine"),
        (4, 128, "affine"),
        (4, 32, "mxfp4"),
    ],
)
@pytest.mark.parametrize("make", LAYERS)
def test_values_are_those_of_the_stock_layer(
    make: Callable[..., nn.Module], bits: int, group_size: int, mode: str, shape: tuple[int, ...], products: list[int]
) -> None:
    layer, x = make(bits=bits, group_size=group_size, mode=mode), tokens(*shape)
    stock = np.array(layer(x))
    assert not products
    cpu.speed_up(layer)
    fast = layer(x)
    assert fast.dtype == mx.float32
    assert relative_error(fast, stock) <= TOLERANCE
    assert products


@pytest.mark.parametrize("make", LAYERS)
def test_half_precision_scales_with_float32_activations(make: Callable[..., nn.Module], products: list[int]) -> None:
    layer, x = make(bits=4, group_size=64), tokens(1, 40)
    layer.update(tree_map(lambda a: a if a.dtype == mx.uint32 else a.astype(mx.bfloat16), layer.parameters()))
    stock = np.array(layer(x))
    cpu.speed_up(layer)
    fast = layer(x)
    assert fast.dtype == mx.float32
    assert relative_error(fast, stock) <= TOLERANCE
    assert layer(x.astype(mx.bfloat16)).dtype == mx.bfloat16
    assert products


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "quick_gelu", "silu"])
def test_every_activation(activation: str, products: list[int]) -> None:
    layer, x = dense(activation, bits=8), 20 * tokens(1, 40)  # far into both tails
    stock = np.array(layer(x))
    cpu.speed_up(layer)
    assert relative_error(layer(x), stock) <= TOLERANCE
    assert products


def test_matrices_larger_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "BLOCK", 7 * 128)  # 200 rows in pieces of 7, the last one of 4
    monkeypatch.setattr(activations, "CHUNK", 3 * 256)
    for make in LAYERS:
        layer, x = make(bits=4), tokens(1, 40)
        stock = np.array(layer(x))
        cpu.speed_up(layer)
        assert relative_error(layer(x), stock) <= TOLERANCE


def test_memory_is_that_of_a_block_and_not_of_a_matrix() -> None:
    layer = nn.QuantizedLinear(1024, 8192, bias=False)  # 32 MB in float32
    cpu.speed_up(layer)
    x = mx.random.normal((16, 1024))
    mx.eval(x, layer.parameters())
    tracemalloc.start()  # NumPy reports its arrays there
    try:
        mx.eval(layer(x))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 2**20 < peak < 2**23


@pytest.mark.parametrize("make", LAYERS)
def test_few_tokens_stay_with_the_stock_kernels(make: Callable[..., nn.Module], products: list[int]) -> None:
    layer, x = make(bits=4), tokens(1, 2)
    stock = layer(x)
    cpu.speed_up(layer)
    assert mx.array_equal(layer(x), stock)
    assert not products


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("quantization", [{"mode": "mxfp8"}, {"mode": "nvfp4"}], ids=str)
def test_other_quantizations_stay_with_the_stock_kernels(
    make: Callable[..., nn.Module], quantization: dict[str, Any], products: list[int]
) -> None:
    layer, x = make(**quantization), tokens(1, 40)
    stock = np.array(layer(x))
    cpu.speed_up(layer)
    assert relative_error(layer(x), stock) <= TOLERANCE
    assert not products


def test_experts_without_a_gate_go_one_matrix_after_the_other(products: list[int]) -> None:
    layer = SparseMLP(replace(WIDE, gated=False), MoEConfig(), layer=0)
    nn.quantize(layer, group_size=64, bits=4)
    x = tokens(1, 40)
    stock = np.array(layer(x))
    cpu.speed_up(layer)
    assert relative_error(layer(x), stock) <= TOLERANCE
    assert sum(products) == 2 * 2 * 40


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "how", [{"bits": 3}, {"bits": 4, "group_size": 32}, {"bits": 4, "group_size": 32, "mode": "mxfp4"}]
)
def test_a_stack_of_experts(how: dict[str, Any], bias: bool, products: list[int]) -> None:
    """Sorted by expert or not; fewer tokens than mlx-lm sorts come as one row for all their experts."""
    layer = SwitchLinear(128, 200, 4, bias=bias)
    if bias:
        layer.bias = mx.random.normal((4, 200))
    layer = layer.to_quantized(**how)
    chosen = mx.array(np.random.default_rng(0).integers(0, 3, 90))  # expert 3 has no token

    def run() -> list[mx.array]:
        results = []
        for indices, ordered in ((mx.sort(chosen), True), (chosen, False)):
            x = tokens(90, 1)
            results.append(layer(x, indices, sorted_indices=ordered))
            results.append(mx.grad(lambda x, i=indices, o=ordered: layer(x, i, sorted_indices=o).square().sum())(x))
        return [*results, layer(tokens(1, 20, 1, 1), chosen[:40].reshape(1, 20, 2))]

    stock = [np.array(result) for result in run()]
    assert not products
    cpu.speed_up(layer)
    for fast, wanted in zip(run(), stock, strict=True):
        assert relative_error(fast, wanted) <= TOLERANCE
    assert len(products) == 2 * 2 * 3


def test_an_expert_without_tokens_is_not_unpacked(products: list[int]) -> None:
    layer = sparse(bits=4)
    layer.gate.weight = mx.array([[0.1], [-0.1], [0.2], [-0.2]]) * mx.ones((4, 128))
    x = mx.abs(tokens(1, 40))
    stock = np.array(layer(x))
    cpu.speed_up(layer)
    assert relative_error(layer(x), stock) <= TOLERANCE
    assert products == [40] * 6  # three matrices of experts 2 and 0


def test_the_trace_is_kept() -> None:
    layer, x = sparse(bits=4), tokens(1, 40)
    traces: list[list[Routing]] = [[], []]
    layer(x, traces[0])
    cpu.speed_up(layer)
    layer(x, traces[1])
    assert mx.array_equal(traces[0][0].experts, traces[1][0].experts)


@pytest.mark.parametrize("make", LAYERS)
def test_gradients_are_those_of_the_stock_layer(make: Callable[..., nn.Module], products: list[int]) -> None:
    layer, x = make(bits=4), tokens(2, 40)

    def gradients() -> dict[str, mx.array]:
        def loss(parameters: dict[str, Any], x: mx.array) -> mx.array:
            layer.update(parameters)
            return layer(x).square().sum()

        found, of_input = mx.grad(loss, argnums=(0, 1))(layer.trainable_parameters(), x)
        return {"x": of_input, **dict(tree_flatten(found))}

    stock = gradients()
    cpu.speed_up(layer)
    fast = gradients()
    assert products
    assert fast.keys() == stock.keys()
    assert fast.keys() == {linear: {"x", "bias"}, dense: {"x"}, sparse: {"x", "gate.weight"}}[make]
    for name, gradient in fast.items():
        assert relative_error(gradient, np.array(stock[name])) <= TOLERANCE, name


def test_inside_compile_the_stock_layer_runs(products: list[int]) -> None:
    for make in LAYERS:
        layer, x = make(bits=4), tokens(1, 40)
        stock = np.array(layer(x))
        cpu.speed_up(layer)
        assert relative_error(mx.compile(lambda x, layer=layer: layer(x))(x), stock) <= TOLERANCE
    assert not products


def tiny_model() -> Model:
    text = replace(WIDE, moe=MoEConfig(router_rank=3, use_residual=True))
    config = ModelConfig(text_config=text, vision_config=CLIP, image_token_index=IMAGE_TOKEN)
    model = Model(config)
    nn.quantize(model.language_model, group_size=64, bits=4)
    return model


def test_a_model_answers_and_is_saved_as_before(tmp_path: Path) -> None:
    model = tiny_model()
    ids = np.array([[*range(3, 33), *[IMAGE_TOKEN] * CLIP.num_patches]])
    pixels = mx.random.normal((1, CLIP.image_size, CLIP.image_size, 3))

    def logits() -> np.ndarray:
        return np.array(model(mx.array(ids), input_embeddings=model.embed(ids, model.encode_images(pixels))))

    stock, before = logits(), dict(tree_flatten(model.parameters()))
    model.save_weights(str(tmp_path / "stock.safetensors"))
    cpu.speed_up(model)
    assert relative_error(mx.array(logits()), stock) <= TOLERANCE
    model.save_weights(str(tmp_path / "fast.safetensors"))
    assert (tmp_path / "fast.safetensors").read_bytes() == (tmp_path / "stock.safetensors").read_bytes()
    assert dict(tree_flatten(model.parameters())).keys() == before.keys()
    model.load_weights(str(tmp_path / "stock.safetensors"), strict=True)


def test_lora_trains_on_top() -> None:
    def gradients(model: Model) -> dict[str, mx.array]:
        model.freeze()
        mx.random.seed(0)
        linear_to_lora_layers(model, len(model.layers), {"rank": 2, "scale": 1.0, "dropout": 0.0})
        x = mx.random.normal((1, 40, 128), key=mx.random.key(2))
        return dict(tree_flatten(nn.value_and_grad(model, lambda m: (m.hidden(x) * x).sum())(model)[1]))

    mx.random.seed(3)
    stock = gradients(tiny_model())
    mx.random.seed(3)
    model = tiny_model()
    cpu.speed_up(model)
    fast = gradients(model)
    assert fast.keys() == stock.keys()
    assert any("lora_b" in name for name in fast)
    for name, gradient in fast.items():
        if name.endswith("lora_b"):  # lora_a has none while lora_b is zero
            assert relative_error(gradient, np.array(stock[name])) <= 1e-4, name


def test_a_gpu_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    layer = sparse(bits=4)
    cpu.speed_up(layer)
    assert type(layer) is SparseMLP
