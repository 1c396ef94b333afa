"""``gm-mlx convert ADAPTER --to gguf-lora``: from an adapter's folder to one file for llama.cpp's ``--lora``.

Of the base, config and norms are needed: which architecture its GGUF file has, and what its matrices were multiplied
by. All that a base can be given as knows them, and the GGUF file itself knows best.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from gm_mlx.config import ModelConfig
from gm_mlx.convert.checkpoint import open_checkpoint
from gm_mlx.convert.source import is_model_folder
from gm_mlx.convert.to_gguf.blocks import LAYERS
from gm_mlx.convert.to_gguf.folder import MODEL_FILE
from gm_mlx.convert.to_gguf.lora_factors import Base, lora_model
from gm_mlx.convert.to_gguf.pieces import changed
from gm_mlx.convert.to_gguf.types import find_target
from gm_mlx.convert.to_gguf.write import file_bytes, write_gguf
from gm_mlx.convert.translate import translate
from gm_mlx.errors import UserError
from gm_mlx.files import new_file
from gm_mlx.folder import read_model_folder
from gm_mlx.gguf_file import GGUFHeader, read_header
from gm_mlx.new_folder import REASONS, sync
from gm_mlx.safetensors_writer import DTYPE_NAMES
from gm_mlx.tensors import Tensor
from gm_mlx.weights import DTYPES

SUFFIX = ".gguf"


def convert_adapter(
    folder: Path,
    base: Path,
    out: Path,
    *,
    dtype: str | None = None,
    force: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[str]:
    """Write an adapter as a GGUF file.

    Args:
        folder: the adapter's, as peft or LLaVA saves it.
        base: the model that it will run with; see ``open_base``.
        out: the file, whose name ends in .gguf.
        dtype: "float32", "float16" or "bfloat16"; None for the adapter's own.
        force: replace an adapter that is there.
        progress: called as ``progress("write", bytes written, bytes in all)``.

    Returns:
        Notes for the user.

    Raises:
        UserError: the adapter or the base is damaged, one does not fit the other, the adapter has parts that llama.cpp
            has no LoRA for, or ``out`` cannot be written. The message names the file, the key or tensor, and the
            remedy; nothing is left behind.
    """
    _check_out(out, force)
    adapter = open_checkpoint(folder)
    model = lora_model(adapter, open_base(base))
    model.metadata["general.name"] = out.stem
    own = {tensor.dtype for tensor in adapter.adapter.values()}
    target = find_target(DTYPE_NAMES[DTYPES[dtype]] if dtype else own.pop() if len(own) == 1 else "F32", {})
    total, done = file_bytes(model, target), 0

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress("write", done, total)

    try:
        with new_file(out) as partial:
            notes = write_gguf(partial, model, target, wrote)
            sync(partial)
    except OSError as error:
        reason = REASONS.get(error.errno or 0, f"cannot be written ({error.strerror or error}); write elsewhere")
        raise UserError(f"{out}: {reason}") from error
    return notes


def open_base(path: Path) -> Base:
    """What an adapter must know of its base.

    Args:
        path: a GGUF file that gm-mlx wrote or the folder with it, a model folder, quantized or not, or a checkpoint of
            a vision-language model with its tower.

    Raises:
        UserError: it is none of these, or damaged.
    """
    file = path / MODEL_FILE if path.is_dir() else path
    if file.is_file() or path.suffix == SUFFIX:
        return _from_gguf(read_header(file))
    if is_model_folder(path):
        config, tensors = ModelConfig.load(path), read_model_folder(path)
    else:
        try:
            made = translate(open_checkpoint(path))
        except UserError as error:
            raise UserError(f"{error}; as --base, the .gguf file that the adapter is for will do as well") from None
        config, tensors = made.config, made.tensors
    text = config.text_config
    names = {i: f"{LAYERS}.{i}.post_attention_layernorm.weight" for i in text.sparse_layers}
    # Gemma stores a norm's distance from one.
    return Base(text, {i: changed(tensors[name], lambda w: w + text.norm_plus_one) for i, name in names.items()})


def _from_gguf(header: GGUFHeader) -> Base:
    try:
        text = ModelConfig.from_dict(json.loads(header.metadata["gm.config"])).text_config
    except (KeyError, TypeError, ValueError, RecursionError):
        raise UserError(
            f"{header.path}: was not written by gm-mlx; llama.cpp's convert_lora_to_gguf.py makes adapters for it"
        ) from None
    norms = {}
    # Only gemma4's routers hold the weights of the norm before them.
    for i in text.sparse_layers if header.metadata.get("general.architecture") == "gemma4" else ():
        tensor = header.tensors.get(f"blk.{i + 1}.pre_ffw_norm_2.weight")
        if tensor is None or (tensor.type, tensor.shape) != ("F32", (text.hidden_size,)):
            raise UserError(f"{header.path}: has no sound norm in layer {i}; convert the model again")
        norms[i] = Tensor("F32", tensor.shape, _reader(header.path, tensor.offset, text.hidden_size))
    return Base(text, norms)


def _reader(path: Path, offset: int, count: int) -> Callable[[], mx.array]:
    return lambda: mx.array(np.fromfile(path, "<f4", count, offset=offset))


def _check_out(out: Path, force: bool) -> None:
    """Refuse a place for the file before any work."""
    if out.suffix != SUFFIX:
        raise UserError(f"{out}: an adapter is one file; name it {out.name}{SUFFIX}")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.absolute().parent}; make it first")
    if not os.path.lexists(out):
        return
    if not force:
        raise UserError(f"{out}: exists; choose another file, or replace it with --force")
    if out.is_dir() or read_header(out).metadata.get("general.type") != "adapter":
        raise UserError(f"{out}: is no adapter, and --force replaces nothing else; choose another file")
