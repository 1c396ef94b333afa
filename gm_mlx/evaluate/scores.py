"""The metrics of the papers' benchmarks, as LLaVA's and MoE-LLaVA's scripts compute them.

Each function takes all answered questions and returns one number, the one that the papers' tables have, and a table
of what it is made of. Shares are percentages.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from gm_mlx.evaluate.evalai import normalised
from gm_mlx.evaluate.question import Answered, Question

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
LETTERS = tuple("ABCDE")
ENOUGH = 3  # people who must agree with an answer for it to be right

Answers = Sequence[Answered]
Right = Callable[[Question, str], float]


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        name: the part of the benchmark.
        questions: how many there are in it.
        measures: its figures by name, in the order in which they are shown.
    """

    name: str
    questions: int
    measures: dict[str, float]


class Scores(NamedTuple):
    """What a benchmark says of a model.

    Attributes:
        measure: what the number is.
        value: the number that the papers' tables have.
        rows: what it is made of.
    """

    measure: str
    value: float
    rows: tuple[Row, ...]


def exact(answers: Answers) -> Scores:
    """Answers that are right but for case, white space and a full stop at the end."""
    from gm_mlx.train.answers import same_answer

    return _accuracy(answers, lambda question, text: same_answer(text, question.wanted[0]))


def vqa(answers: Answers) -> Scores:
    """VQAv2, VizWiz and TextVQA: how many of ten people said the same; see ``agreement``."""
    return _accuracy(answers, lambda question, text: agreement(text, question.wanted))


def agreement(text: str, people: Sequence[str]) -> float:
    """How far people agree with an answer, 0 to 1.

    The mean, over all but one of them, of min(1, matches / 3), with all answers normalised: VQA's accuracy, as LLaVA's
    ``TextVQAAccuracyEvaluator`` computes it.
    """
    wanted = normalised(text)
    matches = sum(normalised(answer) == wanted for answer in people)
    without_a_match = min(1.0, (matches - 1) / ENOUGH)
    without_another = min(1.0, matches / ENOUGH)
    return (matches * without_a_match + (len(people) - matches) * without_another) / len(people)


def gqa(answers: Answers) -> Scores:
    """GQA: the same text, after ``scripts/convert_gqa_for_eval.py`` has made it lower case without a last full stop."""
    return _accuracy(answers, lambda question, text: text.rstrip(".").lower() == question.wanted[0])


def pope(answers: Answers) -> Scores:
    """POPE: the mean F1 of finding "yes" in its three categories (``eval_pope.py``)."""
    rows = []
    for name, part in _by_category(answers).items():
        said = [says_yes(answer.text) for answer in part]
        true = [answer.question.wanted[0] == "yes" for answer in part]
        hits = sum(a and b for a, b in zip(said, true, strict=True))
        precision, recall = _ratio(hits, sum(said)), _ratio(hits, sum(true))
        measures = {
            "accuracy": _percent(a == b for a, b in zip(said, true, strict=True)),
            "precision": 100 * precision,
            "recall": 100 * recall,
            "F1": 100 * _ratio(2 * precision * recall, precision + recall),
            "yes": _percent(said),
        }
        rows.append(Row(name, len(part), measures))
    mean = sum(row.measures["F1"] for row in rows) / len(rows)
    return Scores("mean F1", mean, (*rows, Row("mean", len(answers), {"F1": mean})))


def says_yes(text: str) -> bool:
    """How POPE reads an answer: anything is a yes unless its first sentence has the word no or not in it."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def mme(answers: Answers) -> Scores:
    """MME: for each subtask the share of right answers and that of images with none wrong, summed up over subtasks.

    The number is the sum of the ten subtasks of perception, 2000 at most. A question that comes twice counts once.
    """
    rows = []
    for name, part in _by_category(answers).items():
        unique = {(answer.question.bundle, answer.question.text): answer for answer in part}
        right = [yes_or_no(answer.text) == answer.question.wanted[0] for answer in unique.values()]
        images: dict[str, bool] = {}
        for (image, _), is_right in zip(unique, right, strict=True):
            images[image] = images.get(image, True) and is_right
        shares = {"accuracy": _percent(right), "accuracy+": _percent(images.values())}
        rows.append(Row(name, len(unique), {**shares, "score": sum(shares.values())}))
    sums = []
    for name, parts in (("perception", PERCEPTION), ("cognition", COGNITION)):
        chosen = [row for row in rows if row.name in parts]
        total = sum(row.measures["score"] for row in chosen)
        sums.append(Row(name, sum(row.questions for row in chosen), {"score": total}))
    return Scores("perception", sums[0].measures["score"], (*rows, *sums))


def yes_or_no(text: str) -> str:
    """How MME reads an answer: by its first four characters. What is neither is "other", and wrong."""
    start = text.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def science_qa(answers: Answers) -> Scores:
    """ScienceQA: right letters among the questions that have an image, which is the number, and among the others."""
    parts = {
        "with an image": [answer for answer in answers if answer.question.image is not None],
        "without": [answer for answer in answers if answer.question.image is None],
        "all": list(answers),
    }
    rows = tuple(_letters(name, part, chosen_letter) for name, part in parts.items() if part)
    return Scores(
        "accuracy with an image" if parts["with an image"] else "accuracy", rows[0].measures["accuracy"], rows
    )


def chosen_letter(text: str) -> str:
    """How ScienceQA reads an answer (``eval_science_qa.py``): "A", "A. ..." or "The answer is A."; empty for others."""
    if text in LETTERS or (text[:1] in LETTERS and text[1:3] == ". "):
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else ""


def mm_bench(answers: Answers) -> Scores:
    """MMBench: right letters among all rows; and, where the file has questions in several orders, CircularEval's share.

    CircularEval takes a question for right when it is right in every order of its options that was asked.
    """
    rows = [_letters("all rows", answers, first_letter)]
    in_every_order: dict[str, bool] = {}
    for question, text in answers:
        name = question.bundle or str(question.id)
        in_every_order[name] = in_every_order.get(name, True) and _is_chosen(question, first_letter(text))
    parts = [_letters(name, part, first_letter) for name, part in _by_category(answers).items() if name]
    if len(in_every_order) == len(answers):
        return Scores("accuracy", rows[0].measures["accuracy"], (*rows, *parts))
    circular = _percent(in_every_order.values())
    rows.append(Row("in every order of the options", len(in_every_order), {"accuracy": circular}))
    return Scores("CircularEval accuracy", circular, (*rows, *parts))


def first_letter(text: str) -> str:
    """The letter that an answer is or begins with, as "A: ..." or "(A) ..." but not "A ..."; or ``chosen_letter``'s."""
    found = re.match(r"\(?([A-Z])(?:[.,:)\n]|$)", text)
    return found[1] if found else chosen_letter(text)


def _letters(name: str, answers: Answers, read: Callable[[str], str]) -> Row:
    right = (_is_chosen(question, read(text)) for question, text in answers)
    return Row(name, len(answers), {"accuracy": _percent(right)})


def _is_chosen(question: Question, letter: str) -> bool:
    return letter in question.wanted and letter in question.options


def _accuracy(answers: Answers, right: Right) -> Scores:
    """The mean over all questions, and over the parts of the benchmark where there are several."""
    parts = {"all": list(answers)}
    if len(by_category := _by_category(answers)) > 1:
        parts |= by_category
    rows = tuple(
        Row(name, len(part), {"accuracy": _percent(right(*one) for one in part)}) for name, part in parts.items()
    )
    return Scores("accuracy", rows[0].measures["accuracy"], rows)


def _by_category(answers: Answers) -> dict[str, list[Answered]]:
    parts: dict[str, list[Answered]] = defaultdict(list)
    for answer in answers:
        parts[answer.question.category].append(answer)
    return dict(parts)


def _percent(values: Iterable[float]) -> float:
    listed = list(values)
    return 100 * sum(listed) / len(listed)


def _ratio(above: float, below: float) -> float:
    return above / below if below else 0.0
