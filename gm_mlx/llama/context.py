"""llama.cpp's key/value cache and what is computed into it: tokens, image features, logits."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from gm_mlx.errors import UserError
from gm_mlx.llama.binding import LOG, library
from gm_mlx.llama.model import LlamaModel
from gm_mlx.llama.worker import Worker

SEQUENCE = 0  # llama.cpp can hold several conversations in one cache; here there is one


class Context:
    """A cache of a fixed size for one model.

    Args:
        model: the model; it must stay open for longer than this.
        worker: what llama.cpp runs in.
        size: positions that it holds.
        chunk: positions that are computed at a time.
        threads: processors.
        kv_bits: 8 or 4 to keep keys and values in so many bits; None for 16.

    Raises:
        UserError: there is not enough memory, or the model does not allow ``kv_bits``.
    """

    def __init__(
        self, model: LlamaModel, worker: Worker, *, size: int, chunk: int, threads: int, kv_bits: int | None = None
    ) -> None:
        self._c = c = library()
        self._worker = worker
        self._model = model
        self.size, self.chunk = size, chunk
        self._handle: int | None = None
        params = c.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = size, chunk, chunk
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_AUTO
        params.no_perf = True
        if kv_bits is not None:  # quantized values are only read by flash attention
            params.type_k = params.type_v = {8: c.GGML_TYPE_Q8_0, 4: c.GGML_TYPE_Q4_0}[kv_bits]
            params.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_ENABLED
        LOG.clear()
        self._handle = worker.run(c.llama_init_from_model, model.handle, params)
        if not self._handle:
            remedy = "leave kv_bits out or ask for less context" if kv_bits else "ask for less context"
            raise UserError(f"a context of {size} positions cannot be made: {LOG.reason()}; {remedy}")
        self._memory = c.llama_get_memory(self._handle)
        self._batch = c.llama_batch_init(chunk, 0, 1)
        for i in range(chunk):
            self._batch.n_seq_id[i], self._batch.seq_id[i][0] = 1, SEQUENCE
        self._never = c.ggml_abort_callback()

    @property
    def handle(self) -> Any:
        """llama.cpp's context."""
        return self._handle

    def close(self) -> None:
        """Give the memory back."""
        handle, self._handle = self._handle, None
        if handle:
            self._worker.run(self._c.llama_free, handle)
            self._worker.run(self._c.llama_batch_free, self._batch)

    def clear(self) -> None:
        """Forget all positions."""
        self._c.llama_memory_clear(self._memory, False)

    def cut(self, position: int) -> bool:
        """Forget all from a position on; false when the cache cannot go back that far, and is now empty."""
        c, window = self._c, self._model.window
        if position and c.llama_memory_seq_rm(self._memory, SEQUENCE, position, -1):
            # Sliding layers drop what has left their window. What is still there must reach back from the cut.
            oldest = c.llama_memory_seq_pos_min(self._memory, SEQUENCE)
            if not window or 0 <= oldest <= max(0, position - window):
                return True
        self.clear()
        return position == 0

    def interruptible(self, yes: bool) -> None:
        """Let Ctrl-C stop a computation in its midst. It costs a little for each step, so single tokens go without."""
        self._c.llama_set_abort_callback(self._handle, self._worker.stop if yes else self._never, None)

    def decode(self, ids: Sequence[int], position: int, *, all_logits: bool = False) -> None:
        """Compute at most ``chunk`` tokens into the cache; logits are kept of the last, or of all."""
        batch = self._batch
        batch.n_tokens = count = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position + i, all_logits or i + 1 == count
        self._check(self._worker.run(self._c.llama_decode, self._handle, batch))

    def decode_image(self, chunk: Any, features: np.ndarray, position: int) -> None:
        """Compute an image into the cache.

        Args:
            chunk: mtmd's description of it.
            features: float32 [T, D] from ``vision.Vision.encode``.
            position: its first position.
        """
        after = self._c.llama_pos()
        pointer = np.ascontiguousarray(features).ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        arguments = (chunk, pointer, position, SEQUENCE, self.chunk, ctypes.byref(after))
        none = self._c.mtmd_helper_post_decode_callback()
        call = self._c.mtmd_helper_decode_image_chunk
        self._check(self._worker.run(call, self._model.mtmd, self._handle, *arguments, none, None))

    def logits(self, row: int = -1) -> np.ndarray:
        """Logits float32 [V] of a token of the last ``decode``; a copy."""
        size = self._c.llama_vocab_n_tokens(self._model.vocab)
        return np.ctypeslib.as_array(self._c.llama_get_logits_ith(self._handle, row), (size,)).copy()

    def _check(self, code: int) -> None:
        """Raise for a computation that llama.cpp did not end well."""
        if code:
            raise RuntimeError(f"llama.cpp could not compute ({code}): {LOG.reason()}")
