"""Honest resume: a run that was killed anywhere goes on as if nothing had happened, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from fixtures import tiny_folder, tiny_model
from train_runs import assert_same, batches, files, log, losses, reader, run
from training_data import images_in, llava, write_lines

from gm_mlx.capacity import Capacity, set_capacity
from gm_mlx.errors import UserError
from gm_mlx.lora.attach import add_lora
from gm_mlx.lora.config import LoRAConfig
from gm_mlx.model import Model
from gm_mlx.moe import set_gumbel
from gm_mlx.processor import Processor
from gm_mlx.train.checkpoints import first_difference
from gm_mlx.train.config import TrainConfig
from gm_mlx.train.data import Batch
from gm_mlx.train.events import Event
from gm_mlx.train.log import Log
from gm_mlx.train.stages import select_stage

CONFIG = TrainConfig(steps=6, learning_rate=1e-2, log_every=1, save_every=2, keep=3)
Data = Callable[[int, int, int], Batch]


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return reader(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(processor: Processor) -> Data:
    make = batches(processor)
    made = [make(number, 0, 1) for number in range(6)]
    return lambda number, rank, ranks: made[number % 6]


def learner(stage: int = 2) -> Model:
    model = tiny_model()
    select_stage(model, stage)
    return model


def until(
    folder: Path, data: Data, step: int, config: TrainConfig = CONFIG, model: Model | None = None, **more: Any
) -> None:
    """A run that ends as a crash does, in step ``step``."""

    class Crash(Exception):
        pass

    def watch(event: Event) -> None:
        if event.kind == "step" and event.step == step:
            raise Crash

    with pytest.raises(Crash):
        run(model or learner(), data, config, folder, watch=watch, **more)


# A process that trains, and kills itself at a call of some function of ``os``: fsync and replace are called while files
# are written and put in their places, and times marks the steps.
TRAINS = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from fixtures import tiny_model
from train_runs import LOSS
from gm_mlx.lora.attach import add_lora
from gm_mlx.lora.config import LoRAConfig
from gm_mlx.processor import Processor
from gm_mlx.train.config import TrainConfig
from gm_mlx.train.loader import Loader
from gm_mlx.train.loop import train
from gm_mlx.train.prepare import prepare

folder, out, function, at = Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], int(sys.argv[5])
plain, count = getattr(os, function), 0

def killed(*inputs):
    global count
    count += 1
    if count == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*inputs)

setattr(os, function, killed)
processor = Processor.from_folder(folder / "model")
prepared = prepare([folder / "data.jsonl"], processor, max_length=100)
model = tiny_model()
add_lora(model, LoRAConfig(rank=2, dropout=0.3))
config = TrainConfig(steps=12, learning_rate=1e-2, log_every=2, save_every=3, accumulate=2, keep=1,
                     validate_every=4)
with Loader(prepared.train, processor, 4, parts=2, workers=0) as loader:
    train(model, LOSS, loader, config, out, identity={"data": prepared.train.fingerprint()}, describe=LOSS.describe,
          validate=lambda model: {"loss": float(LOSS(model, loader(99))[0].item())}, names=loader.names,
          watch=lambda event: os.times() if event.kind == "step" else None)
"""


@pytest.mark.slow
def test_killed_anywhere(tmp_path: Path) -> None:
    """By SIGKILL, again and again, at steps and while checkpoints are written; the log and the weights are the same."""
    tiny_folder(tmp_path / "model")
    names = images_in(tmp_path / "images", 8)
    records = [
        llava(
            "<image>what is this red?" * (1 + n % 2), f"a {'red dog' * (1 + n % 3)}", image=[names[n % 8]] * (1 + n % 2)
        )
        for n in range(18)
    ]
    write_lines(tmp_path / "data.jsonl", records)

    def trains(out: str, function: str = "times", at: int = 0) -> int:
        command = [sys.executable, "-c", TRAINS, Path(__file__).parent, tmp_path, tmp_path / out, function, str(at)]
        return subprocess.run(command, timeout=120).returncode

    assert trains("whole") == 0
    random = np.random.default_rng(0)
    kills = [("fsync", 1), ("times", 5), ("fsync", 2), ("replace", 1), ("fsync", 3)]
    kills += [(function, int(random.integers(1, 5))) for function in ("times", "fsync", "times", "replace")]
    codes = [trains("parts", function, at) for function, at in kills]
    assert set(codes) <= {-signal.SIGKILL, 0} and codes.count(-signal.SIGKILL) >= 7
    assert trains("parts") == 0
    assert log(tmp_path / "parts") == log(tmp_path / "whole")
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    for name in ("step-000012.safetensors", "best.safetensors"):
        mine, other = (mx.load(str(tmp_path / run / name)) for run in ("parts", "whole"))
        assert mine.keys() == other.keys() and mine
        for key, array in mine.items():
            assert mx.array_equal(array, other[key]).item(), key


def test_a_window_that_a_checkpoint_cuts_in_two(data: Data, tmp_path: Path) -> None:
    """Lines of the log are of the same steps, wherever the checkpoint stands."""
    config = dataclasses.replace(CONFIG, log_every=5, save_every=3)
    run(learner(), data, config, tmp_path / "whole")
    until(tmp_path / "parts", data, 4, config)
    run(learner(), data, config, tmp_path / "parts")
    assert log(tmp_path / "parts") == log(tmp_path / "whole")
    assert [line["step"] for line in log(tmp_path / "whole")] == [5, 6]


@pytest.mark.parametrize("kind", ["step", "log", "validation", "saved", "stopped", "finished"])
def test_interrupted_at_any_event(data: Data, tmp_path: Path, kind: str) -> None:
    """The checkpoint that an interrupt leaves is as good as any: nothing is done or told twice, or left out."""
    config = dataclasses.replace(CONFIG, log_every=2, validate_every=2, patience=2)
    curve = {2: 1.0, 4: 3.0, 6: 2.0}
    model: Model

    def validate(model: Model) -> dict[str, float]:
        return {"loss": curve[step]}

    def watch(event: Event) -> None:
        nonlocal step
        step = event.step
        if event.kind == kind and (step == 4 or kind in ("stopped", "finished")) and presses:
            presses.pop()
            raise KeyboardInterrupt

    whole, model = learner(), learner()
    presses: list[int] = []
    step = 0
    run(whole, data, config, tmp_path / "whole", validate=validate, watch=watch)
    presses, step = [1], 0
    with pytest.raises(KeyboardInterrupt):
        run(model, data, config, tmp_path / "parts", validate=validate, watch=watch)
    model = learner()
    step = 4
    finished, _ = run(model, data, config, tmp_path / "parts", validate=validate, watch=watch)
    assert finished.best_step == 2 and finished.stopped_early
    assert_same(model, whole)
    assert log(tmp_path / "parts") == log(tmp_path / "whole")
    assert files(tmp_path / "parts") >= {"best.safetensors", "step-000006.safetensors"}


@pytest.mark.parametrize("checkpoint", [False, True])
def test_what_is_drawn_is_drawn_again(data: Data, tmp_path: Path, checkpoint: bool) -> None:
    """Second experts, and who finds no room at them: a step's draws are the same in whichever process it is done."""

    def drawing(gumbel: bool = True) -> Model:
        model = learner(3)
        set_gumbel(model, gumbel, in_eval=False)
        set_capacity(model, Capacity(0.8, by="random"))
        return model

    config = dataclasses.replace(CONFIG, checkpoint=checkpoint)
    whole, parts = drawing(), drawing()
    run(whole, data, config, tmp_path / "whole")
    until(tmp_path / "parts", data, 5, config, drawing())
    run(parts, data, config, tmp_path / "parts")
    assert_same(parts, whole)
    assert log(tmp_path / "parts") == log(tmp_path / "whole")
    run(drawing(gumbel=False), data, config, tmp_path / "largest")
    assert losses(tmp_path / "largest") != losses(tmp_path / "whole")


def test_interrupted_in_a_validation(data: Data, tmp_path: Path) -> None:
    """It is made up for."""
    config = dataclasses.replace(CONFIG, validate_every=3, log_every=3)
    presses = [1]

    def validate(model: Model) -> dict[str, float]:
        if presses:
            presses.pop()
            raise KeyboardInterrupt
        return {"loss": 1.0}

    with pytest.raises(KeyboardInterrupt):
        run(learner(), data, config, tmp_path / "parts", validate=validate)
    assert [(line["kind"], line["step"]) for line in log(tmp_path / "parts")] == [("log", 3)]
    run(learner(), data, config, tmp_path / "parts", validate=validate)
    run(learner(), data, config, tmp_path / "whole", validate=validate)
    assert log(tmp_path / "parts") == log(tmp_path / "whole")


def test_a_finished_run_returns_at_once(data: Data, tmp_path: Path) -> None:
    model = learner()
    finished, _ = run(model, data, CONFIG, tmp_path)

    def never(*_: Any) -> Batch:
        raise AssertionError

    again = learner()
    found, events = run(again, never, CONFIG, tmp_path)
    assert found == finished
    assert [event.kind for event in events] == ["resumed", "finished"]
    assert events[0].figures == {"path": tmp_path / "step-000006.safetensors", "damaged": [], "changed": {}}
    assert_same(again, model)
    assert len(losses(tmp_path)) == 6


@pytest.mark.parametrize("keep", [1, 2])
def test_keeps_so_many(data: Data, tmp_path: Path, keep: int) -> None:
    """The older ones are removed when the new one is complete; the best is none of them."""
    seen = []

    def watch(event: Event) -> None:
        seen.append(len([name for name in files(tmp_path) if name.startswith("step-")]))

    config = dataclasses.replace(CONFIG, keep=keep, save_every=1, validate_every=1)
    left = iter([1.0] * 6)
    run(learner(), data, config, tmp_path, watch=watch, validate=lambda model: {"loss": next(left)})
    newest = {f"step-{step:06d}.safetensors" for step in range(7 - keep, 7)}
    assert files(tmp_path) == {"log.jsonl", "best.safetensors", *newest}
    assert max(seen) == keep


# Damage.


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def no_checkpoint(path: Path) -> None:
    mx.save_safetensors(str(path), {"a": mx.zeros(3)}, {"step": "4"})


@pytest.mark.parametrize("spoil", [cut, no_checkpoint, lambda path: path.write_bytes(b"")])
def test_a_damaged_checkpoint(data: Data, tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    """The run goes on from the one before, and says so."""
    run(learner(), data, CONFIG, tmp_path / "whole")
    until(tmp_path / "parts", data, 5)
    newest = tmp_path / "parts" / "step-000004.safetensors"
    spoil(newest)
    model = learner()
    _, events = run(model, data, CONFIG, tmp_path / "parts")
    assert events[0].kind == "resumed" and events[0].step == 2
    assert events[0].figures["damaged"] == [newest]
    assert events[0].figures["path"] == tmp_path / "parts" / "step-000002.safetensors"
    assert log(tmp_path / "parts") == log(tmp_path / "whole")
    ours, theirs = (mx.load(str(tmp_path / run / newest.name)) for run in ("parts", "whole"))
    assert all(mx.array_equal(array, theirs[name]).item() for name, array in ours.items())


def test_all_checkpoints_damaged(data: Data, tmp_path: Path) -> None:
    """That is for the user to decide on: nothing is removed, and nothing starts over by itself."""
    run(learner(), data, CONFIG, tmp_path)
    lines = log(tmp_path)
    for path in tmp_path.glob("step-*"):
        cut(path)
    kept = files(tmp_path)
    with pytest.raises(UserError, match=r"step-000006.safetensors: is cut short.*no other checkpoint .* start over"):
        run(learner(), data, CONFIG, tmp_path)
    assert files(tmp_path) == kept and log(tmp_path) == lines


def test_a_log_that_ends_within_a_line(data: Data, tmp_path: Path) -> None:
    run(learner(), data, CONFIG, tmp_path / "whole")
    until(tmp_path / "parts", data, 5)
    path = tmp_path / "parts" / "log.jsonl"
    path.write_bytes(path.read_bytes() + b'{"kind": "log", "step": 5, "lo')
    run(learner(), data, CONFIG, tmp_path / "parts")
    assert log(tmp_path / "parts") == log(tmp_path / "whole")


def test_what_a_killed_process_left_is_removed(data: Data, tmp_path: Path) -> None:
    (tmp_path / ".step-000002.partial.safetensors").write_bytes(b"half")
    run(learner(), data, CONFIG, tmp_path)
    assert not [name for name in files(tmp_path) if name.startswith(".")]


# Other runs.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 8}, "steps is 6 and not 8"),
        ({"weight_decay": 0.1}, "weight_decay is 0.01 and not 0.1"),
        ({"seed": 4}, "seed is 0 and not 4"),
        ({"precision": "float32"}, 'precision is "auto" and not "float32"'),
        ({"betas": (0.9, 0.999)}, r"betas is \[0.9, 0.99\] and not \[0.9, 0.999\]"),
        ({"learning_rate": 1e-3}, "learning_rate is 0.01 and not 0.001"),  # the run is over
    ],
)
def test_other_hyperparameters_are_refused(data: Data, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    run(learner(), data, CONFIG, tmp_path)
    with pytest.raises(UserError, match=rf"step-000006.safetensors: is of another run, whose {said}; .* start over"):
        run(learner(), data, dataclasses.replace(CONFIG, **changes), tmp_path)


def test_what_may_change_on_the_way(data: Data, tmp_path: Path) -> None:
    """How a run is watched, kept and cut into parts; and the two remedies for a loss that is no longer a number."""
    until(tmp_path, data, 3)
    more = dataclasses.replace(
        CONFIG, log_every=2, save_every=1, keep=1, checkpoint=True, accumulate=2, learning_rate=1e-3, clip=0.5
    )
    _, events = run(learner(), data, more, tmp_path)
    assert events[0].figures["changed"] == {
        "learning_rate": (1e-2, 1e-3), "clip": (1.0, 0.5), "accumulate": (1, 2), "checkpoint": (False, True),
        "log_every": (1, 2), "save_every": (2, 1), "keep": (3, 1),
    }  # fmt: skip
    assert files(tmp_path) == {"log.jsonl", "step-000006.safetensors"}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"data": "b", "lora": {"rank": 4}}, 'data is "a" and not "b"'),
        ({"data": "a", "lora": {"rank": 8}}, "lora.rank is 4 and not 8"),
        ({"data": "a", "lora": {"rank": 4, "dora": True}}, "lora.dora is null and not true"),
        ({"data": "a"}, r'lora is \{"rank": 4\} and not null'),
        (None, 'data is "a" and not null'),
    ],
)
def test_another_identity_is_refused(data: Data, tmp_path: Path, other: Any, said: str) -> None:
    run(learner(), data, CONFIG, tmp_path, identity={"data": "a", "lora": {"rank": 4}})
    kept = files(tmp_path)
    with pytest.raises(UserError, match=f"is of another run, whose {said}; "):
        run(learner(), data, CONFIG, tmp_path, identity=other)
    assert files(tmp_path) == kept and len(losses(tmp_path)) == 6


def test_other_parts_of_the_model_are_refused(data: Data, tmp_path: Path) -> None:
    run(learner(1), data, CONFIG, tmp_path)
    with pytest.raises(UserError, match="is of another model, or of other parts; language_model"):
        run(learner(2), data, CONFIG, tmp_path)
    with pytest.raises(UserError, match="is of another model, or of other parts; multi_modal_projector"):
        model = tiny_model()
        add_lora(model, LoRAConfig(rank=2, targets=["projector"]))
        run(model, data, CONFIG, tmp_path)


def test_differences_are_found_in_order() -> None:
    assert first_difference({"a": 1, "b": {"c": [1]}}, {"b": {"c": [1]}, "a": 1}) is None
    assert first_difference({"a": {"b": 1}}, {"a": 3}) == ("a", {"b": 1}, 3)
    assert first_difference({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": 2}}}) == ("a.b.c", 1, 2)


def test_two_processes_cannot_train_in_one_folder(data: Data, tmp_path: Path) -> None:
    tried = []

    def watch(event: Event) -> None:
        if event.kind == "step" and not tried:
            # flock is about open files, so a second one of this process stands for one of another.
            with pytest.raises(UserError, match="another process trains there"):
                Log(tmp_path)
            tried.append(event)

    run(learner(), data, CONFIG, tmp_path, watch=watch)
    assert tried
    Log(tmp_path).close()
    assert len(losses(tmp_path)) == 6


def test_a_folder_that_cannot_be_written(data: Data, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/log.jsonl: cannot be written \(File exists\)"):
        run(learner(), data, CONFIG, tmp_path / "file")


def test_the_log_is_json(data: Data, tmp_path: Path) -> None:
    run(learner(), data, CONFIG, tmp_path)
    for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines():
        assert json.loads(line)["kind"] == "log"
    assert os.stat(tmp_path / "log.jsonl").st_size > 0
