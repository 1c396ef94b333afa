"""A file of answers, which grows line by line, so that a run that was killed goes on where it stopped.

A line is what LLaVA's scripts write: ``question_id``, ``prompt``, ``text``, ``model_id`` and ``metadata``. Beside the
file, ``NAME.run.json`` says which run it is of. Lines come in the order in which questions are asked. When all are
there, they are sorted as the benchmark's questions are: some of LLaVA's scripts count lines instead of reading ids.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gm_mlx.errors import UserError
from gm_mlx.evaluate.question import Answered, Question
from gm_mlx.files import lock, new_file

# What the keys of a run's identity are called where two runs differ; for hashes the values say nothing.
NAMES = {
    "benchmark": "--benchmark",
    "weights": "model",
    "adapters": "adapters",
    "kv_bits": "--kv-bits",
    "max_tokens": "--max-tokens",
    "image_mode": "--image-mode",
    "questions": "set of questions",
}
HASHES = ("weights", "adapters", "questions")


class AnswersFile:
    """Answers of a run, those of an earlier try included. Nothing is written before ``begin``.

    Args:
        out: the file.
        run: the run's identity, with the keys of ``NAMES``.
        about: what else to note beside it.
        questions: all of the run's, as the benchmark has them.
        order: their numbers as they are asked.
        force: begin anew.

    Raises:
        UserError: the file cannot be there, holds something else, or answers of another run.
    """

    def __init__(
        self,
        out: Path,
        run: Mapping[str, Any],
        about: Mapping[str, Any],
        questions: Sequence[Question],
        order: Sequence[int],
        *,
        force: bool,
    ) -> None:
        self.path, self.run_file = out, out.with_suffix(".run.json")
        self.lines: list[dict[str, Any]] = []  # in the order in which questions are asked
        self._run, self._about, self._questions, self._order = run, about, questions, order
        self._size = out.stat().st_size if out.is_file() else 0
        self._end = 0  # of the lines that are kept, in bytes
        self._file: Any = None
        if not out.parent.is_dir():
            raise UserError(f"{out}: there is no folder {out.parent}; make it first")
        if self._size or (os.path.lexists(out) and not out.is_file()):
            self._check(force)
            if not force:
                self._read()

    @property
    def is_complete(self) -> bool:
        """Whether every question has its answer."""
        return len(self.lines) == len(self._order)

    @property
    def next_question(self) -> Question:
        """The first question that has no answer."""
        return self._questions[self._order[len(self.lines)]]

    @property
    def answers(self) -> list[Answered]:
        """Questions with their answers, as the benchmark has them and without those that could not be asked."""
        return [
            Answered(self._questions[number], line["text"])
            for number, line in self._sorted()
            if "error" not in line["metadata"]
        ]

    def begin(self) -> None:
        """Open the file for the answers that are still to come; no other process can write to it meanwhile.

        Raises:
            UserError: it cannot be written, or another process is at it or has been since it was read.
        """
        try:
            self._file = open(self.path, "ab")  # noqa: SIM115 - closed by ``close``
            if not lock(self._file):
                raise UserError(f"{self.path}: another process writes to it; wait for it, or choose another")
            if os.fstat(self._file.fileno()).st_size != self._size:
                raise UserError(f"{self.path}: another process has written to it; run the same command again")
            self._file.truncate(self._end)
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror or error}); choose another file"
            ) from None
        write_whole(self.run_file, json.dumps({**self._run, **self._about}, indent=2) + "\n")

    def add(self, text: str, model: str, metadata: Mapping[str, Any]) -> None:
        """Write the answer to the next question; raises ``UserError`` when the disk is full."""
        question = self.next_question
        line = {
            "question_id": question.id,
            "prompt": question.text,
            "text": text,
            "model_id": model,
            "metadata": dict(metadata),
        }
        try:
            self._file.write(_text(line).encode())
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); make room on the disk") from None
        self.lines.append(line)

    def close(self) -> None:
        """Let others write to the file."""
        if self._file is not None:
            self._file.close()

    def sort(self) -> None:
        """Bring the lines of a complete file into the order of the benchmark's questions."""
        content = "".join(_text(line) for _, line in self._sorted())
        if self.path.read_bytes() != content.encode():
            write_whole(self.path, content)

    def _sorted(self) -> list[tuple[int, dict[str, Any]]]:
        return sorted(zip(self._order, self.lines, strict=False), key=lambda pair: pair[0])

    def _check(self, force: bool) -> None:
        """Whether the file that is there may be gone on with, or replaced."""
        try:
            known = json.loads(self.run_file.read_bytes())
        except (OSError, ValueError, RecursionError):
            known = None
        if not isinstance(known, dict):
            raise UserError(
                f"{self.path}: exists, and no {self.run_file.name} beside it says that it holds answers; choose "
                "another file, or remove it first"
            )
        differing = next((key for key in NAMES if known.get(key) != self._run.get(key)), None)
        if differing is None or force:
            return
        values = "" if differing in HASHES else f" ({known.get(differing)} there, {self._run.get(differing)} here)"
        raise UserError(
            f"{self.path}: has answers of a run with another {NAMES[differing]}{values}; choose another file, or begin "
            "anew with --force"
        )

    def _read(self) -> None:
        """The lines that are there. The last one may be incomplete, when the process was killed while it wrote."""
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}); choose another file") from None
        whole = content[: content.rfind(b"\n") + 1]
        found = [_object(line) for line in whole.splitlines()]
        as_asked = [self._questions[number] for number in self._order]
        fault = _first_wrong(found, as_asked)
        if fault is not None and len(found) == len(self._order) and _first_wrong(found, self._questions) is None:
            fault, found = None, [found[number] for number in self._order]
        if fault is not None:
            raise UserError(
                f"{self.path}: line {fault + 1} does not answer its question, so the file was changed; choose another, "
                "or begin anew with --force"
            )
        self.lines, self._end = found, len(whole)


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all; raises ``UserError`` where it cannot be written."""
    try:
        with new_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); make room or write elsewhere"
        ) from None


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _first_wrong(lines: Sequence[Mapping[str, Any]], questions: Sequence[Question]) -> int | None:
    """The number of the first line that is no answer to the question of its number."""
    right = (_answers(line, question) for line, question in zip(lines, questions, strict=False))
    wrong = next((number for number, is_right in enumerate(right) if not is_right), None)
    return len(questions) if wrong is None and len(lines) > len(questions) else wrong


def _answers(line: Mapping[str, Any], question: Question) -> bool:
    if (line.get("question_id"), line.get("prompt")) != (question.id, question.text):
        return False
    return isinstance(line.get("text"), str) and isinstance(line.get("metadata"), dict)
