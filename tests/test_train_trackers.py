"""Trackers: files that TensorBoard itself reads, and what wandb is told. wandb is a stand-in here."""

from __future__ import annotations

import errno
import subprocess
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gm_mlx.errors import UserError
from gm_mlx.train.events import Event
from gm_mlx.train.trackers import Trackers, check_trackers

STEPS = 6
CONFIG = {"command": "lora", "lora": {"rank": 8, "targets": ["experts"]}}


def events(first: int = 1, last: int = STEPS) -> list[Event]:
    """What a run tells from one step to another, both included."""
    told = [Event("resumed", first - 1, STEPS, {"path": "step.safetensors", "damaged": []})] if first > 1 else []
    for step in range(first, last + 1):
        told.append(Event("step", step, STEPS, {"loss": 1 / step, "seconds": 0.1}))
        told.append(Event("log", step, STEPS, {"loss": 1 / step, "learnt": 5, "load_entropy": {"0": 0.5, "2": 0.75}}))
        if step % 3 == 0:
            told.append(Event("validation", step, STEPS, {"loss": 2 / step, "exact_match": 0.5, "best": True}))
            told.append(Event("saved", step, STEPS, {"path": "step.safetensors"}))
    return [*told, Event("finished", last, STEPS, {"loss": 0.1})] if last == STEPS else told


def run(names: list[str], folder: Path, first: int = 1, last: int = STEPS) -> None:
    with Trackers(names, folder, CONFIG) as trackers:
        for event in events(first, last):
            trackers(event)


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard has to show: steps and values by name."""
    reader = EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    assert "rank" in str(reader.Tensors("config")[-1].tensor_proto.string_val[0])
    return {tag: [(point.step, point.value) for point in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_tensorboard_reads_what_is_written(tmp_path: Path) -> None:
    run(["tensorboard"], tmp_path / "run")
    shown = read(tmp_path / "run")
    assert shown == {
        "train/loss": [(step, pytest.approx(1 / step)) for step in range(1, STEPS + 1)],
        "train/learnt": [(step, 5) for step in range(1, STEPS + 1)],
        "train/load_entropy/0": [(step, 0.5) for step in range(1, STEPS + 1)],
        "train/load_entropy/2": [(step, 0.75) for step in range(1, STEPS + 1)],
        "validation/loss": [(step, pytest.approx(2 / step)) for step in (3, 6)],
        "validation/exact_match": [(step, 0.5) for step in (3, 6)],
    }


def test_steps_that_are_done_again_are_shown_once(tmp_path: Path) -> None:
    run(["tensorboard"], tmp_path, last=5)
    run(["tensorboard"], tmp_path, first=4)
    assert [step for step, _ in read(tmp_path)["train/loss"]] == [*range(1, STEPS + 1)]


def test_tensorboard_needs_no_framework(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from gm_mlx.train.trackers import Trackers\n"
        "assert not {'tensorboard', 'wandb'} & sys.modules.keys()\n"
        "Trackers(['tensorboard'], Path(sys.argv[1]), {}).close()\n"
        "print(*{'tensorflow', 'torch', 'jax', 'mlx'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("", "mlx")  # what importing gm_mlx may bring


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackers = Trackers(["tensorboard"], tmp_path, {})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trackers._trackers[0]._file, "add_event", full)  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"tensorboard: cannot be written \(No space left on device\); make room"):
        trackers(events()[1])
    monkeypatch.setattr(trackers._trackers[0]._file, "close", full)  # type: ignore[union-attr]
    trackers.close()
    trackers.close()


class FakeRun:
    """A run of wandb; notes what is done to it."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given, self.id = given, given["id"] or "fresh-id"
        self.logged: list[dict[str, Any]] = []
        self.metrics: list[tuple[str, str]] = []
        self.exit_code: int | None = None

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, figures: dict[str, Any]) -> None:
        self.logged.append(figures)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stand-in with the names that are used; its ``runs`` are what was begun."""
    module = types.ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None, origin="wandb/__init__.py")
    runs: list[FakeRun] = []

    def init(**given: Any) -> FakeRun:
        runs.append(FakeRun(given))
        return runs[-1]

    vars(module).update(runs=runs, init=init, Settings=dict, Error=type("Error", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def test_wandb_gets_the_same_figures(wandb: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(["wandb"], tmp_path / "my-run", last=4)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    run(["wandb", "tensorboard", "wandb"], tmp_path / "my-run", first=4)
    begun, resumed = wandb.runs
    assert begun.given == {
        "project": "gm-mlx",
        "name": "my-run",
        "id": None,
        "resume": "allow",
        "dir": str(tmp_path / "my-run"),
        "config": CONFIG,
        "settings": {"console": "off"},
    }
    assert begun.metrics == resumed.metrics == [("*", "step")]
    entropy = {"train/load_entropy/0": 0.5, "train/load_entropy/2": 0.75}
    assert begun.logged[0] == {"step": 1, "train/loss": 1.0, "train/learnt": 5, **entropy}
    assert begun.logged[3] == {"step": 3, "validation/loss": 2 / 3, "validation/exact_match": 0.5}
    assert (resumed.given["id"], resumed.given["project"]) == ("fresh-id", "mine")
    assert [figures["step"] for figures in resumed.logged] == [4, 5, 6, 6]
    assert (begun.exit_code, resumed.exit_code) == (1, 0)  # the first of them was interrupted
    assert (tmp_path / "my-run" / "tensorboard").is_dir()


def test_wandb_without_an_account_is_one_line(
    wandb: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> FakeRun:
        raise wandb.Error("No API key\nconfigured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"^wandb: No API key configured\. Use `wandb login` to log in; or .*offline$"):
        Trackers(["tensorboard", "wandb"], tmp_path, {})
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1  # closed, or it would be empty
    assert next((tmp_path / "tensorboard").iterdir()).stat().st_size > 0


def test_what_is_not_installed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(["tensorboard"])
    with pytest.raises(UserError, match="'mlflow' is unknown; known are tensorboard and wandb"):
        check_trackers(["tensorboard", "mlflow"])
    for name in ("tensorboard", "wandb"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, name, None)
            with pytest.raises(UserError, match=rf"{name} is not installed here; pip install {name}$"):
                Trackers([name], tmp_path / "run", {})
    with monkeypatch.context() as without:
        (tmp_path / "wandb").mkdir()  # wandb makes such a folder, and Python takes it for a package
        without.setattr(sys, "path", [str(tmp_path)])
        with pytest.raises(UserError, match="wandb is not installed here"):
            check_trackers(["wandb"])
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_loaded_or_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: cannot be written \(.*\); choose another folder"):
        Trackers(["tensorboard"], tmp_path / "file", {})
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.event_file_writer", None)
    with pytest.raises(UserError, match=r"tensorboard cannot be loaded \(.*\); install it again"):
        Trackers(["tensorboard"], tmp_path / "run", {})
