"""One form in a process of its own: its peak memory is its own, and when it crashes the bench goes on.

``python -m gm_mlx.bench.child`` reads requests from stdin and answers each, one line of JSON both ways. The first is to
load a form; the others are the tasks of ``gm_mlx.bench.rounds``. When stdin ends, so does the process, at once.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from gm_mlx.bench.energy import find_meter
from gm_mlx.bench.subject import Subject
from gm_mlx.errors import UserError

if TYPE_CHECKING:
    from numpy.random import Generator

STATUS = Path("/proc/self/status")
SIZE = (640, 480)  # of the picture that is asked about when none is named

Values = dict[str, dict[str, Any]]


class Measured:
    """A loaded form, and the tasks that it is put to."""

    def __init__(self, subject: Subject, random: Generator, image: Image.Image | None) -> None:
        self._subject = subject
        self._random = random
        self._image = image
        self._meter = find_meter()
        self._pictures = 0
        self.tasks = {"prefill": self.prefill, "decode": self.decode, "picture": self.picture}

    def prefill(self, tokens: int) -> Values:
        """Read a prompt of random tokens."""
        ids = self._ids(tokens)
        with self._timed(tokens) as value:
            self._subject.prefill(ids)
        return {"pp": value}

    def decode(self, tokens: int) -> Values:
        """Compute tokens one by one, from the first on."""
        ids = self._ids(tokens)
        self._subject.reset()
        with self._timed(tokens) as value:
            self._subject.decode(ids)
        return {"tg": value}

    def picture(self, tokens: int) -> Values:
        """Ask about a picture, and compute tokens behind the question; 0 computes none."""
        assert self._image is not None
        picture = self._image.copy()
        # Another corner, so that no engine remembers having seen it.
        self._pictures += 1
        picture.putpixel((0, 0), (self._pictures % 256, self._pictures // 256 % 256, 0))
        with self._timed(1) as first:
            asked = self._subject.ask(picture)
        values = {"encode": {"seconds": asked.encode_seconds, "joules": None, "tokens": 1}, "first": first}
        if tokens:
            if asked.depth + tokens > self._subject.context_length:
                raise UserError(
                    f"{tokens} tokens behind a picture and a question of {asked.depth} do not fit the model's context "
                    f"of {self._subject.context_length}; ask for fewer with -n"
                )
            ids = self._ids(tokens)
            with self._timed(tokens) as behind:
                self._subject.decode(ids)
            values["tg_deep"] = {**behind, "depth": asked.depth}
        return values

    def _ids(self, tokens: int) -> list[int]:
        return self._random.integers(0, self._subject.vocab_size, tokens).tolist()

    @contextmanager
    def _timed(self, tokens: int) -> Iterator[dict[str, Any]]:
        value: dict[str, Any] = {"tokens": tokens}
        before, began = self._meter.read(), perf_counter()
        yield value
        value["seconds"] = perf_counter() - began
        value["joules"] = self._meter.joules(before, self._meter.read())


def load(request: dict[str, Any]) -> tuple[Subject, dict[str, Any]]:
    """Open the form that a request names; returns it with the answer to the request."""
    path, mmproj = Path(request["model"]), request["mmproj"] and Path(request["mmproj"])
    subject: Subject
    if request["engine"] == "mlx":
        from gm_mlx.bench.mlx_subject import MLXSubject

        began = perf_counter()
        subject = MLXSubject(path)
    else:
        from gm_mlx.bench.llama_subject import LlamaSubject, make_ready

        make_ready(path, mmproj)
        began = perf_counter()
        subject = LlamaSubject(path, mmproj, request["threads"], request["gpu_layers"])
    seconds = perf_counter() - began
    for name, option in (("prompt", "-p"), ("generate", "-n")):
        if request[name] > subject.context_length:
            raise UserError(
                f"{option} {request[name]}: the model's context has {subject.context_length} positions; ask for fewer"
            )
    facts = {**subject.facts(), "reads_images": subject.reads_images, "context_length": subject.context_length}
    return subject, {"values": {"load": {"seconds": seconds, "joules": None, "tokens": 1}}, "facts": facts}


def open_picture(subject: Subject, source: str | None, seed: int) -> Image.Image:
    """The picture to ask about: the named one, or noise."""
    if source is not None:
        return subject.open_image(source)
    noise = np.random.default_rng(seed).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def peak_memory() -> int:
    """The most bytes that this process ever had in memory, mapped files included."""
    if STATUS.exists():
        # ru_maxrss would not do: it begins with the peak of the process that started this one.
        found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
        assert found
        return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def requests() -> Iterator[dict[str, Any]]:
    """Requests from stdin. The process ends with stdin, whatever it is at: then nobody waits for the rest."""
    lines: SimpleQueue[bytes] = SimpleQueue()

    def listen() -> None:
        # Unbuffered: a buffer's lock would be in the way when this process ends by itself.
        with open(sys.stdin.fileno(), "rb", buffering=0) as stdin:
            for line in stdin:
                lines.put(line)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        yield json.loads(lines.get())


def main() -> None:
    """Answer requests."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no answer
    measured: Measured | None = None
    subject: Subject | None = None
    for request in requests():
        try:
            if request["task"] == "load":
                subject, answer = load(request)
                image = open_picture(subject, request["image"], request["seed"]) if subject.reads_images else None
                measured = Measured(subject, np.random.default_rng(request["seed"]), image)
            else:
                assert measured is not None
                answer = {"values": measured.tasks[request["task"]](request["tokens"])}
            assert subject is not None
            answer |= {"peak_memory": peak_memory(), "runtime_peak": subject.runtime_peak()}
        except (UserError, RuntimeError, MemoryError) as error:
            answer = {"failed": " ".join(str(error).split()) or type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
