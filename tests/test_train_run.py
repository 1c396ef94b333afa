"""A run joined up from data to trained weights, and the folder that it works in."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from fixtures import tiny_folder, tiny_model
from mlx.utils import tree_flatten
from training_data import images_in, llava, row, write_lines

from gm_mlx.errors import UserError
from gm_mlx.lora.attach import add_lora
from gm_mlx.lora.config import LoRAConfig
from gm_mlx.lora.folder import load_adapter
from gm_mlx.model import Model
from gm_mlx.processor import Processor
from gm_mlx.train.config import TrainConfig
from gm_mlx.train.events import Event
from gm_mlx.train.log import Log
from gm_mlx.train.losses import AnswerLoss
from gm_mlx.train.prepare import Prepared, prepare
from gm_mlx.train.record import record, record_text
from gm_mlx.train.run import fit, num_steps
from gm_mlx.train.run_folder import RUN_FILE, check_places, fingerprint, open_run, remove_run
from gm_mlx.train.split import split
from gm_mlx.weights import load_model, save_model

CONFIG = TrainConfig(steps=6, learning_rate=1e-2, log_every=1, save_every=2, validate_every=3)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, reader: Processor) -> Prepared:
    folder = tmp_path_factory.mktemp("data")
    images_in(folder, 8)
    records = [llava("<image>what is this?", "a dog" if n % 2 else "the cat", image=f"{n % 8}.png") for n in range(16)]
    return prepare([write_lines(folder / "data.jsonl", records)], reader, max_length=100, hold_out=4)


def learner() -> Model:
    model = tiny_model()
    add_lora(model, LoRAConfig(rank=2, dropout=0.1))
    return model


def learnt(model: Model) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in tree_flatten(model.trainable_parameters())}


def run(
    folder: Path, reader: Processor, prepared: Prepared, config: TrainConfig = CONFIG, **more: Any
) -> tuple[Model, Any, list[Event]]:
    model, events = learner(), []
    finished = fit(model, reader, prepared, config, folder, batch_size=4, workers=0, **{"watch": events.append, **more})
    return model, finished, events


def test_steps_of_epochs() -> None:
    assert [num_steps(*of) for of in ((12, 4, 1), (13, 4, 1), (13, 4, 2.5), (1, 8, 0.01))] == [3, 4, 10, 1]


def test_a_run(tmp_path: Path, reader: Processor, prepared: Prepared) -> None:
    """It learns, validates on what is held out, and keeps a record."""
    before = learnt(learner())
    model, finished, events = run(tmp_path, reader, prepared)
    assert not model.training
    assert any((before[name] != array).any() for name, array in learnt(model).items())
    assert [event.step for event in events if event.kind == "validation"] == [3, 6]
    table = record(tmp_path, finished, CONFIG, prepared, 4)
    assert table["validation"]["step"] == (finished.best_step if finished.restored_best else 6)
    assert table["validation"].keys() >= {"loss", "exact_match"}
    assert (table["steps"], table["rows"], table["held_out"], table["batch_size"]) == (6, 12, 4, 4)
    assert table["loss"] < table["first_loss"] and table["tokens"] > 0
    json.dumps(table)
    text = record_text(table)
    assert "6 steps of 4 rows, from 12 rows with" in text and "On 4 rows held out the loss is" in text


def test_a_hold_out_that_nobody_asked_for() -> None:
    """A twentieth and at most 200 rows; none where all rows share their images."""
    alone = [row("what?", "a dog", images=[f"{n}.png"]) for n in range(6000)]
    assert [len(split(alone[:n], None)[1]) for n in (5, 100, 6000)] == [0, 5, 200]
    assert split([row("what?", "a dog", images=["0.png"])] * 100, None)[1] == []


def test_without_a_hold_out(tmp_path: Path, reader: Processor, prepared: Prepared) -> None:
    alone = dataclasses.replace(prepared, held_out=prepared.train.take([]))
    _, finished, events = run(tmp_path, reader, alone)
    assert not [event for event in events if event.kind == "validation"]
    table = record(tmp_path, finished, CONFIG, alone, 4)
    assert table["validation"] is None and "held out" not in record_text(table)


def test_interrupted_and_resumed_is_uninterrupted(tmp_path: Path, reader: Processor, prepared: Prepared) -> None:
    whole, _, _ = run(tmp_path / "whole", reader, prepared)

    def interrupt(event: Event) -> None:
        if (event.kind, event.step) == ("step", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", reader, prepared, watch=interrupt)
    model, _, events = run(tmp_path / "parts", reader, prepared)
    assert [event.step for event in events if event.kind == "step"] == [4, 5, 6]
    for name, array in learnt(whole).items():
        np.testing.assert_array_equal(array, learnt(model)[name])
    again, _, events = run(tmp_path / "parts", reader, prepared)
    assert not [event for event in events if event.kind == "step"]
    for name, array in learnt(whole).items():
        np.testing.assert_array_equal(array, learnt(again)[name])


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("batch_size", lambda given: {"batch_size": 3}),
        ("data", lambda given: {"prepared": dataclasses.replace(given, train=given.train.take(range(8)))}),
        ("held_out", lambda given: {"prepared": dataclasses.replace(given, held_out=given.held_out.take([0]))}),
        ("aux_loss_coef", lambda given: {"loss": AnswerLoss(0.5)}),
        ("learning_rate", lambda given: {"config": dataclasses.replace(CONFIG, learning_rate=1e-3)}),
        ("model", lambda given: {"identity": {"model": "another"}}),
    ],
)
def test_another_run_is_refused(key: str, change: Any, tmp_path: Path, reader: Processor, prepared: Prepared) -> None:
    config = dataclasses.replace(CONFIG, steps=1)
    given: dict[str, Any] = {"prepared": prepared, "config": config, "batch_size": 4, "identity": {"model": "one"}}
    fit(learner(), reader, folder=tmp_path, workers=0, **given)
    other = {**given, **change(prepared)}
    other["config"] = dataclasses.replace(other["config"], steps=1)
    with pytest.raises(UserError, match=key):
        fit(learner(), reader, folder=tmp_path, workers=0, **other)


# --- the folder ---


def made(out: Path, run_id: str | None) -> Path:
    out.mkdir()
    (out / "gm.json").write_text(json.dumps({"training": {"run": run_id}} if run_id else {}))
    (out / "adapter_model.safetensors").write_bytes(b"x")
    return out


def test_a_run_knows_its_own_work(tmp_path: Path) -> None:
    folder, out = tmp_path / "out.run", tmp_path / "out"
    assert not check_places(out, folder)
    run_id = open_run(folder, {"command": "lora"})
    assert open_run(folder, {"command": "train"}) == run_id
    table = json.loads((folder / RUN_FILE).read_text())
    assert table["command"] == "lora" and table["id"] == run_id
    made(out, run_id)
    assert check_places(out, folder)
    with pytest.raises(UserError, match="out: exists; choose another folder, or replace it with --force"):
        check_places(out, folder, restart=True)
    assert not check_places(out, folder, restart=True, force=True)
    remove_run(folder)
    with pytest.raises(UserError, match="out: exists"):
        check_places(out, folder)
    with pytest.raises(UserError, match="out: exists"):
        check_places(out, tmp_path / "another.run")


@pytest.mark.parametrize("where", ["out", "out/inside", "."])
def test_a_run_does_not_lie_in_what_it_makes(where: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot lie in .*out nor around it; choose another with --run"):
        check_places(tmp_path / "out", tmp_path / where)


def test_what_is_no_run_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    check_places(tmp_path / "out", folder)
    (folder / "a.txt").write_text("x")
    with pytest.raises(UserError, match="photos: holds something else than a run; choose another folder with --run"):
        check_places(tmp_path / "out", folder)
    remove_run(folder)
    assert (folder / "a.txt").exists()
    with pytest.raises(UserError, match=r"a\.txt: is a file"):
        check_places(tmp_path / "out", folder / "a.txt")
    with pytest.raises(UserError, match="there is no folder"):
        check_places(tmp_path / "out", tmp_path / "no" / "such")
    with pytest.raises(UserError, match="is the source"):
        check_places(tmp_path / "out", tmp_path / "out.run", sources=[tmp_path / "out"])


def test_a_run_that_is_going_on_is_not_removed(tmp_path: Path) -> None:
    open_run(tmp_path / "run", {})
    log = Log(tmp_path / "run")
    with pytest.raises(UserError, match="another process trains there"):
        remove_run(tmp_path / "run")
    log.close()
    remove_run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_fingerprint_sees_each_tensor(tmp_path: Path) -> None:
    def of(model: Model) -> str:
        save_model(model, tmp_path)
        return fingerprint([tmp_path / "model.safetensors"])

    first = of(tiny_model())
    assert of(tiny_model()) == first
    for path in ("language_model.model.norm", "multi_modal_projector.linear_2"):
        model = tiny_model()
        module: Any = model
        for name in path.split("."):
            module = module[name]
        module.weight = module.weight + mx.array(1e-3)
        assert of(model) != first


# --- the manual ---


def test_the_python_of_the_manual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/fine-tuning.md shows, with a tiny model and two rows for somebody's own."""
    text = (Path(__file__).parents[1] / "docs" / "fine-tuning.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    rows = re.search(r"```csv\n(.*?)```", text, re.DOTALL)
    assert code and rows
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "my-model")
    images_in(tmp_path / "parts", 3)
    (tmp_path / "parts" / "data.csv").write_text(rows[1].replace(".jpg", ".png"))
    exec(compile(code[1], "fine-tuning.md", "exec"), {})
    model = load_model(tmp_path / "my-model")
    assert load_adapter(model, tmp_path / "my-adapter")
    assert (tmp_path / "my-run" / "log.jsonl").is_file()
