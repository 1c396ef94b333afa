"""A linear, with LoRA or without, as one function.

MLX would add up the parts one by one, keep each sum for the gradient, and go through each a second time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from gm_mlx.cpu.cores import numpy_function, one_core, spread
from gm_mlx.cpu.matrix import FloatMatrix, Matrix, is_readable, matrix_of, pays

# Numbers of a sum at a time.
CHUNK = 2**17


class Layer(NamedTuple):
    """What a linear, or a stack of experts, is made of.

    Attributes:
        base: the layer without LoRA.
        trained: whether its matrix is.
        scales: by which B A of each adapter is multiplied.
        arrays: all that has a gradient: the matrix, if it is trained, and A and B of each adapter. A is [r, in] and B
            [out, r]; those of experts have one more axis in front, as the matrix has.
    """

    base: nn.Module
    trained: bool
    scales: list[float]
    arrays: list[mx.array]

    @classmethod
    def read(cls, layer: Any) -> Layer | None:
        """The parts of a layer (``gm_mlx.lora.layers`` if it has LoRA), if NumPy can compute it.

        It cannot with DoRA, nor with dropout, which LoRA has in training.
        """
        base, adapters = (layer.base, layer.adapters) if "adapters" in layer else (layer, [])
        dropped = any("magnitude" in one or (one.training and one.dropout_rate) for one in adapters)
        if dropped or not is_readable(base):
            return None
        trained = "weight" in base.trainable_parameters()
        arrays = [base.weight] * trained + [factor for one in adapters for factor in (one.lora_a, one.lora_b)]
        return cls(base, trained, [one.scale * one.weight for one in adapters], arrays)

    def linear(self, arrays: Sequence[np.ndarray], expert: int | None = None) -> Linear:
        """The linear, or that of an expert, with these values of ``arrays``."""
        factors = arrays[self.trained :]
        own = list(factors) if expert is None else [factor[expert] for factor in factors]
        return Linear(matrix_of(self.base, expert), self.trained, self.scales, own)


class Linear(NamedTuple):
    """``x W^T + sum of scale * (x A^T) B^T``.

    Attributes:
        matrix: W.
        trained: whether W is.
        scales: one per adapter.
        factors: A [r, in] and B [out, r] of each adapter, one after the other.
    """

    matrix: Matrix | FloatMatrix
    trained: bool
    scales: list[float]
    factors: list[np.ndarray]

    def times(self, x: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """[T, out] of x [T, in], and what ``back`` needs: scale * x A^T of each adapter, [T, r]."""
        y = self.matrix.times(x)
        with one_core():  # too little for all of them
            lows = [x @ (scale * a).T for a, scale in zip(self.factors[::2], self.scales, strict=True)]
        for low, b in zip(lows, self.factors[1::2], strict=True):
            add_product(y, low, b.T)
        return y, lows

    def back(self, dy: np.ndarray, x: np.ndarray, lows: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Gradients of x [T, in] and of ``Layer.arrays``, from that of the result [T, out]."""
        dx, found = self.matrix.back(dy), []
        if self.trained:
            assert isinstance(self.matrix, FloatMatrix)
            found.append(self.matrix.of_weight(dy, x))
        with one_core():
            of_lows = [scale * (dy @ b) for b, scale in zip(self.factors[1::2], self.scales, strict=True)]  # [T, r]
            for low, of_low in zip(lows, of_lows, strict=True):
                found += [of_low.T @ x, dy.T @ low]
        for of_low, a in zip(of_lows, self.factors[::2], strict=True):
            add_product(dx, of_low, a)
        return dx, found


def add_product(y: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
    """Add x w to y [T, out]."""
    step = max(1, CHUNK // y.shape[1])

    def work(starts: Iterator[int]) -> None:
        for start in starts:
            piece = slice(start, start + step)
            y[piece] += x[piece] @ w

    spread(work, range(0, len(y), step))


def linear(x: mx.array, layer: nn.Module) -> mx.array | None:
    """A layer with its bias and LoRA, if any, [..., out] of x [..., in]; None where NumPy cannot, or should not."""
    parts = Layer.read(layer)
    if parts is None or not pays(x, parts.base):
        return None
    bias = [parts.base.bias] if "bias" in parts.base else []
    count = len(parts.arrays)

    def forward(x: np.ndarray, *given: np.ndarray) -> tuple[np.ndarray, Any]:
        rows = x.reshape(-1, x.shape[-1])
        y, lows = parts.linear(given[:count]).times(rows)
        for b in given[count:]:
            y += b
        return y.reshape(*x.shape[:-1], -1), (given, rows, lows)

    def backward(dy: np.ndarray, kept: Any) -> list[np.ndarray]:
        given, rows, lows = kept
        of_y = dy.reshape(len(rows), -1)
        dx, found = parts.linear(given[:count]).back(of_y, rows, lows)
        return [dx.reshape(*dy.shape[:-1], -1), *found, *(of_y.sum(axis=0) for _ in bias)]

    return numpy_function(forward, backward, x, *parts.arrays, *bias)
