"""Models in memory from tensors on disk: as they are, packed by a table, or unpacked from one.

One tensor is read, packed and let go before the next, so the memory holds the finished model and one tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from gm_mlx import cpu
from gm_mlx.config import ModelConfig
from gm_mlx.model import Model
from gm_mlx.quant.recipes import Precision
from gm_mlx.safetensors_writer import MLX_DTYPES
from gm_mlx.tensors import Tensor
from gm_mlx.weights import (
    DTYPES,
    PACKED,
    apply_quantization,
    is_router,
    quantizable_layers,
    quantized_layers,
    runs_on_cpu,
)


def file_dtype(tensors: Mapping[str, Tensor]) -> str | None:
    """The dtype that a quantized model's floats are written in: float16 for a float32 model, else None, as they are."""
    wide = any(t.dtype == "F32" and len(t.shape) > 1 and not is_router(name) for name, t in tensors.items())
    return "float16" if wide else None


def build_model(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    table: Mapping[str, Any] | None = None,
    dtype: str | None = None,
) -> Model:
    """The model that a folder written with these tensors and this table would give, without the folder.

    Args:
        config: the model's config, without a quantization table.
        tensors: its tensors by name, none of them packed.
        table: mlx-lm's quantization table; None leaves all layers as they are.
        dtype: "float32", "float16" or "bfloat16", which floats are rounded to before they are packed; None for none.
            MLX's CPU backend then computes in float32, as ``load_model`` does.

    Raises:
        UserError: the table does not fit the model.
    """
    model = Model(config)
    if table is not None:
        apply_quantization(model, table)
    packed = quantized_layers(model)
    weights: list[tuple[str, mx.array]] = []
    for name, tensor in tensors.items():
        array = tensor.read()
        if dtype is not None and not is_router(name):
            array = array.astype(DTYPES[dtype])
        path, _, last = name.rpartition(".")
        if path in packed and last == "weight":
            layer = packed[path]
            parts = mx.quantize(array, group_size=layer.group_size, bits=layer.bits, mode=layer.mode)
            arrays = {f"{path}.{part}": values for part, values in zip(PACKED, parts, strict=False)}
        else:
            arrays = {name: array.astype(mx.float32) if is_router(name) or runs_on_cpu() else array}
        mx.eval(*arrays.values())
        weights += arrays.items()
        del array
    model.load_weights(weights)
    model.eval()
    cpu.speed_up(model)
    return model


def rounded(weight: mx.array, precision: Precision) -> mx.array:
    """A weight [..., in] as it comes back from its packing, in its own dtype."""
    values = precision.to_dict()
    return mx.dequantize(*mx.quantize(weight, **values), **values, dtype=weight.dtype)


def dequantized(config: ModelConfig, tensors: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The tensors of a quantized model as floats, unpacked when they are read.

    What rounding took does not come back: packing them again rounds the rounded.

    Args:
        config: the model's config with its quantization table; one without a table comes back as it is.
        tensors: the model's tensors, packed ones by the names ``weight``, ``scales`` and ``biases``.

    Returns:
        The config without the table, and tensors in the dtype of the model's other floats.

    Raises:
        UserError: the table does not fit the model.
    """
    table = config.extra.get("quantization")
    plain = dataclasses.replace(config, extra={k: v for k, v in config.extra.items() if k != "quantization"})
    if table is None:
        return plain, dict(tensors)
    model = Model(plain)
    shapes = {path: layer.weight.shape for path, layer in quantizable_layers(model).items()}
    apply_quantization(model, table, lambda path: f"{path}.scales" in tensors)
    packed = quantized_layers(model)
    # A norm tells the dtype of activations, also where the scales are of another kind (MXFP4).
    dtype = tensors["language_model.model.norm.weight"].dtype
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        if path not in packed or last not in PACKED:
            result[name] = tensor
        elif last == "weight":
            parts = [tensors[f"{path}.{part}"] for part in PACKED if f"{path}.{part}" in tensors]
            precision = Precision(packed[path].bits, packed[path].group_size, packed[path].mode)
            result[name] = Tensor(dtype, shapes[path], _unpacker(parts, precision, MLX_DTYPES[dtype]))
    return plain, result


def _unpacker(parts: list[Tensor], precision: Precision, dtype: mx.Dtype) -> Callable[[], mx.array]:
    def read() -> mx.array:
        weight, scales, *biases = (part.read() for part in parts)
        return mx.dequantize(weight, scales, biases[0] if biases else None, **precision.to_dict(), dtype=dtype)

    return read
