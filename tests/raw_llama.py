"""llama.cpp by its C functions alone: what a GGUF file gives in it, with none of our engine in between."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np

CONTEXT = 1024


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    pass


def logits(path: Path, parts: Sequence[list[int] | np.ndarray], loras: Sequence[tuple[Path, float]] = ()) -> np.ndarray:
    """Logits float32 [L, V] at every position of a prompt.

    Args:
        path: the model's file.
        parts: runs of token ids, and of embeddings [n, D] as they enter llama.cpp's graph, in the order of the prompt.
        loras: files of adapters, and how strong each shall be.
    """
    llama_cpp.llama_log_set(_silent, None)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    assert model, f"llama.cpp does not load {path}"
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = CONTEXT
    options.n_threads = options.n_threads_batch = 2
    context = llama_cpp.llama_init_from_model(model, options)
    assert context, f"llama.cpp makes no context for {path}"
    try:
        _add_loras(model, context, loras)
        size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        rows, position = [], 0
        for part in parts:
            rows += _decoded(context, part, position, size)
            position += len(part)
        return np.stack(rows)
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


def _add_loras(model: ctypes.c_void_p, context: ctypes.c_void_p, loras: Sequence[tuple[Path, float]]) -> None:
    """Read adapters, which the model frees in the end, and put them to work."""
    adapters = [llama_cpp.llama_adapter_lora_init(model, str(path).encode()) for path, _ in loras]
    assert all(adapters), "llama.cpp does not load an adapter"
    if loras:
        handles = (llama_cpp.llama_adapter_lora_p_ctypes * len(loras))(*adapters)
        scales = (ctypes.c_float * len(loras))(*(scale for _, scale in loras))
        assert llama_cpp.llama_set_adapters_lora(context, handles, len(loras), scales) == 0


def _decoded(context: ctypes.c_void_p, part: list[int] | np.ndarray, position: int, size: int) -> list[np.ndarray]:
    width = part.shape[1] if isinstance(part, np.ndarray) else 0
    batch = llama_cpp.llama_batch_init(len(part), width, 1)
    batch.n_tokens = len(part)
    values = np.ascontiguousarray(part, np.float32 if width else np.int32)
    ctypes.memmove(batch.embd if width else batch.token, values.ctypes.data, values.nbytes)
    for i in range(len(part)):
        batch.pos[i] = position + i
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = 0
        batch.logits[i] = 1
    assert llama_cpp.llama_decode(context, batch) == 0
    rows = [np.array(llama_cpp.llama_get_logits_ith(context, i)[:size], np.float32) for i in range(len(part))]
    llama_cpp.llama_batch_free(batch)
    return rows
