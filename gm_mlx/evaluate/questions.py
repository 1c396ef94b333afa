"""Question files of the benchmarks, as LLaVA's eval.zip has them or as their makers publish them.

Each reader yields questions with the text as it stands in the file and the image's name as it stands there. What is
wrong with a row is yielded in its place; only a file that cannot be read on ends the reading.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gm_mlx.errors import UserError
from gm_mlx.evaluate.question import Question
from gm_mlx.train.records import Record, read_json_lines, read_json_list
from gm_mlx.train.rows import Problem, Stored, Where

Found = Iterator[Question | Problem]
POPE_FILES = "coco_pope_*.json"
OPTIONS = "ABCD"
# Cells of a table that pandas, and MMBench's reader after it, take for empty.
EMPTY = {"", "#N/A", "<NA>", "N/A", "NA", "NULL", "n/a", "null"}
EMPTY_IN_ANY_CASE = {"nan", "none"}
ROTATION = 1_000_000  # added to the index of an MMBench question for each other order of its options
LONGEST_INDEX = 16  # characters; an image is longer, so a shorter cell names the row that has it


def read_llava(path: Path) -> Found:
    """LLaVA's question files: a line is ``{"question_id": 1, "image": "a.jpg", "text": "What is this?"}``."""
    yield from _rows(read_json_lines(path), _llava)


def _llava(where: Where, row: Mapping[str, Any]) -> Question:
    text = row.get("text", row.get("question"))
    image = row.get("image")
    return Question(
        where,
        _id(row.get("question_id", where.number)),
        _text(text, "text"),
        None if image in (None, "") else _text(image, "image"),
        str(row.get("category", "")),
    )


def read_exact(path: Path) -> Found:
    """gm-mlx's own: a line is ``{"image": "a.jpg", "question": "What is this?", "answer": "a cat"}``."""

    def question(where: Where, row: Mapping[str, Any]) -> Question:
        found = _llava(where, row)
        answer = _text(row.get("answer"), "answer")
        return Question(where, found.id, found.text, found.image, found.category, (answer,))

    yield from _rows(read_json_lines(path), question)


def read_vqav2(path: Path) -> Found:
    """VQA's ``v2_OpenEnded_mscoco_val2014_questions.json``, or LLaVA's lines."""
    if path.suffix == ".jsonl":
        yield from read_llava(path)
        return
    table = read_json(path, dict)
    subset = table.get("data_subtype")

    def question(where: Where, row: Mapping[str, Any]) -> Question:
        image = f"COCO_{subset}_{int(row['image_id']):012d}.jpg"
        return Question(where, _id(row["question_id"]), _text(row["question"], "question"), image)

    yield from _rows(_entries(path, table.get("questions")), question)


def read_vizwiz(path: Path) -> Found:
    """VizWiz's ``val.json`` and ``test.json``, which have the answers in them or not; or LLaVA's lines."""
    if path.suffix == ".jsonl":
        yield from read_llava(path)
        return

    def question(where: Where, row: Mapping[str, Any]) -> Question:
        image = _text(row["image"], "image")
        people = tuple(str(answer["answer"]) for answer in row.get("answers", ()))
        category = str(row.get("answer_type", ""))
        return Question(where, image, _text(row["question"], "question"), image, category, people)

    yield from _rows(_entries(path, read_json(path, list)), question)


def read_gqa(path: Path) -> Found:
    """GQA's ``testdev_balanced_questions.json``, or LLaVA's lines."""
    if path.suffix == ".jsonl":
        yield from read_llava(path)
        return

    def question(where: Where, row: Mapping[str, Any]) -> Question:
        image = f"{_text(row['imageId'], 'imageId')}.jpg"
        wanted = (_text(row["answer"], "answer"),) if "answer" in row else ()
        return Question(where, row["id"], _text(row["question"], "question"), image, wanted=wanted)

    entries = [{**row, "id": name} for name, row in read_json(path, dict).items() if isinstance(row, dict)]
    yield from _rows(_entries(path, entries), question)


def read_pope(path: Path) -> Found:
    """A folder with POPE's three files, which have the answers in them; or LLaVA's lines."""
    if not path.is_dir():
        yield from read_llava(path)
        return
    for file in pope_files(path):
        category = file.stem.removeprefix("coco_pope_")

        def question(where: Where, row: Mapping[str, Any], category: str = category) -> Question:
            found = _llava(where, row)
            label = _text(row.get("label"), "label")
            return Question(where, found.id, found.text, found.image, category, (label,))

        yield from _rows(read_json_lines(file), question)


def pope_files(folder: Path) -> list[Path]:
    """POPE's files in a folder; raises ``UserError`` where there are none."""
    if not (files := sorted(folder.glob(POPE_FILES))):
        raise UserError(f"{folder}: has none of POPE's files ({POPE_FILES}); name the folder that has")
    return files


def read_mme(path: Path) -> Found:
    """LLaVA's ``llava_mme.jsonl``. The two questions about an image are one bundle, its subtask and its name."""

    def question(where: Where, row: Mapping[str, Any]) -> Question:
        found = _llava(where, row)
        category, _, name = str(found.id).partition("/")
        bundle = f"{category}/{Path(name).stem}"
        return Question(where, found.id, found.text, found.image, category, bundle=bundle)

    yield from _rows(read_json_lines(path), question)


def read_science_qa(path: Path) -> Found:
    """LLaVA's ``llava_test_CQM-A.json``: conversations, of which the first message is asked. Half have no image."""

    def question(where: Where, row: Mapping[str, Any]) -> Question:
        text = _text(row["conversations"][0]["value"], "value").replace("<image>", "").strip()
        image = _text(row["image"], "image") if "image" in row else None
        return Question(where, _id(row["id"]), _text(text, "value"), image)

    yield from _rows(read_json_list(path), question)


def read_mm_bench(path: Path) -> Found:
    """MMBench's tables: an image in base64, a hint, a question, and up to four options, one a line in what is asked."""
    images: dict[str, str] = {}  # by the index of the row that has it
    unique: dict[str, str] = {}  # so that an image that comes with each order of the options is in memory once
    for number, row in enumerate(read_table(path), start=1):
        where = Where(str(path), "row", number)
        try:
            cell = row["image"].strip()
            cell = images.get(cell, cell) if len(cell) <= LONGEST_INDEX else unique.setdefault(cell, cell)
            images[row["index"]] = cell
            yield _mm_bench(where, row, cell)
        except (KeyError, ValueError, UserError) as error:
            yield Problem(where, _why(error))


def _mm_bench(where: Where, row: Mapping[str, str], image: str) -> Question:
    index = int(row["index"])
    options = []
    for letter in OPTIONS:
        if _is_empty(text := row.get(letter) or ""):
            break
        options.append(f"{letter}. {text}")
    hint = row.get("hint") or ""
    answer = row.get("answer") or ""
    return Question(
        where,
        index,
        "\n".join([*([] if _is_empty(hint) else [hint]), _text(row["question"], "question"), *options]),
        Stored(hashlib.blake2b(image.encode(), digest_size=16).hexdigest(), partial(_decoded, image)),
        row.get("l2-category") or row.get("category") or "",
        () if _is_empty(answer) else (answer,),
        OPTIONS[: len(options)],
        str(index % ROTATION),
    )


def _is_empty(cell: str) -> bool:
    return cell in EMPTY or cell.lower() in EMPTY_IN_ANY_CASE


def _decoded(image: str) -> bytes:
    try:
        return base64.b64decode(image, validate=True)
    except binascii.Error as error:
        raise UserError(f"image: not base64 ({error})") from None


def read_table(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a table whose cells are apart by tabs, with the first line's names.

    Raises:
        UserError: it is no such table, or lacks MMBench's columns.
    """
    limit = csv.field_size_limit(sys.maxsize)  # of a cell, which holds an image here
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", restval="")
            missing = {"index", "question", "image", "A", "B"} - set(reader.fieldnames or ())
            if missing:
                raise UserError(
                    f"{path}: no column {min(missing)!r} in its first line; name one of MMBench's .tsv files"
                )
            yield from reader
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a table in UTF-8 ({error}); download it again") from None
    finally:
        csv.field_size_limit(limit)


def read_json(path: Path, kind: type) -> Any:
    """A whole JSON file, which must be an object (dict) or a list.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read as JSON ({reason}); check the path, or download it again") from None
    if not isinstance(value, kind):
        wanted = "an object" if kind is dict else "a list"
        raise UserError(f"{path}: its JSON is not {wanted}; check that it is the benchmark's file")
    return value


def _entries(path: Path, values: Any) -> Iterator[Record]:
    if not isinstance(values, list):
        raise UserError(f"{path}: has no list of questions; check that it is the benchmark's file")
    for number, value in enumerate(values, start=1):
        yield Record(Where(str(path), "record", number), value, lambda: None)


def _rows(
    records: Iterator[Record] | Iterator[Record | Problem], question: Callable[[Where, Mapping[str, Any]], Question]
) -> Found:
    """Questions of records, and problems where they cannot be made."""
    for record in records:
        if isinstance(record, Problem):
            yield record
            continue
        try:
            if not isinstance(record.value, Mapping):
                raise UserError("not an object")
            yield question(record.where, record.value)
        except (KeyError, TypeError, ValueError, IndexError, UserError) as error:
            yield Problem(record.where, _why(error))


def _why(error: Exception) -> str:
    return f"has no {error}" if isinstance(error, KeyError) else str(error)


def _id(value: Any) -> str | int:
    return value if isinstance(value, int) else _text(value, "question_id")


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"has no text in {key!r}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{key!r} is not UTF-8 text") from None
    return value
