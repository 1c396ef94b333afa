"""LoRA adapters beside a GGUF model: checked against it, read by llama.cpp, and at work in every context.

llama.cpp itself checks names and two dimensions of a factor, and runs into assertions at the rest.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from pathlib import Path

from gm_mlx.errors import UserError
from gm_mlx.gguf_file import GGUFHeader, GGUFTensor, read_header
from gm_mlx.llama.binding import LOG, library
from gm_mlx.llama.check import part_paths
from gm_mlx.llama.context import Context
from gm_mlx.llama.model import LlamaModel
from gm_mlx.llama.worker import Worker

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
OTHER = "name an adapter that was made for this model"
# Keys of an adapter and what llama.cpp takes them for, without asking.
KINDS = {"general.architecture": "string", "general.type": "string", "adapter.type": "string"}
ALPHA = "adapter.lora.alpha"


class Adapters:
    """Adapters that llama.cpp has read; they live as long as the model.

    Args:
        model: the model that they are for. No context of it may exist yet.
        text: its header.
        worker: what llama.cpp runs in.
        loras: files, and how strong each shall be; 1 is as it was trained.

    Raises:
        UserError: a file is damaged, no adapter, or one for another model.
    """

    def __init__(
        self, model: LlamaModel, text: GGUFHeader, worker: Worker, loras: Sequence[tuple[str | Path, float]]
    ) -> None:
        self._scales = [scale for _, scale in loras]
        self._handles = []
        tensors = _all_tensors(text) if loras else {}
        for path, scale in loras:
            header = check_adapter(path, text, tensors)
            if not math.isfinite(scale):
                raise UserError(f"{path}: a strength of {scale} is not possible; 1 is as it was trained")
            LOG.clear()
            handle = worker.run(library().llama_adapter_lora_init, model.handle, os.fsencode(header.path))
            if not handle:
                raise UserError(f"{path}: llama.cpp cannot load it: {LOG.reason()}; {OTHER}")
            self._handles.append(handle)

    def put_on(self, context: Context) -> None:
        """Let all that a context computes from now on be with the adapters."""
        c, count = library(), len(self._handles)
        if count:
            handles = (c.llama_adapter_lora_p_ctypes * count)(*self._handles)
            c.llama_set_adapters_lora(context.handle, handles, count, (ctypes.c_float * count)(*self._scales))


def check_adapter(path: str | Path, text: GGUFHeader, tensors: dict[str, GGUFTensor]) -> GGUFHeader:
    """Read the header of an adapter and check it against a model.

    Args:
        path: the adapter's file.
        text: the model's header.
        tensors: the model's, of all its parts.

    Raises:
        UserError: the file is damaged, no adapter, or one for another model.
    """
    header = read_header(path)
    wrong = [key for key, kind in KINDS.items() if header.kinds.get(key) != kind]
    if wrong or (header.metadata["general.type"], header.metadata["adapter.type"]) != ("adapter", "lora"):
        raise UserError(f"{path}: no LoRA adapter; make one with `gm-mlx convert ADAPTER --to gguf-lora --base MODEL`")
    if header.kinds.get(ALPHA, "float32") != "float32":
        raise UserError(f"{path}: {ALPHA} is {header.kinds[ALPHA]} and not float32; convert the adapter again")
    if "adapter.alora.invocation_tokens" in header.metadata:
        raise UserError(f"{path}: is at work behind certain tokens only, which is not supported; use llama.cpp's tools")
    archs = [each.metadata["general.architecture"] for each in (header, text)]
    if archs[0] != archs[1]:
        raise UserError(f"{path}: is for a model of type {archs[0]!r}, and {text.path} is {archs[1]!r}; {OTHER}")
    for name in header.tensors:
        stem, kind = name.removesuffix(".lora_a").removesuffix(".lora_b"), name[-7:]
        if stem == name:
            continue  # a norm, which llama.cpp leaves out, or what it refuses by itself
        pair = [header.tensors.get(stem + part) for part in (".lora_a", ".lora_b")]
        if None in pair:
            raise UserError(f"{path}: tensor {name!r} lacks its other factor; convert the adapter again")
        if kind == ".lora_a" and not _fits(pair[0].shape, pair[1].shape, stem, tensors):  # type: ignore[union-attr]
            raise UserError(f"{path}: tensor {name!r} does not fit {text.path}; {OTHER}")
    return header


def _fits(down: tuple[int, ...], up: tuple[int, ...], stem: str, tensors: dict[str, GGUFTensor]) -> bool:
    """Whether factors are those of a matrix [.., out, in]: A [.., r, in] and B [.., out, r]."""
    if stem not in tensors or not down or not up:
        return False
    *stack, rows, columns = tensors[stem].shape if len(tensors[stem].shape) > 1 else (0, 0)
    rank = up[-1]
    if stem == EMBEDDING:  # its rows are looked up; as a head too, it would get the factors the wrong way round
        return HEAD in tensors and down == (rows, rank) and up == (columns, rank)
    return down == (*stack, rank, columns) and up == (*stack, rows, rank)


def _all_tensors(text: GGUFHeader) -> dict[str, GGUFTensor]:
    """The tensors of a model, which may be in several files."""
    headers = (text if path == text.path else read_header(path) for path in part_paths(text.path))
    return {name: tensor for header in headers for name, tensor in header.tensors.items()}
