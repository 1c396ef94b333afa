"""Attention in NumPy, on all cores, with its gradient.

MLX's CPU backend makes a matrix of all scores on one core, and spends 14 ns on each of them and 20 on its gradient.
Here a core takes some queries of a head at a time, and only the keys that they may see. Scores are not kept for the
gradient but computed once more: the logarithm of each sum of exponentials is enough to have the probabilities back
(FlashAttention, Dao et al. 2022, algorithm 1 and appendix B).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from gm_mlx.cpu.cores import is_known, numpy_function, spread
from gm_mlx.decoder import Attention as DecoderAttention
from gm_mlx.vision import Attention as TowerAttention

# Queries at a time: their scores fit a core's own cache.
QUERIES = 128
# Scores below which MLX's kernels run.
WORTH = 2**15


class FastDecoderAttention(DecoderAttention):
    def attend(self, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | str | None, cache: Any) -> mx.array:
        # A quantized cache gives tuples; a mask that is an array is a sliding window's.
        plain = isinstance(k, mx.array) and (mask is None or isinstance(mask, str))
        if not plain or not _pays(q, k, v):
            return super().attend(q, k, v, mask, cache)
        return attention(q, k, v, self.scale, causal=mask is not None)


class FastTowerAttention(TowerAttention):
    def attend(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return attention(q, k, v, self.scale, causal=False) if _pays(q, k, v) else super().attend(q, k, v)


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, causal: bool) -> mx.array:
    """``mx.fast.scaled_dot_product_attention``.

    Args:
        q: queries [B, H, L, D].
        k: keys [B, Hkv, S, D]; each of them serves H / Hkv heads.
        v: values [B, Hkv, S, D].
        scale: of the scores.
        causal: the last query sees all keys, the one before it all but the last, and so on.

    Returns:
        [B, H, L, D].
    """

    def forward(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, Heads]:
        heads = Heads(q * np.float32(scale), k, v, causal, np.empty(q.shape[:3], np.float32))
        return heads.forward(), heads

    def backward(dy: np.ndarray, heads: Heads) -> tuple[np.ndarray, ...]:
        dq, dk, dv = heads.backward(dy)
        return dq * np.float32(scale), dk, dv

    return numpy_function(forward, backward, q, k, v).swapaxes(1, 2)


class Heads(NamedTuple):
    """Attention of all heads.

    Attributes:
        q: scaled queries [B, H, L, D].
        k: [B, Hkv, S, D].
        v: [B, Hkv, S, D].
        causal: see ``attention``.
        sums: the logarithms of the sums of exponentials, [B, H, L]; ``forward`` writes them.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    causal: bool
    sums: np.ndarray

    def forward(self) -> np.ndarray:
        """[B, L, H, D], as the next layer reads it."""
        batch, heads, length, size = self.q.shape
        y = np.empty((batch, length, heads, size), np.float32)

        def work(items: Iterator[tuple[int, int, int]]) -> None:
            for row, head, start in items:
                queries, keys = self._slices(start)
                _, v = self._of(row, head)
                p = self._scores(row, head, queries, keys)  # [n, keys]
                top = p.max(axis=1, keepdims=True)
                p -= top
                np.exp(p, out=p)
                total = p.sum(axis=1, keepdims=True)
                np.divide(p @ v[keys], total, out=y[row, queries, head])
                self.sums[row, head, queries] = (top + np.log(total))[:, 0]

        spread(work, list(product(range(batch), range(heads), range(0, length, QUERIES))))
        return y

    def backward(self, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gradients of q, k and v from that of the result, [B, L, H, D]."""
        batch, heads, length, size = self.q.shape
        shared, keys_length = self.k.shape[1:3]
        dq = np.empty(self.q.shape, np.float32)
        dk, dv = (np.zeros((batch, heads, keys_length, size), np.float32) for _ in range(2))

        def work(items: Iterator[tuple[int, int]]) -> None:
            for row, head in items:
                k, v = self._of(row, head)
                for start in range(0, length, QUERIES):
                    queries, keys = self._slices(start)
                    p = self._scores(row, head, queries, keys)
                    p -= self.sums[row, head, queries, None]
                    np.exp(p, out=p)
                    of_y = dy[row, queries, head]
                    dv[row, head, keys] += p.T @ of_y
                    ds = of_y @ v[keys].T
                    ds -= np.einsum("ij,ij->i", p, ds)[:, None]
                    ds *= p
                    np.matmul(ds, k[keys], out=dq[row, head, queries])
                    dk[row, head, keys] += ds.T @ self.q[row, head, queries]

        spread(work, list(product(range(batch), range(heads))))
        dk, dv = (d.reshape(batch, shared, -1, keys_length, size).sum(axis=2) for d in (dk, dv))
        return dq, dk, dv

    def _slices(self, start: int) -> tuple[slice, slice]:
        """Some queries, and the keys that they see."""
        length, keys = self.q.shape[2], self.k.shape[2]
        stop = min(start + QUERIES, length)
        return slice(start, stop), slice(keys - length + stop if self.causal else keys)

    def _of(self, row: int, head: int) -> tuple[np.ndarray, np.ndarray]:
        """The keys and values of a head."""
        shared = head * self.k.shape[1] // self.q.shape[1]
        return self.k[row, shared], self.v[row, shared]

    def _scores(self, row: int, head: int, queries: slice, keys: slice) -> np.ndarray:
        """[n, keys], minus infinity where a query does not see a key."""
        scores = self.q[row, head, queries] @ self._of(row, head)[0][keys].T
        if self.causal:
            count = len(scores)
            scores[:, -count:] += np.triu(np.full((count, count), -np.inf, np.float32), 1)
        return scores


def _pays(q: mx.array, k: mx.array, v: mx.array) -> bool:
    batch, heads, length, _ = q.shape
    return batch * heads * length * k.shape[2] >= WORTH and is_known(q, k, v)
