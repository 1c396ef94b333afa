"""gm-tiny learns a shape that it has never seen, from 4 bits, by the commands that a user has."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gm_tiny_reading import derive
from PIL import Image

from gm_mlx.hub import find_model
from gm_mlx.processor import Processor
from gm_mlx.train.prepare import prepare

ROOT = Path(__file__).parents[1]
for folder in ("train_gm_tiny", "new_shape"):
    sys.path.insert(0, str(ROOT / "examples" / folder))

make_data: Any = importlib.import_module("make_data")
proof: Any = importlib.import_module("run")

EASY_VQA = ROOT.parent / "shared" / "data" / "easy_vqa.tar.gz"
SAMPLE = ROOT / "tests" / "data" / "easy_vqa_300"
LEAST_NEW, MOST_BEFORE, MOST_FORGOTTEN, LEAST_SAME = 0.95, 0.20, 0.02, 0.99


# --- data ---


def test_pictures_show_rings_where_the_scene_has_them() -> None:
    """A ring's middle is background and what is around it is not: no old shape is like that."""
    seen = 0
    for index in range(40):
        scene = make_data.new_scene(make_data.scene_rng("look", 0, index))
        (ring,) = (o for o in scene.objects if o.shape == "ring")
        if scene.noise:
            continue
        seen += 1
        pixels = make_data.render(scene).astype(int)
        assert tuple(pixels[int(ring.y), int(ring.x)]) == scene.background
        away = 0.39 * ring.width
        for x, y in ((-away, 0), (away, 0), (0, -away), (0, away)):
            assert np.abs(pixels[int(ring.y + y), int(ring.x + x)] - ring.rgb).max() < 40
        left, top, right, bottom = ring.box()
        assert min(left, top) >= -1e-9 and max(right, bottom) <= 64 + 1e-9
    assert seen > 15


def test_every_answer_is_right() -> None:
    """By the independent reading of scenes that gm-tiny's own questions are checked with."""
    for index in range(150):
        for make in (make_data.training_row, make_data.test_row):
            scene, asked = make(index)
            for question, answer, _ in asked:
                plain = question.lower().rstrip("?.")
                ends = "." if plain.startswith("describe") else "?"
                assert derive(scene, plain + ends) == answer, (question, scene)


def test_training_rows_have_rings_every_other_time_and_test_rows_ask_for_one() -> None:
    rows = [make_data.training_row(index) for index in range(60)]
    assert [any(o.shape == "ring" for o in scene.objects) for scene, _ in rows] == [True, False] * 30
    about = [answer for _, asked in rows for q, answer, _ in asked if re.search(r"\brings?\b", q)]
    assert {"yes", "no"} <= set(about)
    for index in range(60):
        scene, ((_, answer, kind),) = make_data.test_row(index)
        assert "ring" in answer and kind in make_data.NAMING
        assert scene not in [mine for mine, _ in rows]


def test_the_files_are_training_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {name: (make, 6) for name, (make, _) in make_data.PARTS.items()}
    monkeypatch.setattr(make_data, "PARTS", parts)
    make_data.write_data(tmp_path)
    processor = Processor.from_folder(find_model("gm-tiny"))
    data = prepare([tmp_path / "train.jsonl"], processor, max_length=1024)
    assert len(data.train) == 6 and not data.problems
    # A row's tokens are those of the same conversation in a chat.
    row = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])
    texts = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    ids, learnt = processor.encode_supervised(messages, num_images=1)
    assert [part.tolist() for part in data.train.tokens(0)] == [list(ids), list(learnt)]
    asked = proof.new_shapes(tmp_path)
    assert len(asked) == 6
    scene, ((question, answer, _),) = make_data.test_row(2)
    assert (asked[2].question, asked[2].answer) == (question, answer)
    assert np.array_equal(np.asarray(asked[2].image), make_data.render(scene))
    assert isinstance(asked[2].image, Image.Image)


# --- the proof ---


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any], list[Any]]:
    """The data's folder, questions about rings, and questions about old shapes."""
    out = tmp_path_factory.mktemp("ring")
    make_data.write_data(out / "data")
    return out, proof.new_shapes(out / "data"), proof.old_shapes(SAMPLE, None, None)


@pytest.fixture(scope="module")
def given(asked: tuple[Path, list[Any], list[Any]]) -> dict[str, list[str]]:
    """What each form of the model answers, about rings and then about old shapes."""
    out, new, old = asked
    proof.learn(out / "data" / "train.jsonl", out / "ring")
    return {name: proof.answers(form, [*new, *old]) for name, form in proof.make_forms(out).items()}


def right(given: list[str], asked: list[Any]) -> float:
    return proof.share_of_same(given, [one.answer for one in asked])


@pytest.mark.slow
def test_learns_what_it_could_not_do(asked: tuple[Path, list[Any], list[Any]], given: dict[str, list[str]]) -> None:
    _, new, _ = asked
    assert right(given["without the adapter"][: len(new)], new) < MOST_BEFORE
    for name in set(given) - {"without the adapter"}:
        assert right(given[name][: len(new)], new) >= LEAST_NEW, name


@pytest.mark.slow
def test_forgets_little(asked: tuple[Path, list[Any], list[Any]], given: dict[str, list[str]]) -> None:
    _, new, old = asked
    before = right(given["without the adapter"][len(new) :], old)
    for name in set(given) - {"without the adapter"}:
        assert right(given[name][len(new) :], old) >= before - MOST_FORGOTTEN, name


@pytest.mark.slow
def test_all_forms_say_the_same(given: dict[str, list[str]]) -> None:
    beside = given["with the adapter"]
    for name in ("fused", "fused, --dequantize", "llama.cpp, --lora"):
        assert proof.share_of_same(given[name], beside) >= LEAST_SAME, name


@pytest.mark.slow
@pytest.mark.skipif(not EASY_VQA.exists(), reason="easy-VQA is not at hand; 300 of its questions are asked above")
def test_forgets_little_of_all_of_easy_vqa(
    asked: tuple[Path, list[Any], list[Any]], given: dict[str, list[str]]
) -> None:
    out, *_ = asked
    assert given  # the adapter is there
    every = proof.old_shapes(EASY_VQA, "test", 2400)
    base = find_model("gm-tiny")
    before, after = (right(proof.answers(proof.Form(base, a), every), every) for a in (None, out / "ring"))
    assert after >= before - MOST_FORGOTTEN
