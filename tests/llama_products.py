"""What llama.cpp multiplies its matrices with, seen from inside its graph as its own ``llama-imatrix`` sees it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp._ggml import libggml


class GGMLTensor(ctypes.Structure):
    """``struct ggml_tensor`` of ggml.h."""


GGMLTensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(GGMLTensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]
libggml.ggml_op_desc.argtypes, libggml.ggml_op_desc.restype = [ctypes.POINTER(GGMLTensor)], ctypes.c_char_p


class Products:
    """Sums of x^2 per input channel of each matrix, float64 [E, C], and rows that came in, int64 [E]."""

    def __init__(self) -> None:
        self.sums: dict[str, np.ndarray] = {}
        self.counts: dict[str, np.ndarray] = {}

    def see(self, address: int, asked: bool, _: Any) -> bool:
        """The callback ``cb_eval``: says which results it wants, and is called again when they are there."""
        tensor = ctypes.cast(address, ctypes.POINTER(GGMLTensor))
        kind = libggml.ggml_op_desc(tensor).decode()
        if kind not in ("MUL_MAT", "MUL_MAT_ID"):
            return False
        matrix, inputs = tensor[0].src[0][0], tensor[0].src[1][0]
        name = matrix.name.decode()
        if not (name.startswith("blk.") and name.endswith(".weight")):
            return False
        if asked:
            return True
        x = values(inputs, np.float32)  # [.., n, C]
        count = matrix.ne[2]
        if kind == "MUL_MAT":
            rows = x.reshape(-1, x.shape[-1])
            experts = np.zeros(len(rows), int)
        else:
            ids = values(tensor[0].src[2][0], np.int32)[0, 0]  # [T, k]
            x = np.broadcast_to(
                x[0], (*ids.shape, x.shape[-1])
            )  # one input for all of a token's experts, or each its own
            rows, experts = x.reshape(-1, x.shape[-1]), ids.reshape(-1)
        sums = np.stack([np.square(rows[experts == e], dtype=np.float64).sum(axis=0) for e in range(count)])
        self.sums[name] = self.sums.get(name, 0) + sums
        self.counts[name] = self.counts.get(name, 0) + np.bincount(experts, minlength=count)
        return True


def values(tensor: Any, dtype: type) -> np.ndarray:
    """A tensor's values in NumPy's order, four axes."""
    assert dtype != np.float32 or tensor.type == 0
    count = sum((n - 1) * stride for n, stride in zip(tensor.ne, tensor.nb, strict=True)) + np.dtype(dtype).itemsize
    raw = (ctypes.c_char * count).from_address(tensor.data)
    return np.ndarray(tuple(tensor.ne)[::-1], dtype, raw, strides=tuple(tensor.nb)[::-1]).copy()


@contextmanager
def watched(products: Products) -> Iterator[None]:
    """Every context that llama.cpp makes in here is watched."""
    make = llama_cpp.llama_init_from_model
    callback = llama_cpp.llama_cpp.ggml_backend_sched_eval_callback(products.see)

    def watching(model: Any, options: Any) -> Any:
        options.cb_eval = callback
        return make(model, options)

    llama_cpp.llama_init_from_model = watching
    try:
        yield
    finally:
        llama_cpp.llama_init_from_model = make
