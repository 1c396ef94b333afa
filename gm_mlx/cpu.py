"""Quantized layers on MLX's CPU backend.

That backend has no tuned kernel for quantized weights: it multiplies one number after the other on one core, at 2
GFLOP/s. It is far faster to unpack a piece of the matrix to float32 and to multiply it with the BLAS that NumPy brings,
on all cores. NumPy computes the activations too: MLX spends 36 ns on a GELU here.

NumPy needs values, so these layers evaluate what they are given. MLX differentiates through them all the same, with the
gradient of the stock layer. Inside ``mx.compile``, where nothing can be evaluated, the stock layer runs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from threadpoolctl import ThreadpoolController

from gm_mlx._mlx_lm import QuantizedSwitchLinear, SwitchGLU
from gm_mlx.moe import GLU, MLP, SparseMLP

# Multiply-adds below which the stock kernels run: they take half a millisecond for them, as NumPy's calls do for none.
WORTH = 2**19
# Weights that a core unpacks at a time: what of its 2 MB of float32 the core's own cache loses, the shared one keeps.
BLOCK = 2**19
# Numbers per activation call: with its temporaries, what fits a core's own cache.
CHUNK = 2**15

CORES = os.cpu_count() or 1
POOL = ThreadPoolExecutor(CORES, thread_name_prefix="gm-mlx-cpu")  # NumPy works outside the interpreter lock
# Each core multiplies what it has just unpacked, so BLAS must not spread one product over all of them: its threads
# would spin while they wait for each other, for seconds when another program has the core. BLAS counts its threads per
# process, hence the lock.
BLAS = ThreadpoolController()
BLAS_LOCK = threading.Lock()


def speed_up(model: nn.Module) -> None:
    """Give the quantized layers of ``model`` their fast path, in place; on a GPU nothing is changed.

    Parameters keep their names and values: a model that was sped up is saved as the same file.

    Args:
        model: any module; each quantized linear, embedding or stack of experts, ``MLP`` and ``SparseMLP`` in it is
            affected.
    """
    if mx.default_device().type != mx.DeviceType.cpu:
        return
    for module in model.modules():
        if fast := FAST_LAYERS.get(type(module)):
            module.__class__ = fast


class FastQuantizedLinear(nn.QuantizedLinear):
    def __call__(self, x: mx.array) -> mx.array:
        if not _pays(x, self):
            return super().__call__(x)
        y = with_stock_gradient(lambda x: Matrix.of(self).times(x), self.stock_product, x)
        return y + self.bias if "bias" in self else y  # outside, since it may be trained

    def stock_product(self, x: mx.array) -> mx.array:
        return mx.quantized_matmul(
            x,
            self.weight,
            self.scales,
            self.get("biases"),
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )


class FastQuantizedEmbedding(nn.QuantizedEmbedding):
    def as_linear(self, x: mx.array) -> mx.array:
        stock = super().as_linear
        return with_stock_gradient(lambda x: Matrix.of(self).times(x), stock, x) if _pays(x, self) else stock(x)


class FastQuantizedSwitchLinear(QuantizedSwitchLinear):
    """Experts that are called one matrix after the other, as where LoRA is on them; see ``FastSparseMLP`` else."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        # Fewer tokens than mlx-lm sorts by expert have all their experts in one row of x.
        if x.shape[:-2] != indices.shape or not _pays(x, self):
            return super().__call__(x, indices, sorted_indices)

        def fast(x: np.ndarray) -> np.ndarray:
            chosen = np.asarray(indices).reshape(-1)
            y = np.empty((len(x), self.output_dims), np.float32)
            for expert in np.unique(chosen):
                tokens = chosen == expert
                y[tokens] = Matrix.of(self, expert).times(x[tokens])
            return y

        y = with_stock_gradient(fast, lambda x: self.stock_product(x, indices, sorted_indices), x)
        return y + self.bias[indices][..., None, :] if "bias" in self else y

    def stock_product(self, x: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
        return mx.gather_qmm(
            x,
            self.weight,
            self.scales,
            self.get("biases"),
            rhs_indices=indices,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=sorted_indices,
        )


class FastMLP(MLP):
    def __call__(self, x: mx.array) -> mx.array:
        stock = super().__call__
        if not _pays(x, self.gate_proj, self.up_proj, self.down_proj):
            return stock(x)
        return with_stock_gradient(lambda x: glu_network(x, self), stock, x)


class FastSparseMLP(SparseMLP):
    def combine(self, x: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
        layer = self.switch_mlp
        stock = super().combine
        if not isinstance(layer, SwitchGLU) or not _pays(x, layer.gate_proj, layer.up_proj, layer.down_proj):
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


FAST_LAYERS: dict[type, type] = {
    nn.QuantizedLinear: FastQuantizedLinear,
    nn.QuantizedEmbedding: FastQuantizedEmbedding,
    QuantizedSwitchLinear: FastQuantizedSwitchLinear,
    MLP: FastMLP,
    SparseMLP: FastSparseMLP,
}


class Matrix(NamedTuple):
    """A quantized matrix [out, in] in MLX's packing: one stream of bits per row, the first code in the lowest bits.

    Attributes:
        codes: uint8 [out, in * bits / 8].
        scales: float32 [out, groups].
        biases: float32 [out, groups], or None for MXFP4. A weight is its code times its group's scale plus its group's
            bias; for MXFP4 the code stands for a number of ``FP4``.
        bits: 2, 3, 4, 5, 6 or 8.
    """

    codes: np.ndarray
    scales: np.ndarray
    biases: np.ndarray | None
    bits: int

    @classmethod
    def of(cls, layer: nn.Module, expert: int | None = None) -> Matrix:
        """The matrix of a quantized layer, or one of the matrices of a ``QuantizedSwitchLinear``."""
        index = ... if expert is None else expert
        codes = np.asarray(layer.weight).view(np.uint8)[index]
        if layer.mode == "mxfp4":
            exponents = np.asarray(layer.scales)[index].astype(np.int32) - 127
            return cls(codes, np.ldexp(np.float32(1), exponents), None, layer.bits)
        return cls(codes, to_numpy(layer.scales[index]), to_numpy(layer.biases[index]), layer.bits)

    def times(self, x: np.ndarray) -> np.ndarray:
        """The products [T, out] of x [T, in] with every row, in float32."""
        (tokens, size), (rows, groups) = x.shape, self.scales.shape
        ordered = self._in_order_of_codes(x)
        if self.biases is not None:
            # The bias of a group is one more weight, and what it is multiplied with is the sum of the group's inputs.
            ordered = np.concatenate([ordered, x.reshape(tokens, groups, -1).sum(axis=2)], axis=1)  # [T, in + groups]
        y = np.empty((tokens, rows), np.float32)
        step = max(1, min(BLOCK // size, -(-rows // CORES)))
        starts = iter(range(0, rows, step))

        def work(core: int) -> None:
            block = np.empty((step, ordered.shape[1]), np.float32)
            for start in starts:  # shared: a core that has finished takes the next rows
                piece = slice(start, min(start + step, rows))
                weights = block[: piece.stop - start]
                self._unpack(piece, weights)
                np.matmul(ordered, weights.T, out=y[:, piece])

        with BLAS_LOCK, BLAS.limit(limits=1, user_api="blas"):
            list(POOL.map(work, range(CORES)))
        return y

    def _in_order_of_codes(self, x: np.ndarray) -> np.ndarray:
        """Columns of x as ``_unpack`` orders weights: all that come first in their bytes, all that come second, ..."""
        return x.reshape(len(x), -1, CODES_PER_UNIT[self.bits]).swapaxes(1, 2).reshape(x.shape)

    def _unpack(self, rows: slice, out: np.ndarray) -> None:
        """Write some rows, [n, in] and their biases behind them."""
        per_unit, mask = CODES_PER_UNIT[self.bits], np.uint8(2**self.bits - 1)
        units = self.codes[rows].reshape(len(out), -1, per_unit * self.bits // 8)  # [n, units, bytes]
        groups = self.scales.shape[1]
        size = units.shape[1] * per_unit
        scales = np.repeat(self.scales[rows], units.shape[1] // groups, axis=1)  # [n, units]
        planes = out[:, :size].reshape(len(out), per_unit, -1)  # a view
        for place in range(per_unit):
            byte, shift = divmod(self.bits * place, 8)
            codes = units[:, :, byte] >> shift
            if shift + self.bits > 8:  # its upper bits are in the next byte
                codes |= units[:, :, byte + 1] << (8 - shift)
            codes &= mask
            np.multiply(codes if self.biases is not None else FP4[codes], scales, out=planes[:, place])
        if self.biases is not None:
            out[:, size:] = self.biases[rows]


# The fewest codes that fill whole bytes, by their bits.
CODES_PER_UNIT = {2: 4, 3: 8, 4: 2, 5: 8, 6: 4, 8: 1}
# The numbers of MXFP4's codes (OCP Microscaling formats, E2M1: sign, two bits of exponent, one of mantissa).
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


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


def _sigmoid_gated(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """``x / (1 + exp(y))``, computed in the memory of ``y``."""
    with np.errstate(over="ignore"):  # x over infinity is the zero that is meant
        np.exp(y, out=y)
    y += 1
    return np.divide(x, y, out=y)


def _quick_gelu(x: np.ndarray) -> np.ndarray:
    return _sigmoid_gated(x, x * -1.702)


def _silu(x: np.ndarray) -> np.ndarray:
    return _sigmoid_gated(x, -x)


# NumPy has no erf: the exact GELU stays with MLX.
NUMPY_ACTIVATIONS: dict[Callable[..., mx.array], Callable[[np.ndarray], np.ndarray]] = {
    nn.gelu_approx: _gelu_tanh,
    nn.gelu_fast_approx: _quick_gelu,
    nn.silu: _silu,
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
    def backward(inputs: Any, cotangent: mx.array, output: mx.array) -> Any:
        return mx.vjp(stock, list(inputs) if others else [inputs], [cotangent])[1]

    return call(x, *others)  # type: ignore[return-value]


def _pays(x: mx.array, *layers: nn.Module) -> bool:
    """Whether there is enough to do, and every layer is one that ``Matrix`` can read.

    A layer that wraps a quantized one, as LoRA's does, is none: it computes more than a product.
    """
    return (
        all(type(layer) in READABLE and layer.mode in ("affine", "mxfp4") for layer in layers)
        and x.size * layers[0].scales.shape[-2] >= WORTH
    )


READABLE = (
    nn.QuantizedLinear,
    FastQuantizedLinear,
    FastQuantizedEmbedding,
    QuantizedSwitchLinear,
    FastQuantizedSwitchLinear,
)
