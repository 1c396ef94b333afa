"""A GGUF file's metadata and table of tensors, checked before llama.cpp reads the file.

llama.cpp is C++: of some faults in a file it says so, at others it ends the whole process. So every file goes through
this reader first, which is plain Python, believes no number that the file's size does not bear out, and follows the
rules of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gm_mlx.errors import UserError

# What ggml numbers its tensor types: name, values in a block, bytes of a block. Numbers that are missing were given up.
TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 22: ("IQ2_S", 256, 82), 18: ("IQ3_XXS", 256, 98),
    21: ("IQ3_S", 256, 110), 19: ("IQ1_S", 256, 50), 29: ("IQ1_M", 256, 56), 20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18),
}  # fmt: skip

# What GGUF numbers its kinds of values: name, and NumPy's dtype where all values have one size.
KINDS = {
    0: ("uint8", "<u1"), 1: ("int8", "<i1"), 2: ("uint16", "<u2"), 3: ("int16", "<i2"), 4: ("uint32", "<u4"),
    5: ("int32", "<i4"), 6: ("float32", "<f4"), 7: ("bool", "|b1"), 8: ("string", None), 9: ("array", None),
    10: ("uint64", "<u8"), 11: ("int64", "<i8"), 12: ("float64", "<f8"),
}  # fmt: skip

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Bounds far above any file that makes sense, so that a wrong number cannot fill the memory.
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 20
MAX_ELEMENTS = 1 << 24
MAX_STRING = 1 << 24
MAX_NAME = 63  # bytes; ggml has room for so many
SHOWN = 300  # characters of an error that come from the file
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32
AGAIN = "download it again"


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a file.

    Attributes:
        type: ggml's name of its type, such as "F16" or "Q4_K".
        shape: as NumPy and PyTorch write it; the file has it the other way round.
        offset: where its bytes begin in the file.
        nbytes: how many they are.
    """

    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says about itself.

    Attributes:
        path: the file.
        metadata: bool, int, float, str, or a list of one of these, by key.
        tensors: its tensors by name, in the file's order.
        kinds: the format's own type of each value, such as "uint32" or "array of string".
        alignment: what the places of tensors are multiples of.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    kinds: dict[str, str] = field(repr=False)
    alignment: int = DEFAULT_ALIGNMENT


def read_header(path: str | Path) -> GGUFHeader:
    """Read and check all of a GGUF file but the values of its tensors.

    Args:
        path: a little-endian file of version 2 or 3.

    Raises:
        UserError: the file is missing, cut short, not GGUF, or contradicts itself. The message names the file, the key
            or tensor, and the remedy.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise _Fault(f"has {size} bytes and is not a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _read(path, _Reader(content))
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, not a GGUF file; name a file in it") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except _Fault as fault:
        # Names in a damaged file can be anything: line breaks, and megabytes of it.
        shown = "".join(character if character.isprintable() else "?" for character in str(fault)[:SHOWN])
        raise UserError(f"{path}: {shown}; {fault.remedy}") from None


class _Fault(Exception):
    """What is wrong with a file, and what helps."""

    def __init__(self, what: str, remedy: str = AGAIN) -> None:
        super().__init__(what)
        self.remedy = remedy


class _Reader:
    """Takes values from the front of a file, and none that would reach beyond its end."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content = content
        self.size = len(content)
        self.at = 0

    def take(self, count: int, what: str) -> int:
        """Claim the next ``count`` bytes; returns where they begin."""
        start = self.at
        if count > self.size - start:
            raise _Fault(f"is cut short or damaged at {what}")
        self.at = start + count
        return start

    def number(self, form: str, what: str) -> Any:
        """One number of a format of ``struct``."""
        return struct.unpack_from(form, self.content, self.take(struct.calcsize(form), what))[0]

    def text(self, what: str, longest: int = MAX_STRING) -> bytes:
        """One string, as bytes."""
        length = self.number("<Q", what)
        if length > longest:
            raise _Fault(f"is damaged at {what}: {length} bytes of text")
        start = self.take(length, what)
        return self.content[start : start + length]

    def name(self, what: str) -> str:
        """One string that identifies something."""
        try:
            return self.text(what, longest=1 << 16).decode("utf-8")
        except UnicodeDecodeError:
            raise _Fault(f"is damaged at {what}: a name that is no text") from None

    def texts(self, count: int, what: str) -> list[str]:
        """Many strings. A vocabulary has hundreds of thousands, so this loop does nothing twice."""
        content, size, at = self.content, self.size, self.at
        unpack = struct.Struct("<Q").unpack_from
        out = []
        for _ in range(count):
            if size - at < 8:
                raise _Fault(f"is cut short or damaged at {what}")
            (length,) = unpack(content, at)
            at += 8
            if length > size - at or length > MAX_STRING:
                raise _Fault(f"is cut short or damaged at {what}")
            out.append(content[at : at + length].decode("utf-8", errors="replace"))
            at += length
        self.at = at
        return out


def _read(path: Path, reader: _Reader) -> GGUFHeader:
    if reader.content[reader.take(4, "the beginning") : 4] != MAGIC:
        raise _Fault("is not a GGUF file")
    version = reader.number("<I", "the version")
    if version not in VERSIONS:
        swapped = struct.unpack(">I", struct.pack("<I", version))[0] in VERSIONS
        reason = "is written for big-endian machines" if swapped else f"is GGUF of version {version}, not 2 or 3"
        raise _Fault(reason)
    tensor_count = reader.number("<Q", "the number of tensors")
    key_count = reader.number("<Q", "the number of keys")
    if tensor_count > MAX_TENSORS or key_count > MAX_KEYS:
        raise _Fault(f"is damaged: it would have {tensor_count} tensors and {key_count} keys")
    metadata: dict[str, Any] = {}
    kinds: dict[str, str] = {}
    for index in range(key_count):
        key = reader.name(f"key {index + 1} of {key_count}")
        if not key or key in metadata:
            raise _Fault(f"names the key {key!r} twice" if key else f"has no name for key {index + 1}")
        metadata[key], kinds[key] = _value(reader, key)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if kinds.get("general.alignment", "uint32") != "uint32" or alignment.bit_count() != 1 or alignment < 8:
        raise _Fault(f"general.alignment is {alignment!r} and not a power of two")
    entries = [_entry(reader, index, tensor_count) for index in range(tensor_count)]
    return GGUFHeader(path, metadata, _placed(entries, reader, alignment), kinds, alignment)


def _value(reader: _Reader, key: str) -> tuple[Any, str]:
    """The value of a key, and its kind."""
    name, dtype = _kind(reader, key)
    if name == "string":
        return reader.text(key).decode("utf-8", errors="replace"), name
    if name != "array":
        return _numbers(reader, key, dtype, 1)[0], name
    name, dtype = _kind(reader, key)
    count = reader.number("<Q", key)
    if name == "array" or count > MAX_ELEMENTS:
        raise _Fault(f"is damaged at {key}: " + ("a list of lists" if name == "array" else f"a list of {count}"))
    values = reader.texts(count, key) if name == "string" else _numbers(reader, key, dtype, count)
    return values, f"array of {name}"


def _kind(reader: _Reader, key: str) -> tuple[str, str]:
    number = reader.number("<I", key)
    if number not in KINDS:
        raise _Fault(f"is damaged at {key}: values of kind {number}")
    name, dtype = KINDS[number]
    return name, dtype or ""


def _numbers(reader: _Reader, key: str, dtype: str, count: int) -> list[Any]:
    width = np.dtype(dtype).itemsize
    start = reader.take(width * count, key)
    raw = np.frombuffer(reader.content[start : start + width * count], "|u1" if dtype == "|b1" else dtype)
    return (raw != 0).tolist() if dtype == "|b1" else raw.tolist()


def _entry(reader: _Reader, index: int, count: int) -> tuple[str, str, tuple[int, ...], int, int]:
    """One line of the table of tensors: name, type, shape, bytes, and the place among the values."""
    name = reader.name(f"tensor {index + 1} of {count}")
    if not name or len(name.encode()) > MAX_NAME:
        raise _Fault(f"is damaged: tensor {index + 1} is called {name[:80]!r}")
    dimensions = reader.number("<I", f"tensor {name!r}")
    if dimensions > MAX_DIMENSIONS:
        raise _Fault(f"is damaged: tensor {name!r} has {dimensions} dimensions")
    sizes = tuple(reader.number("<Q", f"tensor {name!r}") for _ in range(dimensions))
    if math.prod(sizes) >= 1 << 63 or not all(0 < size < 1 << 63 for size in sizes):
        raise _Fault(f"is damaged: tensor {name!r} has the shape {list(sizes)}")
    number = reader.number("<I", f"tensor {name!r}")
    if number not in TENSOR_TYPES:
        raise _Fault(f"tensor {name!r} has type {number}, which is not known here", f"update gm-mlx, or {AGAIN}")
    kind, block, width = TENSOR_TYPES[number]
    if (sizes[0] if sizes else 1) % block:
        raise _Fault(f"is damaged: tensor {name!r} has rows of {sizes[:1]} values, not multiples of {block} ({kind})")
    offset = reader.number("<Q", f"tensor {name!r}")
    return name, kind, sizes[::-1], math.prod(sizes) // block * width, offset


def _placed(
    entries: list[tuple[str, str, tuple[int, ...], int, int]], reader: _Reader, alignment: int
) -> dict[str, GGUFTensor]:
    """Tensors with their places in the file: one behind the other without gaps, and all inside it."""
    start = -(-reader.at // alignment) * alignment
    due = 0
    tensors: dict[str, GGUFTensor] = {}
    for name, kind, shape, nbytes, offset in entries:
        if name in tensors:
            raise _Fault(f"names the tensor {name!r} twice")
        if offset != due:
            raise _Fault(f"is damaged: tensor {name!r} is said to begin at byte {offset} of the values, not at {due}")
        if start + offset + nbytes > reader.size:
            raise _Fault(
                f"is cut short: tensor {name!r} needs {start + offset + nbytes} bytes, and the file has {reader.size}"
            )
        tensors[name] = GGUFTensor(kind, shape, start + offset, nbytes)
        due += -(-nbytes // alignment) * alignment
    return tensors
