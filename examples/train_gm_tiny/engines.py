"""Ask several forms of gm-tiny the same questions of easy-VQA, and print what each of them gets right.

    python examples/train_gm_tiny/engines.py gm-tiny Q8_0=OUT/model.gguf Q4_0=OUT2/model.gguf --easy-vqa easy_vqa.tar.gz

A form is whatever `gm-mlx chat --model` takes: a model folder, or a GGUF file with its mmproj.gguf beside it. The first
one is what the others' answers are held against; one model is in memory at a time. Answers are greedy and count when
they are right to the letter.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from time import perf_counter

from PIL import Image

from gm_mlx.cli.console import Progress, size
from gm_mlx.engine import Engine, Sampling
from gm_mlx.errors import UserError
from gm_mlx.hub import find_model
from gm_mlx.quant.report import markdown, share
from gm_mlx.vlm import open_engine
from gm_mlx.weights import weight_files

from easy_vqa import EasyVQA, load_easy_vqa  # isort: skip

GREEDY = Sampling(max_tokens=32)  # right answers are one word
HEADER = ["", "engine", "size", "right", "as the first", "prompt reused", "seconds"]


@dataclass(frozen=True)
class Form:
    """A model to ask.

    Attributes:
        label: what the table calls it.
        model: its name for ``open_engine``.
        options: what ``open_engine`` needs beside that.
        bytes: of its weight files.
    """

    label: str
    model: str
    options: dict[str, Path]
    bytes: int


@dataclass(frozen=True)
class Outcome:
    """What an engine said.

    Attributes:
        engine: its name.
        answers: one per question.
        reused: share of all prompt positions that were in the key/value cache already.
        seconds: for all questions, without loading.
    """

    engine: str
    answers: list[str]
    reused: float
    seconds: float


def find_form(text: str) -> Form:
    """The form that an argument ``MODEL`` or ``LABEL=MODEL`` names; raises ``UserError`` if it is not there."""
    label, equals, model = text.partition("=")
    if not equals or "/" in label:
        label = model = text
    path = Path(model)
    if path.suffix != ".gguf":
        files, options = weight_files(find_model(model)), {}
    else:
        mmproj = path.with_name("mmproj.gguf")
        files, options = [path, mmproj], {"mmproj": mmproj}
        if missing := [file for file in files if not file.is_file()]:
            raise UserError(f"{missing[0]}: not there; `gm-mlx convert --to gguf` writes a model with its mmproj.gguf")
    return Form(label, model, options, sum(file.stat().st_size for file in files))


def pick(easy: EasyVQA, limit: int | None) -> list[tuple[str, str, int]]:
    """Questions as ``recipes.py`` takes them, evenly spread; those about one image together, like beside like."""
    rows = easy.questions[:: max(1, len(easy.questions) // (limit or len(easy.questions)))]
    return sorted(rows, key=lambda row: (row[2], row[0]))


def ask(engine: Engine, easy: EasyVQA, questions: Sequence[tuple[str, str, int]], progress: Progress) -> Outcome:
    """Put all questions to an engine, those about one image in a row.

    The image stands in front of the question, so from the second question on its features and its positions in the
    key/value cache are there already.
    """
    answers: list[str] = []
    prompt = cached = 0
    began = perf_counter()
    for row, group in groupby(questions, key=lambda question: question[2]):
        image = engine.open_image(Image.fromarray(easy.images[row]))
        for question, _, _ in group:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            pieces = list(engine.stream([{"role": "user", "content": content}], [image], GREEDY))
            answers.append("".join(piece.text for piece in pieces).strip())
            prompt += pieces[-1].stats.prompt_tokens
            cached += pieces[-1].stats.cached_tokens
            progress("compare", len(answers), len(questions))
    return Outcome(engine.name, answers, cached / prompt, perf_counter() - began)


def table(forms: Sequence[Form], outcomes: Sequence[Outcome], expected: Sequence[str]) -> str:
    """The table in Markdown, a row for each form."""
    rows = []
    for form, outcome in zip(forms, outcomes, strict=True):
        same = "–" if outcome is outcomes[0] else share(agreement(outcome.answers, outcomes[0].answers))
        cells = [outcome.engine, size(form.bytes), share(agreement(outcome.answers, expected)), same]
        rows.append((form.label, [*cells, f"{outcome.reused:.0%}", f"{outcome.seconds:.1f}"]))
    return markdown(HEADER, rows)


def agreement(a: Sequence[str], b: Sequence[str]) -> float:
    """Share of answers that are the same."""
    return sum(one == other for one, other in zip(a, b, strict=True)) / len(a)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("forms", nargs="+", metavar="[LABEL=]MODEL", help="a folder, a .gguf file, or gm-tiny")
    parser.add_argument("--easy-vqa", type=Path, required=True, help="easy_vqa.tar.gz or the folder in it")
    parser.add_argument("--split", default="test", help="test; '' when the folder is itself a split")
    parser.add_argument("--limit", type=int, help="take so many questions, evenly spread; all by default")
    arguments = parser.parse_args()
    progress = Progress()
    try:
        forms = [find_form(text) for text in arguments.forms]
        easy = load_easy_vqa(arguments.easy_vqa, arguments.split or None)
        questions = pick(easy, arguments.limit)
        outcomes = []
        for form in forms:
            engine = open_engine(form.model, **form.options)
            try:
                with progress.waiting("compare"):
                    outcomes.append(ask(engine, easy, questions, progress))
            finally:
                engine.close()
    except UserError as error:
        sys.exit(f"engines.py: {error}")
    print(f"{len(questions)} test questions of easy-VQA.\n")
    print(table(forms, outcomes, [answer for _, answer, _ in questions]), end="")


if __name__ == "__main__":
    main()
