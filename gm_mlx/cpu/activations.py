"""Activations and their slopes in NumPy: MLX spends 14 to 36 ns on one of them here, and twice that on its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from gm_mlx.cpu.cores import is_known, numpy_function, recomputed, spread
from gm_mlx.moe import GLU

# Numbers per call: with its temporaries, what fits a core's own cache.
CHUNK = 2**14
# Numbers below which MLX computes an activation in less time than it takes to ask for another way.
WORTH = 2**14

Activation = Callable[[mx.array], mx.array]
Function = Callable[[np.ndarray], np.ndarray]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # one over infinity is the zero that is meant
        y = np.exp(-x)
    y += 1
    return np.reciprocal(y, out=y)


def _silu(x: np.ndarray) -> np.ndarray:
    y = _sigmoid(x)
    y *= x
    return y


def _silu_slope(x: np.ndarray) -> np.ndarray:
    s = _sigmoid(x)
    return s * (1 + x * (1 - s))


def _quick_gelu(x: np.ndarray) -> np.ndarray:
    y = _sigmoid(1.702 * x)
    y *= x
    return y


def _quick_gelu_slope(x: np.ndarray) -> np.ndarray:
    return _silu_slope(1.702 * x)


def _tanh_of_gelu(x: np.ndarray, square: np.ndarray) -> np.ndarray:
    y = square * 0.044715
    y += 1
    y *= x
    y *= np.float32(np.sqrt(2 / np.pi))
    return np.tanh(y, out=y)


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    y = _tanh_of_gelu(x, x * x)
    y += 1
    y *= x
    y *= 0.5
    return y


def _gelu_tanh_slope(x: np.ndarray) -> np.ndarray:
    square = x * x
    t = _tanh_of_gelu(x, square)
    square *= np.float32(3 * 0.044715 * np.sqrt(2 / np.pi))
    square += np.float32(np.sqrt(2 / np.pi))
    square *= x
    square *= 1 - t
    square += 1
    t += 1
    t *= square
    t *= 0.5
    return t


# Values and slopes. NumPy has no erf: the exact GELU stays with MLX.
NUMPY_ACTIVATIONS: dict[Activation, tuple[Function, Function]] = {
    nn.gelu_approx: (_gelu_tanh, _gelu_tanh_slope),
    nn.gelu_fast_approx: (_quick_gelu, _quick_gelu_slope),
    nn.silu: (_silu, _silu_slope),
}


class FastActivation:
    """One of ``NUMPY_ACTIVATIONS``, on all cores; or another, of which no steps are kept for the gradient."""

    def __init__(self, activation: Activation) -> None:
        self.activation = activation

    def __call__(self, x: mx.array) -> mx.array:
        if x.size < WORTH or not is_known(x):
            return self.activation(x)
        if self.activation not in NUMPY_ACTIVATIONS:
            return recomputed(self.activation, x)
        value, slope = NUMPY_ACTIVATIONS[self.activation]

        def forward(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            y = np.empty(x.shape, np.float32)
            elementwise(lambda x: (value(x),), [x], [y])
            return y, x

        def backward(dy: np.ndarray, x: np.ndarray) -> list[np.ndarray]:
            dx = np.empty(x.shape, np.float32)
            elementwise(lambda dy, x: (dy * slope(x),), [dy, x], [dx])
            return [dx]

        return numpy_function(forward, backward, x)


class FastGLU(GLU):
    """A GLU whose activation is one of ``NUMPY_ACTIVATIONS``, on all cores."""

    def __init__(self, glu: GLU) -> None:
        self.activation = glu.activation

    def __call__(self, up: mx.array, gate: mx.array) -> mx.array:
        if gate.size < WORTH or not is_known(up, gate):
            return super().__call__(up, gate)

        def forward(up: np.ndarray, gate: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
            return gated(self, up, gate, np.empty(gate.shape, np.float32)), (up, gate)

        def backward(dh: np.ndarray, inputs: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
            return gated_back(self, dh, *inputs, np.empty(dh.shape, np.float32))

        return numpy_function(forward, backward, up, gate)


def gated(glu: GLU, up: np.ndarray, gate: np.ndarray, out: np.ndarray) -> np.ndarray:
    """``activation(gate) * up``, written to ``out``, which may be ``gate``."""
    value, _ = NUMPY_ACTIVATIONS[glu.activation]
    elementwise(lambda up, gate: (value(gate) * up,), [up, gate], [out])
    return out


def gated_back(
    glu: GLU, dh: np.ndarray, up: np.ndarray, gate: np.ndarray, out: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of ``up``, written to ``out``, and of ``gate``, from that of ``gated``."""
    value, slope = NUMPY_ACTIVATIONS[glu.activation]
    of_gate = np.empty(gate.shape, np.float32)
    elementwise(lambda dh, up, gate: (dh * value(gate), dh * up * slope(gate)), [dh, up, gate], [out, of_gate])
    return out, of_gate


def elementwise(
    function: Callable[..., tuple[np.ndarray, ...]], inputs: list[np.ndarray], results: list[np.ndarray]
) -> None:
    """Write a function of single numbers, on all cores.

    Args:
        function: of as many numbers as there are inputs; gives as many as there are results.
        inputs: arrays of one shape.
        results: new arrays of that shape, or inputs.
    """
    flat, out = [array.reshape(-1) for array in inputs], [array.reshape(-1) for array in results]

    def work(starts: Iterator[int]) -> None:
        for start in starts:
            piece = slice(start, start + CHUNK)
            for array, values in zip(out, function(*(array[piece] for array in flat)), strict=True):
                array[piece] = values

    spread(work, range(0, len(flat[0]), CHUNK))
