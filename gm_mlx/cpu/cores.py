"""Work for all cores, and the bridge between MLX's arrays and NumPy's."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from threadpoolctl import ThreadpoolController

CORES = os.cpu_count() or 1
POOL = ThreadPoolExecutor(CORES, thread_name_prefix="gm-mlx-cpu")  # NumPy works outside the interpreter lock
# Each core multiplies what it has just made, so BLAS must not spread one product over all of them: its threads would
# spin while they wait for each other, for seconds when another program has the core. BLAS counts its threads per
# process, hence the lock.
BLAS = ThreadpoolController()
BLAS_LOCK = threading.Lock()

Forward = Callable[..., tuple[np.ndarray, Any]]
Backward = Callable[[np.ndarray, Any], Sequence[np.ndarray]]


@contextmanager
def one_core() -> Iterator[None]:
    """Products within this block are made on the core that asks for them; with ``spread``, on all of those."""
    with BLAS_LOCK, BLAS.limit(limits=1, user_api="blas"):
        yield


def spread(work: Callable[[Iterator[Any]], None], items: Iterable[Any]) -> None:
    """Run ``work`` on every core.

    Args:
        work: takes items until there are none. All cores share the iterator: one that has finished takes the next.
        items: what there is to do. Not a generator, which cannot be asked by two at a time.
    """
    shared = iter(items)
    with one_core():
        list(POOL.map(lambda _: work(shared), range(CORES)))


def to_numpy(array: mx.array) -> np.ndarray:
    """The values of an array as float32, without a copy where they are."""
    return np.asarray(array if array.dtype == mx.float32 else array.astype(mx.float32))


def is_known(*arrays: mx.array) -> bool:
    """Whether arrays can be given values now, which inside ``mx.compile`` they cannot."""
    try:
        mx.eval(*arrays)
    except ValueError:
        return False
    return True


def numpy_function(forward: Forward, backward: Backward, *inputs: mx.array) -> mx.array:
    """A function that NumPy computes, and its gradient.

    Args:
        forward: of float32 arrays, the inputs: the result, and what the gradient needs.
        backward: of the gradient of the result and what ``forward`` left for it: gradients of all inputs.
        inputs: arrays that ``is_known`` has found to be known.

    Returns:
        The result in the first input's dtype.
    """
    kept = []

    @mx.custom_function
    def call(*inputs: mx.array) -> mx.array:
        y, needed = forward(*map(to_numpy, inputs))
        kept.append(needed)
        return mx.array(y).astype(inputs[0].dtype)

    @call.vjp
    def of_inputs(inputs: Any, cotangent: mx.array, output: mx.array) -> Any:
        gradients = backward(to_numpy(cotangent), kept[0])
        given = inputs if isinstance(inputs, list | tuple) else (inputs,)
        found = tuple(mx.array(g).astype(x.dtype) for g, x in zip(gradients, given, strict=True))
        return found if len(found) > 1 else found[0]

    return call(*inputs)  # type: ignore[return-value]


def recomputed(function: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
    """A function of MLX's own operations, of which only the input is kept for the gradient, and not each step."""

    @mx.custom_function
    def call(x: mx.array) -> mx.array:
        return released([function(x)])[0]

    @call.vjp
    def of_input(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        return released(mx.vjp(function, [x], [cotangent])[1])[0]

    return call(x)  # type: ignore[return-value]


def released(arrays: Sequence[mx.array]) -> list[mx.array]:
    """The same numbers in arrays that do not know what they came from, and so do not keep it."""
    mx.eval(arrays)
    # NumPy has no bfloat16.
    wide = [array.astype(mx.float32) if array.dtype == mx.bfloat16 else array for array in arrays]
    return [mx.array(np.array(w)).astype(array.dtype) for w, array in zip(wide, arrays, strict=True)]
