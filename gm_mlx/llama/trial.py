"""Load files in another process first, once, so that one that makes llama.cpp abort does not take this process with it.

Headers are checked before (``gm_mlx.llama.check``), but llama.cpp has more assertions than anybody can list, and a file
from the internet can run into any. The trial computes one token and one image. Files that passed are remembered, so it
costs a moment for each new file and nothing after that.

Run as a program with a model and perhaps an mmproj file, this module is the trial; what it finds wrong it prints.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from PIL import Image

from gm_mlx.errors import UserError
from gm_mlx.gguf_file import AGAIN, GGUFHeader
from gm_mlx.llama.binding import library_file
from gm_mlx.llama.check import check_mmproj, check_text_model, part_paths
from gm_mlx.llama.context import Context
from gm_mlx.llama.memo import remembered
from gm_mlx.llama.model import LlamaModel, physical_cores
from gm_mlx.llama.vision import Picture, Vision
from gm_mlx.llama.worker import Worker

SIZE, CHUNK = 4096, 2048  # of the context, which must hold an image
IMAGE_SIDE = 64  # small, for towers that read images of any size
REFUSED = 3  # exit code: llama.cpp said no, and why is on the output
LAST_WORDS = re.compile(r"GGML_ASSERT\(.*|(?i:fatal )?error:.*|what\(\):.*")
SECONDS = 600  # a trial that takes longer hangs


def check_by_trial(text: GGUFHeader, mmproj: GGUFHeader | None) -> None:
    """Make sure that llama.cpp survives these files; raises ``UserError`` with its last words."""
    files = [*part_paths(text.path), *([mmproj.path] if mmproj else [])]
    remembered("trial", [library_file(), *files], lambda: _try([text.path, *([mmproj.path] if mmproj else [])]))


def _try(paths: list[Path]) -> str:
    if getattr(sys, "frozen", False) or not sys.executable:  # inside an app, that would start the app
        return "not tried"
    # Without this ggml would start a debugger to print where it aborts.
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    command = [sys.executable, "-P", "-m", "gm_mlx.llama.trial", *map(str, paths)]
    try:
        result = subprocess.run(command, capture_output=True, env=environment, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"{paths[0]}: llama.cpp does not come to an end of loading it; {AGAIN}") from None
    except OSError:  # a system that lets nothing be started
        return "not tried"
    if result.returncode == 0:
        return "passed"
    said, errors = (text.decode(errors="replace").splitlines() for text in (result.stdout, result.stderr))
    if result.returncode == REFUSED:
        raise UserError(said[-1])
    path = said[-1] if said else str(paths[0])
    if result.returncode == -signal.SIGKILL:
        raise UserError(f"{path}: there is not enough memory to load it; take a smaller quantization of the model")
    words = next((found[0] for line in reversed(errors) if (found := LAST_WORDS.search(line))), "it does not say why")
    raise UserError(f"{path}: llama.cpp breaks down when it loads this file: {words}; {AGAIN}")


def main(paths: list[str]) -> int:
    """The trial itself. It prints the path of each file before it loads it, and what is wrong last of all."""
    try:
        print(paths[0], flush=True)
        text = check_text_model(paths[0])
        _run(text, None)
        if len(paths) > 1:
            print(paths[1], flush=True)
            _run(text, check_mmproj(paths[1]))
    except (UserError, RuntimeError) as error:
        print(" ".join(str(error).split()))
        return REFUSED
    return 0


def _run(text: GGUFHeader, mmproj: GGUFHeader | None) -> None:
    """Compute one token, and an image where the model reads images."""
    worker, threads = Worker(), physical_cores()
    model = LlamaModel(text, mmproj, worker=worker, gpu_layers=0, threads=threads, as_stored=True)
    context = Context(model, worker, size=min(SIZE, model.context_length), chunk=CHUNK, threads=threads)
    if mmproj is not None:
        vision, image = Vision(model, worker), Image.new("RGB", (IMAGE_SIDE, IMAGE_SIDE))
        features, _ = vision.encode(image)
        pictures = [part for part in vision.chunks([image]).parts() if isinstance(part, Picture)]
        if pictures[0].rows < context.size:
            context.decode_image(pictures[0].chunk, features[0], 0)
            return
    context.decode([0], 0)
    context.logits()


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # the system takes the memory back faster than llama.cpp gives it
