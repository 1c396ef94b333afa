"""Tensors that are not in memory yet: what converting and quantizing pass from a file to a file, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from gm_mlx.errors import UserError
from gm_mlx.safetensors_header import check_header


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
