"""A GGUF file written tensor by tensor, with types that need no compiler: F32, F16, BF16, Q8_0 and Q4_0.

gguf-py writes the header and packs blocks. A tensor is read, packed some rows at a time, appended and let go, so memory
holds one tensor and a block of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from gm_mlx.convert.to_gguf.pieces import GGUFModel, Piece
from gm_mlx.convert.to_gguf.types import Target, component_of, fits
from gm_mlx.errors import UserError
from gm_mlx.tensors import row_blocks

if TYPE_CHECKING:
    from gguf import GGUFWriter

# Embedding and head quantize worse than what lies between, and a file of 4 bits has room for them.
EMBEDDINGS = {"Q4_0": "Q8_0"}
# Where rows do not divide into blocks.
FALLBACK = "F16"


def tensor_types(model: GGUFModel, target: Target) -> dict[str, str]:
    """The type of each tensor, by name, in a file that gguf-py writes."""
    return {
        piece.name: wanted if fits(wanted, piece.tensor.shape[-1]) else FALLBACK
        for piece in model.pieces
        for wanted in [_wanted_type(piece, target)]
    }


def _wanted_type(piece: Piece, target: Target) -> str:
    if piece.stored is not None or len(piece.tensor.shape) == 1:
        return piece.stored or "F32"
    if piece.name.startswith(("v.", "mm.")):
        return target.vision_types()["tower" if piece.name.startswith("v.") else "projector"]
    kind = target.tensor_type(piece.name)
    rule = component_of(piece.name) == "embeddings" and not target.components
    return EMBEDDINGS.get(kind, kind) if rule else kind


def file_bytes(model: GGUFModel, target: Target) -> int:
    """About how many bytes a file takes."""
    types = tensor_types(model, target)
    return sum(_num_bytes(piece.tensor.shape, types[piece.name]) for piece in model.pieces)


def write_gguf(
    path: Path, model: GGUFModel, target: Target, progress: Callable[[int], None] | None = None
) -> list[str]:
    """Write a file that does not exist yet.

    Args:
        path: the file.
        model: what goes into it.
        target: the types of its tensors, none of which needs llama.cpp.
        progress: called with the number of bytes of tensors just written.

    Returns:
        Notes for the user: matrices that have another type than asked for.

    Raises:
        UserError: a value does not fit float16.
        OSError: the file cannot be written.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    types = tensor_types(model, target)
    writer = GGUFWriter(path, model.arch)
    try:
        ours = {"gm.quantization": target.name, "general.file_type": target.file_type}
        keys = {**model.keys(), **ours, "general.quantization_version": 2}
        for key, value in keys.items():
            _add(writer, key, value)
        for piece in model.pieces:
            shape, name = piece.tensor.shape, types[piece.name]
            kind = GGMLQuantizationType[name]
            writer.add_tensor_info(piece.name, shape, np.dtype(np.float32), _num_bytes(shape, name), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file = writer.fout[0]
        for piece in model.pieces:
            writer.write_padding(file, file.tell())
            for block in _packed(piece, types[piece.name]):
                file.write(block.data)
                if progress:
                    progress(block.nbytes)
            mx.clear_cache()  # MLX keeps freed memory for arrays of the same size, and few are
        writer.write_padding(file, file.tell())
    finally:
        writer.close()
    return [
        f"{piece.name} is {FALLBACK}: its rows of {piece.tensor.shape[-1]} do not divide into blocks of 32"
        for piece in model.pieces
        if types[piece.name] != _wanted_type(piece, target)
    ]


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
        return
    # bool before int, which it is too.
    adders = ((bool, writer.add_bool), (int, writer.add_uint32), (float, writer.add_float32), (str, writer.add_string))
    next(add for kind, add in adders if isinstance(value, kind))(key, value)


def _num_bytes(shape: tuple[int, ...], name: str) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    return math.prod(shape) // block * size


def _packed(piece: Piece, name: str) -> Iterator[np.ndarray]:
    """The bytes of a tensor in a type, some rows at a time; uint8 arrays."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    array = piece.tensor.read()
    if array.shape != piece.tensor.shape:
        raise ValueError(f"{piece.name}: read {array.shape} where {piece.tensor.shape} was announced")
    mx.eval(array)  # else each block would read the tensor anew
    for block in row_blocks(array):
        if name == "BF16":
            values = np.asarray(block.astype(mx.bfloat16).view(mx.uint16))
        elif name == "F16":
            half = block.astype(mx.float16)
            if mx.isinf(half).any().item():
                raise UserError(f"tensor {piece.name!r} has values that float16 cannot hold; use BF16 or F32")
            values = np.asarray(half)
        else:
            values = quantize(np.asarray(block.astype(mx.float32)), GGMLQuantizationType[name])
        yield np.ascontiguousarray(values).reshape(-1).view(np.uint8)
