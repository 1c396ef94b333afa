"""Files for the servers that know the answers of a test set."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from gm_mlx.errors import UserError
from gm_mlx.evaluate.evalai import normalised
from gm_mlx.evaluate.question import Answered
from gm_mlx.evaluate.questions import read_llava, read_table
from gm_mlx.train.rows import Problem

# Columns of MMBench's table that its server does not want back.
NOT_ASKED_FOR = {"hint", "category", "source", "image", "comment", "l2-category"}
PREDICTION = 6  # the column that the answer goes to


def vqav2(answers: Sequence[Answered], questions: Path, whole: Path | None) -> str:
    """The JSON that EvalAI takes for VQAv2 (``scripts/convert_vqav2_for_submission.py``).

    Args:
        answers: all that were asked.
        questions: their file.
        whole: LLaVA's file of the whole test set, of which those that were not asked get an empty answer.
    """
    said = {answer.question.id: normalised(answer.text) for answer in answers}
    rows = [{"question_id": name, "answer": text} for name, text in said.items()]
    for other in read_llava(whole) if whole is not None else ():
        if isinstance(other, Problem):
            raise UserError(f"{other}; download the file again")
        if other.id not in said:
            rows.append({"question_id": other.id, "answer": ""})
    return json.dumps(rows)


def vizwiz(answers: Sequence[Answered], questions: Path, whole: Path | None) -> str:
    """The JSON that EvalAI takes for VizWiz (``scripts/convert_vizwiz_for_submission.py``)."""
    return json.dumps([{"image": Path(str(image.image)).name, "answer": normalised(text)} for image, text in answers])


def mm_bench(answers: Sequence[Answered], questions: Path, whole: Path | None) -> str:
    """MMBench's table with the answers and without images (``scripts/convert_mmbench_for_submission.py``).

    Cells are apart by tabs; the server takes the table as a spreadsheet.
    """
    said = {str(answer.question.id): answer.text for answer in answers}
    out = io.StringIO(newline="")
    writer: csv.DictWriter[str] | None = None
    for row in read_table(questions):
        if writer is None:
            kept = [name for name in row if name not in NOT_ASKED_FOR]
            kept.insert(PREDICTION, "prediction")
            writer = csv.DictWriter(out, kept, delimiter="\t", extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
        writer.writerow({**row, "prediction": said.get(row["index"], "")})
    return out.getvalue()
