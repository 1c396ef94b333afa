"""Choose the easy-VQA test questions that are kept in this repository as a test fixture.

python examples/train_gm_tiny/make_fixture.py easy_vqa.tar.gz tests/data/easy_vqa_300
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from easy_vqa import open_source

COUNT = 300
SEED = 0

README = """# 300 questions of easy-VQA's test split

Source: https://github.com/vzhou842/easy-VQA at commit 3b553bb7ff, by Victor Zhou, MIT license (see `LICENSE`).

`questions.json` lists `[question, answer, image id]`, `images/` holds the images as published. Chosen by
`examples/train_gm_tiny/make_fixture.py`: one question for each of 300 images, the 13 answers taken in turn so that each
comes 23 or 24 times, image and question picked with seed 0. In the full test split 74 % of the answers are yes or no,
here 15 %, so the share of right answers on both is not the same number.
"""


def choose(questions: list[tuple[str, str, int]], count: int, seed: int) -> list[tuple[str, str, int]]:
    """Pick ``count`` questions about as many images, taking the answers in turn; sorted by image id."""
    shuffled = random.Random(seed).sample(questions, len(questions))
    answers = sorted({answer for _, answer, _ in questions})
    chosen: dict[int, tuple[str, str, int]] = {}
    for turn in range(count):
        wanted = answers[turn % len(answers)]
        question = next(q for q in shuffled if q[1] == wanted and q[2] not in chosen)
        chosen[question[2]] = question
    return [chosen[image_id] for image_id in sorted(chosen)]


def main(source: str, target: str) -> None:
    """Write the fixture folder."""
    read, folder = open_source(Path(source)), Path(target)
    questions = [tuple(question) for question in json.loads(read("test/questions.json"))]
    chosen = choose(questions, COUNT, SEED)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for _, _, image_id in chosen:
        (folder / "images" / f"{image_id}.png").write_bytes(read(f"test/images/{image_id}.png"))
    lines = ",\n".join(json.dumps(question) for question in chosen)
    (folder / "questions.json").write_text(f"[\n{lines}\n]\n")
    (folder / "LICENSE").write_bytes(read("LICENSE"))
    (folder / "README.md").write_text(README)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: make_fixture.py EASY_VQA_ARCHIVE_OR_FOLDER OUT_DIR")
    main(*sys.argv[1:])
