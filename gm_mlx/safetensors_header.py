"""A safetensors file's table of contents, checked before MLX reads the file.

A downloaded file can be cut short or be something else altogether, and MLX believes what the header says. So every file
goes through this check first, which is plain Python over a few kilobytes and follows the rules of the format:
https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from gm_mlx.errors import UserError

# Bytes per element of the dtypes that MLX reads.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "U16": 2, "U32": 4, "U64": 8, "I8": 1, "I16": 2, "I32": 4, "I64": 8,
    "F16": 2, "BF16": 2, "F32": 4, "C64": 8,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMENSION = 2**31 - 1  # MLX keeps dimensions in 32 bits


class Entry(NamedTuple):
    """One tensor of a file: its safetensors dtype, such as "BF16", and its shape."""

    dtype: str
    shape: tuple[int, ...]


def check_header(path: Path) -> dict[str, Entry]:
    """Read and check the header of a safetensors file.

    Args:
        path: the file.

    Returns:
        Tensor names with dtype and shape, in the file's order.

    Raises:
        UserError: the file is missing, cut short, not safetensors, or its table does not describe its bytes exactly.
            The message names the file, and the tensor where there is one.
    """
    try:
        header, data_bytes = _read_header(Path(path))
        table = json.loads(header, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
        if not isinstance(table, dict):
            raise ValueError("its header is not a JSON object")
        _check_metadata(table.pop("__metadata__", None))
        spans = {name: _check_entry(name, entry) for name, entry in table.items()}
        _check_layout(spans, data_bytes)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        reason = "its header is not valid JSON" if isinstance(error, (json.JSONDecodeError, RecursionError)) else error
        raise UserError(f"{path}: {reason}; fetch or convert the file again") from None
    return {name: Entry(table[name]["dtype"], tuple(table[name]["shape"])) for name in table}


def _read_header(path: Path) -> tuple[str, int]:
    """The header's text and the number of data bytes behind it."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError(f"has {size} bytes and is not a safetensors file")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES:
            raise ValueError("is not a safetensors file")
        header = file.read(length)
    if len(header) < length:
        raise ValueError(f"is cut short: its header needs {8 + length} bytes and the file has {size}")
    if not header.startswith(b"{"):
        raise ValueError("is not a safetensors file")
    return header.decode("utf-8"), size - 8 - length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("its header names a key twice")
    return table


def _no_constant(name: str) -> None:
    raise ValueError(f"its header is not valid JSON ({name})")


def _check_metadata(metadata: Any) -> None:
    if metadata is None:  # as MLX writes it
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ is not a table of strings")
    for key, value in metadata.items():
        _check_text(key)
        _check_text(value)


def _check_text(text: str) -> None:
    """Refuse half a surrogate pair, which Python's JSON reader lets through and MLX's does not."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("its header holds text that is not Unicode") from None


def _check_entry(name: str, entry: Any) -> tuple[int, int]:
    """Check one tensor by itself; returns where its bytes begin and end."""
    _check_text(name)
    if not isinstance(entry, dict):
        raise ValueError(f"tensor {name!r} has no description")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"tensor {name!r} has dtype {dtype!r}, which is not one of {list(DTYPE_BYTES)}")
    if not isinstance(shape, list) or not _are_counts(shape) or any(n > MAX_DIMENSION for n in shape):
        raise ValueError(f"tensor {name!r} has no valid shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not _are_counts(offsets):
        raise ValueError(f"tensor {name!r} has no valid data_offsets")
    begin, end = offsets
    needed = DTYPE_BYTES[dtype] * math.prod(shape)
    if end - begin != needed:
        raise ValueError(f"tensor {name!r} needs {needed} bytes but its data_offsets hold {end - begin}")
    return begin, end


def _are_counts(values: Iterable[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _check_layout(spans: dict[str, tuple[int, int]], data_bytes: int) -> None:
    """The tensors must cover the data from its first to its last byte, without holes and without overlap."""
    position = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != position:
            raise ValueError(f"tensor {name!r} begins at byte {begin} of the data where byte {position} was due")
        position = end
    if position > data_bytes:
        raise ValueError(f"is cut short: its tensors need {position} bytes and it holds {data_bytes}")
    if position < data_bytes:
        raise ValueError(f"holds {data_bytes - position} bytes that belong to no tensor")
