"""Model folders read and written one tensor at a time, for models that need not fit into memory.

All names, shapes and dtypes of what is written are known before anything is read. A tensor is read, cast, quantized
where the table says so, appended to its file and dropped; in memory at a time are one tensor and a block of its rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from gm_mlx.config import ModelConfig
from gm_mlx.errors import UserError
from gm_mlx.model import Model
from gm_mlx.new_folder import SIDE_FILES_BYTES, check_out, check_space, new_folder
from gm_mlx.processor import Processor
from gm_mlx.safetensors_header import Entry
from gm_mlx.safetensors_writer import DTYPE_NAMES, MLX_DTYPES, bytes_of, num_bytes, write_safetensors
from gm_mlx.tensors import Tensor, open_safetensors, row_blocks
from gm_mlx.weights import (
    DTYPES,
    INDEX_FILE,
    PACKED,
    apply_quantization,
    is_router,
    json_text,
    named_arrays,
    quantized_layers,
    shard_names,
    unread_model,
    weight_files,
)

MAX_SHARD_BYTES = 5 << 30
# What gm.json says of the old weights and their answers only: no longer true of what is made of them.
STALE = ("sha256", "exact_match", "exact_match_before_quantization", "notes")


def read_model_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model folder, by name; those of quantized layers as they are packed.

    Raises:
        UserError: a file is missing or damaged, or the tensors are not those of ``config.json``.
    """
    folder = Path(folder)
    config = ModelConfig.load(folder)
    tensors = open_safetensors(weight_files(folder))
    unread_model(config, tensors, folder)
    return tensors


def read_notes(folder: Path) -> dict[str, Any]:
    """A model folder's ``gm.json``; nothing if it has none.

    Raises:
        UserError: the file is damaged.
    """
    file = folder / "gm.json"
    try:
        notes = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({error}); convert the model again") from None
    if not isinstance(notes, dict):
        raise UserError(f"{file}: not a JSON object; convert the model again")
    return notes


def write_model_folder(
    out: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    processor: Processor | None,
    gm: Mapping[str, Any],
    card: str,
    quantization: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra_files: Mapping[str, bytes] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Write a complete model folder, or nothing (see ``new_folder``).

    Args:
        out: the folder to be; see ``check_out``.
        config: the model. Where its ``extra["quantization"]`` and the names of ``tensors`` say that a layer is
            quantized already, the layer's packed arrays are copied as they are.
        tensors: all tensors of the model, by the names and with the shapes that ``Model(config)`` gives them.
        processor: written with its tokenizer; None leaves a folder that cannot chat.
        gm: the contents of ``gm.json``; ``sha256`` of the weight files is added.
        card: the model card, README.md.
        quantization: mlx-lm's table for the layers to quantize; see ``weights.apply_quantization``.
        dtype: "float32", "float16" or "bfloat16" for all that is not packed yet; None keeps each tensor's own. Routers
            are float32 in any case.
        force: replace a model folder that is there.
        max_shard_bytes: most bytes of tensors per file. One larger layer makes a larger file.
        extra_files: more files for the folder, by name.
        progress: called as ``progress("write", bytes written, bytes in all)``.

    Raises:
        UserError: the tensors or the table are not the model's, ``out`` is not free, the disk is full or too small, or
            a value does not fit ``dtype``. Nothing is left behind, whatever the exception.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype: {dtype!r} is not one of {list(DTYPES)}")
    given, out = Path(out), check_out(out, force=force)
    model = unread_model(config, tensors, given)
    jobs = _plan(model, tensors, quantization, dtype)
    total = sum(job.num_bytes for job in jobs)
    check_space(out, total + total // 100 + SIDE_FILES_BYTES)
    with new_folder(out, force=force) as folder:
        hashes = _write_weights(folder, _shards(jobs, max_shard_bytes), total, progress)
        texts = {
            "config.json": json_text(model.config.to_dict()),
            "gm.json": json_text({**gm, "sha256": hashes}),
            "README.md": card,
        }
        files = {name: text.encode() for name, text in texts.items()} | dict(extra_files or {})
        for name, content in files.items():
            (folder / name).write_bytes(content)
        if processor is not None:
            processor.save(folder)


@dataclass(frozen=True)
class Job:
    """A tensor to read, and what is written of it.

    Attributes:
        name: its name.
        source: the tensor.
        dtype: what its values are cast to, before they are quantized.
        quantization: the arguments of ``mx.quantize``, or None.
        outputs: the tensor itself, or its packed weight, scales and, in most modes, biases.
    """

    name: str
    source: Tensor
    dtype: mx.Dtype
    quantization: dict[str, Any] | None
    outputs: dict[str, Entry]

    @property
    def num_bytes(self) -> int:
        return sum(map(num_bytes, self.outputs.values()))


def _plan(
    model: Model, tensors: Mapping[str, Tensor], quantization: Mapping[str, Any] | None, dtype: str | None
) -> list[Job]:
    """What to read and what to write, in the model's order; quantizes the layers of ``model``, which stays unread."""
    packed = quantized_layers(model)
    if quantization is not None:
        apply_quantization(model, quantization)
    fresh = {path: layer for path, layer in quantized_layers(model).items() if path not in packed}
    arrays = named_arrays(model)
    jobs = []
    for name, array in arrays.items():
        path, _, part = name.rpartition(".")
        if path in fresh and part in ("scales", "biases"):
            continue  # made with the weight
        source = tensors[name]
        kept = is_router(name) or (path in packed and part in PACKED)
        stored = source.dtype if kept or dtype is None else DTYPE_NAMES[DTYPES[dtype]]
        outputs = {name: Entry("F32" if is_router(name) else stored, array.shape)}
        how = None
        if path in fresh and part == "weight":
            how = {key: getattr(fresh[path], key) for key in ("group_size", "bits", "mode")}
            parts = {f"{path}.{part}": arrays[f"{path}.{part}"] for part in PACKED if f"{path}.{part}" in arrays}
            # Scales have the dtype of what was quantized, but in the modes that keep them in a byte.
            outputs = {
                name: Entry(stored if array.dtype == mx.float32 else DTYPE_NAMES[array.dtype], array.shape)
                for name, array in parts.items()
            }
        jobs.append(Job(name, source, MLX_DTYPES["F32" if is_router(name) else stored], how, outputs))
    return jobs


def _shards(jobs: Iterable[Job], max_bytes: int) -> list[list[Job]]:
    """Split the jobs, in order, into files of at most ``max_bytes``; a layer's packed arrays stay together."""
    shards: list[list[Job]] = [[]]
    room = max_bytes
    for job in jobs:
        if job.num_bytes > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1].append(job)
        room -= job.num_bytes
    # Tensors of an odd size come last: all others then lie where programs that map files into memory want them.
    return [sorted(shard, key=lambda job: any(num_bytes(out) % 8 for out in job.outputs.values())) for shard in shards]


def _write_weights(
    folder: Path, shards: list[list[Job]], total: int, progress: Callable[[str, int, int], None] | None
) -> dict[str, str]:
    """Write the weight files, and their index if there are several; returns the files' SHA-256."""
    names = shard_names(len(shards))
    done = 0

    def pieces(jobs: list[Job]) -> Iterator[memoryview]:
        nonlocal done
        for job in jobs:
            for piece in _data(job):
                done += piece.nbytes
                yield piece
                del piece  # it may be a view that keeps the whole tensor while the next one is read
                if progress:
                    progress("write", done, total)
            mx.clear_cache()  # MLX keeps freed memory for arrays of the same size, and few are

    hashes: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for name, jobs in zip(names, shards, strict=True):
        entries = {name: entry for job in jobs for name, entry in job.outputs.items()}
        hashes[name] = write_safetensors(folder / name, entries, pieces(jobs))
        weight_map |= dict.fromkeys(entries, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json_text(index), encoding="utf-8")
    return hashes


def _data(job: Job) -> Iterator[memoryview]:
    """The bytes of a job's outputs, one after the other."""
    array = job.source.read()
    if array.shape != job.source.shape or DTYPE_NAMES[array.dtype] != job.source.dtype:
        raise ValueError(f"{job.name}: read {array.dtype} {array.shape} where {job.source} was announced")
    mx.eval(array)  # else each block would read the tensor anew
    others: list[list[memoryview]] = [[] for _ in list(job.outputs)[1:]]
    for block in (_cast(job, rows) for rows in row_blocks(array)):
        if job.quantization is None:
            yield bytes_of(block)
            continue
        packed, *scales = mx.quantize(block, **job.quantization)
        mx.eval(packed, *scales)
        yield bytes_of(packed)
        for kept, scale in zip(others, scales, strict=True):
            kept.append(bytes_of(scale))  # one number for each group: little
    for kept in others:
        yield from kept


def _cast(job: Job, block: mx.array) -> mx.array:
    if block.dtype == job.dtype:
        return block
    block = block.astype(job.dtype)
    if job.dtype == mx.float16 and mx.isinf(block).any().item():
        raise UserError(f"tensor {job.name!r} has values that float16 cannot hold; use --dtype bfloat16")
    return block
