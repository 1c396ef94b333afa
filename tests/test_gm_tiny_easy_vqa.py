"""easy-VQA: the reader, the fixture, and that our scenes and questions are like its own."""

from __future__ import annotations

import importlib
import json
import random
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gm_tiny_reading import COLOURS, SHAPES, derive
from PIL import Image

from gm_mlx.errors import UserError

ROOT = Path(__file__).parents[1]
FIXTURE = ROOT / "tests" / "data" / "easy_vqa_300"
sys.path.insert(0, str(ROOT / "examples" / "train_gm_tiny"))

scenes: Any = importlib.import_module("scenes")
questions: Any = importlib.import_module("questions")
easy_vqa: Any = importlib.import_module("easy_vqa")
make_fixture: Any = importlib.import_module("make_fixture")


def test_easy_scenes_look_like_easy_vqa() -> None:
    published = easy_vqa.load_easy_vqa(FIXTURE, None).images
    ours = [scenes.render(scenes.sample_easy_scene(random.Random(i))) for i in range(300)]
    statistics = [[_statistics(image) for image in images] for images in (published, ours)]
    for ours_and_theirs in zip(*(np.array(s).T for s in statistics), strict=True):
        # Means of 300 images each: within four standard errors.
        a, b = ours_and_theirs
        assert abs(a.mean() - b.mean()) < 4 * np.sqrt((a.var() + b.var()) / 300)


def _statistics(image: np.ndarray) -> list[float]:
    """Background level, object's width, height and area, the share of blurred pixels among its pixels."""
    packed = image.astype(int) @ (65536, 256, 1)  # [64, 64]
    values, counts = np.unique(packed, return_counts=True)
    differs = packed != values[counts.argmax()]
    rows, columns = np.nonzero(differs)
    blurred = differs.sum() - np.sort(counts)[-2]
    size = (np.ptp(columns) + 1, np.ptp(rows) + 1)
    return [image[~differs].mean(), *size, differs.sum(), blurred / differs.sum()]


def easy_vqa_strings() -> set[str]:
    """easy-VQA's 107 different questions."""
    things = ["a circle", "a rectangle", "a triangle"] + [f"a {colour} shape" for colour in COLOURS[:8]]
    forms = [
        "does the image {not}contain {thing}?",
        "is there {not}{thing}?",
        "is there {not}{thing} in the image?",
    ]
    found = {f.format(thing=t, **{"not": n}) for f in forms for t in things for n in ("", "not ")}
    found |= {f"is {t} present?" for t in things} | {f"is no {t[2:]} present?" for t in things}
    found |= {f"what is the {colour} shape?" for colour in COLOURS[:8]}
    found |= {f"what {q} the {s}?" for q in ("color is", "is the color of") for s in ("shape", *SHAPES[:3])}
    return found | {f"what shape {end}?" for end in ("does the image contain", "is in the image", "is present")}


def test_every_easy_vqa_question_is_asked_and_answered_alike() -> None:
    wanted = easy_vqa_strings()
    assert len(wanted) == 107
    assert {question for question, _, _ in json.loads((FIXTURE / "questions.json").read_text())} <= wanted
    mix = {"colour": 1.0, "shape": 1.0, "present": 2.0, "absent": 2.0}
    texts: set[str] = set()
    for index in range(800):
        scene = scenes.sample_easy_scene(random.Random(index))
        texts |= {question for question, _, _ in questions.questions_for(scene, random.Random(index), 30, mix)}
    assert wanted - texts == set()


def test_easy_vqa_answers_follow_our_reading() -> None:
    """Its answers, negated questions among them, follow from the one object seen in each of its images."""
    for question, answer, image_id in json.loads((FIXTURE / "questions.json").read_text()):
        image = np.asarray(Image.open(FIXTURE / "images" / f"{image_id}.png").convert("RGB"))
        colour = next(c for c in COLOURS if (image == scenes.COLOURS[c]).all(-1).any())
        _, width, height, area, _ = _statistics(image)
        fill = area / (width * height)  # of the bounding box: 1/2, pi/4 or 1
        shape = "triangle" if fill < 0.69 else "circle" if fill < 0.93 else "rectangle"
        seen = scenes.Scene((255, 255, 255), (scenes.Object(shape, colour, 32, 32, width, height, (0, 0, 0)),))
        assert derive(seen, question) == answer, image_id


def test_the_fixture_is_the_documented_choice() -> None:
    chosen = json.loads((FIXTURE / "questions.json").read_text())
    answers = [answer for _, answer, _ in chosen]
    assert len(chosen) == len({image_id for _, _, image_id in chosen}) == 300
    assert {answers.count(answer) for answer in set(answers)} == {23, 24}
    assert len(set(answers)) == 13
    assert sorted(p.stem for p in (FIXTURE / "images").iterdir()) == sorted(str(i) for _, _, i in chosen)
    assert "Victor Zhou" in (FIXTURE / "LICENSE").read_text()


def published_layout(folder: Path) -> Path:
    """A tiny easy-VQA: two images, three questions per split, in a folder as published."""
    for split in ("train", "test"):
        (folder / "easy_vqa" / split / "images").mkdir(parents=True)
        for image_id, level in enumerate((40, 200)):
            Image.new("RGB", (64, 64), (level, 0, 0)).save(folder / f"easy_vqa/{split}/images/{image_id}.png")
        text = json.dumps([["what shape is present?", "circle", 1], ["is there a circle?", "no", 0]])
        (folder / f"easy_vqa/{split}/questions.json").write_text(text)
    return folder / "easy_vqa"


def test_easy_vqa_reads_alike_from_folder_and_archive(tmp_path: Path) -> None:
    folder = published_layout(tmp_path)
    archive = tmp_path / "easy_vqa.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "easy_vqa")
    for source in (folder, archive):
        data = easy_vqa.load_easy_vqa(source, "test")
        assert data.images.shape == (2, 64, 64, 3)
        assert data.questions == [("what shape is present?", "circle", 1), ("is there a circle?", "no", 0)]
        assert [int(image[0, 0, 0]) for image in data.images] == [40, 200]


def _remove_image(folder: Path) -> None:
    (folder / "test/images/1.png").unlink()


def _break_image(folder: Path) -> None:
    (folder / "test/images/1.png").write_bytes(b"no image")


def _resize_image(folder: Path) -> None:
    Image.new("RGB", (32, 64)).save(folder / "test/images/1.png")


def _break_questions(folder: Path) -> None:
    (folder / "test/questions.json").write_text('[["only one"]]')


def _empty_questions(folder: Path) -> None:
    (folder / "test/questions.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove_image, r"1\.png cannot be read"),
        (_break_image, r"1\.png is not a readable image"),
        (_resize_image, r"1\.png is 32 x 64 pixels"),
        (_break_questions, r"questions\.json is no list"),
        (_empty_questions, r"questions\.json is empty"),
    ],
)
def test_damaged_easy_vqa_is_refused(tmp_path: Path, damage: Any, message: str) -> None:
    folder = published_layout(tmp_path)
    damage(folder)
    with pytest.raises(UserError, match=message):
        easy_vqa.load_easy_vqa(folder, "test")


def test_wrong_easy_vqa_sources_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no archive")
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    for source, split, message in (
        ("missing", "test", "does not exist"),
        ("text", "test", "not a whole tar archive"),
        ("empty.tar", "test", r"holds no test/questions\.json"),
        ("text", "validation", "unknown split 'validation'"),
    ):
        with pytest.raises(UserError, match=message):
            easy_vqa.load_easy_vqa(tmp_path / source, split)


def test_the_choice_of_the_fixture_takes_answers_in_turn() -> None:
    pool = [(f"q{i}", "abc"[i % 3], i // 3) for i in range(90)]
    chosen = make_fixture.choose(pool, 10, seed=0)
    assert sorted([sum(a == letter for _, a, _ in chosen) for letter in "abc"]) == [3, 3, 4]
    assert len({image_id for _, _, image_id in chosen}) == 10
    assert chosen == make_fixture.choose(pool, 10, seed=0)
