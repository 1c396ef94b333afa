"""Readers of benchmarks' files: what is asked, what is right, and what is said of files that are wrong."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import benchmark_files
import pytest
from benchmark_files import ALL, Files, document, lines
from hypothesis import given
from hypothesis import strategies as st

from gm_mlx.errors import UserError
from gm_mlx.evaluate import questions
from gm_mlx.evaluate.benchmarks import BENCHMARKS, LETTER, SHORT, UNANSWERABLE
from gm_mlx.evaluate.prepare import Prepared, prepare
from gm_mlx.evaluate.question import Question
from gm_mlx.images import load_image
from gm_mlx.train.rows import BadRows, Problem, image_source

NAMES = {"--questions": "questions", "--annotations": "annotations", "--images": "images"}


def prepared(name: str, files: Files, **options: Any) -> Prepared:
    """``prepare`` with a command's options."""
    paths = {
        NAMES[key]: Path(value)
        for key, value in zip(files.options[::2], files.options[1::2], strict=True)
        if key in NAMES
    }
    return prepare(BENCHMARKS[name], paths.pop("questions"), **{**paths, **options})


def colour(question: Question) -> str:
    if question.image is None:
        return benchmark_files.NO_IMAGE
    red, _, blue = load_image(image_source(question.image)).getpixel((3, 3))  # type: ignore[misc]
    return "red" if red > blue else "blue"


def test_suffixes_are_those_of_the_papers_scripts() -> None:
    assert (SHORT, LETTER, UNANSWERABLE) == (
        benchmark_files.SHORT,
        benchmark_files.LETTER,
        benchmark_files.UNANSWERABLE,
    )


@pytest.mark.parametrize("name", ALL)
def test_what_is_asked_about_which_image(name: str, tmp_path: Path) -> None:
    """Each published format, in the order in which it is asked: questions about one image follow each other."""
    benchmark, write = ALL[name]
    files = write(tmp_path)
    asked, order, problems = prepared(benchmark, files)
    found = [(asked[number].text, colour(asked[number])) for number in order]
    places = [(question.where.file, question.where.number) for question in asked]
    assert places == sorted(places)
    assert sorted(set(found)) == sorted(files.right)
    assert problems == []
    colours = [shown for _, shown in found]
    changes = sum(a != b for a, b in pairwise(colours))
    assert changes == len(set(colours)) - 1
    if BENCHMARKS[benchmark].score and name != "vqav2 on the server":
        assert all(question.wanted for question in asked)


def test_a_suffix_that_is_there_is_not_added_again(tmp_path: Path) -> None:
    benchmark_files.image(tmp_path, "a.jpg", "red")
    for text in ("What?", f"What?\n{SHORT}", f"What?\nSomething else.\n{SHORT}"):
        row = {"question_id": 1, "image": "a.jpg", "text": text}
        asked, _, _ = prepare(BENCHMARKS["vqav2"], lines(tmp_path / "q.jsonl", [row]))
        assert asked[0].text.count(SHORT) == 1 and asked[0].text.startswith("What?\n")


def test_mmbench_options_hints_and_orders(tmp_path: Path) -> None:
    asked, order, _ = prepared("mmbench", benchmark_files.mmbench(tmp_path))
    assert [(q.id, q.options, q.wanted, q.bundle) for q in asked] == [
        (241, "AB", ("B",), "241"),
        (252, "ABCD", ("D",), "252"),
        (1000241, "AB", ("A",), "241"),
    ]
    assert order == [0, 2, 1]
    chinese, _, _ = prepared("mmbench-cn", benchmark_files.mmbench(tmp_path))
    assert chinese[0].text == "Which?\nA. cat\nB. dog\n请直接回答选项字母。"


def test_a_limit_is_spread_evenly(tmp_path: Path) -> None:
    rows = [{"question_id": number, "text": f"{number}?"} for number in range(100)]
    path = lines(tmp_path / "q.jsonl", rows)
    asked, _, _ = prepare(BENCHMARKS["answers"], path, limit=4)
    assert [question.id for question in asked] == [0, 25, 50, 75]
    for limit in (1, 7, 99, 100, 1000):
        assert len(prepare(BENCHMARKS["answers"], path, limit=limit).questions) == min(limit, 100)


@pytest.mark.parametrize("name", ["mme", "mmbench"])
def test_a_limit_leaves_bundles_whole(name: str, tmp_path: Path) -> None:
    files = ALL[name][1](tmp_path)
    everything = prepared(name, files).questions
    for limit in range(1, len(everything)):
        asked = prepared(name, files, limit=limit).questions
        assert 0 < len(asked) <= limit + 1
        for bundle in {question.bundle for question in asked}:
            whole = [question for question in everything if question.bundle == bundle]
            assert [question for question in asked if question.bundle == bundle] == whole


def test_bad_rows_are_all_found(tmp_path: Path) -> None:
    benchmark_files.image(tmp_path, "a.png", "red")
    (tmp_path / "damaged.png").write_bytes(b"no image")
    good = {"image": "a.png", "question": "What?", "answer": "it"}
    rows = [
        good,
        {**good, "image": "b.png"},
        {**good, "image": "damaged.png"},
        {**good, "answer": ""},
        {**good, "image": 3},
    ]
    path = lines(tmp_path / "q.jsonl", rows)
    path.write_text(path.read_text() + "{broken\n[]\n" + json.dumps({**good, "question": "\ud800"}) + "\n")
    with pytest.raises(BadRows, match=r"7 of 8 rows cannot be asked; the first: .*q\.jsonl: line ") as caught:
        prepare(BENCHMARKS["exact"], path)
    found = {problem.where.number: problem.reason for problem in caught.value.problems}
    expected = {
        2: "no such file", 3: "not an image", 4: "'answer'", 5: "'image'", 6: "not JSON", 7: "not an object",
        8: "not UTF-8",
    }  # fmt: skip
    assert found.keys() == expected.keys()
    assert [word for number, word in expected.items() if word not in found[number]] == []
    asked, _, problems = prepare(BENCHMARKS["exact"], path, skip_bad=True)
    assert (len(asked), len(problems)) == (1, 7)
    lines(path, rows[1:])
    with pytest.raises(BadRows, match=r"4 of 4 rows .*; correct the data$"):
        prepare(BENCHMARKS["exact"], path, skip_bad=True)


def without_an_answer(folder: Path, name: str, key: str) -> Files:
    """A benchmark one of whose questions is asked about another image than the annotations have."""
    files = ALL[name][1](folder)
    path = Path(files.options[1])
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(first), key: "other"}), *rest]))
    return files


@pytest.mark.parametrize(("name", "key"), [("textvqa", "question_id"), ("pope", "category"), ("mme", "question_id")])
def test_a_question_without_an_answer_is_a_bad_row(name: str, key: str, tmp_path: Path) -> None:
    with pytest.raises(BadRows, match=r"line 1: .* has no answer to it"):
        prepared(name, without_an_answer(tmp_path, name, key))


@pytest.mark.parametrize("name", ["scienceqa", "textvqa", "pope", "mme", "gqa with LLaVA's file"])
def test_what_has_no_server_needs_its_annotations(name: str, tmp_path: Path) -> None:
    benchmark, write = ALL[name]
    files = write(tmp_path)
    place = files.options.index("--annotations")
    with pytest.raises(UserError, match=r"give the benchmark's answers with --annotations"):
        prepared(benchmark, files._replace(options=files.options[:place] + files.options[place + 2 :]))


@pytest.mark.parametrize("name", ["exact", "answers", "mmbench"])
def test_annotations_that_nobody_reads_are_refused(name: str, tmp_path: Path) -> None:
    files = ALL[name][1](tmp_path)
    with pytest.raises(UserError, match=r"--annotations: .* leave it out"):
        prepared(name, files, annotations=tmp_path)


WRONG: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no file": ("exact", lambda path: None, "cannot be read"),
    "no questions": ("exact", lambda path: path.write_text("\n"), "has no questions"),
    "a folder": ("exact", lambda path: path.mkdir(), "cannot be read"),
    "no list": ("vizwiz", lambda path: path.write_text("{}"), "not a list"),
    "no object": ("gqa", lambda path: path.write_text("[]"), "not an object"),
    "not JSON": ("gqa", lambda path: path.write_text("{"), "cannot be read as JSON"),
    "no list in it": ("vqav2", lambda path: path.write_text("{}"), "no list of questions"),
    "a list that breaks off": ("scienceqa", lambda path: path.write_text("[{}"), "JSON"),
    "no table": ("mmbench", lambda path: path.write_text("index\tquestion\n"), "no column 'A'"),
    "no text": ("mmbench", lambda path: path.write_bytes(b"index\xff"), "not a table"),
    "an empty folder": ("pope", lambda path: path.mkdir(), "coco_pope_"),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_cannot_be_read_on(case: str, tmp_path: Path) -> None:
    name, write, words = WRONG[case]
    path = tmp_path / "wrong"
    write(path)
    with pytest.raises(UserError, match=f"(?s){path}.*{words}") as caught:
        prepare(BENCHMARKS[name], path)
    assert "\n" not in str(caught.value)


WRONG_ANNOTATIONS: dict[str, Any] = {
    "vqav2": [{}, {"annotations": [{"question_id": 1}]}, {"annotations": [{"question_id": 1, "answers": []}]}, []],
    "vizwiz": [{}, [{"image": "a"}], [1]],
    "gqa": [[], {"201": {}}, {"201": 3}],
    "textvqa": [{}, {"data": [{"image_id": "0054c", "question": 3, "answers": ["x"]}]}],
    "scienceqa": [{"4": {"choices": ["a"], "answer": 9}}, {"4": {}}, []],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG_ANNOTATIONS.items() for value in values]
)
def test_annotations_that_are_none(name: str, value: Any, tmp_path: Path) -> None:
    files = ALL[name][1](tmp_path)
    path = document(tmp_path / "wrong.json", value)
    with pytest.raises(UserError, match=r"wrong\.json.*check that it is the benchmark's file") as caught:
        prepared(name, files, annotations=path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "make"), [("pope", "coco_pope_random.json"), ("mme", "count/1.txt")])
def test_folders_of_annotations_that_are_none(name: str, make: str, tmp_path: Path) -> None:
    files = ALL[name][1](tmp_path)
    folder = tmp_path / "wrong"
    folder.mkdir()
    with pytest.raises(UserError, match=r"wrong.* has no"):
        prepared(name, files, annotations=folder)
    (folder / make).parent.mkdir(exist_ok=True)
    (folder / make).write_text('{"image": "no label"}\n')
    with pytest.raises(UserError, match=r"annotation 1 cannot be read"):
        prepared(name, files, annotations=folder)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=6), st.floats(allow_nan=False)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=5,
)
KEYS = (
    "question_id", "image", "text", "question", "answer", "category", "image_id", "answers", "answer_type", "imageId",
    "id", "conversations", "label",
)  # fmt: skip
ROWS = st.lists(st.one_of(st.dictionaries(st.sampled_from(KEYS), JSON), JSON), max_size=5)
READERS: dict[str, tuple[Callable[[Path], questions.Found], Callable[[list[Any]], str]]] = {
    "llava": (questions.read_llava, lambda rows: "".join(json.dumps(row) + "\n" for row in rows)),
    "exact": (questions.read_exact, lambda rows: "".join(json.dumps(row) + "\n" for row in rows)),
    "mme": (questions.read_mme, lambda rows: "".join(json.dumps(row) + "\n" for row in rows)),
    "vqav2": (questions.read_vqav2, lambda rows: json.dumps({"questions": rows})),
    "vizwiz": (questions.read_vizwiz, json.dumps),
    "scienceqa": (questions.read_science_qa, json.dumps),
}


@pytest.mark.parametrize("name", READERS)
@given(rows=ROWS)
def test_whatever_a_row_is_it_is_a_question_or_a_problem(name: str, rows: list[Any]) -> None:
    read, write = READERS[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        path.write_text(write(rows), encoding="utf-8")
        found = list(read(path))
    assert [row.where.number for row in found] == list(range(1, len(rows) + 1))
    for row in found:
        assert isinstance(row, Problem) or (row.text.strip() and isinstance(row.id, str | int))


CELLS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=5)


@given(st.lists(st.lists(CELLS, max_size=9), max_size=4))
def test_whatever_a_row_of_mmbench_is(rows: list[list[str]]) -> None:
    head = ["index", "question", "hint", "A", "B", "C", "D", "answer", "image"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.tsv"
        path.write_text("\n".join("\t".join(cells) for cells in [head, *rows]), encoding="utf-8", newline="")
        try:
            found = list(questions.read_mm_bench(path))
        except UserError:  # quotes that are never closed
            return
    assert all(isinstance(row, Question | Problem) for row in found)


def test_large_cells_are_read_and_the_limit_is_put_back(tmp_path: Path) -> None:
    import csv

    limit = csv.field_size_limit()
    path = tmp_path / "large.tsv"
    path.write_text("index\tquestion\tA\tB\timage\n1\tWhat?\tx\ty\t" + "A" * (limit + 4) + "\n")
    (found,) = questions.read_mm_bench(path)
    assert isinstance(found, Question) and csv.field_size_limit() == limit
