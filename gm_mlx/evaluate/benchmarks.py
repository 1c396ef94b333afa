"""The benchmarks: for each a row that says how its files are read, what is asked, and how answers are scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gm_mlx.evaluate import labels, questions, scores, uploads
from gm_mlx.evaluate.question import Answered, Key, Labels, Question
from gm_mlx.evaluate.questions import Found
from gm_mlx.evaluate.scores import Scores

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"
UNANSWERABLE = f"When the provided information is insufficient, respond with 'Unanswerable'.\n{SHORT}"
# LLaVA's scripts: model_vqa_loader.py, and model_vqa.py with its kin.
LOADER_TOKENS, LONG_TOKENS = 128, 1024


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is run.

    Attributes:
        name: what the command line calls it.
        read: its reader of question files.
        suffix: stands on a line of its own behind each question, unless the file has it there already.
        annotations: reader of what its makers say is right; None where the question file has all that is known.
        key: what identifies a question in the labels.
        score: the metric; None where nothing is scored.
        upload: makes the file for the benchmark's server, of the answers, the question file and that of the whole test
            set.
        upload_ending: of that file's name.
        fills: the server wants the whole test set, of which only a part is asked.
        max_tokens: longest answer.
        exif: turn photographs as their EXIF orientation says. LLaVA's code takes them as they are stored.
    """

    name: str
    read: Callable[[Path], Found]
    suffix: str = ""
    annotations: Callable[[Path], Labels] | None = None
    key: Callable[[Question], Key] = labels.by_id
    score: Callable[[Sequence[Answered]], Scores] | None = None
    upload: Callable[[Sequence[Answered], Path, Path | None], str] | None = None
    upload_ending: str = ".upload.json"
    fills: bool = False
    max_tokens: int = LOADER_TOKENS
    exif: bool = False


MM_BENCH = Benchmark(
    "mmbench",
    questions.read_mm_bench,
    LETTER,
    score=scores.mm_bench,
    upload=uploads.mm_bench,
    upload_ending=".upload.tsv",
    max_tokens=LONG_TOKENS,
)
ROWS = (
    Benchmark("exact", questions.read_exact, score=scores.exact, exif=True),
    Benchmark("answers", questions.read_llava, max_tokens=LONG_TOKENS),
    Benchmark("vqav2", questions.read_vqav2, SHORT, labels.vqav2, score=scores.vqa, upload=uploads.vqav2, fills=True),
    Benchmark("gqa", questions.read_gqa, SHORT, labels.gqa, score=scores.gqa),
    Benchmark(
        "vizwiz", questions.read_vizwiz, UNANSWERABLE, labels.vizwiz, labels.by_image, scores.vqa, uploads.vizwiz
    ),
    Benchmark(
        "scienceqa",
        questions.read_science_qa,
        LETTER,
        labels.science_qa,
        score=scores.science_qa,
        max_tokens=LONG_TOKENS,
    ),
    Benchmark("textvqa", questions.read_llava, SHORT, labels.text_vqa, labels.text_vqa_key, scores.vqa),
    Benchmark("pope", questions.read_pope, SHORT, labels.pope, labels.pope_key, scores.pope),
    Benchmark("mme", questions.read_mme, SHORT, labels.mme, labels.mme_key, scores.mme),
    MM_BENCH,
    replace(MM_BENCH, name="mmbench-cn", suffix=LETTER_CN),
)
BENCHMARKS = {row.name: row for row in ROWS}
