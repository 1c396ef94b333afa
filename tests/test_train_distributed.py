"""Several processes that train together: the steps of one process, one writer, and no one left waiting."""

from __future__ import annotations

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
from fixtures import tiny_folder
from train_ranks import HERE, free_ports, launch
from train_runs import files, log, losses
from training_data import images_in, llava, write_lines

# One rank of a run, or the only one. The folder has a model and data; the options are JSON.
TRAINS = """
import gm_mlx  # before anything imports mlx
import json, os, signal, sys
from pathlib import Path
import mlx.core as mx
from fixtures import tiny_config, tiny_model
from train_runs import LOSS, run
from gm_mlx.config import MoEConfig
from gm_mlx.errors import UserError
from gm_mlx.lora.attach import add_lora
from gm_mlx.lora.config import LoRAConfig
from gm_mlx.processor import Processor
from gm_mlx.train.config import TrainConfig
from gm_mlx.train.loader import Loader
from gm_mlx.train.losses import AnswerLoss
from gm_mlx.train.prepare import prepare
from gm_mlx.train.stages import select_stage

folder, out, options = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
rank = mx.distributed.init().rank()
out = out / f"rank{rank}"  # as on machines that share no disk
processor = Processor.from_folder(folder / "model")
prepared = prepare([folder / "data.jsonl"], processor, max_length=100)
# Without room, with dropout, and with the balance of experts if that is asked for.
model = tiny_model(config=tiny_config(moe=MoEConfig(aux_loss_coef=options.get("balance", 0.0))))
if options.get("lora"):
    add_lora(model, LoRAConfig(rank=2, dropout=options.get("dropout", 0.0)))
else:
    select_stage(model, 2)
config = TrainConfig(steps=6, learning_rate=1e-2, log_every=1, save_every=100, **options.get("config", {}))
loader = Loader(prepared.train, processor, 8, parts=config.accumulate, workers=0)
failing = options.get("fails", [None, None, None])

def batches(number, of, ranks):
    batch = loader(number, of, ranks)
    if failing[:2] == [rank, number]:
        if failing[2] == "error":
            raise UserError("cat.jpg: cannot be decoded")
        if failing[2] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return batch._replace(pixels=batch.pixels * float("nan"))
    return batch

def validate(model):
    return {"loss": 1.0 + rank * mx.random.uniform().item() if rank else 1.0, "rank": rank}

try:
    finished, events = run(
        model, batches, config, out, names=loader.names,
        identity={"data": options.get("data", ["a", "a"])[rank]},
        **({"validate": validate} if config.validate_every else {}),
    )
except UserError as error:
    sys.exit(str(error))
print(json.dumps({"rank": rank, "step": finished.step, "stopped": finished.stopped_early, "told": len(events)}),
      file=sys.stderr)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    tiny_folder(folder / "model")
    names = images_in(folder / "images", 8)
    records = [
        llava("<image>" + "what is this red circle? " * (1 + n % 3), f"a red {'dog' * (1 + n % 3)}", image=names[n % 8])
        for n in range(24)
    ]
    write_lines(folder / "data.jsonl", records)
    return folder


Trains = Callable[..., list[Any]]


@pytest.fixture
def trains(folder: Path, tmp_path: Path) -> Trains:
    def trains(name: str, ranks: int = 2, **options: Any) -> list[Any]:
        return launch(TRAINS, folder, tmp_path / name, json.dumps(options), ranks=ranks, folder=tmp_path)

    return trains


def last(folder: Path) -> dict[str, mx.array]:
    return mx.load(str(folder / "rank0" / "step-000006.safetensors"))  # type: ignore[return-value]


def assert_close(mine: Path, other: Path, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(losses(mine / "rank0"), losses(other / "rank0"), rtol=tolerance)
    expected = last(other)
    for name, array in last(mine).items():
        if name.startswith("weights."):
            np.testing.assert_allclose(array, expected[name], atol=10 * tolerance, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_two_ranks_take_the_steps_of_one(trains: Trains, tmp_path: Path, lora: bool) -> None:
    """Half a batch each, against one process with all of it. Rank 0 alone writes and tells."""
    one, two = trains("one", ranks=1, lora=lora), trains("two", lora=lora)
    assert [ended.code for ended in (*one, *two)] == [0, 0, 0], two
    assert [json.loads(ended.said.splitlines()[-1])["told"] > 0 for ended in two] == [True, False]
    assert not (tmp_path / "two" / "rank1").exists()
    assert files(tmp_path / "two" / "rank0") == {"log.jsonl", "step-000006.safetensors"}
    assert_close(tmp_path / "two", tmp_path / "one")
    for mine, other in zip(log(tmp_path / "two" / "rank0"), log(tmp_path / "one" / "rank0"), strict=True):
        # Counts are exact: of learnt tokens, of positions, and of tokens at each expert, which the entropy is of.
        for key in ("step", "learnt", "positions"):
            assert mine[key] == other[key]
        assert mine["load_entropy"] == pytest.approx(other["load_entropy"], rel=1e-2)


@pytest.mark.slow
def test_each_share_balances_its_own_experts(trains: Trains, tmp_path: Path) -> None:
    """With the balance of experts, which is a product of means, two ranks are as two parts, and near the whole."""
    options = {"lora": True, "balance": 0.1}
    for name, ranks, parts in (("ranks", 2, 1), ("parts", 1, 2), ("whole", 1, 1)):
        ended = trains(name, ranks=ranks, config={"accumulate": parts}, **options)
        assert {one.code for one in ended} == {0}, ended
    assert_close(tmp_path / "ranks", tmp_path / "parts")
    ranks, whole = (losses(tmp_path / name / "rank0") for name in ("ranks", "whole"))
    assert not np.allclose(ranks, whole, rtol=1e-4)
    np.testing.assert_allclose(ranks, whole, rtol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["error", "kill"])
def test_a_rank_that_fails_takes_the_others_along(trains: Trains, tmp_path: Path, how: str) -> None:
    """None waits for ever, and rank 0 keeps what was done."""
    options = {"lora": True, "dropout": 0.3}
    first, second = trains("parts", fails=[1, 3, how], **options)
    path = tmp_path / "parts" / "rank0" / "step-000003.safetensors"
    assert first.code == 1
    assert first.said.splitlines()[-1] == (
        f"step 4: another of the machines has stopped; what it says is the reason; the last checkpoint is {path}"
    )
    assert second.code == (1 if how == "error" else -signal.SIGKILL)
    assert how == "kill" or second.said.splitlines()[-1] == "cat.jpg: cannot be decoded"
    if how == "error":  # and they go on as if nothing had happened, dropout included
        for name in ("parts", "whole"):
            assert [ended.code for ended in trains(name, **options)] == [0, 0]
        assert log(tmp_path / "parts" / "rank0") == log(tmp_path / "whole" / "rank0")
        expected = last(tmp_path / "whole")
        for name, array in last(tmp_path / "parts").items():
            assert mx.array_equal(array, expected[name]).item(), name


@pytest.mark.slow
def test_the_first_rank_fails(trains: Trains) -> None:
    first, second = trains("run", fails=[0, 2, "error"])
    assert (first.code, second.code) == (1, 1)
    assert "step 3: another of the machines has stopped" in second.said.splitlines()[-1]


@pytest.mark.slow
def test_no_number_at_one_rank_stops_all(trains: Trains, tmp_path: Path) -> None:
    first, second = trains("run", fails=[1, 2, "nan"])
    assert (first.code, second.code) == (1, 1)
    mine, other = (ended.said.splitlines()[-1] for ended in (first, second))
    assert mine.startswith("step 3: the loss is nan; use a lower --learning-rate")
    assert "data.jsonl: line " in mine and " and 5 more)" in mine
    assert mine.startswith(other)  # which knows of no checkpoint
    assert files(tmp_path / "run" / "rank0") == {"log.jsonl"}


@pytest.mark.slow
def test_all_stop_early_together(trains: Trains, tmp_path: Path) -> None:
    """Each has another loss on its part of the held-out rows; rank 0's counts."""
    ended = trains("run", config={"validate_every": 1, "patience": 2}, lora=True)
    assert [one.code for one in ended] == [0, 0]
    assert [json.loads(one.said.splitlines()[-1])["step"] for one in ended] == [3, 3]
    lines = [line for line in log(tmp_path / "run" / "rank0") if line["kind"] == "validation"]
    assert [(line["loss"], line["rank"]) for line in lines] == [(1.0, 0)] * 3


@pytest.mark.slow
def test_ranks_with_other_data_are_refused(trains: Trains) -> None:
    first, second = trains("run", data=["a", "b"])
    assert (first.code, second.code) == (1, 1)
    assert 'rank 1 is told to train something else than rank 0: data is "a" and not "b"' in second.said
    assert "another of the machines has stopped" in first.said.splitlines()[-1]


@pytest.mark.slow
def test_mlx_launch(folder: Path, tmp_path: Path) -> None:
    """The way in which users start it."""
    script = tmp_path / "trains.py"
    script.write_text(TRAINS)

    options = json.dumps({"lora": True})
    command = [Path(sys.executable).with_name("mlx.launch"), "-n", "2", "--backend", "ring"]
    command += ["--starting-port", str(free_ports(1)[0]), "--env", f"PYTHONPATH={HERE}", "--"]
    command += [sys.executable, script, folder, tmp_path / "run", options]
    process = subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.PIPE,  # it polls its input, which must not be at its end
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    try:
        process.wait(timeout=120)
        assert process.stderr is not None
        said = process.stderr.read()
    finally:
        process.kill()
        for pipe in (process.stdin, process.stderr):
            assert pipe is not None
            pipe.close()

    assert '"rank": 0, "step": 6' in said and '"rank": 1, "step": 6' in said
    assert len(losses(tmp_path / "run" / "rank0")) == 6
