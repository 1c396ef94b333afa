"""A safetensors file written from its first byte to its last, with no tensor kept.

Names, dtypes and shapes are known before any data is, so the header comes first and the data follows as it arrives. The
counterpart of ``safetensors_header``; the format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from gm_mlx.safetensors_header import DTYPE_BYTES, Entry

# What safetensors calls MLX's dtypes, and the other way round.
DTYPE_NAMES = {
    mx.bool_: "BOOL", mx.uint8: "U8", mx.uint16: "U16", mx.uint32: "U32", mx.uint64: "U64", mx.int8: "I8",
    mx.int16: "I16", mx.int32: "I32", mx.int64: "I64", mx.float16: "F16", mx.bfloat16: "BF16", mx.float32: "F32",
    mx.complex64: "C64",
}  # fmt: skip
MLX_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


def num_bytes(entry: Entry) -> int:
    """Bytes that a tensor takes in a file."""
    return DTYPE_BYTES[entry.dtype] * math.prod(entry.shape)


def bytes_of(array: mx.array) -> memoryview:
    """An array's bytes, little-endian as on every machine that MLX runs on; not copied where they lie in order."""
    bits = np.asarray(array.view(BITS[array.itemsize]))  # NumPy has no bfloat16
    return np.ascontiguousarray(bits).reshape(-1).view(np.uint8).data


def write_safetensors(path: Path, entries: Mapping[str, Entry], data: Iterable[memoryview]) -> str:
    """Write a file that does not exist yet.

    Args:
        path: the file.
        entries: dtype and shape of each tensor, in the order of their data.
        data: the bytes of all tensors, in pieces of any length.

    Returns:
        The file's SHA-256 in hexadecimal.

    Raises:
        OSError: the file exists or cannot be written.
        ValueError: there is more or less data than the entries announce.
    """
    table: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name, entry in entries.items():
        begin, end = end, end + num_bytes(entry)
        table[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # so that the data begins at a multiple of 8
    digest = hashlib.sha256()
    written = 0
    with open(path, "xb") as file:
        prefix = struct.pack("<Q", len(header)) + header
        file.write(prefix)
        digest.update(prefix)
        for piece in data:
            file.write(piece)
            digest.update(piece)
            written += piece.nbytes
            del piece  # before the next one is made
    if written != end:
        raise ValueError(f"{path}: {written} bytes of tensors where {end} were announced")
    return digest.hexdigest()
