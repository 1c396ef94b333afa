"""Weights on disk: a model folder's ``config.json`` and safetensors files, read and written.

Reading is lazy: files are checked against the model's names and shapes from their headers alone, and a tensor's bytes
are read when a result first needs them. A folder is written beside its place and renamed when it is complete, so an
interrupted save leaves the old model whole. ``gm_mlx.folder`` writes models that need not fit into memory.

Quantization is described by mlx-lm's table in ``config.json``: defaults for all quantized layers and an entry for each
layer that differs. Which layers are quantized at all is seen from the file: they are the ones that have ``scales``.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from gm_mlx import cpu
from gm_mlx.config import ModelConfig
from gm_mlx.errors import UserError
from gm_mlx.model import Model
from gm_mlx.new_folder import check_out, new_folder
from gm_mlx.safetensors_header import Entry
from gm_mlx.tensors import Tensor, open_safetensors

if TYPE_CHECKING:
    from gm_mlx.processor import Processor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
FLOAT_ENTRIES = ("F32", "F16", "BF16")
# What a quantized layer's packed arrays must be in the file; all other arrays are floating point.
PACKED_ENTRIES = {mx.uint32: ("U32",), mx.uint8: ("U8",)}

PACKED = ("weight", "scales", "biases")  # the arrays of a quantized layer; not every mode has biases

# mode: the group sizes and bits that MLX has kernels for.
QUANTIZATION_MODES = {
    "affine": ((32, 64, 128), (2, 3, 4, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "mxfp8": ((32,), (8,)),
    "nvfp4": ((16,), (4,)),
}


def runs_on_cpu() -> bool:
    """Whether MLX computes on its CPU backend."""
    return mx.default_device().type == mx.DeviceType.cpu


def load_model(folder: Path, *, dtype: str | None = None) -> Model:
    """Build the model of a folder and give it the folder's weights, lazily.

    Args:
        folder: a model folder with ``config.json`` and ``model.safetensors``, or shards with their index.
        dtype: "float32", "float16" or "bfloat16" for everything that is not quantized. By default the files' own
            dtype, and float32 on MLX's CPU backend, which has fast kernels for nothing else.

    Returns:
        The model, with the fast quantized layers of ``gm_mlx.cpu`` on MLX's CPU backend. Routers are float32; quantized
        layers keep the dtype of their scales.

    Raises:
        UserError: a file is missing or damaged, or the files' tensors are not the model's; the first few are named.
    """
    folder = Path(folder)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype: {dtype!r} is not one of {list(DTYPES)}")
    config = ModelConfig.load(folder)
    files = weight_files(folder)
    model = unread_model(config, open_safetensors(files), folder)

    kept = _quantized_arrays(model)
    weights: dict[str, mx.array] = {}
    for file in files:
        loaded: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
        weights |= {name: _cast(name, array, dtype, name in kept) for name, array in loaded.items()}
    model.load_weights(list(weights.items()))
    model.eval()
    cpu.speed_up(model)
    return model


def save_model(
    model: Model, folder: Path, processor: Processor | None = None, *, max_shard_bytes: int = 5 << 30
) -> None:
    """Write a model that is in memory as a folder, or nothing (see ``new_folder``).

    Args:
        model: the model; its lazy arrays are computed shard by shard.
        folder: where to. A model that is there is replaced, and all else in its folder with it.
        processor: written with its tokenizer; None leaves a folder that cannot chat.
        max_shard_bytes: most bytes of tensors per file. One larger tensor makes a larger file.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    shards = _shards(named_arrays(model), max_shard_bytes)
    names = shard_names(len(shards))
    texts = {"config.json": json_text(model.config.to_dict())}
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(array.nbytes for shard in shards for array in shard.values())
        texts[INDEX_FILE] = json_text(
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        )
    with new_folder(check_out(folder, force=True), force=True) as partial:
        for name, shard in zip(names, shards, strict=True):
            mx.save_safetensors(str(partial / name), shard, metadata={"format": "mlx"})
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        if processor is not None:
            processor.save(partial)


def shard_names(count: int) -> list[str]:
    """Names of the weight files of a model in so many of them."""
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def quantized_layers(model: Model) -> dict[str, nn.Module]:
    """Path and layer of all that is quantized."""
    return {path: layer for path, layer in model.named_modules() if "scales" in layer}


def named_arrays(model: Model) -> dict[str, mx.array]:
    """All parameters by the names they have in a file."""
    return dict(tree_flatten(model.parameters()))  # type: ignore[arg-type]


def num_parameters(model: Model) -> int:
    """Weights of the model; a quantized layer counts as the layer it was made from."""
    count = sum(array.size for array in named_arrays(model).values())
    for layer in quantized_layers(model).values():
        packing = sum(layer[name].size for name in PACKED if name in layer)
        count += layer["scales"].size * layer.group_size - packing
    return count


def quantizable_layers(model: Model) -> dict[str, nn.Module]:
    """Path and layer of all that can be quantized: linears, token embeddings and stacked experts.

    Not the tower's positions, which are added as they are and never looked up, nor the routers, which are raw arrays.
    """
    return {
        path: layer
        for path, layer in sorted(model.named_modules())
        if hasattr(layer, "to_quantized") and not path.endswith("position_embedding")
    }


def apply_quantization(
    model: Model, table: Mapping[str, Any], takes_defaults: Callable[[str], bool] = lambda path: True
) -> None:
    """Quantize layers in place and note how in ``model.config``, so that a saved model describes itself.

    Args:
        model: the model; it may have quantized layers already, which stay as they are.
        table: mlx-lm's layout: ``group_size``, ``bits`` and ``mode`` ("affine" when missing) as defaults, then
            ``<module path>: {"group_size": ..., "bits": ..., "mode": ...}`` for a layer that differs and
            ``<module path>: false`` for one that is left out.
        takes_defaults: whether a layer that the table does not name is quantized with the defaults.

    Raises:
        UserError: the table names a layer that cannot be quantized, or a value that MLX or the layer does not allow.
    """
    if not isinstance(table, Mapping):
        raise UserError("quantization: not a table")
    layers = quantizable_layers(model)
    defaults = {key: table[key] for key in ("group_size", "bits", "mode") if key in table}
    named = {path: value for path, value in table.items() if path not in defaults}
    defaults = _quantization_values("quantization", defaults)
    if unknown := [path for path, value in named.items() if value is not False and path not in layers]:
        raise UserError(f"quantization: {unknown[0]!r} is not a layer of this model that can be quantized")
    chosen: dict[str, dict[str, Any]] = {}
    for path, layer in layers.items():
        value = named.get(path, takes_defaults(path))
        if value is False:
            continue
        where = f"quantization: {path}"
        chosen[path] = defaults if value is True else _quantization_values(where, value)
        if (width := layer.weight.shape[-1]) % chosen[path]["group_size"]:
            raise UserError(f"{where}: its rows of {width} do not divide into groups of {chosen[path]['group_size']}")
    nn.quantize(model, class_predicate=lambda path, _: chosen.get(path, False))

    record = dict(model.config.extra.get("quantization") or defaults)
    shared = {key: record.get(key, value) for key, value in defaults.items()}
    record |= {path: value for path, value in named.items() if value is False and path in layers}
    record |= {path: dict(values) for path, values in chosen.items() if values != shared or path in record}
    model.config = dataclasses.replace(model.config, extra={**model.config.extra, "quantization": record})


def _quantization_values(where: str, value: Any) -> dict[str, Any]:
    """Check one entry of a quantization table; returns it with its mode filled in."""
    if not isinstance(value, Mapping) or not {"group_size", "bits"} <= set(value) <= {"group_size", "bits", "mode"}:
        raise UserError(f"{where}: needs group_size and bits, may have mode, and nothing else")
    values = {"group_size": value["group_size"], "bits": value["bits"], "mode": value.get("mode", "affine")}
    if not isinstance(values["mode"], str) or values["mode"] not in QUANTIZATION_MODES:
        raise UserError(f"{where}: mode {values['mode']!r} is not one of {list(QUANTIZATION_MODES)}")
    for key, allowed in zip(("group_size", "bits"), QUANTIZATION_MODES[values["mode"]], strict=True):
        if type(values[key]) is not int or values[key] not in allowed:
            raise UserError(f"{where}: {key} {values[key]!r} is not one of {list(allowed)} for mode {values['mode']}")
    return values


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files: one, or the shards that its index names."""
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        raise UserError(f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}; fetch or convert the model again")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: not a safetensors index; fetch or convert the model again") from None
    for name in names:
        # A name with a folder in it could make us read any file of the machine.
        if not isinstance(name, str) or name != os.path.basename(name) or "\\" in name or name in ("", ".", ".."):
            raise UserError(f"{index}: {name!r} is not a file name inside the model folder")
    return [folder / name for name in names]


def unread_model(config: ModelConfig, tensors: Mapping[str, Entry | Tensor], folder: Path) -> Model:
    """The model that some tensors are meant for, with layers quantized as the config and the tensors' names say.

    Its own values are never computed: it costs no memory, and gives names, shapes and what is packed.

    Args:
        config: the model.
        tensors: dtype and shape of each tensor, by name.
        folder: where they are, or are to be; named in errors.

    Raises:
        UserError: the config's quantization is not one of this model, or names, shapes or kinds of tensors differ from
            what the model needs; one message says all that differs.
    """
    model = Model(config)
    if (table := config.extra.get("quantization")) is not None:
        try:
            apply_quantization(model, table, lambda path: f"{path}.scales" in tensors)
        except UserError as error:
            raise UserError(f"{folder / 'config.json'}: {error}") from None
    wanted = named_arrays(model)
    wrong = []
    for name, array in wanted.items():
        if name in tensors:
            dtype, shape = tensors[name].dtype, tensors[name].shape
            if shape != array.shape:
                wrong.append(f"{name} is {list(shape)} instead of {list(array.shape)}")
            elif dtype not in PACKED_ENTRIES.get(array.dtype, FLOAT_ENTRIES):
                wrong.append(f"{name} has dtype {dtype}")
    problems = [
        _first_few("missing", sorted(wanted.keys() - tensors.keys())),
        _first_few("not part of the model", sorted(tensors.keys() - wanted.keys())),
        _first_few("wrong", wrong),
    ]
    if any(problems):
        raise UserError(f"{folder}: the weights do not fit config.json: {'; '.join(p for p in problems if p)}")
    return model


def _first_few(what: str, names: list[str], few: int = 3) -> str:
    if not names:
        return ""
    more = f" and {len(names) - few} more" if len(names) > few else ""
    return f"{len(names)} {what} ({', '.join(names[:few])}{more})"


def is_router(name: str) -> bool:
    """Whether a tensor is a router's. These are float32 in every model: the choice of experts flips on the last bits of
    a logit, and a router is a few kilobytes."""
    return ".mlp.gate." in name


def _quantized_arrays(model: Model) -> set[str]:
    """Names of the arrays that a quantized layer needs as they are."""
    return {f"{path}.{name}" for path in quantized_layers(model) for name in PACKED}


def _cast(name: str, array: mx.array, dtype: str | None, quantized: bool) -> mx.array:
    if quantized:
        return array
    if is_router(name) or (dtype is None and runs_on_cpu()):
        return array.astype(mx.float32)
    return array if dtype is None else array.astype(DTYPES[dtype])


def _shards(arrays: dict[str, mx.array], max_bytes: int) -> list[dict[str, mx.array]]:
    """Split tensors, in order, into files of at most ``max_bytes``."""
    shards: list[dict[str, mx.array]] = [{}]
    room = max_bytes
    for name, array in arrays.items():
        if array.nbytes > room and shards[-1]:
            shards.append({})
            room = max_bytes
        shards[-1][name] = array
        room -= array.nbytes
    return shards


def json_text(data: Any) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
