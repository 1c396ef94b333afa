"""llama.cpp's quantizer in a process of its own, since C code cannot be interrupted and may end the process it is in.

``python -m gm_mlx.convert.to_gguf.quantizer_process`` reads a job from stdin, a line of JSON and then the importance
matrix as float32. It says on stdout, a line of JSON each, which tensor it is at, and at last what went wrong, or null.
When stdin ends before that, the parent has died, and so does this process, without leaving a file.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gm_mlx.llama.binding import LOG, library

# Rows of one tensor that the quantizer holds at a time: the source, float32 and the result. Enough for all cores.
MAX_BUFFER_BYTES = 128 << 20
MAX_TEXT = 127  # bytes of a string that an override of metadata has room for
TENSOR_LINE = re.compile(r"\[ *\d+/ *\d+\] +(\S+) +- ")


def main() -> None:
    """Do the job that stdin names."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever C prints is no answer

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    job = json.loads(sys.stdin.buffer.readline())
    imatrix = {name: np.frombuffer(sys.stdin.buffer.read(4 * size), np.float32) for name, size in job["imatrix"]}
    threading.Thread(target=_die_with_parent, args=(Path(job["out"]),), daemon=True).start()
    answer(failed=quantize(job, imatrix, lambda name: answer(tensor=name)))


def _die_with_parent(out: Path) -> None:
    while os.read(0, 1):  # unbuffered: a buffer's lock would be in the way when this process ends by itself
        pass  # nothing comes but the end, when the parent closes the pipe or is gone
    out.unlink(missing_ok=True)
    os._exit(1)


def quantize(job: dict[str, Any], imatrix: dict[str, np.ndarray], at_tensor: Callable[[str], None]) -> str | None:
    """Run the quantizer; returns why it failed, None when the file is complete."""
    c = library()

    @c.llama_log_callback
    def listener(level: int, text: bytes, _: Any) -> None:
        LOG.hear(level, text)
        if found := TENSOR_LINE.match(text.decode("utf-8", errors="replace")):
            at_tensor(found[1])

    c.llama_log_set(listener, None)
    params = c.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.max_buf_size = job["file_type"], job["threads"], MAX_BUFFER_BYTES
    # Each list ends with an entry of zeros, as ctypes makes them; all of it must live until the call is over.
    params.tt_overrides = overrides = (c.llama_model_tensor_override * (len(job["overrides"]) + 1))()
    for override, (pattern, kind) in zip(overrides, job["overrides"], strict=False):
        override.pattern, override.type = pattern.encode(), kind
    params.kv_overrides = keys = (c.llama_model_kv_override * (len(job["keys"]) + 1))()
    for key, (name, value) in zip(keys, job["keys"].items(), strict=False):
        key.key = name.encode()
        if isinstance(value, int):
            key.tag, key.value.val_i64 = c.LLAMA_KV_OVERRIDE_TYPE_INT, value
        else:
            text = value.encode()[:MAX_TEXT].decode(errors="ignore")
            key.tag, key.value.val_str = c.LLAMA_KV_OVERRIDE_TYPE_STR, text.encode()
    if imatrix:  # a list that is there makes llama.cpp look every matrix up
        params.imatrix = entries = (c.llama_model_imatrix_data * (len(imatrix) + 1))()
        for entry, (name, values) in zip(entries, imatrix.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    LOG.clear()
    failed = c.llama_model_quantize(os.fsencode(job["source"]), os.fsencode(job["out"]), ctypes.byref(params))
    return LOG.reason() if failed else None


if __name__ == "__main__":
    main()
