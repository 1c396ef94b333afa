"""The ablation on the order of the stages: its arms differ in what they say and in nothing else."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from gm_mlx.hub import find_model
from gm_mlx.model import Model
from gm_mlx.processor import Processor
from gm_mlx.train.losses import AnswerLoss

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "ablation"))

order: Any = importlib.import_module("moe_order")

SAMPLE = ROOT / "tests" / "data" / "easy_vqa_300"
LAYERS = (0, 2)


@pytest.fixture(scope="module")
def data() -> Any:
    return order.Data(Processor.from_folder(find_model("gm-tiny")))


@pytest.fixture(scope="module")
def start() -> Model:
    mx.random.seed(5)
    model = Model(order.DENSE)
    mx.eval(model.parameters())
    return model


def weights(model: Model) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(model.parameters())}


def test_every_arm_takes_the_same_steps_and_rows(data: Any) -> None:
    assert list(order.ARMS) == [
        "dense, then experts",
        "experts from the start",
        "random experts from the start",
        "dense throughout",
    ]
    # The rows of the second phase go on where those of the first end, and a seed has rows of its own.
    first = data.asked(0, 0, order.PHASES[0].steps, 0, 1)
    assert np.array_equal(first.ids, data.asked(0, order.PHASES[0].steps, 0, 0, 1).ids)
    other = data.asked(1, 0, order.PHASES[0].steps, 0, 1)
    assert first.ids.shape != other.ids.shape or (first.ids != other.ids).any()


def test_no_scene_is_trained_and_measured_on() -> None:
    scenes = [{order.draw(split, 0, index)[0] for index in range(300)} for split in ("asked", "described", "heldout")]
    assert all(len(mine) == 300 for mine in scenes)
    assert not scenes[2] & (scenes[0] | scenes[1])
    assert {len(scene.objects) for mine in scenes for scene in mine} == {1, 2}


def test_copies_compute_what_the_dense_model_does_and_random_experts_do_not(data: Any, start: Model) -> None:
    batch = data.batch("asked", 0, 0)
    figures = {}
    for form in ("dense", "copies", "random"):
        model = order.in_form(start, form, 0)
        assert (model.config.text_config.moe is None) == (form == "dense")
        figures[form] = AnswerLoss()(model, batch)[2]["answers"].item()
    assert figures["copies"] == pytest.approx(figures["dense"], rel=1e-4)
    assert abs(figures["random"] - figures["dense"]) > 3e-4 * figures["dense"]
    before = weights(start)
    for form in ("copies", "random"):  # all else is the dense model's, and routers depend on the seed alone
        mine = weights(order.in_form(start, form, 0))
        assert all(np.array_equal(mine[name], before[name]) for name in before.keys() & mine.keys())
        gates = {name: value for name, value in mine.items() if ".mlp.gate." in name}
        again, other = (weights(order.in_form(start, "copies", seed)) for seed in (0, 1))
        assert all(np.array_equal(value, again[name]) for name, value in gates.items())
        assert not all(np.array_equal(value, other[name]) for name, value in gates.items())


@pytest.mark.slow
def test_all_of_it_in_a_few_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: Any
) -> None:
    """Two seeds; what learns is what the table says; a second call repeats nothing and prints the same table."""
    few = {"steps": 2, "save_every": 2}
    monkeypatch.setattr(order, "SEEDS", (0, 1))
    monkeypatch.setattr(order, "BATCH", 2)
    monkeypatch.setattr(order, "HELD_OUT", 10)
    monkeypatch.setattr(order, "PHASES", tuple(dataclasses.replace(phase, **few) for phase in order.PHASES))
    fewer = {name: dataclasses.replace(config, **few) for name, config in order.PRETRAINING.items()}
    monkeypatch.setattr(order, "PRETRAINING", fewer)
    monkeypatch.setattr(sys, "argv", ["moe_order.py", "--out", str(tmp_path), "--easy-vqa", str(SAMPLE), "--split", ""])
    order.main()
    printed = capsys.readouterr().out
    assert printed.count("seed ") == 8
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table] == ["", "---", *order.ARMS]

    start = order.common_start(data, tmp_path)
    before = weights(start)
    for name, arm in order.ARMS.items():
        after = weights(order.run(name, 0, start, data, tmp_path / "seed 0"))
        tower = {key for key in before if key.startswith("vision_tower")}
        assert all(np.array_equal(before[key], after[key]) for key in tower)
        assert {"held-out loss", "scenes", "easy-VQA"} == json.loads(
            (tmp_path / "seed 0" / f"{name}.json").read_text()
        ).keys()
        first = order.in_form(start, arm.forms[0], 0)
        order.select_stage(first, arm.learns[0])
        order.train(first, AnswerLoss(), None, order.PHASES[0], tmp_path / "seed 0" / f"{arm.forms[0]}, phase 1")
        middle = weights(first)
        moved = {key for key in middle.keys() & after.keys() if not np.array_equal(middle[key], after[key])}
        if name == "dense, then experts":
            assert not moved  # what both models have is all but the experts
        else:
            assert any("self_attn" in key for key in moved) and any("projector" in key for key in moved)
    order.main()
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")] == table
