"""Small benchmarks in the formats in which they are published: a few questions, images, and what is right.

Each function writes one to a folder and returns what ``gm-mlx evaluate`` is told, and the right answer by prompt and by
the colour of the image. Colours are those of whole images, so that a test can see which one was shown.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
UNANSWERABLE = f"When the provided information is insufficient, respond with 'Unanswerable'.\n{SHORT}"
NO_IMAGE = "none"

Right = dict[tuple[str, str], str]


class Files(NamedTuple):
    """A benchmark on the disk.

    Attributes:
        options: of the command, but for the model and the output.
        right: the right answer by prompt and colour, in the order in which questions are asked.
        perfect: the score of right answers.
    """

    options: list[str]
    right: Right
    perfect: float = 100.0


def image(folder: Path, name: str, colour: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), colour).save(path)


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def document(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def exact(folder: Path) -> Files:
    image(folder, "a.png", "red")
    image(folder, "b.png", "blue")
    rows = [
        {"image": "a.png", "question": "What colour?", "answer": "Red."},
        {"image": "b.png", "question": "What colour?", "answer": "blue"},
        {"question": "What is two and two?", "answer": "four"},
        {"image": "a.png", "question": "Is it blue?", "answer": "no"},
    ]
    right = {
        ("What colour?", "red"): "red",
        ("Is it blue?", "red"): "No",
        ("What colour?", "blue"): "blue",
        ("What is two and two?", NO_IMAGE): "four",
    }
    return Files(["--questions", str(lines(folder / "q.jsonl", rows))], right)


def answers(folder: Path) -> Files:
    """LLaVA-Bench's file."""
    image(folder, "images/001.jpg", "red")
    rows = [{"question_id": 7, "image": "001.jpg", "text": "What is that?", "category": "conv"}]
    questions = lines(folder / "questions.jsonl", rows)
    options = ["--questions", str(questions), "--images", str(folder / "images")]
    return Files(options, {("What is that?", "red"): "A red image."})


def vqav2_val(folder: Path) -> Files:
    """VQA's own files."""
    for number, colour in ((42, "red"), (581929, "blue")):
        image(folder, f"val2014/COCO_val2014_{number:012d}.jpg", colour)
    rows = [
        {"image_id": 42, "question": "How many?", "question_id": 42000},
        {"image_id": 581929, "question": "Who is it?", "question_id": 581929002},
    ]
    questions = document(folder / "questions.json", {"data_subtype": "val2014", "questions": rows})
    people = {581929002: ("other", ["mom"] * 3 + ["mother"] * 7), 42000: ("number", ["2"] * 10)}
    notes = [
        {"question_id": name, "answer_type": kind, "answers": [{"answer": text, "answer_id": 1} for text in said]}
        for name, (kind, said) in people.items()
    ]
    annotations = document(folder / "annotations.json", {"annotations": notes})
    right = {(f"How many?\n{SHORT}", "red"): "Two.", (f"Who is it?\n{SHORT}", "blue"): "The mother"}
    options = ["--questions", str(questions), "--annotations", str(annotations), "--images", str(folder / "val2014")]
    return Files(options, right)


def vqav2_test(folder: Path) -> Files:
    """LLaVA's file of the test-dev part, whose answers only the server has."""
    name = "COCO_test2015_000000000001.jpg"
    image(folder, name, "red")
    rows = [{"question_id": 1002, "image": name, "text": f"Is it red?\n{SHORT}", "category": "default"}]
    questions = lines(folder / "test-dev.jsonl", rows)
    whole = lines(folder / "test.jsonl", [{**rows[0], "question_id": 1001}, *rows])
    return Files(["--questions", str(questions), "--fill", str(whole)], {(f"Is it red?\n{SHORT}", "red"): "Yes."})


def gqa(folder: Path) -> Files:
    """GQA's own file."""
    image(folder, "n1.jpg", "red")
    rows = {
        "201": {"imageId": "n1", "question": "Is it overcast?", "answer": "no", "types": {}},
        "202": {"imageId": "n1", "question": "What is on the left?", "answer": "bag"},
    }
    right = {(f"Is it overcast?\n{SHORT}", "red"): "No.", (f"What is on the left?\n{SHORT}", "red"): "bag"}
    return Files(["--questions", str(document(folder / "testdev_balanced_questions.json", rows))], right)


def gqa_llava(folder: Path) -> Files:
    """LLaVA's file, and GQA's as annotations."""
    own = gqa(folder)
    rows = [{"question_id": "202", "image": "n1.jpg", "text": f"What is on the left?\n{SHORT}", "category": "default"}]
    questions = lines(folder / "llava_gqa_testdev_balanced.jsonl", rows)
    return Files(
        ["--questions", str(questions), "--annotations", own.options[1]],
        {(f"What is on the left?\n{SHORT}", "red"): "Bag"},
    )


def vizwiz(folder: Path) -> Files:
    """VizWiz's own file with answers."""
    image(folder, "VizWiz_val_00000000.jpg", "red")
    people = ["unanswerable"] * 6 + ["soup"] * 4
    row = {
        "image": "VizWiz_val_00000000.jpg",
        "question": "What is this?",
        "answers": [{"answer_confidence": "yes", "answer": said} for said in people],
        "answer_type": "unanswerable",
        "answerable": 0,
    }
    right = {(f"What is this?\n{UNANSWERABLE}", "red"): "Unanswerable"}
    return Files(["--questions", str(document(folder / "val.json", [row]))], right)


def scienceqa(folder: Path) -> Files:
    image(folder, "images/4/image.png", "red")
    asked = "Which is it?\nContext: N/A\nOptions: (A) cat (B) dog"
    rows = [
        {"id": "4", "image": "4/image.png", "conversations": [{"from": "human", "value": f"<image>\n{asked}"}]},
        {"id": "5", "conversations": [{"from": "human", "value": "Context: none.\nOptions: (A) x (B) y (C) z"}]},
    ]
    questions = document(folder / "llava_test_CQM-A.json", rows)
    document(
        folder / "problems.json",
        {
            "4": {"choices": ["cat", "dog"], "answer": 1},
            "5": {"choices": ["x", "y", "z"], "answer": 2},
            "6": {"choices": ["x", "y"], "answer": 0},
        },
    )
    right = {
        (f"{asked}\n{LETTER}", "red"): "B",
        (f"Context: none.\nOptions: (A) x (B) y (C) z\n{LETTER}", NO_IMAGE): "C. z",
    }
    options = ["--questions", str(questions), "--annotations", str(folder), "--images", str(folder / "images")]
    return Files(options, right)


def textvqa(folder: Path) -> Files:
    """Ids are those of images; a line of words that were read stands behind the question, in front of it or nowhere."""
    image(folder, "0054c.jpg", "red")
    tokens = "Reference OCR token: MIA, NOKIA"
    texts = [f"What brand?\n{tokens}\n{SHORT}", f"what year?\n{SHORT}", f"{tokens}\nWho?\n{SHORT}"]
    rows = [{"question_id": "0054c", "image": "0054c.jpg", "text": text, "category": "default"} for text in texts]
    questions = lines(folder / "llava_textvqa_val_v051_ocr.jsonl", rows)
    notes = [
        {"image_id": "0054c", "question_id": 1, "question": "what brand?", "answers": ["nokia"] * 9 + ["mia"]},
        {"image_id": "0054c", "question_id": 2, "question": "What year?", "answers": ["2008"] * 10},
        {"image_id": "0054c", "question_id": 3, "question": "who?", "answers": ["mia"] * 10},
    ]
    annotations = document(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": notes})
    right = {(texts[0], "red"): "Nokia", (texts[1], "red"): "2008", (texts[2], "red"): "Mia"}
    return Files(["--questions", str(questions), "--annotations", str(annotations)], right)


POPE = {
    "random": (("red.jpg", "dog", "yes"), ("blue.jpg", "cat", "no")),
    "popular": (("red.jpg", "dog", "yes"), ("blue.jpg", "dog", "no")),
    "adversarial": (("red.jpg", "cat", "no"), ("blue.jpg", "car", "yes")),
}


def pope(folder: Path) -> Files:
    """LLaVA's file, and POPE's folder as annotations. Labels are in another order than the questions."""
    rows, right = [], {}
    for colour in ("red", "blue"):
        image(folder, f"val2014/{colour}.jpg", colour)
    for category, entries in POPE.items():
        label_rows = []
        for file, thing, label in entries:
            text = f"Is there a {thing} in the image?"
            label_rows.append({"question_id": len(label_rows) + 1, "image": file, "text": text, "label": label})
            rows.append(
                {"question_id": len(rows), "image": file, "text": f"{text}\n{SHORT}", "category": category},
            )
            right[f"{text}\n{SHORT}", file.split(".")[0]] = label.capitalize()
        lines(folder / "coco" / f"coco_pope_{category}.json", label_rows[::-1])
    questions = lines(folder / "llava_pope_test.jsonl", rows)
    options = ["--questions", str(questions), "--annotations", str(folder / "coco")]
    return Files([*options, "--images", str(folder / "val2014")], right)


def pope_own(folder: Path) -> Files:
    """POPE's folder alone."""
    files = pope(folder)
    return Files(["--questions", str(folder / "coco"), *files.options[-2:]], files.right)


MME = {"existence": "images", "code_reasoning": ""}


def mme(folder: Path) -> Files:
    """Two subtasks, one of them with images and answers in folders of their own."""
    rows, right = [], {}
    for (category, inner), colour in zip(MME.items(), ("red", "blue"), strict=True):
        base = folder / "MME_Benchmark_release_version" / category
        image(base / inner, "0020.png", colour)
        texts = base / ("questions_answers_YN" if inner else "")
        texts.mkdir(exist_ok=True)
        asked = (("Is it here?", "Yes"), ("Is it there?", "No"))
        (texts / "0020.txt").write_text("".join(f"{text}  Please answer yes or no.\t{say}\n" for text, say in asked))
        for text, say in asked:
            name = "/".join(part for part in (category, inner, "0020.png") if part)
            prompt = f"{text}\n{SHORT}" if inner else f"{text} Please answer yes or no.\n{SHORT}"
            rows.append({"question_id": f"{category}/0020.png", "image": name, "text": prompt, "category": category})
            right[prompt, colour] = say
    questions = lines(folder / "llava_mme.jsonl", rows)
    base = str(folder / "MME_Benchmark_release_version")
    return Files(["--questions", str(questions), "--annotations", base, "--images", base], right, 200.0)


def mmbench(folder: Path) -> Files:
    """Two questions, one of them in two orders of its options, whose second row names the image of the first."""
    cells = []
    for colour in ("red", "blue"):
        out = io.BytesIO()
        Image.new("RGB", (8, 6), colour).save(out, "PNG")
        cells.append(base64.b64encode(out.getvalue()).decode())
    head = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category"]
    rows = [
        ["241", "Which?", "", "cat", "dog", "", "nan", "B", "x", cells[0], "s", "logic"],
        ["252", 'Say "what"\nis it?', "A hint.", "one", "two", "three", "four", "D", "y", cells[1], "s", "logic"],
        ["1000241", "Which?", "nan", "dog", "cat", "", "", "A", "x", "241", "s", "logic"],
    ]
    path = folder / "mmbench_dev.tsv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([head, *rows])
    right = {
        (f"Which?\nA. cat\nB. dog\n{LETTER}", "red"): "B",
        (f"Which?\nA. dog\nB. cat\n{LETTER}", "red"): "A. dog",
        (f'A hint.\nSay "what"\nis it?\nA. one\nB. two\nC. three\nD. four\n{LETTER}', "blue"): "(D)",
    }
    return Files(["--questions", str(path)], right)


ALL: dict[str, tuple[str, Callable[[Path], Files]]] = {
    "exact": ("exact", exact),
    "answers": ("answers", answers),
    "vqav2": ("vqav2", vqav2_val),
    "vqav2 on the server": ("vqav2", vqav2_test),
    "gqa": ("gqa", gqa),
    "gqa with LLaVA's file": ("gqa", gqa_llava),
    "vizwiz": ("vizwiz", vizwiz),
    "scienceqa": ("scienceqa", scienceqa),
    "textvqa": ("textvqa", textvqa),
    "pope": ("pope", pope),
    "pope's own files": ("pope", pope_own),
    "mme": ("mme", mme),
    "mmbench": ("mmbench", mmbench),
}
"""By a name for tests: what the command line calls it, and what writes its files."""
