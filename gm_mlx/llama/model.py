"""A GGUF model in memory: llama.cpp's text model, and its vision library (mtmd) where there is an mmproj file.

Whoever makes one closes it; closing twice does no harm. The files have been checked before (``gm_mlx.llama.check``).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from gm_mlx.engine import Progress
from gm_mlx.errors import UserError
from gm_mlx.gguf_file import GGUFHeader
from gm_mlx.llama.binding import LOG, library
from gm_mlx.llama.worker import Worker

SPACE_PREFIX = "tokenizer.ggml.add_space_prefix"
LOAD_UNITS = 1000  # llama.cpp tells progress as a part of one


class LlamaModel:
    """A text model with or without sight.

    Args:
        text: the text model's header.
        mmproj: the vision model's header, or None.
        worker: what llama.cpp runs in.
        gpu_layers: layers that a GPU computes; None for all that it can.
        threads: processors for images.
        keep_spaces: do not put a space in front of text, whatever the file says; the caller does that.
        vocab_only: load the vocabulary and no weights.
        as_stored: keep weights as the file has them, and not rearranged for speed.
        progress: told about loading.

    Attributes:
        handle: llama.cpp's model.
        vocab: its vocabulary.
        mtmd: the vision library's context, or None.
        width: values of one input embedding.
        context_length: positions that it was made for.
        window: the attention's window in its sliding layers; 0 without such layers.

    Raises:
        UserError: llama.cpp refuses a file, with its reason.
    """

    def __init__(
        self,
        text: GGUFHeader,
        mmproj: GGUFHeader | None = None,
        *,
        worker: Worker,
        gpu_layers: int | None = None,
        threads: int = 1,
        keep_spaces: bool = False,
        vocab_only: bool = False,
        as_stored: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self._c = library()
        self._worker = worker
        self.handle: int | None = None
        self.mtmd: int | None = None
        self.handle = self._load_text(
            text.path,
            progress,
            n_gpu_layers=gpu_layers,
            vocab_only=vocab_only,
            use_extra_bufts=not as_stored,
            kv_overrides=_no_space_prefix() if keep_spaces else None,
        )
        self.vocab = self._c.llama_model_get_vocab(self.handle)
        self.width = self._c.llama_model_n_embd_inp(self.handle)
        self.context_length = self._c.llama_model_n_ctx_train(self.handle)
        self.window = self._c.llama_model_n_swa(self.handle)
        if not self._c.llama_model_has_decoder(self.handle) or self._c.llama_model_has_encoder(self.handle):
            self.close()
            raise UserError(f"{text.path}: not a model that continues text, so it cannot chat; name another file")
        if mmproj is not None:
            try:
                self.mtmd = self._load_vision(mmproj.path, gpu_layers, threads)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Give the memory back."""
        mtmd, self.mtmd = self.mtmd, None
        if mtmd is not None:
            self._worker.run(self._c.mtmd_free, mtmd)
        handle, self.handle = self.handle, None
        if handle is not None:
            self._worker.run(self._c.llama_model_free, handle)

    def _load_text(self, path: Path, progress: Progress | None, **options: Any) -> int:
        c = self._c
        params = c.llama_model_default_params()
        for name, value in options.items():
            if value is not None:
                setattr(params, name, value)

        def report(part: float, data: Any) -> bool:
            if progress is not None:
                progress("load", int(part * LOAD_UNITS), LOAD_UNITS)
            return not self._worker.stops

        params.progress_callback = callback = c.llama_progress_callback(report)
        LOG.clear()
        handle = self._worker.run(c.llama_model_load_from_file, os.fsencode(path), params)
        del callback
        if not handle:
            raise UserError(f"{path}: llama.cpp cannot load it: {LOG.reason()}; download it again or update llama.cpp")
        return handle

    def _load_vision(self, path: Path, gpu_layers: int | None, threads: int) -> int:
        c = self._c
        params = c.mtmd_context_params_default()
        params.use_gpu = gpu_layers != 0
        params.print_timings = False
        params.n_threads = threads
        params.warmup = False  # the first image builds the graph
        LOG.clear()
        handle = self._worker.run(c.mtmd_init_from_file, os.fsencode(path), self.handle, params)
        if not handle:
            raise UserError(f"{path}: llama.cpp cannot load it: {LOG.reason()}; download it again or update llama.cpp")
        if not c.mtmd_support_vision(handle):
            c.mtmd_free(handle)
            raise UserError(f"{path}: reads no images; name the mmproj file of a vision model")
        return handle


def _no_space_prefix() -> Any:
    """What tells llama.cpp not to put a space in front of text."""
    c = library()
    overrides = (c.llama_model_kv_override * 2)()  # the second one, empty, ends the list
    overrides[0].key = SPACE_PREFIX.encode()
    overrides[0].tag = c.LLAMA_KV_OVERRIDE_TYPE_BOOL
    overrides[0].value.val_bool = False
    return overrides


def physical_cores() -> int:
    """Processors for computing: cores and not their hyperthreads, and only those that this process may use."""
    if sys.platform == "darwin":  # on Apple silicon the fast ones
        for name in ("hw.perflevel0.physicalcpu", "hw.physicalcpu"):
            out = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False).stdout.strip()
            if out.isdigit() and int(out):
                return int(out)
        return os.cpu_count() or 1
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    siblings = {_read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in allowed}
    return max(1, min(len(siblings), _quota()))


def _quota() -> int:
    """Processors that a container may use at a time, rounded up."""
    words = _read("/sys/fs/cgroup/cpu.max").split()
    return -(-int(words[0]) // int(words[1])) if len(words) == 2 and words[0].isdigit() else 1 << 16


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
