"""The model in the box answers right: the shipped 4-bit weights, through the engine that users run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gm_mlx
from gm_mlx import _blas
from gm_mlx.config import ModelConfig
from gm_mlx.hub import find_model
from gm_mlx.presets import PRESETS
from gm_mlx.vlm import VLM
from gm_mlx.weights import load_model, named_arrays

ROOT = Path(__file__).parent.parent
FIXTURE = ROOT / "tests" / "data" / "easy_vqa_300"
LEAST_EASY_VQA, LEAST_GENERATED = 0.97, 0.90
EASY_VQA = ROOT.parent / "shared" / "data" / "easy_vqa.tar.gz"


@pytest.fixture(scope="module")
def folder() -> Path:
    return find_model("gm-tiny")


@pytest.fixture(scope="module")
def model() -> Iterator[VLM]:
    model = gm_mlx.load()
    yield model
    model.close()


@pytest.fixture(scope="module")
def evaluate() -> Iterator[object]:
    """``examples/train_gm_tiny/evaluate.py``, whose folder is no package."""
    scripts = str(ROOT / "examples" / "train_gm_tiny")
    sys.path.insert(0, scripts)
    import evaluate

    yield evaluate
    sys.path.remove(scripts)


def test_is_the_preset(folder: Path) -> None:
    config = ModelConfig.load(folder)
    assert config == PRESETS["gm-tiny"]
    assert config.text_config.sparse_layers == [0, 2]


def test_fits_the_box(folder: Path) -> None:
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8_000_000


def test_experts_have_four_bits_and_routers_all(folder: Path) -> None:
    model = load_model(folder)
    for layer in model.config.text_config.sparse_layers:
        mlp = model.layers[layer].mlp
        for name in ("gate_proj", "up_proj", "down_proj"):
            assert mlp.switch_mlp[name].bits == 4
    arrays = named_arrays(model)
    routers = [name for name in arrays if ".mlp.gate." in name]
    assert len(routers) == 4  # two factors in two layers
    assert all(str(arrays[name].dtype) == "mlx.core.float32" for name in routers)


def test_experts_share_the_work(model: VLM) -> None:
    """No expert of a layer is idle or takes everything, on prompts about ten pictures."""
    rows = json.loads((FIXTURE / "questions.json").read_text())[:10]
    for layer in range(2):
        counts = np.zeros(4)
        for question, _, image in rows:
            picture = Image.open(FIXTURE / "images" / f"{image}.png").convert("RGB")
            trace = model.engine.trace_routing([{"role": "user", "content": question}], [picture])  # type: ignore[attr-defined]
            counts += np.bincount(np.array(trace[layer].experts).ravel(), minlength=4)
        assert (counts / counts.sum() > 0.05).all(), counts


@pytest.mark.slow
def test_easy_vqa_fixture(model: VLM) -> None:
    """300 published test questions, one conversation each, as a user would ask them."""
    rows = json.loads((FIXTURE / "questions.json").read_text())
    right = 0
    for question, answer, image in rows:
        right += str(model.chat(question, [FIXTURE / "images" / f"{image}.png"])) == answer
    assert len(rows) == 300
    assert right >= LEAST_EASY_VQA * len(rows)


@pytest.mark.slow
def test_held_out_questions(folder: Path, evaluate) -> None:
    """1,000 generated questions, and the figure that the model card states."""
    from gm_mlx.processor import Processor

    found = evaluate.evaluate(load_model(folder), Processor.from_folder(folder), None)["generated"]
    assert found["all"] >= LEAST_GENERATED
    stated = json.loads((folder / "gm.json").read_text())["exact_match"]["generated"]["all"]
    assert found["all"] == pytest.approx(stated, abs=0.005)  # another BLAS rounds differently


@pytest.mark.slow
@pytest.mark.skipif(not EASY_VQA.exists(), reason="easy-VQA is not at hand; 300 of its questions are asked above")
def test_all_of_easy_vqa(folder: Path, evaluate) -> None:
    """All 9,673 published test questions; every eighth where there is no BLAS, which would take half an hour."""
    from gm_mlx.processor import Processor

    limit = None if "OpenBLAS" in _blas.status() or sys.platform == "darwin" else 1200
    model, processor = load_model(folder), Processor.from_folder(folder)
    found = evaluate.evaluate(model, processor, EASY_VQA, limit=limit)["easy-vqa"]
    assert found["all"] >= LEAST_EASY_VQA


def test_says_what_it_cannot_do(model: VLM) -> None:
    """Once, and only about a picture that is no 64 x 64 one."""
    small, photograph = (Image.new("RGB", (side, side), "white") for side in (64, 640))
    assert model.engine.notices([small]) == []
    (line,) = model.engine.notices([small, photograph])
    assert "photograph" in line
    assert "gm-mlx chat --model" in line
    assert model.engine.notices([photograph]) == []


def test_second_question_computes_only_what_is_new() -> None:
    model = gm_mlx.load()
    talk = model.conversation()
    image = FIXTURE / "images" / f"{json.loads((FIXTURE / 'questions.json').read_text())[0][2]}.png"
    first = list(talk.ask("what shape is in the image?", images=[image]))[-1].stats
    second = list(talk.ask("what color is it?"))[-1].stats
    assert (first.images_encoded, first.cached_tokens) == (1, 0)
    assert second.images_encoded == 0
    # All of the first prompt and its answer; the end-of-turn mark is re-read with the new turn.
    assert second.cached_tokens >= first.prompt_tokens + first.generated_tokens - 1
    model.close()
