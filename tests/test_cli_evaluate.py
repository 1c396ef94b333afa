"""``gm-mlx evaluate``, as a user types it: every benchmark, both engines, interrupted runs, and what is refused."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import benchmark_files
import fixtures
import pytest
import typer
from benchmark_files import ALL, NO_IMAGE, lines
from fake_engine import FakeEngine, text_of
from PIL.Image import Image

from gm_mlx import vlm
from gm_mlx.cli.main import app, main
from gm_mlx.engine import GREEDY, Piece, Sampling, Stats
from gm_mlx.evaluate.answers import AnswersFile
from gm_mlx.evaluate.benchmarks import BENCHMARKS

DOCS = Path(__file__).parent.parent / "docs"
EASY_VQA = Path(__file__).parent / "data" / "easy_vqa_300"
Say = Callable[[str, str], str]


class Saying(FakeEngine):
    """Says what a test wants to a prompt about an image of a colour."""

    def __init__(self, say: Say, model: str | None = None, **options: Any) -> None:
        super().__init__(model, **options)
        self.image_config = None
        self._say = say
        self.heard: list[tuple[str, str, int]] = []

    def stream(
        self, messages: Sequence[Any], images: Sequence[Image] = (), sampling: Sampling = GREEDY
    ) -> Iterator[Piece]:
        colour = NO_IMAGE
        if images:
            red, _, blue = images[0].getpixel((3, 3))  # type: ignore[misc]
            colour = "red" if red > blue else "blue"
        prompt = text_of(messages[-1])
        self.heard.append((prompt, colour, sampling.max_tokens))
        yield Piece(f" {self._say(prompt, colour)}\n", Stats(finish_reason="stop"))


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Callable[[Say], list[Saying]]:
    """Puts engines that say something in the place of models; returns a list of those that are loaded."""

    def install(say: Say) -> list[Saying]:
        loaded: list[Saying] = []

        def open_engine(model: str | None = None, **options: Any) -> Saying:
            loaded.append(Saying(say, model, **options))
            return loaded[-1]

        monkeypatch.setattr(vlm, "open_engine", open_engine)
        return loaded

    return install


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Runs ``evaluate``; returns the object of ``--json``."""
    assert main(["evaluate", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs ``evaluate``, which must fail; returns what it says, of which the last line is the error."""
    capsys.readouterr()
    assert main(["evaluate", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[-1].startswith("gm-mlx: error: ")
    return said.err


@pytest.mark.parametrize("name", ALL)
def test_right_answers_have_the_highest_score_and_wrong_ones_none(
    name: str, tmp_path: Path, engines: Callable[[Say], list[Saying]], capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark, write = ALL[name]
    files = write(tmp_path)
    loaded = engines(lambda prompt, colour: files.right[prompt, colour])
    out = tmp_path / "right.jsonl"
    found = told(capsys, "--benchmark", benchmark, *files.options, "-o", str(out))
    scored = name not in ("answers", "vqav2 on the server")
    assert found["score"] == (pytest.approx(files.perfect) if scored else None)
    assert (found["left_out"], found["cut"]) == (0, 0)
    assert [engine.closed for engine in loaded] == [True]
    long = benchmark in ("answers", "scienceqa", "mmbench")
    assert {limit for _, _, limit in loaded[0].heard} == {1024 if long else 128}
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == found["questions"] == found["answered_now"] == len(loaded[0].heard)
    assert all(row.keys() == {"question_id", "prompt", "text", "model_id", "metadata"} for row in rows)
    heard = [(prompt, files.right[prompt, colour]) for prompt, colour, _ in loaded[0].heard]
    assert sorted((row["prompt"], row["text"]) for row in rows) == sorted(heard)

    opposite = {"Yes": "No", "No": "Yes"}
    engines(lambda prompt, colour: opposite.get(files.right[prompt, colour], "nonsense"))
    wrong = told(capsys, "--benchmark", benchmark, *files.options, "-o", str(tmp_path / "wrong.jsonl"))
    assert wrong["score"] == (0 if scored else None)


def test_files_for_servers(
    tmp_path: Path, engines: Callable[[Say], list[Saying]], capsys: pytest.CaptureFixture[str]
) -> None:
    engines(lambda prompt, colour: "The Two.")
    made = {}
    for name in ("vqav2 on the server", "vizwiz", "mmbench"):
        benchmark, write = ALL[name]
        folder = tmp_path / benchmark
        folder.mkdir()
        options = ["--benchmark", benchmark, *write(folder).options, "-o", str(folder / "a.jsonl")]
        found = told(capsys, *options)
        made[benchmark] = Path(found["upload"])
        assert main(["evaluate", *options]) == 0
        assert f"{found['upload']}" in capsys.readouterr().err
    assert json.loads(made["vqav2"].read_text()) == [
        {"question_id": 1002, "answer": "2"},
        {"question_id": 1001, "answer": ""},
    ]
    assert json.loads(made["vizwiz"].read_text()) == [{"image": "VizWiz_val_00000000.jpg", "answer": "2"}]
    with made["mmbench"].open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert list(rows[0]) == ["index", "question", "A", "B", "C", "D", "prediction", "answer"]
    assert [(row["index"], row["prediction"]) for row in rows] == [
        ("241", "The Two."), ("252", "The Two."), ("1000241", "The Two."),
    ]  # fmt: skip


def easy_vqa(folder: Path, count: int = 12) -> list[str]:
    """Options that ask questions of easy-VQA, and two about each image."""
    rows = json.loads((EASY_VQA / "questions.json").read_text())[:count]
    questions = [{"image": f"{image}.png", "question": text, "answer": answer} for text, answer, image in rows]
    again = [{**row, "question": "what shape is it?", "answer": "?"} for row in questions[: count // 2]]
    path = lines(folder / "q.jsonl", questions + again)
    return ["--benchmark", "exact", "--questions", str(path), "--images", str(EASY_VQA / "images")]


@pytest.mark.parametrize("model", ["gm-tiny", "gm-tiny-gguf"])
def test_both_engines(model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """gm-tiny knows easy-VQA: two thirds of what is asked have an answer, and it is right about these."""
    out = tmp_path / "a.jsonl"
    assert main(["evaluate", "--model", model, *easy_vqa(tmp_path), "-o", str(out)]) == 0
    said = capfd.readouterr()
    assert "exact, accuracy: 66.67 (18 questions)" in said.out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["model_id"] for row in rows} == {model}
    shapes = [row["text"] for row in rows if row["prompt"] == "what shape is it?"]
    assert set(shapes) <= {"circle", "rectangle", "triangle"} and len(shapes) == 6


class Stop:
    """Ctrl-C behind so many answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._add = AnswersFile.add
        self.after = 0
        monkeypatch.setattr(AnswersFile, "add", lambda file, *answer: self._added(file, *answer))

    def _added(self, file: AnswersFile, *answer: Any) -> None:
        if len(file.lines) == self.after:
            raise KeyboardInterrupt
        self._add(file, *answer)


@pytest.mark.parametrize("model", ["gm-tiny", pytest.param("gm-tiny-gguf", marks=pytest.mark.slow)])
def test_an_interrupted_run_goes_on_and_leaves_the_same_file(
    model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["evaluate", "--model", model, *easy_vqa(tmp_path)]
    whole, out = tmp_path / "whole.jsonl", tmp_path / "a.jsonl"
    assert main([*options, "-o", str(whole)]) == 0
    with monkeypatch.context() as patch:
        stop = Stop(patch)
        for stop.after in (0, 5, 11):  # in the middle of an image's questions, and between two images'
            assert main([*options, "-o", str(out)]) == 130
            said = capfd.readouterr().err.splitlines()[-1]
            begun = f"{out} has {stop.after} of 18 answers" if stop.after else "no question was answered yet"
            assert said == f"{begun}; run the same command again to go on"
            assert len(out.read_text().splitlines()) == stop.after
    assert main([*options, "-o", str(out)]) == 0
    assert "going on behind 11 of 18 answers" in capfd.readouterr().err
    assert out.read_bytes() == whole.read_bytes()


def test_a_finished_run_is_scored_without_the_model(
    tmp_path: Path, engines: Callable[[Say], list[Saying]], capsys: pytest.CaptureFixture[str]
) -> None:
    files = benchmark_files.gqa(tmp_path)
    loaded = engines(lambda prompt, colour: files.right[prompt, colour])
    options = ["--benchmark", "gqa", *files.options, "-o", str(tmp_path / "a.jsonl")]
    first = told(capsys, *options)
    again = told(capsys, *options)
    assert len(loaded) == 1
    assert again == {**first, "answered_now": 0}
    told(capsys, *options, "--force")
    assert len(loaded) == 2


def test_a_file_of_another_run_is_left_alone(
    tmp_path: Path, engines: Callable[[Say], list[Saying]], capsys: pytest.CaptureFixture[str]
) -> None:
    files = benchmark_files.gqa(tmp_path)
    loaded = engines(lambda prompt, colour: "no")
    out = tmp_path / "a.jsonl"
    options = ["--benchmark", "gqa", *files.options, "-o", str(out)]
    told(capsys, *options)
    before = out.read_bytes()
    for change, words in (
        (["--model", "gm-tiny-gguf"], "another model"),
        (["--max-tokens", "7"], "another --max-tokens (128 there, 7 here)"),
        (["--image-mode", "pad"], "another --image-mode (None there, pad here)"),
        (["--limit", "1"], "another set of questions"),
        (["--kv-bits", "8"], "another --kv-bits"),
    ):
        assert words in failed(capsys, *options, *change)
    assert out.read_bytes() == before and len(loaded) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--benchmark", "imagenet"], "--benchmark imagenet: unknown; known are exact, answers, vqav2"),
        (["--image-mode", "stretch"], "'stretch' is not one of pad, crop, resize"),
        (["--fill", "q.jsonl"], "--fill: gqa has no use for it"),
        (["--benchmark", "vqav2", "--fill", "none.jsonl"], "--fill none.jsonl: no such file"),
        (["--limit", "0"], "--limit"),
        (["--questions", "none.json"], "none.json: cannot be read"),
        (["--annotations", "none.json"], "none.json: cannot be read"),
        (["--images", "elsewhere"], "2 of 2 rows cannot be asked"),
        (["--out", "missing/a.jsonl"], "there is no folder missing"),
        (["--out", "testdev_balanced_questions.json"], "exists, and no"),
        (["--model", "no-such-model"], "no-such-model: no such folder"),
        (["--adapter", "no-such-adapter"], "no-such-adapter: no such folder"),
        (["--mmproj", "x.gguf"], "--mmproj is for GGUF files"),
    ],
)
def test_what_is_refused_leaves_nothing_behind(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    engines: Callable[[Say], list[Saying]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    files = benchmark_files.gqa(tmp_path)
    loaded = engines(lambda prompt, colour: "no")
    before = sorted(os.listdir())
    said = failed(capsys, "--benchmark", "gqa", *files.options, "-o", "a.jsonl", *arguments)
    assert words in said.splitlines()[-1]
    assert loaded == [] and sorted(os.listdir()) == before


def test_rows_that_cannot_be_asked_are_listed(
    tmp_path: Path, engines: Callable[[Say], list[Saying]], capsys: pytest.CaptureFixture[str]
) -> None:
    files = benchmark_files.exact(tmp_path)
    (tmp_path / "b.png").unlink()
    engines(lambda prompt, colour: files.right[prompt, colour])
    options = ["--benchmark", "exact", *files.options, "-o", str(tmp_path / "a.jsonl")]
    said = failed(capsys, *options).splitlines()
    assert len(said) == 2 and "line 2: " in said[0] and "b.png: no such file" in said[0]
    assert main(["evaluate", *options, "--skip-bad"]) == 0
    done = capsys.readouterr()
    assert "exact, accuracy: 100.00 (3 questions)" in done.out
    assert "note: 1 rows are left out" in done.err


def test_a_question_that_fails_keeps_what_is_there(
    tmp_path: Path, engines: Callable[[Say], list[Saying]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The header of an image is looked at before, and its end only when it is asked about."""
    files = benchmark_files.exact(tmp_path)
    fixtures.picture(1, (64, 64)).save(tmp_path / "b.png")
    content = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(content[: len(content) // 2])
    engines(lambda prompt, colour: files.right[prompt, colour])
    out = tmp_path / "a.jsonl"
    options = ["--benchmark", "exact", *files.options, "-o", str(out)]
    said = failed(capsys, *options).splitlines()[-1]
    assert "line 2: " in said and "b.png: the image is damaged" in said and said.endswith("with --skip-bad")
    assert len(out.read_text().splitlines()) == 2
    found = told(capsys, *options, "--skip-bad")
    assert (found["score"], found["left_out"], found["answered_now"]) == (100, 1, 2)
    assert main(["evaluate", *options]) == 0
    assert "note: 1 questions could not be asked and do not count" in capsys.readouterr().err


def test_answers_that_were_cut_are_told_of(
    tmp_path: Path, engines: Callable[[Say], list[Saying]], capsys: pytest.CaptureFixture[str]
) -> None:
    files = benchmark_files.exact(tmp_path)
    out = tmp_path / "a.jsonl"
    assert main(["evaluate", "--benchmark", "exact", *files.options, "-o", str(out), "--max-tokens", "1"]) == 0
    capsys.readouterr()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    cut = sum(row["metadata"]["finish_reason"] == "length" for row in rows)
    assert cut > 0
    assert main(["evaluate", "--benchmark", "exact", *files.options, "-o", str(out), "--max-tokens", "1"]) == 0
    assert f"note: {cut} answers were cut at --max-tokens" in capsys.readouterr().err


def test_parts_have_lines_of_their_own_whatever_they_are_called(
    tmp_path: Path, engines: Callable[[Say], list[Saying]], capsys: pytest.CaptureFixture[str]
) -> None:
    engines(lambda prompt, colour: "it")
    rows = [{"question": f"{name}?", "answer": "it", "category": name} for name in ("[red]x", "\x1b[31mred")]
    path = lines(tmp_path / "q.jsonl", rows)
    assert main(["evaluate", "--benchmark", "exact", "--questions", str(path), "-o", str(tmp_path / "a.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "[red]x" in out and "[31mred" in out and "\x1b" not in out


def test_the_commands_of_the_manual_are_understood() -> None:
    """Every benchmark of the papers' tables has a line that the parser takes, and the manual names all there are."""
    command = typer.main.get_command(app).commands["evaluate"]  # type: ignore[attr-defined]
    lines = re.findall(r"`gm-mlx (evaluate [^`]*)`", (DOCS / "models.md").read_text(encoding="utf-8"))
    parsed = [command.make_context("evaluate", shlex.split(line)[1:]).params["benchmark"] for line in lines]
    assert set(parsed) == BENCHMARKS.keys() - {"exact", "mmbench-cn"}
    manual = (DOCS / "cli.md").read_text(encoding="utf-8").split("## `gm-mlx evaluate`")[1].split("\n## ")[0]
    table = manual.split("| benchmark | question file |")[1].split("\n\n")[0]
    named = [
        name for cells in re.findall(r"^\| (`[^|]*)\|", table, re.MULTILINE) for name in re.findall("`([^`]+)`", cells)
    ]
    assert sorted(named) == sorted(BENCHMARKS)
