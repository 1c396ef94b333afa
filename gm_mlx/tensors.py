"""Tensors that are not in memory yet: what converting and quantizing pass from a file to a file, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from gm_mlx.errors import UserError
from gm_mlx.safetensors_header import check_header

BLOCK_BYTES = 32 << 20  # of a tensor's rows, cast and quantized at a time


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file, or one that is made of some.

    Attributes:
        dtype: its name in safetensors, such as "BF16".
        shape: its shape.
        read: brings the values; every call reads anew, so nothing stays in memory that the caller does not keep.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], mx.array]


def open_safetensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors of safetensors files, whose headers are checked now and whose data is read later.

    Raises:
        UserError: a file is damaged, or two files hold a tensor of the same name.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, entry in check_header(file).items():
            if name in tensors:
                raise UserError(f"{file}: tensor {name!r} is in another shard too; fetch or convert the model again")
            tensors[name] = Tensor(entry.dtype, entry.shape, _reader(file, name))
    return tensors


def _reader(file: Path, name: str) -> Callable[[], mx.array]:
    # MLX keeps what it has read in the array, so each call asks for arrays of its own: a header costs a millisecond.
    return lambda: mx.load(str(file))[name]  # type: ignore[index,call-overload,return-value]


def row_blocks(array: mx.array) -> Iterator[mx.array]:
    """The rows of a tensor [..., C], some at a time, as arrays [n, C]; a vector is one row."""
    # Stacked experts are taken one by one: they may be views of one matrix, which no step here needs to copy.
    for matrix in array if array.ndim == 3 else [array]:
        rows = matrix.reshape(-1, matrix.shape[-1]) if matrix.ndim > 1 else matrix.reshape(1, -1)
        step = max(1, BLOCK_BYTES // max(1, rows.itemsize * rows.shape[1]))
        for start in range(0, rows.shape[0], step):
            yield rows[start : start + step]
