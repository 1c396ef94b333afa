"""PyTorch's files (``pytorch_model.bin`` and its kin) without PyTorch: tensors by name, each read when it is asked for.

Such a file is a zip archive whose members are stored and not compressed: ``data.pkl`` describes the tensors, and
``data/0``, ``data/1``, ... hold the bytes of their storages (torch/serialization.py). A tensor is a view of a storage:
an offset, a shape and strides. The description is read by ``restricted_pickle``, so that nothing in a file can run.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import mlx.core as mx
import numpy as np

from gm_mlx.convert.restricted_pickle import Named, Refused, read_pickle
from gm_mlx.errors import UserError
from gm_mlx.safetensors_header import MAX_DIMENSION
from gm_mlx.tensors import Tensor

MAX_PICKLE_BYTES = 32 << 20  # a description of 5,000 tensors takes 1 MB
WRAPPERS = ("state_dict", "module", "model")  # what trainers put a state dict into
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field
ENCRYPTED = 1


class Dtype(NamedTuple):
    """How a dtype of PyTorch is read: as which safetensors dtype, from which bytes, into which MLX array."""

    safetensors: str
    stored: str
    array: mx.Dtype


DTYPES = {
    "float32": Dtype("F32", "<f4", mx.float32),
    "float16": Dtype("F16", "<f2", mx.float16),
    "bfloat16": Dtype("BF16", "<u2", mx.bfloat16),  # NumPy has no bfloat16: its bits travel as whole numbers
    "float64": Dtype("F32", "<f8", mx.float32),  # a model folder has no float64
    "int64": Dtype("I64", "<i8", mx.int64),
    "int32": Dtype("I32", "<i4", mx.int32),
    "int16": Dtype("I16", "<i2", mx.int16),
    "int8": Dtype("I8", "<i1", mx.int8),
    "uint8": Dtype("U8", "<u1", mx.uint8),
    "uint16": Dtype("U16", "<u2", mx.uint16),
    "uint32": Dtype("U32", "<u4", mx.uint32),
    "uint64": Dtype("U64", "<u8", mx.uint64),
    "bool": Dtype("BOOL", "|b1", mx.bool_),
    "complex64": Dtype("C64", "<c8", mx.complex64),
}
# Known by name, so that the message can say which tensor has one.
UNREADABLE_DTYPES = (
    "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2",
    "complex128", "complex32", "qint8", "quint8", "qint32", "quint4x2", "quint2x4",
)  # fmt: skip

STORAGES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
UNTYPED = "untyped"  # a storage of bytes; the tensor's own dtype says what they are


class Storage(NamedTuple):
    """A storage as the pickle describes it: a dtype or ``UNTYPED``, its member, and its elements (or bytes)."""

    dtype: str
    key: str
    size: int


class View(NamedTuple):
    """A tensor as the pickle describes it; offset and strides count elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Span:
    """Where a view's elements lie in the file: from byte ``start``, ``count`` elements from the first to the last."""

    path: Path
    name: str
    start: int
    count: int
    view: View


def open_torch(files: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors of PyTorch files, whose descriptions are checked now and whose data is read later.

    Args:
        files: zip archives as ``torch.save`` writes them since PyTorch 1.6. A state dict may lie in ``state_dict``,
            ``module`` or ``model`` of a larger dict; what is not a tensor is passed over.

    Returns:
        Tensors by name. float64 is read as float32.

    Raises:
        UserError: a file is damaged, of the old format, holds anything but a state dict, or repeats a name. Nothing in
            it has run.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        found = _open_file(Path(file))
        if twice := sorted(tensors.keys() & found.keys()):
            raise UserError(f"{file}: tensor {twice[0]!r} is in another shard too; fetch or convert the model again")
        tensors |= found
    return tensors


def _open_file(path: Path) -> dict[str, Tensor]:
    try:
        with open(path, "rb") as file:
            _check_kind(path, file)
            with zipfile.ZipFile(file) as archive:
                members = _members(archive)
                pickle = members.get("data.pkl")
                if pickle is None:
                    raise ValueError("it is a zip archive without data.pkl")
                if pickle.file_size > MAX_PICKLE_BYTES:
                    raise ValueError(f"its data.pkl has {pickle.file_size:,} bytes")
                if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
                    raise UserError(f"{path}: was written on a big-endian machine; save it again on another")
                views = _state_dict(read_pickle(archive.read(pickle), KNOWN, _storage))
            return {name: _tensor(path, file, members, name, view) for name, view in views.items()}
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Refused as error:
        remedy = "nothing of it was run; save the model's state_dict() alone"
        raise UserError(f"{path}: {_one_line(error)}; {remedy}") from None
    # A damaged archive or pickle can raise anything: struct.error, KeyError, UnicodeError, MemoryError, ...
    except Exception as error:
        reason = _one_line(error) if type(error) is ValueError else f"is damaged ({type(error).__name__})"
        raise UserError(f"{path}: not a PyTorch file that can be read: {reason}; fetch or save it again") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _check_kind(path: Path, file: BinaryIO) -> None:
    """Name the kinds of file that are met in the place of a zip archive."""
    start = file.read(64)
    if start.startswith(b"\x80"):
        again = f"f={path.name!r}; torch.save(torch.load(f, map_location='cpu', weights_only=True), f)"
        raise UserError(f'{path}: PyTorch\'s format before 1.6; save it again: python -c "import torch; {again}"')
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a Git LFS pointer and not the file itself; run `git lfs pull` in its folder")
    if not start.startswith(b"PK"):
        size = os.fstat(file.fileno()).st_size
        raise UserError(f"{path}: has {size} bytes and is not a PyTorch file; fetch it again")


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The archive's members without the folder that they all share."""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.partition("/")[2]
        if name in members:
            raise ValueError(f"it has two members {name[:100]!r}")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"its member {name[:100]!r} is compressed, as torch.save never does")
        if info.flag_bits & ENCRYPTED:
            raise ValueError(f"its member {name[:100]!r} is encrypted")
        members[name] = info
    return members


def _counts(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(n) is int and 0 <= n <= 2**62 for n in values)


def _storage(identity: Any) -> Storage:
    """The storage of a persistent id: ("storage", type, key, device, number of elements)."""
    kind, storage_type, key, _, size = identity
    if kind != "storage" or not isinstance(key, str) or not _counts((size,)):
        raise ValueError("its pickle describes a storage in an unknown way")
    return Storage(_dtype(storage_type), key, size)


def _dtype(named: Any) -> str:
    """The dtype that a global stands for: a storage type or a dtype itself."""
    if not isinstance(named, Named) or not isinstance(named.value, str):
        raise ValueError("its pickle describes a tensor without a dtype")
    return named.value


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any = False, hooks: Any = None, *rest: Any
) -> View:
    """``torch._utils._rebuild_tensor`` and its versions 2 and 3; version 3 gives the dtype first of ``rest``."""
    if not isinstance(storage, Storage) or not _counts((offset,)) or not _counts(shape) or not _counts(stride):
        raise ValueError("its pickle describes a tensor in an unknown way")
    dtype = storage.dtype
    if dtype == UNTYPED:
        dtype = _dtype(rest[0] if rest else None)
    if len(shape) != len(stride) or any(n > MAX_DIMENSION for n in shape):
        raise ValueError("its pickle describes a tensor without a valid shape")
    return View(storage, dtype, offset, shape, stride)


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    return data


# All that a state dict's pickle may ask for. The functions are ours and only note what they are given.
KNOWN: dict[str, Any] = {
    "collections.OrderedDict": lambda *items: {},
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch.Size": lambda *values: values,
    "torch.storage.UntypedStorage": UNTYPED,
    **{f"torch.{name}": dtype for name, dtype in STORAGES.items()},
    **{f"torch.{dtype}": dtype for dtype in (*DTYPES, *UNREADABLE_DTYPES)},
}


def _state_dict(root: Any) -> dict[str, View]:
    """The tensors of the object that was saved."""
    for _ in range(8):  # a dict can hold itself
        if not isinstance(root, dict):
            raise ValueError("it holds no state dict")
        if views := {name: value for name, value in root.items() if isinstance(value, View)}:
            for name in views:
                name.encode("utf-8")  # half a surrogate pair is no name
            return views
        inner = [root[key] for key in WRAPPERS if isinstance(root.get(key), dict)]
        if not inner:
            break
        root = inner[0]
    raise ValueError("it holds no tensors")


def _tensor(path: Path, file: BinaryIO, members: dict[str, zipfile.ZipInfo], name: str, view: View) -> Tensor:
    """Check a view against its storage and the storage against the file."""
    if view.dtype not in DTYPES:
        raise UserError(f"{path}: tensor {name!r} has dtype {view.dtype}; save it as bfloat16 or float16")
    dtype = DTYPES[view.dtype]
    width = np.dtype(dtype.stored).itemsize
    storage_bytes = view.storage.size * (1 if view.storage.dtype == UNTYPED else width)
    member = members.get(f"data/{view.storage.key}")
    if member is None or member.file_size != storage_bytes:
        there = "is not there" if member is None else f"has {member.file_size} bytes"
        raise UserError(f"{path}: the data of tensor {name!r} {there} instead of {storage_bytes} bytes; fetch it again")
    size = math.prod(view.shape)
    count = 1 + sum((n - 1) * step for n, step in zip(view.shape, view.stride, strict=True)) if size else 0
    if (view.offset + count) * width > storage_bytes:
        raise UserError(f"{path}: tensor {name!r} reaches beyond its storage; fetch or save it again")
    # torch.expand() makes many elements of one: a file of a kilobyte could ask for all memory.
    if size * width > storage_bytes:
        raise UserError(f"{path}: tensor {name!r} repeats its storage; save it again after .contiguous()")
    start = _data_offset(file, member) + view.offset * width
    return Tensor(dtype.safetensors, view.shape, partial(_read, Span(path, name, start, count, view)))


def _data_offset(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: behind its local header, whose padding the table of contents does not tell."""
    file.seek(member.header_offset)
    signature, name_length, extra_length = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    begin = member.header_offset + LOCAL_HEADER.size + name_length + extra_length
    if signature != b"PK\x03\x04" or begin + member.file_size > os.fstat(file.fileno()).st_size:
        raise ValueError("is cut short")
    return begin


def _read(span: Span) -> mx.array:
    """The values of a tensor, contiguous."""
    view = span.view
    dtype = DTYPES[view.dtype]
    if 0 in view.shape:
        return mx.zeros(view.shape, dtype=dtype.array)
    values: np.ndarray
    if span.count == math.prod(view.shape) and _is_contiguous(view) and view.dtype != "float64":
        # NumPy's view of an MLX array can be written to, so that the bytes go where they stay, without a copy.
        array = mx.zeros(view.shape, dtype=mx.uint16 if dtype.stored == "<u2" else dtype.array)
        mx.eval(array)
        values = np.array(array, copy=False)
        _fill(span, values)
        return array if array.dtype == dtype.array else array.view(dtype.array)
    values = np.empty(span.count, dtype=dtype.stored)
    _fill(span, values)
    # An axis of one element may have any stride.
    steps = tuple(step * values.itemsize if n > 1 else 0 for n, step in zip(view.shape, view.stride, strict=True))
    strided = np.lib.stride_tricks.as_strided(values, view.shape, steps, writeable=False)
    array = mx.array(np.ascontiguousarray(strided.astype(np.float32) if view.dtype == "float64" else strided))
    return array.view(dtype.array) if view.dtype == "bfloat16" else array


def _is_contiguous(view: View) -> bool:
    expected = 1
    for size, step in zip(reversed(view.shape), reversed(view.stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _fill(span: Span, values: np.ndarray) -> None:
    """Read bytes of the file into an array."""
    raw = values.reshape(-1).view(np.uint8)
    try:
        with open(span.path, "rb") as file:
            file.seek(span.start)
            if file.readinto(raw) == raw.nbytes:  # type: ignore[arg-type]
                return
    except OSError as error:
        raise UserError(f"{span.path}: cannot be read ({error.strerror or error})") from None
    raise UserError(f"{span.path}: tensor {span.name!r} is cut short; fetch the file again")
