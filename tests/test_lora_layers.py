"""Layers with LoRA, of each kind on each base, against W + scale * B A in float64 and PyTorch's gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

from gm_mlx import cpu
from gm_mlx._mlx_lm import SwitchLinear
from gm_mlx.lora.layers import LowRank, Wrapper, float_weight, row_squares, wrap
from gm_mlx.router import LowRankRouter, Router

SIZES = {"in": 64, "out": 96, "experts": 3}
KINDS = ("linear", "linear with bias", "experts", "experts with bias", "embedding", "head", "router", "low router")
PACKINGS: dict[str, dict[str, Any] | None] = {
    "float": None,
    **{f"{bits} bits": {"group_size": 32, "bits": bits} for bits in (2, 3, 4, 5, 6, 8)},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
}
EXACT = {mx.float32: 2e-5, mx.bfloat16: 2e-2}


def base_layer(kind: str, packing: str = "float", dtype: mx.Dtype = mx.float32) -> nn.Module:
    mx.random.seed(0)
    size, out = SIZES["in"], SIZES["out"]
    layer: nn.Module
    if kind == "router":
        return Router(size, out)
    if kind == "low router":
        return LowRankRouter(size, out, 5)
    if kind in ("embedding", "head"):
        layer = nn.Embedding(out, size)
    elif "experts" in kind:
        layer = SwitchLinear(size, out, SIZES["experts"], bias="bias" in kind)
    else:
        layer = nn.Linear(size, out, bias="bias" in kind)
    if "bias" in layer:
        layer.bias = mx.random.normal(layer.bias.shape)
    layer.set_dtype(dtype)
    how = PACKINGS[packing]
    return layer if how is None else layer.to_quantized(**how)


def low_rank(kind: str, rank: int = 4, seed: int = 0, adapter: str = "default", **settings: Any) -> LowRank:
    """Random factors, of which none is zero."""
    rows, columns = (SIZES["in"], SIZES["out"]) if kind in ("embedding", "head") else (SIZES["out"], SIZES["in"])
    stack = (SIZES["experts"],) if "experts" in kind else ()
    random = np.random.default_rng(seed)
    a, b = (mx.array(random.normal(size=(*stack, *shape)) / 8, mx.float32) for shape in ((rank, columns), (rows, rank)))
    return LowRank(adapter, a, b, settings.pop("alpha", 6.0), **settings)


def inputs(kind: str, dtype: mx.Dtype = mx.float32, tokens: int = 7) -> tuple[mx.array, ...]:
    """What the layer is called with."""
    random = np.random.default_rng(1)
    if kind == "embedding":
        return (mx.array(random.integers(0, SIZES["out"], (1, tokens))),)
    x = mx.array(random.normal(size=(1, tokens, SIZES["in"])), mx.float32).astype(dtype)
    if "experts" not in kind:
        return (x,)
    chosen = mx.array(random.integers(0, SIZES["experts"], (1, tokens, 2)))
    return x[:, :, None, None], chosen


def output(layer: nn.Module, kind: str, *given: mx.array) -> mx.array:
    return layer.as_linear(*given) if kind == "head" else layer(*given)  # type: ignore[operator]


def weights(base: nn.Module, kind: str) -> np.ndarray:
    """W in float64, [out, in] or [E, out, in]."""
    if "experts" in kind:
        return np.stack([np.array(float_weight(base, e), np.float64) for e in range(SIZES["experts"])])
    return np.array(float_weight(base), np.float64)


def expected(kind: str, weight: np.ndarray, base: nn.Module, *given: mx.array) -> np.ndarray:
    """What a plain layer with this weight gives, in float64."""
    x = np.array(given[0].astype(mx.float32) if given[0].dtype == mx.bfloat16 else given[0])
    bias = np.array(base.bias.astype(mx.float32), np.float64) if "bias" in base else 0.0
    if kind == "embedding":
        return weight[x]
    if "experts" not in kind:
        return x @ weight.T + bias
    chosen = np.array(given[1])
    y = np.einsum("blzyi,blkoi->blkyo", x, weight[chosen])
    return y + (bias[chosen][..., None, :] if "bias" in base else 0.0)  # type: ignore[index]


def merged(weight: np.ndarray, kind: str, *lows: LowRank) -> np.ndarray:
    """W + sum of the adapters' changes, from the papers' formulas."""
    total = weight.copy()
    for low in lows:
        a, b = np.array(low.lora_a, np.float64), np.array(low.lora_b, np.float64)
        delta = low.alpha / (math.sqrt(a.shape[-2]) if low.rslora else a.shape[-2]) * (b @ a)
        if kind in ("embedding", "head"):
            delta = delta.T
        if "magnitude" in low:
            moved = weight + delta
            lengths = np.linalg.norm(moved, axis=-1, keepdims=True)
            delta = np.array(low.magnitude, np.float64)[..., None] * moved / lengths - weight
        total += low.weight * delta
    return total


def error(found: mx.array, wanted: np.ndarray) -> float:
    return float(np.abs(np.array(found.astype(mx.float32)) - wanted).max() / np.abs(wanted).max())


def wrapped(kind: str, packing: str, *lows: LowRank, dtype: mx.Dtype = mx.float32) -> Wrapper:
    wrapper = wrap(base_layer(kind, packing, dtype))
    wrapper.adapters += lows
    wrapper.eval()
    return wrapper


# Routers are never packed, and MLX's CPU backend has no experts in bfloat16 floats.
CASES = [
    (kind, packing, dtype)
    for kind in KINDS
    for packing in PACKINGS
    for dtype in EXACT
    if (packing == "float" or "router" not in kind)
    and not ("experts" in kind and packing == "float" and dtype == mx.bfloat16)
]


@pytest.mark.parametrize(("kind", "packing", "dtype"), CASES)
def test_forward(kind: str, packing: str, dtype: mx.Dtype) -> None:
    lows = [low_rank(kind), low_rank(kind, rank=3, seed=1, rslora=True, weight=-0.5)]
    layer = wrapped(kind, packing, *lows, dtype=dtype)
    given = inputs(kind, dtype)
    found = output(layer, kind, *given)
    assert found.dtype == (mx.float32 if "router" in kind or kind == "embedding" else dtype)
    wanted = expected(kind, merged(weights(layer.base, kind), kind, *lows), layer.base, *given)
    assert error(found, wanted) <= EXACT[dtype]
    assert error(found, expected(kind, weights(layer.base, kind), layer.base, *given)) > 0.05


@pytest.mark.parametrize(("kind", "packing", "dtype"), [case for case in CASES if case[0] not in ("embedding", "head")])
def test_dora(kind: str, packing: str, dtype: mx.Dtype) -> None:
    low = low_rank(kind)
    layer = wrapped(kind, packing, low, low_rank(kind, seed=1), dtype=dtype)
    squares = row_squares(layer.base)
    low.use_dora(squares, mx.sqrt(squares) * mx.linspace(0.5, 2, SIZES["out"]))
    given = inputs(kind, dtype)
    wanted = expected(kind, merged(weights(layer.base, kind), kind, *layer.adapters), layer.base, *given)
    for _ in range(2):  # lengths are computed, and then known
        assert error(output(layer, kind, *given), wanted) <= EXACT[dtype]
    low.lora_b = low.lora_b * 3
    wanted = expected(kind, merged(weights(layer.base, kind), kind, *layer.adapters), layer.base, *given)
    assert error(output(layer, kind, *given), wanted) <= EXACT[dtype]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("kind", "packing", "dtype"), CASES)
def test_nothing_changes_before_training(kind: str, packing: str, dtype: mx.Dtype, dora: bool) -> None:
    if dora and kind in ("embedding", "head"):
        return
    low = low_rank(kind)
    low.lora_b = mx.zeros_like(low.lora_b)
    layer = wrapped(kind, packing, low, dtype=dtype)
    if dora:
        low.use_dora(row_squares(layer.base))
    given = inputs(kind, dtype)
    for training in (True, False):
        layer.train(training)
        assert mx.array_equal(output(layer, kind, *given), output(layer.base, kind, *given))


@pytest.mark.parametrize("packing", ["4 bits", "3 bits", "mxfp4", "8 bits"])
@pytest.mark.parametrize("kind", ["linear", "linear with bias", "head"])
def test_on_the_cpus_fast_layers(kind: str, packing: str) -> None:
    low = low_rank(kind)
    layer = wrapped(kind, packing, low)
    given = inputs(kind, tokens=200)  # enough for the fast path
    stock = output(layer, kind, *given)
    cpu.speed_up(layer)
    assert type(layer.base).__name__.startswith("Fast")
    assert error(output(layer, kind, *given), np.array(stock)) <= 1e-5
    if kind != "head":
        low.use_dora(row_squares(layer.base), mx.full((SIZES["out"],), 0.7))
        wanted = expected(kind, merged(weights(layer.base, kind), kind, low), layer.base, *given)
        assert error(output(layer, kind, *given), wanted) <= 2e-5


def torch_gradients(kind: str, layer: Wrapper, *given: mx.array) -> dict[str, np.ndarray]:
    """Gradients of sum(y ** 2) by PyTorch's autograd in float64, of the merged weight that peft's formulas give."""
    (low,) = layer.adapters
    names = [name for name in ("lora_a", "lora_b", "magnitude") if name in low]
    leaves = {name: torch.tensor(np.array(low[name], np.float64), requires_grad=True) for name in names}
    weight = torch.tensor(weights(layer.base, kind))
    delta = low.scale * leaves["lora_b"] @ leaves["lora_a"]
    moved = weight + (delta.T if kind in ("embedding", "head") else delta)
    if "magnitude" in leaves:
        moved = (leaves["magnitude"] / moved.detach().norm(dim=-1))[..., None] * moved
    x = torch.tensor(np.array(given[0]))
    if kind == "embedding":
        y = moved[x]
    elif "experts" in kind:
        chosen = torch.tensor(np.array(given[1]).astype(np.int64))
        y = torch.einsum("blzyi,blkoi->blkyo", x.double(), moved[chosen])
        if "bias" in layer.base:
            y = y + torch.tensor(np.array(layer.base.bias, np.float64))[chosen][..., None, :]
    else:
        y = x.double() @ moved.T + (torch.tensor(np.array(layer.base.bias)) if "bias" in layer.base else 0)
    (y**2).sum().backward()
    return {name: leaf.grad.numpy() for name, leaf in leaves.items()}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("packing", ["float", "4 bits", "mxfp4"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [7, 64])  # one by one, and sorted by expert
def test_gradients(kind: str, packing: str, dora: bool, tokens: int) -> None:
    if ("router" in kind and packing != "float") or (dora and kind in ("embedding", "head")):
        return
    layer = wrapped(kind, packing, low_rank(kind))
    if dora:
        squares = row_squares(layer.base)
        layer.adapters[0].use_dora(squares, mx.sqrt(squares) * 1.5)
    layer.freeze()
    layer.adapters[0].unfreeze()
    layer.train()
    given = inputs(kind, tokens=tokens)

    def loss(layer: Wrapper) -> mx.array:
        return (output(layer, kind, *given) ** 2).sum()

    found = dict(tree_flatten(nn.value_and_grad(layer, loss)(layer)[1]))
    wanted = torch_gradients(kind, layer, *given)
    assert found.keys() == {f"adapters.0.{name}" for name in wanted}
    for name, gradient in wanted.items():
        assert error(found[f"adapters.0.{name}"], gradient) <= 1e-4, name


def test_dropout() -> None:
    low = low_rank("linear", dropout=0.5)
    layer = wrapped("linear", "float", low)
    (x,) = inputs("linear", tokens=400)
    whole = layer(x) - layer.base(x)
    layer.train()
    mx.random.seed(1)
    first, second = (layer(x) - layer.base(x) for _ in range(2))
    assert not mx.array_equal(first, second)
    mx.random.seed(1)
    assert mx.array_equal(layer(x) - layer.base(x), first)
    assert error(mx.stack([layer(x) - layer.base(x) for _ in range(200)]).mean(axis=0), np.array(whole)) < 0.2
    layer.eval()
    assert mx.array_equal(layer(x) - layer.base(x), whole)


@pytest.mark.parametrize("make", [lambda k: low_rank(k), lambda k: low_rank(k, rank=8, rslora=True, alpha=2.0)])
def test_scale(make: Callable[[str], LowRank]) -> None:
    low = make("linear")
    assert low.scale == pytest.approx(low.alpha / low.rank ** (0.5 if low.rslora else 1))


def test_a_row_of_zeros_has_no_length_and_stays() -> None:
    layer = wrapped("linear", "float", low_rank("linear"))
    layer.base.weight[3] = 0
    low = layer.adapters[0]
    low.use_dora(row_squares(layer.base))
    low.lora_b[3] = 0
    assert mx.isfinite(layer(*inputs("linear"))).all()
    assert mx.array_equal(layer(*inputs("linear"))[..., 3], mx.zeros((1, 7)))
