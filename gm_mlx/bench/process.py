"""The bench's end of a child: starts it, asks it, and says in a line how it died."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from typing import Any

from gm_mlx.bench.forms import Form
from gm_mlx.bench.rounds import Settings
from gm_mlx.errors import UserError

COMMAND = (sys.executable, "-P", "-m", "gm_mlx.bench.child")


class Child:
    """A form in a process of its own.

    Args:
        name: what messages call it.
        form: the form.
        settings: how it is measured.
    """

    def __init__(self, name: str, form: Form, settings: Settings) -> None:
        self._name = name
        self._form = form
        self._settings = settings
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115  # open for as long as the process lives
        self._process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},  # else ggml would start a debugger to print where it aborts
            start_new_session=True,  # Ctrl-C in the terminal is for this process, which ends that one
        )

    def load(self) -> dict[str, Any]:
        """Load the form; returns the child's answer, with "values", "facts" and peaks."""
        settings, form = self._settings, self._form
        return self.ask(
            task="load",
            engine=form.engine,
            model=os.path.abspath(form.model),
            mmproj=form.mmproj and os.path.abspath(form.mmproj),
            threads=settings.threads,
            gpu_layers=settings.gpu_layers,
            prompt=settings.prompt,
            generate=settings.generate,
            image=settings.image and os.path.abspath(settings.image),
            seed=settings.seed,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Put it to a task; returns its answer.

        Raises:
            UserError: it cannot do it, or it has died, and why.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has died; why is seen below
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"{self._name}: {self._epitaph()}")
        answer = json.loads(line)
        if "failed" in answer:
            raise UserError(f"{self._name}: {answer['failed']}")
        return answer

    def close(self) -> None:
        """End the process, whatever it is at."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._complaints.close()

    def _epitaph(self) -> str:
        """How it died."""
        code = self._process.wait()
        self._complaints.seek(0)
        lines = [line for line in self._complaints.read().decode(errors="replace").splitlines() if line.strip()]
        last = f" ({lines[-1].strip()})" if lines else ""
        if code == -signal.SIGKILL:
            return "was ended by the system while it was measured; there may be too little memory"
        if code < 0:
            return f"crashed with {signal.Signals(-code).name} while it was measured{last}"
        return f"ended with code {code} while it was measured{last}"
