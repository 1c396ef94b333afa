"""The file of answers: it grows line by line, and is gone on with only by the run that it is of."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gm_mlx.errors import UserError
from gm_mlx.evaluate.answers import NAMES, AnswersFile
from gm_mlx.evaluate.question import Question
from gm_mlx.train.rows import Where

RUN = dict.fromkeys(NAMES, "same")
QUESTIONS = [Question(Where("q.jsonl", "line", number), number, f"What is {number}?") for number in range(4)]
DONE = {"finish_reason": "stop"}


def opened(out: Path, run: dict[str, Any] = RUN, force: bool = False, order: Sequence[int] = range(4)) -> AnswersFile:
    return AnswersFile(out, run, {"made_by": "a test"}, QUESTIONS[: len(order)], order, force=force)


def written(out: Path, *texts: str) -> None:
    file = opened(out)
    file.begin()
    for text in texts:
        file.add(text, "model", DONE)
    file.close()


def test_nothing_is_written_before_it_begins(tmp_path: Path) -> None:
    opened(tmp_path / "a.jsonl")
    assert os.listdir(tmp_path) == []


def test_lines_are_those_of_llava(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    written(out, "größer\n", "b")
    assert out.read_text(encoding="utf-8").splitlines()[0] == (
        '{"question_id": 0, "prompt": "What is 0?", "text": "größer\\n", "model_id": "model", "metadata": '
        '{"finish_reason": "stop"}}'
    )
    assert json.loads((tmp_path / "a.run.json").read_text()) == {**RUN, "made_by": "a test"}
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "a.run.json"]


@pytest.mark.parametrize("cut", [0, 1, 10])
def test_a_run_goes_on_behind_the_last_whole_line(cut: int, tmp_path: Path) -> None:
    """Whatever a killed process has left of its last line, the file becomes that of a run that was not killed."""
    out, whole = tmp_path / "a.jsonl", tmp_path / "whole.jsonl"
    written(whole, "a", "b", "c", "d")
    written(out, "a", "b", "c")
    content = out.read_bytes()
    out.write_bytes(content[: len(content) - cut])
    file = opened(out)
    assert len(file.lines) == (2 if cut else 3) and not file.is_complete
    file.begin()
    for text in "abcd"[len(file.lines) :]:
        file.add(text, "model", DONE)
    file.close()
    assert out.read_bytes() == whole.read_bytes()
    assert opened(out).is_complete
    assert [(answer.question.id, answer.text) for answer in opened(out).answers] == list(enumerate("abcd"))


@pytest.mark.parametrize("key", NAMES)
def test_another_run_is_refused(key: str, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    written(out, "a")
    before = out.read_bytes()
    with pytest.raises(UserError, match=f"{out}: has answers of a run with another {NAMES[key]}.*--force"):
        opened(out, {**RUN, key: "other"})
    file = opened(out, {**RUN, key: "other"}, force=True)
    assert file.lines == [] and out.read_bytes() == before
    file.begin()
    file.close()
    assert out.read_bytes() == b""
    assert json.loads((tmp_path / "a.run.json").read_text())[key] == "other"


def test_values_that_mean_something_are_shown(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", "a")
    with pytest.raises(UserError, match=r"another --max-tokens \(same there, 64 here\)"):
        opened(tmp_path / "a.jsonl", {**RUN, "max_tokens": 64})


@pytest.mark.parametrize("force", [False, True])
def test_what_holds_no_answers_is_never_replaced(force: bool, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    out.write_text("my questions\n")
    for beside in (None, "[]", "{"):
        if beside is not None:
            (tmp_path / "a.run.json").write_text(beside)
        with pytest.raises(UserError, match=f"{out}: exists, and no a.run.json beside it"):
            opened(out, force=force)
    out.unlink()
    out.mkdir()
    with pytest.raises(UserError):
        opened(out, force=force)


def test_an_empty_file_and_a_file_that_is_gone_are_begun(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    out.touch()
    written(out, "a")
    out.unlink()
    assert opened(out, {**RUN, "benchmark": "other"}).lines == []


@pytest.mark.parametrize(
    "line",
    [
        '{"question_id": 1, "prompt": "What is 0?", "text": "a", "metadata": {}}',
        '{"question_id": 0, "prompt": "What is it?", "text": "a", "metadata": {}}',
        '{"question_id": 0, "prompt": "What is 0?", "text": 3, "metadata": {}}',
        '{"question_id": 0, "prompt": "What is 0?", "text": "a"}',
        "[]",
        "{",
    ],
)
def test_a_changed_file_is_refused(line: str, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    written(out, "a")
    out.write_text(line + "\n")
    with pytest.raises(UserError, match=r"line 1 does not answer its question"):
        opened(out)


def test_more_answers_than_questions_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", "a", "b")
    with pytest.raises(UserError, match=r"line 2 does not answer its question"):
        opened(tmp_path / "a.jsonl", order=[0])


def test_two_processes_do_not_write_to_one_file(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    first, second = opened(out), opened(out)
    first.begin()
    first.add("a", "model", DONE)
    with pytest.raises(UserError, match="another process writes to it"):
        second.begin()
    first.close()
    late = opened(out)
    assert len(late.lines) == 1
    written(out, "b")  # while the late one loads its model
    with pytest.raises(UserError, match="another process has written to it"):
        late.begin()
    assert [line["text"] for line in opened(out).lines] == ["a", "b"]


def test_what_could_not_be_asked_is_no_answer(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    file = opened(out)
    file.begin()
    file.add("", "model", {"error": "damaged"})
    file.add("b", "model", DONE)
    assert [answer.text for answer in file.answers] == ["b"]
    file.close()


def test_places_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        opened(tmp_path / "missing" / "a.jsonl")


def test_a_complete_file_is_sorted_as_the_questions_are(tmp_path: Path) -> None:
    """Some of LLaVA's scripts count lines. A process may be killed before the lines are sorted, and after."""
    out, order = tmp_path / "a.jsonl", (2, 0, 3, 1)
    file = opened(out, order=order)
    file.begin()
    for text in "abcd":
        assert file.next_question.id == order["abcd".index(text)]
        file.add(text, "model", DONE)
        assert len(opened(out, order=order).lines) == len(file.lines)
    file.close()
    answers = [(answer.question.id, answer.text) for answer in file.answers]
    assert answers == [(0, "b"), (1, "d"), (2, "a"), (3, "c")]
    for again in range(2):
        file = opened(out, order=order)
        assert file.is_complete
        assert [line["text"] for line in file.lines] == list("abcd")
        assert [(answer.question.id, answer.text) for answer in file.answers] == answers
        file.sort()
        ids = [json.loads(line)["question_id"] for line in out.read_text().splitlines()]
        assert ids == [0, 1, 2, 3], again
