"""The metrics, against values by hand and against slower ways to compute them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gm_mlx.evaluate import scores
from gm_mlx.evaluate.question import Answered, Question
from gm_mlx.train.rows import Where


def answered(said: str, *wanted: str, **fields: Any) -> Answered:
    question = {"id": 1, "text": "What?", **fields}
    return Answered(Question(Where("q.jsonl", "line", 1), wanted=wanted, **question), said)


def measures(found: scores.Scores) -> dict[str, dict[str, float]]:
    return {row.name: row.measures for row in found.rows}


def leave_one_out(text: str, people: Sequence[str]) -> float:
    """VQA's accuracy as its paper writes it."""
    total = 0.0
    for left in range(len(people)):
        others = [people[i] for i in range(len(people)) if i != left]
        total += min(1.0, others.count(text) / 3)
    return total / len(people)


@given(st.lists(st.sampled_from(["red", "blue", "green"]), min_size=10, max_size=10), st.sampled_from(["red", "no"]))
def test_agreement_is_that_of_all_but_one(people: list[str], text: str) -> None:
    assert scores.agreement(text, people) == pytest.approx(leave_one_out(text, people), abs=1e-12)


@pytest.mark.parametrize(("matches", "wanted"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_agreement_by_hand(matches: int, wanted: float) -> None:
    people = ["Two."] * matches + ["many"] * (10 - matches)
    assert scores.agreement("the 2", people) == pytest.approx(wanted)


def test_vqa_has_a_part_for_each_kind_of_answer() -> None:
    found = scores.vqa(
        [
            answered("yes", *["yes"] * 10, category="yes/no"),
            answered("3", *["2"] * 9, "3", category="number"),
            answered("no", *["yes"] * 8, "no", "no", category="yes/no"),
        ]
    )
    assert found.value == pytest.approx(100 * (1 + 0.3 + 0.6) / 3)
    assert measures(found)["yes/no"]["accuracy"] == pytest.approx(80)
    assert measures(found)["number"]["accuracy"] == pytest.approx(30)
    assert [row.questions for row in found.rows] == [3, 2, 1]


def test_gqa_takes_case_and_last_full_stops_away_and_nothing_else() -> None:
    right = [answered(text, "left") for text in ("left", "Left.", "LEFT..")]
    wrong = [answered(text, "left") for text in ("left !", "to the left", "", " left")]
    assert [scores.gqa([one]).value for one in right + wrong] == [100, 100, 100, 0, 0, 0, 0]


def test_exact() -> None:
    assert scores.exact([answered("A  Cat.", "a cat"), answered("cat", "a cat")]).value == 50


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes", True), ("no", False), ("No", False), ("NO", True), ("", True), ("I do not know", False),
        ("No, there is none", False), ("Yes. No dog is there", True), ("There is nothing", True), ("maybe,no", True),
        ("it is not. yes", False),
    ],
)  # fmt: skip
def test_how_pope_reads(text: str, yes: bool) -> None:
    assert scores.says_yes(text) is yes


def test_pope_by_hand() -> None:
    """Random: 3 hits, 1 false alarm, 2 misses, 4 right noes. Popular: all is said to be there."""
    rows = [("Yes", "yes")] * 3 + [("Yes", "no")] + [("No", "yes")] * 2 + [("No", "no")] * 4
    answers = [answered(text, label, category="random") for text, label in rows]
    answers += [answered("Yes", label, category="popular") for label in ("yes", "no")]
    found = scores.pope(answers)
    random, popular = measures(found)["random"], measures(found)["popular"]
    assert random == pytest.approx({"accuracy": 70, "precision": 75, "recall": 60, "F1": 200 / 3, "yes": 40})
    assert popular == pytest.approx({"accuracy": 50, "precision": 50, "recall": 100, "F1": 200 / 3, "yes": 100})
    assert found.value == measures(found)["mean"]["F1"] == pytest.approx(200 / 3)


def test_pope_without_a_yes_is_no_division_by_zero() -> None:
    found = scores.pope([answered("No", "yes", category="random"), answered("No", "no", category="random")])
    assert measures(found)["random"] == {"accuracy": 50, "precision": 0, "recall": 0, "F1": 0, "yes": 0}


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Yes", "yes"), ("no.", "no"), ("YES it is", "yes"), (" yes", "yes"), ("it is yes", "other"), ("", "other"),
        ("not sure", "no"), ("nay", "other"), ("I know", "other"), ("I no", "no"),
    ],
)  # fmt: skip
def test_how_mme_reads(text: str, read: str) -> None:
    assert scores.yes_or_no(text) == read


def mme_image(category: str, name: str, first: str, second: str) -> list[Answered]:
    """Two answers about an image, of which yes and no are right."""
    bundle = f"{category}/{name}"
    return [
        answered(first, "yes", text="Is it?", category=category, bundle=bundle),
        answered(second, "no", text="Is it not?", category=category, bundle=bundle),
    ]


def test_mme_by_hand() -> None:
    answers = mme_image("existence", "1", "Yes", "No") + mme_image("existence", "2", "Yes", "Yes")
    answers += mme_image("OCR", "1", "perhaps", "No") + mme_image("code_reasoning", "1", "Yes", "No")
    found = scores.mme(answers)
    assert measures(found)["existence"] == {"accuracy": 75, "accuracy+": 50, "score": 125}
    assert measures(found)["OCR"] == {"accuracy": 50, "accuracy+": 0, "score": 50}
    assert measures(found)["perception"] == {"score": 175}
    assert measures(found)["cognition"] == {"score": 200}
    assert (found.measure, found.value) == ("perception", 175)


def test_mme_counts_a_question_once() -> None:
    once = mme_image("count", "1", "Yes", "No") + mme_image("count", "2", "No", "No")
    assert scores.mme(once + once[2:]) == scores.mme(once)


def test_the_most_that_mme_gives() -> None:
    answers = [one for name in (*scores.PERCEPTION, *scores.COGNITION) for one in mme_image(name, "1", "yes", "no")]
    found = measures(scores.mme(answers))
    assert (found["perception"]["score"], found["cognition"]["score"]) == (2000, 800)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("B. dog", "B"), ("B.", ""), ("B dog", ""), ("b", ""), ("(B)", ""), ("F", ""), ("F. x", ""),
        ("The answer is B.", "B"), ("I think. The answer is B, as said", "B"), ("The answer is B", ""), ("", ""),
        ("The answer is B. The answer is C.", ""), ("E. x", "E"),
    ],
)  # fmt: skip
def test_how_scienceqa_reads(text: str, letter: str) -> None:
    assert scores.chosen_letter(text) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("B.", "B"), ("B. dog", "B"), ("(B) dog", "B"), ("B: dog", "B"), ("B) dog", "B"), ("B\ndog", "B"),
        ("A dog", ""), ("Both", ""), ("b", ""), ("", ""), ("The answer is C.", "C"), ("B, of course", "B"),
    ],
)  # fmt: skip
def test_how_mmbench_is_read(text: str, letter: str) -> None:
    assert scores.first_letter(text) == letter


def test_scienceqa_counts_images_apart() -> None:
    answers = [
        answered("A", "A", image="1.png", options="AB"),
        answered("A", "B", image="2.png", options="AB"),
        answered("E", "A", image="2.png", options="AB"),
        answered("nothing", "A", image="3.png", options="AB"),
        answered("C. x", "C", options="ABC"),
    ]
    found = scores.science_qa(answers)
    assert (found.measure, found.value) == ("accuracy with an image", 25)
    assert measures(found) == {
        "with an image": {"accuracy": 25},
        "without": {"accuracy": 100},
        "all": {"accuracy": 40},
    }
    assert scores.science_qa(answers[-1:]).measure == "accuracy"


def test_mmbench_takes_a_question_for_right_in_every_order_only() -> None:
    answers = [
        answered("A", "A", id=1, bundle="1", options="AB", category="logic"),
        answered("A", "B", id=1_000_001, bundle="1", options="AB", category="logic"),
        answered("B", "B", id=2, bundle="2", options="AB", category="shape"),
        answered("A", "A", id=1_000_002, bundle="2", options="AB", category="shape"),
    ]
    found = scores.mm_bench(answers)
    assert (found.measure, found.value) == ("CircularEval accuracy", 50)
    assert measures(found)["all rows"] == {"accuracy": 75}
    assert measures(found)["logic"] == {"accuracy": 50}
    plain = scores.mm_bench(answers[::2])
    assert (plain.measure, plain.value) == ("accuracy", 100)


def test_a_letter_that_is_no_option_is_wrong() -> None:
    assert scores.mm_bench([answered("D", "D", options="ABC")]).value == 0
