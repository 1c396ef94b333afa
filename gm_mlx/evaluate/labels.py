"""What the benchmarks' makers publish as right answers, by what identifies a question in their files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from gm_mlx.errors import UserError
from gm_mlx.evaluate.question import Key, Label, Labels, Question
from gm_mlx.evaluate.questions import pope_files, read_json
from gm_mlx.evaluate.scores import LETTERS

ASKED_FOR = "Please answer yes or no."  # at the end of MME's questions, and left out in some question files


def vqav2(path: Path) -> Labels:
    """VQA's ``v2_mscoco_val2014_annotations.json``: ten answers by question id, and what kind they are of."""
    rows = read_json(path, dict).get("annotations")
    return _labels(path, rows, lambda row: (str(row["question_id"]), _people(row, "answer_type")))


def vizwiz(path: Path) -> Labels:
    """VizWiz's ``val.json``: ten answers by the image's name."""
    return _labels(path, read_json(path, list), lambda row: (str(row["image"]), _people(row, "answer_type")))


def _people(row: Mapping[str, Any], category: str) -> Label:
    return Label(tuple(str(answer["answer"]) for answer in row["answers"]), str(row.get(category, "")))


def gqa(path: Path) -> Labels:
    """GQA's ``testdev_balanced_questions.json``: an answer by question id."""
    return _labels(path, read_json(path, dict).items(), lambda entry: (entry[0], Label((str(entry[1]["answer"]),))))


def text_vqa(path: Path) -> Labels:
    """``TextVQA_0.5.1_val.json``: ten answers by image and question, since LLaVA's ids are those of images."""
    rows = read_json(path, dict).get("data")
    return _labels(
        path,
        rows,
        lambda row: ((str(row["image_id"]), row["question"].lower()), Label(tuple(map(str, row["answers"])))),
    )


def text_vqa_key(question: Question) -> Key:
    """Image and question; the prompt has a line of reference tokens behind the question, or in front of it."""
    lines = question.text.split("\n")
    first = lines[1] if len(lines) > 1 and lines[0].startswith("Reference OCR token:") else lines[0]
    return str(question.id), first.lower()


def pope(path: Path) -> Labels:
    """A folder of POPE's three files: yes or no by category, image and question."""
    labels: dict[Key, Label] = {}
    for file in pope_files(path):
        category = file.stem.removeprefix("coco_pope_")

        def label(row: Mapping[str, Any], category: str = category) -> tuple[Key, Label]:
            return (category, row["image"], row["text"]), Label((row["label"],))

        labels |= _labels(file, _json_lines(file), label)
    return labels


def pope_key(question: Question) -> Key:
    """Category, image and the question without its suffix."""
    return question.category, str(question.image), question.text.split("\n")[0]


def mme(path: Path) -> Labels:
    """MME's folder: in each subtask a text file for each image, with a question, a tab and Yes or No in each line."""
    labels: dict[Key, Label] = {}
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir()):
        inner = folder / "questions_answers_YN"
        for file in sorted((inner if inner.is_dir() else folder).glob("*.txt")):
            bundle = f"{folder.name}/{file.stem}"

            def label(line: str, bundle: str = bundle) -> tuple[Key, Label]:
                question, answer = line.split("\t")[:2]
                return (bundle, _plain(question)), Label((answer.strip().lower(),))

            labels |= _labels(file, _text_lines(file), label)
    if not labels:
        raise UserError(f"{path}: has no subtasks of MME in it; name the folder MME_Benchmark_release_version")
    return labels


def mme_key(question: Question) -> Key:
    """Subtask and image, and the question without what asks for a short answer."""
    return question.bundle, _plain(question.text.split("\n")[0])


def _plain(text: str) -> str:
    return " ".join(text.replace(ASKED_FOR, "").split())


def science_qa(path: Path) -> Labels:
    """ScienceQA's ``problems.json``, or a folder with it: the right letter by question id, and how many choices."""
    file = path / "problems.json" if path.is_dir() else path

    def label(entry: tuple[str, Any]) -> tuple[Key, Label]:
        name, problem = entry
        return name, Label((LETTERS[problem["answer"]],), options="".join(LETTERS[: len(problem["choices"])]))

    return _labels(file, read_json(file, dict).items(), label)


def by_id(question: Question) -> Key:
    """The question's id."""
    return str(question.id)


def by_image(question: Question) -> Key:
    """The image's name."""
    return str(question.image)


def _labels(path: Path, rows: Iterable[Any] | None, label: Callable[[Any], tuple[Key, Label]]) -> Labels:
    """Labels of rows; raises ``UserError`` with the number of the first that is none."""
    if rows is None:
        raise UserError(f"{path}: has no list of annotations; check that it is the benchmark's file")
    found: dict[Key, Label] = {}
    for number, row in enumerate(rows, start=1):
        try:
            key, value = label(row)
            found[key] = value
            if not value.wanted:
                raise ValueError("no answer")
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            reason = f"has no {error}" if isinstance(error, KeyError) else error
            raise UserError(
                f"{path}: annotation {number} cannot be read ({reason}); check that it is the benchmark's file"
            ) from None
    return found


def _json_lines(path: Path) -> list[Any]:
    try:
        return [json.loads(line) for line in _text_lines(path)]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: a line is not JSON ({error}); download it again") from None


def _text_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); check it") from None
    return [line for line in text.split("\n") if line.strip()]
