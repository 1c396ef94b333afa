"""Quantized layers on MLX's CPU backend, many tokens at a time.

That backend has no tuned kernel for quantized weights: it multiplies one number after the other on one core, at 2
GFLOP/s. From a dozen tokens on it is far faster to unpack a piece of the matrix to float32 and to multiply it with the
BLAS that NumPy brings, which uses SIMD and all cores. NumPy computes the activations too: MLX spends 36 ns on a GELU.

NumPy needs values, so these layers evaluate what they are given. MLX differentiates through them all the same, with the
gradient of the stock layer. Inside ``mx.compile``, where nothing can be evaluated, the stock layer runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from gm_mlx._mlx_lm import QuantizedSwitchLinear, SwitchGLU
from gm_mlx.moe import GLU, MLP, SparseMLP

# Below, the stock kernels are as fast: both read all the weights, and unpacking costs as much as a few products.
MANY_TOKENS = 16
# Weights unpacked at a time: 2 MB of float32 are still in the cache when they are multiplied.
BLOCK = 2**19
# Numbers per activation call: with its temporaries, what fits a core's own cache.
CHUNK = 2**15

CORES = os.cpu_count() or 1
POOL = ThreadPoolExecutor(CORES, thread_name_prefix="gm-mlx-cpu")  # NumPy works outside the interpreter lock


def speed_up(model: nn.Module) -> None:
    """Give the quantized layers of ``model`` their fast path, in place; on a GPU nothing is changed.

    Parameters keep their names and values: a model that was sped up is saved as the same file.

    Args:
        model: any module; each ``nn.QuantizedLinear``, ``MLP`` and ``SparseMLP`` in it is affected.
    """
    if mx.default_device().type != mx.DeviceType.cpu:
        return
    for module in model.modules():
        if fast := FAST_LAYERS.get(type(module)):
            module.__class__ = fast


class FastQuantizedLinear(nn.QuantizedLinear):
    def __call__(self, x: mx.array) -> mx.array:
        stock = super().__call__
        if not _pays(x, self):
            return stock(x)

        def fast(x: np.ndarray) -> np.ndarray:
            y = Matrix.of(self).times(x)
            return y + to_numpy(self.bias) if "bias" in self else y

        return with_stock_gradient(fast, stock, x)


class FastMLP(MLP):
    def __call__(self, x: mx.array) -> mx.array:
        stock = super().__call__
        if not _pays(x, self.gate_proj, self.up_proj, self.down_proj):
            return stock(x)
        return with_stock_gradient(lambda x: glu_network(x, self), stock, x)


class FastSparseMLP(SparseMLP):
    def combine(self, x: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
        layer: SwitchGLU = self.switch_mlp
        stock = super().combine
        if not _pays(x, layer.gate_proj, layer.up_proj, layer.down_proj):
            return stock(x, experts, weights)

        def fast(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
            chosen = np.asarray(experts).reshape(weights.shape)
            y = np.zeros_like(x)
            for expert in range(layer.gate_proj.num_experts):
                tokens, slots = np.nonzero(chosen == expert)
                if len(tokens):
                    y[tokens] += weights[tokens, slots, None] * glu_network(x[tokens], layer, expert)
            return y

        return with_stock_gradient(fast, lambda x, weights: stock(x, experts, weights), x, weights)


FAST_LAYERS: dict[type, type] = {nn.QuantizedLinear: FastQuantizedLinear, MLP: FastMLP, SparseMLP: FastSparseMLP}


class Matrix(NamedTuple):
    """A quantized matrix [out, in] in MLX's affine packing: 8 / bits codes to the byte, the first one lowest.

    Attributes:
        codes: uint8 [out, in * bits / 8].
        scales: float32 [out, groups].
        biases: float32 [out, groups]; a weight is its code times its group's scale plus its group's bias.
        bits: 2, 4 or 8.
    """

    codes: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    bits: int

    @classmethod
    def of(cls, layer: nn.Module, expert: int | None = None) -> Matrix:
        """The matrix of a quantized layer, or one of the matrices of a ``QuantizedSwitchLinear``."""
        weight, scales, biases = (
            layer[name] if expert is None else layer[name][expert] for name in ("weight", "scales", "biases")
        )
        return cls(np.asarray(weight).view(np.uint8), to_numpy(scales), to_numpy(biases), layer.bits)

    def times(self, x: np.ndarray) -> np.ndarray:
        """The products [T, out] of x [T, in] with every row, in float32."""
        (tokens, size), (rows, groups) = x.shape, self.scales.shape
        # The bias of a group is one more weight, and what it is multiplied with is the sum of the group's inputs.
        sums = x.reshape(tokens, groups, -1).sum(axis=2)
        x = np.concatenate([self._in_order_of_codes(x), sums], axis=1)  # [T, in + groups]
        y = np.empty((tokens, rows), np.float32)
        block = np.empty((min(rows, max(CORES, BLOCK // size)), size + groups), np.float32)
        for start in range(0, rows, len(block)):
            weights = block[: rows - start]
            self._unpack(start, weights)
            np.matmul(x, weights.T, out=y[:, start : start + len(weights)])
        return y

    def _in_order_of_codes(self, x: np.ndarray) -> np.ndarray:
        """Columns of x as ``_unpack`` orders weights: all that come first in their byte, all that come second, ..."""
        return x.reshape(len(x), -1, 8 // self.bits).swapaxes(1, 2).reshape(x.shape)

    def _unpack(self, start: int, out: np.ndarray) -> None:
        """Write ``len(out)`` rows from ``start`` on, [n, in + groups], with all cores."""
        groups, per_byte, mask = self.scales.shape[1], 8 // self.bits, 2**self.bits - 1

        def unpack(first: int) -> None:
            piece = out[first : first + step]
            source = slice(start + first, start + first + len(piece))
            codes = self.codes[source]
            scales = np.repeat(self.scales[source], codes.shape[1] // groups, axis=1)
            planes = piece[:, :-groups].reshape(len(piece), per_byte, -1)  # a view
            for place in range(per_byte):
                np.multiply((codes >> (self.bits * place)) & mask, scales, out=planes[:, place])
            piece[:, -groups:] = self.biases[source]

        step = -(-len(out) // CORES)
        list(POOL.map(unpack, range(0, len(out), step)))


def glu_network(x: np.ndarray, layer: MLP | SwitchGLU, expert: int | None = None) -> np.ndarray:
    """A gated feed-forward network, or one expert of several, on x [T, D]."""
    up, gate = Matrix.of(layer.up_proj, expert).times(x), Matrix.of(layer.gate_proj, expert).times(x)
    return Matrix.of(layer.down_proj, expert).times(_gated(layer.activation, up, gate))


def _gated(glu: GLU, up: np.ndarray, gate: np.ndarray) -> np.ndarray:
    """``glu(up, gate)``; where NumPy has the activation, computed in the memory of ``gate``."""
    if glu.activation not in NUMPY_ACTIVATIONS:
        return to_numpy(glu(mx.array(up), mx.array(gate)))
    activation = NUMPY_ACTIVATIONS[glu.activation]
    step = max(1, CHUNK // gate.shape[1])

    def work(start: int) -> None:
        piece = slice(start, start + step)
        np.multiply(activation(gate[piece]), up[piece], out=gate[piece])

    list(POOL.map(work, range(0, len(gate), step)))
    return gate


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    y = x * x
    y *= 0.044715
    y += 1
    y *= x
    y *= np.float32(np.sqrt(2 / np.pi))
    np.tanh(y, out=y)
    y += 1
    y *= x
    y *= 0.5
    return y


def _quick_gelu(x: np.ndarray) -> np.ndarray:
    y = x * -1.702
    np.exp(y, out=y)
    y += 1
    return np.divide(x, y, out=y)


# NumPy has no erf: the exact GELU stays with MLX.
NUMPY_ACTIVATIONS: dict[Callable[..., mx.array], Callable[[np.ndarray], np.ndarray]] = {
    nn.gelu_approx: _gelu_tanh,
    nn.gelu_fast_approx: _quick_gelu,
}


def to_numpy(array: mx.array) -> np.ndarray:
    """The values of an array as float32, without a copy where they are."""
    return np.asarray(array.astype(mx.float32))


def with_stock_gradient(
    fast: Callable[..., np.ndarray], stock: Callable[..., mx.array], x: mx.array, *others: mx.array
) -> mx.array:
    """``stock(x, *others)`` computed by ``fast``, which takes and gives matrices whose rows are tokens."""
    try:
        mx.eval(x, *others)
    except ValueError:  # inside mx.compile
        return stock(x, *others)

    @mx.custom_function
    def call(*inputs: mx.array) -> mx.array:
        y = fast(*(to_numpy(a).reshape(-1, a.shape[-1]) for a in inputs))
        return mx.array(y).reshape(*x.shape[:-1], -1).astype(x.dtype)

    @call.vjp
    def backward(inputs: mx.array | tuple[mx.array, ...], cotangent: mx.array, output: mx.array) -> list[mx.array]:
        return mx.vjp(stock, list(inputs) if others else [inputs], [cotangent])[1]

    return call(x, *others)


def _pays(x: mx.array, *layers: nn.Module) -> bool:
    """Whether there are many tokens, and every layer is one that ``Matrix`` can read.

    A layer that wraps a quantized one, as LoRA's does, is none: it computes more than a product.
    """
    return x.size >= MANY_TOKENS * x.shape[-1] and all(
        type(layer) in (nn.QuantizedLinear, FastQuantizedLinear, QuantizedSwitchLinear)
        and layer.mode == "affine"
        and layer.bits in (2, 4, 8)
        for layer in layers
    )
