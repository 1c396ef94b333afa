"""Images decoded ahead of their use, by processes that do nothing else.

Not by Python's own pools: they start their processes by running the caller's script again, which would load MLX and the
model in each. These are started as a module of this package, and load numpy and Pillow.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from gm_mlx.errors import UserError
from gm_mlx.images import ImageConfig
from gm_mlx.train.image_worker import decode

COMMAND = (sys.executable, "-P", "-m", "gm_mlx.train.image_worker")


class ImagePool:
    """Decodes images in worker processes, which start when they are first needed.

    Args:
        config: how an image becomes pixels.
        workers: how many processes; with 0, ``submit`` decodes at once and in this process.
    """

    def __init__(self, config: ImageConfig, workers: int) -> None:
        self._config = config
        self._threads = ThreadPoolExecutor(workers, "gm-mlx images") if workers else None
        self._mine = threading.local()  # the process of each thread
        self._processes: list[subprocess.Popen[bytes]] = []
        self._closed = False

    def submit(self, source: str | bytes) -> Future[np.ndarray]:
        """Decode an image; the future's result is uint8 [size, size, 3], or a ``UserError``."""
        if self._threads is not None:
            return self._threads.submit(self._ask, source)
        done: Future[np.ndarray] = Future()
        try:
            done.set_result(decode(source, self._config))
        except UserError as error:
            done.set_exception(error)
        return done

    def close(self) -> None:
        """End all processes, whatever they are at."""
        self._closed = True
        if self._threads is None:
            return
        for process in self._processes:
            process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.communicate()  # closes the pipes and takes leave of the process

    def _ask(self, source: str | bytes) -> np.ndarray:
        """Let this thread's process decode an image. A thread that waits for a pipe lets the others run."""
        process = self._process()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump((source, self._config), process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            reply = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            code = process.wait()
            raise UserError(
                f"the process that decodes images has ended (exit code {code}), perhaps for lack of memory; use fewer "
                "workers"
            ) from error
        if isinstance(reply, str):
            raise UserError(reply)
        return reply

    def _process(self) -> subprocess.Popen[bytes]:
        if not hasattr(self._mine, "process"):
            # A BLAS is for MLX, which does not run there.
            environment = {**os.environ, "GM_MLX_BLAS": "off", "OPENBLAS_NUM_THREADS": "1"}
            self._mine.process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                start_new_session=True,  # Ctrl-C in the terminal is for this process, which ends that one
            )
            self._processes.append(self._mine.process)
            if self._closed:  # it began while the pool was closing
                self._mine.process.kill()
        process: subprocess.Popen[bytes] = self._mine.process
        return process
