"""The reader of GGUF headers, against gguf-py and against files that are damaged in every way."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_gguf import write, write_mmproj, write_text

from gm_mlx.errors import UserError
from gm_mlx.gguf_file import KINDS, TENSOR_TYPES, read_header

KEYS: dict[str, Any] = {"a.flag": True, "a.count": 7, "a.scale": 0.5, "a.text": "hällo\n", "a.list": [1, 2, 3]}
TENSORS = {"x.weight": np.arange(64, dtype=np.float32).reshape(2, 32), "y": np.ones(5, np.float16)}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "small.gguf", "arch", KEYS, TENSORS)


def test_types_are_those_of_gguf_py() -> None:
    known = {kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    assert {number: TENSOR_TYPES[number] for number in known} == known
    assert {number: name for number, (name, _) in KINDS.items()} == {
        kind.value: kind.name.lower() for kind in gguf.GGUFValueType
    }


def test_what_a_file_says(small: Path) -> None:
    header = read_header(small)
    assert header.metadata == {"general.architecture": "arch", **KEYS}
    assert header.kinds["a.count"] == "uint32" and header.kinds["a.list"] == "array of int32"
    assert list(header.tensors) == list(TENSORS)
    tensor = header.tensors["x.weight"]
    assert (tensor.type, tensor.shape, tensor.nbytes) == ("F32", (2, 32), 256)
    content = small.read_bytes()
    assert content[tensor.offset : tensor.offset + tensor.nbytes] == TENSORS["x.weight"].tobytes()


@pytest.mark.parametrize("make", [write_text, write_mmproj])
def test_models_are_read_as_gguf_py_reads_them(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path / "x.gguf")
    header, other = read_header(path), gguf.GGUFReader(path)
    assert header.metadata == {
        name: field.contents() for name, field in other.fields.items() if not name.startswith("GGUF.")
    }
    assert {name: (t.type, list(t.shape), t.offset, t.nbytes) for name, t in header.tensors.items()} == {
        t.name: (t.tensor_type.name, t.shape.tolist()[::-1], t.data_offset, t.n_bytes) for t in other.tensors
    }


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q6_K", "BF16"])
def test_quantized_tensors(tmp_path: Path, kind: str) -> None:
    number = gguf.GGMLQuantizationType[kind]
    block, width = gguf.GGML_QUANT_SIZES[number]
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "arch")
    writer.add_tensor("w", np.zeros((3, 256 // block * width), np.uint8), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = read_header(tmp_path / "x.gguf").tensors["w"]
    assert (tensor.type, tensor.shape, tensor.nbytes) == (kind, (3, 256), 3 * 256 // block * width)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def assembled(*parts: bytes, tensors: int = 0, keys: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts) + bytes(512)


u32 = struct.Struct("<I").pack
u64 = struct.Struct("<Q").pack

FAULTS = {
    "has 0 bytes and is not a GGUF file": b"",
    "has 9 bytes and is not a GGUF file": b"GGUF\3\0\0\0\0",
    "is not a GGUF file": assembled(magic=b"GGML"),
    "is GGUF of version 1, not 2 or 3": assembled(version=1),
    "is GGUF of version 99, not 2 or 3": assembled(version=99),
    "is written for big-endian machines": assembled(version=3 << 24),
    "it would have 0 tensors and 1099511627776 keys": assembled(keys=1 << 40),
    "it would have 18446744073709551615 tensors and 0 keys": assembled(tensors=2**64 - 1),
    "key 1 of 1: 18446744073709551615 bytes of text": assembled(u64(2**64 - 1), keys=1),
    "key 1 of 1: a name that is no text": assembled(u64(2), b"\xff\xfe", keys=1),
    "names the key 'k' twice": assembled(key("k", 4, u32(1)), key("k", 4, u32(1)), keys=2),
    "has no name for key 1": assembled(key("", 4, u32(1)), keys=1),
    "k: values of kind 13": assembled(key("k", 13, u32(1)), keys=1),
    "k: a list of lists": assembled(key("k", 9, u32(9) + u64(1)), keys=1),
    "k: a list of 4294967296": assembled(key("k", 9, u32(0) + u64(1 << 32)), keys=1),
    "is cut short or damaged at k": assembled(key("k", 9, u32(6) + u64(1 << 20)), keys=1),
    "cut short or damaged at many": assembled(key("many", 9, u32(8) + u64(3) + text("a") + u64(1 << 20)), keys=1),
    "general.alignment is 48 and not a power": assembled(key("general.alignment", 4, u32(48)), keys=1),
    "general.alignment is 0 and not a power": assembled(key("general.alignment", 4, u32(0)), keys=1),
    "general.alignment is 'x' and not a power": assembled(key("general.alignment", 8, text("x")), keys=1),
    "tensor 1 is called ''": assembled(tensor("", [1]), tensors=1),
    "tensor 1 is called 'nnnn": assembled(tensor("n" * 64, [1]), tensors=1),
    "tensor 'x' has 5 dimensions": assembled(tensor("x", [1] * 5), tensors=1),
    "tensor 'x' has the shape [0]": assembled(tensor("x", [0]), tensors=1),
    "tensor 'x' has the shape [4294967296, 4294967296]": assembled(tensor("x", [1 << 32, 1 << 32]), tensors=1),
    "tensor 'x' has type 4, which is not known here; update gm-mlx": assembled(tensor("x", [1], 4), tensors=1),
    "tensor 'x' has rows of (33,) values, not multiples of 32 (Q4_0)": assembled(tensor("x", [33], 2), tensors=1),
    "tensor 'x' is said to begin at byte 32 of the values, not at 0": assembled(tensor("x", [1], 0, 32), tensors=1),
    "tensor 'y' is said to begin at byte 4": assembled(tensor("x", [1]), tensor("y", [1], 0, 4), tensors=2),
    "names the tensor 'x' twice": assembled(tensor("x", [1]), tensor("x", [1], 0, 32), tensors=2),
    "is cut short: tensor 'x' needs 4194": assembled(tensor("x", [1 << 20]), tensors=1),
}


@pytest.mark.parametrize("message", FAULTS)
def test_faults(tmp_path: Path, message: str) -> None:
    (tmp_path / "x.gguf").write_bytes(FAULTS[message])
    with pytest.raises(UserError) as error:
        read_header(tmp_path / "x.gguf")
    line = str(error.value)
    assert line.startswith(f"{tmp_path / 'x.gguf'}: ") and message in line
    assert line.endswith("download it again") and "\n" not in line


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    for path, message in ((tmp_path, "a folder, not a GGUF file"), (tmp_path / "no", "No such file"), ("\0", "null")):
        with pytest.raises(UserError, match=message):
            read_header(path)


def test_text_that_is_not_unicode_is_read(tmp_path: Path) -> None:
    """Some vocabularies hold pieces of characters."""
    (tmp_path / "x.gguf").write_bytes(assembled(key("k", 8, u64(2) + b"a\xff"), keys=1))
    assert read_header(tmp_path / "x.gguf").metadata == {"k": "a\ufffd"}


def test_names_with_line_breaks_stay_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(assembled(key("a\nb" * 1000, 99, b""), keys=1))
    with pytest.raises(UserError) as caught:
        read_header(tmp_path / "x.gguf")
    assert "a?b" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


@given(data=st.data())
def test_damage_is_always_one_line(tmp_path_factory: pytest.TempPathFactory, small: Path, data: st.DataObject) -> None:
    content = bytearray(small.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]
    path = tmp_path_factory.mktemp("damaged") / "x.gguf"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert all(0 <= t.offset <= t.offset + t.nbytes <= len(content) for t in header.tensors.values())
