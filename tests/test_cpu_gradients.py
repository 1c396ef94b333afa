"""Gradients of the fast layers on MLX's CPU backend are those of the stock layers, whatever is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from torch_reference import TEXT, relative_error

from gm_mlx import cpu
from gm_mlx.config import MoEConfig
from gm_mlx.cpu import activations, cores, matrix
from gm_mlx.decoder import make_norm
from gm_mlx.lora.layers import LowRank, wrap
from gm_mlx.moe import GLU, MLP, SparseMLP

TOLERANCE = 1e-5
WIDE = replace(TEXT, hidden_size=128, intermediate_size=256)

pytestmark = pytest.mark.skipif(mx.default_device().type != mx.DeviceType.cpu, reason="GPUs have kernels of their own")


def linear(bias: bool = False) -> nn.Module:
    return nn.Linear(128, 200, bias=bias)


def dense() -> nn.Module:
    return MLP(WIDE)


def sparse() -> nn.Module:
    return SparseMLP(WIDE, MoEConfig(), layer=0)


def plain_experts() -> nn.Module:
    return SparseMLP(replace(WIDE, gated=False), MoEConfig(), layer=0)


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "linear": linear,
    "linear with bias": lambda: linear(bias=True),
    "dense": dense,
    "sparse": sparse,
    "sparse without gates": plain_experts,
}


def made(kind: str, bits: int | None, lora: str = "", trained: bool = False) -> Any:
    """A layer in a box, the same each time; ``lora`` says of what kind it is, or is empty."""
    mx.random.seed(0)
    box = nn.Module()
    box.layer = MAKERS[kind]()
    if "bias" in kind:
        box.layer.bias = mx.random.normal((200,))
    if bits:
        nn.quantize(box, group_size=64, bits=bits)
    if not trained:
        box.freeze()
    for path, module in list(box.named_modules()) if lora else []:
        if "weight" not in module or path.endswith("gate"):
            continue
        parent, _, name = path.rpartition(".")
        wrapper = wrap(module)
        weight = module.weight.shape
        *stack, out, size = (*weight[:-1], weight[-1] * 32 // bits) if bits else weight
        for rank, settings in [(4, {"alpha": 6.0}), (3, {"alpha": 2.0, "rslora": True, "weight": -0.5})]:
            factors = [mx.random.normal((*stack, *shape)) / 8 for shape in ((rank, size), (out, rank))]
            one = LowRank(str(rank), *factors, **settings, dropout=0.3 if lora == "dropout" else 0.0)
            if lora == "DoRA":
                one.use_dora(mx.random.uniform(1, 2, (*stack, out)))
            wrapper.adapters.append(one)
        holder = box
        for part in parent.split("."):
            holder = holder[part] if part else holder
        setattr(holder, name, wrapper)
    mx.eval(box.parameters())
    return box


def gradients(box: Any, x: mx.array) -> dict[str, mx.array]:
    """Of what is trained, of the router and of the input."""
    named: dict[str, mx.array] = dict(tree_flatten(box.trainable_parameters()))
    if isinstance(box.layer, SparseMLP):
        named["layer.gate.weight"] = box.layer.gate.weight
    before = box.parameters()

    def loss(x: mx.array, *arrays: mx.array) -> mx.array:
        box.update(tree_unflatten(list(zip(named, arrays, strict=True))))
        mx.random.seed(7)
        y = box.layer(x)
        return (y * mx.random.normal(y.shape, key=mx.random.key(3))).sum()

    found = mx.grad(loss, argnums=tuple(range(1 + len(named))))(x, *named.values())
    box.update(before)
    found = found if named else [found]  # MLX gives a lone gradient by itself
    return {"x": found[0], **dict(zip(named, found[1:], strict=True))}


def x_of(*shape: int) -> mx.array:
    return mx.random.normal((*shape, 128), key=mx.random.key(1))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many arrays had a gradient by NumPy, function by function."""
    seen: list[int] = []
    of_numpy = cores.numpy_function

    def spy(forward: Any, backward: Any, *inputs: mx.array) -> mx.array:
        def counted(*given: Any) -> Any:
            found = backward(*given)
            seen.append(len(found))
            return found

        return of_numpy(forward, counted, *inputs)

    for module in ("activations", "attention", "experts", "layers", "linears", "loss", "networks"):
        monkeypatch.setattr(f"gm_mlx.cpu.{module}.numpy_function", spy)
    return seen


def check(kind: str, bits: int | None, lora: str, trained: bool, training: bool = True) -> dict[str, mx.array]:
    boxes = [made(kind, bits, lora, trained) for _ in range(2)]
    cpu.speed_up(boxes[1])
    stock, fast = (gradients(box.train(training), x_of(2, 40)) for box in boxes)
    assert fast.keys() == stock.keys()
    for name, gradient in fast.items():
        assert gradient.dtype == stock[name].dtype
        assert relative_error(gradient, np.array(stock[name])) <= TOLERANCE, name
    return fast


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("lora", ["", "LoRA"])
@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("kind", MAKERS)
def test_frozen_bases(kind: str, bits: int | None, lora: str, training: bool, calls: list[int]) -> None:
    """What a network keeps in training it computes again in evaluation."""
    found = check(kind, bits, lora, trained=False, training=training)
    assert calls
    assert any("lora_a" in name for name in found) == bool(lora)
    if kind in ("dense", "sparse"):
        # All as one function: of x, of the router's choice, and of two factors of two adapters at three matrices.
        assert max(calls) == 1 + (kind == "sparse") + 12 * bool(lora)


@pytest.mark.parametrize("lora", ["", "LoRA"])
@pytest.mark.parametrize("kind", MAKERS)
def test_trained_bases(kind: str, lora: str, calls: list[int]) -> None:
    found = check(kind, None, lora, trained=True)
    weights = {name for name, _ in tree_flatten(made(kind, None, lora).parameters()) if name.endswith("weight")}
    assert weights <= found.keys()
    assert calls


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("lora", ["dropout", "DoRA"])
def test_what_numpy_leaves_to_mlx(kind: str, lora: str, calls: list[int]) -> None:
    check(kind, 4, lora, trained=False)


def test_trained_scales_keep_the_stock_gradient(calls: list[int]) -> None:
    boxes = [made("linear", 4) for _ in range(2)]
    cpu.speed_up(boxes[1])
    for box in boxes:
        nn.Module.unfreeze(box.layer, keys=["scales", "biases"])
    stock, fast = (gradients(box, x_of(2, 40)) for box in boxes)
    assert fast.keys() == stock.keys() == {"x", "layer.scales", "layer.biases"}
    for name, gradient in fast.items():
        assert relative_error(gradient, np.array(stock[name])) <= TOLERANCE
    assert not calls


@pytest.mark.parametrize("bits", [None, 4])
def test_dropped_tokens(bits: int | None) -> None:
    """Choices of weight zero, and an expert that nobody has."""
    results = []
    for fast in (False, True):
        box = made("sparse", bits, "LoRA")
        if fast:
            cpu.speed_up(box)
        experts = mx.array(np.random.default_rng(0).permuted(np.tile([0, 1, 2], (80, 1)), axis=1)[:, :2], mx.uint32)
        weights = mx.random.uniform(0.1, 1, (80, 2), key=mx.random.key(5))
        kept = (mx.random.uniform(shape=(80, 2), key=mx.random.key(6)) > 0.3).astype(mx.float32)

        def y(x: mx.array, weights: mx.array, box: Any = box, kept: mx.array = kept, e: mx.array = experts) -> mx.array:
            return box.layer.combine(x, e[None], (weights * kept)[None])

        x = x_of(1, 80)
        of = mx.grad(lambda x, w, y=y: (y(x, w) * x_of(1, 80)).sum(), argnums=(0, 1))(x, weights)
        results.append([y(x, weights), *of])
    for found, wanted in zip(results[1], results[0], strict=True):
        assert relative_error(found, np.array(wanted)) <= TOLERANCE


@pytest.mark.parametrize("kind", ["linear with bias", "dense", "sparse"])
def test_gradient_checkpoints(kind: str, calls: list[int]) -> None:
    box, x = made(kind, 4, "LoRA"), x_of(2, 40)
    cpu.speed_up(box)
    plain = mx.grad(lambda x: box.layer(x).square().sum())(x)
    again = mx.grad(lambda x: mx.checkpoint(lambda x: box.layer(x))(x).square().sum())(x)
    assert mx.array_equal(plain, again)
    assert calls


def test_half_precision(calls: list[int]) -> None:
    box, x = made("dense", 4, "LoRA"), x_of(2, 40)
    cpu.speed_up(box)
    wanted, found = gradients(box, x), gradients(box, x.astype(mx.bfloat16))
    assert found["x"].dtype == mx.bfloat16
    for name, gradient in found.items():
        assert relative_error(gradient.astype(mx.float32), np.array(wanted[name])) <= 2e-2, name
        assert name == "x" or gradient.dtype == mx.float32
    assert max(calls) == 13


@pytest.mark.parametrize("name", ["gelu_pytorch_tanh", "quick_gelu", "silu"])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_activations(name: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle and far into both tails; in one piece and in several."""
    monkeypatch.setattr(activations, "WORTH", 1)
    monkeypatch.setattr(activations, "CHUNK", 700)
    gate, up, seen = (scale * mx.random.normal((40, 50), key=mx.random.key(i)) for i in range(3))
    stock = GLU(name)
    fast = activations.FastGLU(stock)
    alone = activations.FastActivation(stock.activation)
    pairs: list[tuple[Callable[..., mx.array], Callable[..., mx.array], list[mx.array]]] = [
        (fast, stock, [up, gate]),
        (alone, stock.activation, [gate]),
    ]
    for mine, theirs, inputs in pairs:

        def results(f: Callable[..., mx.array], inputs: list[mx.array] = inputs) -> list[mx.array]:
            of = mx.grad(lambda *a: (f(*a) * seen).sum(), argnums=tuple(range(len(inputs))))(*inputs)
            return [f(*inputs), *of]

        for found, wanted in zip(results(mine), results(theirs), strict=True):
            assert relative_error(found, np.array(wanted)) <= TOLERANCE
        assert mx.allclose(mx.compile(mine)(*inputs), theirs(*inputs), rtol=1e-5, atol=1e-5)


def test_norms_and_positions_are_computed_again() -> None:
    """To the last bit, of what is frozen; a norm that is trained is MLX's."""
    x, seen = x_of(2, 40), x_of(2, 40)
    for stock, fast in [(make_norm(WIDE), make_norm(WIDE)), (nn.RoPE(64), nn.RoPE(64))]:
        if "weight" in stock:
            stock.weight = fast.weight = mx.random.normal((128,), key=mx.random.key(4))
        fast.freeze()
        cpu.speed_up(fast)
        wanted, found = (
            mx.value_and_grad(lambda x, layer=layer: (layer(x) * seen).sum())(x) for layer in (stock, fast)
        )
        assert mx.array_equal(found[0], wanted[0]) and mx.array_equal(found[1], wanted[1])
    norm = make_norm(WIDE)
    cpu.speed_up(norm)
    gradient = nn.value_and_grad(norm, lambda layer: (layer(x) * seen).sum())(norm)[1]["weight"]
    assert float(mx.abs(gradient).max()) > 0


def test_the_exact_gelu_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "WORTH", 1)
    x = x_of(40)
    wanted, found = (mx.grad(lambda x, f=f: f(x).sum())(x) for f in (nn.gelu, activations.FastActivation(nn.gelu)))
    assert mx.array_equal(found, wanted)


def test_columns_of_gradients_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "BLOCK", 7 * 64)
    monkeypatch.setattr(matrix, "COLUMNS", 64)
    monkeypatch.setattr("gm_mlx.cpu.linears.CHUNK", 3 * 128)
    for kind in MAKERS:
        check(kind, 4, "LoRA", trained=False)
