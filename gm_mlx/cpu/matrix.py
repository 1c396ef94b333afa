"""Products with the matrices of layers. Packed ones are unpacked to float32 piece by piece, for BLAS."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from gm_mlx._mlx_lm import QuantizedSwitchLinear, SwitchLinear
from gm_mlx.cpu.cores import CORES, is_known, spread, to_numpy

# Multiply-adds below which the stock kernels run: they take half a millisecond for them, as NumPy's calls do for none.
WORTH = 2**19
# Weights that a core unpacks at a time: what of its 2 MB of float32 the core's own cache loses, the shared one keeps.
BLOCK = 2**19
# Columns of a piece, where the product goes along rows.
COLUMNS = 256

# The fewest codes that fill whole bytes, by their bits.
CODES_PER_UNIT = {2: 4, 3: 8, 4: 2, 5: 8, 6: 4, 8: 1}
# The numbers of MXFP4's codes (OCP Microscaling formats, E2M1: sign, two bits of exponent, one of mantissa).
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


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
        scales, biases = (
            np.asarray(a)[index] if a.dtype == mx.float32 else to_numpy(a[index]) for a in (layer.scales, layer.biases)
        )
        return cls(codes, scales, biases, layer.bits)

    def times(self, x: np.ndarray) -> np.ndarray:
        """The products [T, out] of x [T, in] with every row, in float32: x W^T."""
        (tokens, size), (rows, groups) = x.shape, self.scales.shape
        ordered = self._in_order_of_codes(x)
        if self.biases is not None:
            # The bias of a group is one more weight, and what it is multiplied with is the sum of the group's inputs.
            ordered = np.concatenate([ordered, x.reshape(tokens, groups, -1).sum(axis=2)], axis=1)  # [T, in + groups]
        y = np.empty((tokens, rows), np.float32)
        step = max(1, min(BLOCK // size, -(-rows // CORES)))

        def work(starts: Iterator[int]) -> None:
            block = np.empty((step, ordered.shape[1]), np.float32)
            for start in starts:
                piece = slice(start, min(start + step, rows))
                np.matmul(ordered, self._unpack(piece, block).T, out=y[:, piece])

        spread(work, range(0, rows, step))
        return y

    def back(self, dy: np.ndarray) -> np.ndarray:
        """The products [T, in] of dy [T, out] with every column, in float32: dy W, the gradient of ``times``."""
        tokens, groups = len(dy), self.scales.shape[1]
        size = self.codes.shape[1] * 8 // self.bits
        group = size // groups
        dx = np.empty((tokens, size), np.float32)
        step = max(1, min(COLUMNS // group, -(-groups // CORES)))

        def work(starts: Iterator[int]) -> None:
            for start in starts:
                stop = min(start + step, groups)
                columns = slice(start * group, stop * group)
                dx[:, columns] = self._groups(start, stop)._columns(dy)

        spread(work, range(0, groups, step))
        return dx

    def _groups(self, start: int, stop: int) -> Matrix:
        """Some of the columns: those of some groups."""
        width = self.codes.shape[1] // self.scales.shape[1]  # bytes of a group
        biases = None if self.biases is None else self.biases[:, start:stop]
        return Matrix(self.codes[:, start * width : stop * width], self.scales[:, start:stop], biases, self.bits)

    def _columns(self, dy: np.ndarray) -> np.ndarray:
        """``back`` on one core, in memory of a block."""
        (tokens, rows), groups = dy.shape, self.scales.shape[1]
        size = self.codes.shape[1] * 8 // self.bits
        width = size if self.biases is None else size + groups
        step = max(1, min(BLOCK // size, rows))
        block = np.empty((step, width), np.float32)
        total, part = np.zeros((tokens, width), np.float32), np.empty((tokens, width), np.float32)
        for start in range(0, rows, step):
            piece = slice(start, min(start + step, rows))
            total += np.matmul(dy[:, piece], self._unpack(piece, block), out=part)
        dx = total[:, :size].reshape(tokens, CODES_PER_UNIT[self.bits], -1).swapaxes(1, 2).reshape(tokens, size)
        if self.biases is not None:
            dx.reshape(tokens, groups, -1)[:] += total[:, size:, None]
        return dx

    def _in_order_of_codes(self, x: np.ndarray) -> np.ndarray:
        """Columns of x as ``_unpack`` orders weights: all that come first in their bytes, all that come second, ..."""
        return x.reshape(len(x), -1, CODES_PER_UNIT[self.bits]).swapaxes(1, 2).reshape(x.shape)

    def _unpack(self, rows: slice, block: np.ndarray) -> np.ndarray:
        """Some rows, [n, in] and their biases behind them, written into the beginning of ``block``."""
        out = block[: rows.stop - rows.start]
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
        return out


class FloatMatrix(NamedTuple):
    """A matrix as it is, float32 [out, in]. MLX's products spread over cores too, but less well than pieces do."""

    weight: np.ndarray

    @classmethod
    def of(cls, layer: nn.Module, expert: int | None = None) -> FloatMatrix:
        """The matrix of a layer, or one of the matrices of a ``SwitchLinear``."""
        return cls(np.asarray(layer.weight)[... if expert is None else expert])

    def times(self, x: np.ndarray) -> np.ndarray:
        """The products [T, out] of x [T, in] with every row: x W^T."""
        return product(x, self.weight.T)

    def back(self, dy: np.ndarray) -> np.ndarray:
        """The products [T, in] of dy [T, out] with every column: dy W, the gradient of ``times``."""
        return product(dy, self.weight)

    def of_weight(self, dy: np.ndarray, x: np.ndarray) -> np.ndarray:
        """dy^T x [out, in], the gradient of the matrix."""
        return product(dy.T, x)


def product(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """x w, each core taking some columns."""
    y = np.empty((x.shape[0], w.shape[1]), np.float32)
    step = max(1, min(COLUMNS, -(-w.shape[1] // CORES)))

    def work(starts: Iterator[int]) -> None:
        for start in starts:
            piece = slice(start, start + step)
            np.matmul(x, w[:, piece], out=y[:, piece])

    spread(work, range(0, w.shape[1], step))
    return y


QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)
FLOAT = (nn.Linear, SwitchLinear)


def is_readable(layer: nn.Module) -> bool:
    """Whether NumPy can multiply with a layer's matrix; not a packed one whose scales are trained."""
    if isinstance(layer, QUANTIZED):
        return layer.mode in ("affine", "mxfp4") and not {"scales", "biases"} & layer.trainable_parameters().keys()
    return isinstance(layer, FLOAT) and layer.weight.dtype == mx.float32


def matrix_of(layer: nn.Module, expert: int | None = None) -> Matrix | FloatMatrix:
    """The matrix of a readable layer, or of one of its experts."""
    return (Matrix if isinstance(layer, QUANTIZED) else FloatMatrix).of(layer, expert)


def pays(x: mx.array, layer: nn.Module) -> bool:
    """Whether there is enough to do for NumPy, and x is known."""
    return x.size * layer.weight.shape[-2] >= WORTH and is_known(x)
