"""Stacked experts on MLX's CPU backend, one product per expert.

MLX's ``gather_mm`` and ``gather_qmm`` multiply one token after the other here, at a tenth of the speed of BLAS and
less. Which tokens an expert has is asked once, and then it multiplies all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from gm_mlx._mlx_lm import QuantizedSwitchLinear, SwitchLinear
from gm_mlx.cpu.cores import is_known, numpy_function
from gm_mlx.cpu.matrix import Matrix, is_readable, pays


def expert_products(x: mx.array, weight: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
    """``mx.gather_mm`` of tokens and the matrices of their experts.

    Args:
        x: [..., 1, in].
        weight: float32 [E, out, in].
        indices: the expert of each token, [...].
        sorted_indices: all tokens of an expert stand together.

    Returns:
        [..., 1, out]. In MLX's own operations, so whatever is trained gets its gradient.
    """
    if not sorted_indices or x.shape[:-1] != (*indices.shape, 1) or indices.ndim != 1 or not is_known(indices):
        return mx.gather_mm(x, weight.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=sorted_indices)
    counts = np.bincount(np.asarray(indices), minlength=len(weight))
    tokens = mx.split(x[:, 0], np.cumsum(counts)[:-1].tolist())
    # Not weight[e], which would copy the matrix.
    matrices = [matrix.squeeze(0) for matrix in mx.split(weight, len(weight))]
    pairs = zip(tokens, matrices, strict=True)
    return mx.concatenate([own @ matrix.T for own, matrix in pairs if len(own)])[:, None]


class FastSwitchLinear(SwitchLinear):
    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        if x.dtype != mx.float32 or self.weight.dtype != mx.float32:
            return super().__call__(x, indices, sorted_indices)
        y = expert_products(x, self.weight, indices, sorted_indices)
        return y + self.bias[indices][..., None, :] if "bias" in self else y


class FastQuantizedSwitchLinear(QuantizedSwitchLinear):
    """Experts that are called one matrix after the other, as where LoRA is on them; see ``FastSparseMLP`` else."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        # Fewer tokens than mlx-lm sorts by expert have all their experts in one row of x.
        if x.shape[:-2] != indices.shape or not (is_readable(self) and pays(x, self) and is_known(indices)):
            return super().__call__(x, indices, sorted_indices)
        chosen = np.asarray(indices).reshape(-1)

        def by_expert(way: Callable[[Matrix, np.ndarray], np.ndarray], x: np.ndarray, size: int) -> np.ndarray:
            """Products [..., n, size] of x [..., n, in] with the matrices of the experts."""
            rows = x.reshape(len(chosen), *x.shape[-2:])
            y = np.empty((*rows.shape[:-1], size), np.float32)
            for expert in np.unique(chosen):
                own = rows[chosen == expert]
                product = way(Matrix.of(self, expert), own.reshape(-1, own.shape[-1]))
                y[chosen == expert] = product.reshape(*own.shape[:-1], size)
            return y.reshape(*x.shape[:-1], size)

        y = numpy_function(
            lambda x: (by_expert(Matrix.times, x, self.output_dims), None),
            lambda dy, _: [by_expert(Matrix.back, dy, self.input_dims)],
            x,
        )
        return y + self.bias[indices][..., None, :] if "bias" in self else y
