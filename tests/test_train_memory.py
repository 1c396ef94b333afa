"""The memory of a step: what is estimated against what is measured, and what the commands say of it."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from fixtures import tiny_config, tiny_folder, tiny_model
from lora_models import model_of
from training_data import images_in, llava, write_lines

from gm_mlx import cpu
from gm_mlx.bench.child import peak_memory
from gm_mlx.cli.main import main
from gm_mlx.config import ModelConfig, MoEConfig
from gm_mlx.footprint import RUNTIME_BYTES
from gm_mlx.lora.attach import add_lora
from gm_mlx.lora.config import LoRAConfig
from gm_mlx.model import Model
from gm_mlx.presets import PRESETS
from gm_mlx.processor import Processor
from gm_mlx.train.config import TrainConfig
from gm_mlx.train.data import Batch
from gm_mlx.train.loop import train
from gm_mlx.train.losses import AnswerLoss
from gm_mlx.train.memory import DORA, DROPOUT, STOCK, Demand, savings, training_bytes
from gm_mlx.train.prepare import Prepared, prepare
from gm_mlx.train.stages import select
from gm_mlx.weights import apply_quantization, load_model, named_arrays

TWO_B = PRESETS["llava-gm-2b"]
STEP: dict[str, Any] = {"rows": 2, "length": 640, "checkpoint": False, "learnt": 32}


def estimate(config: ModelConfig = TWO_B, weights: int = 3 << 30, trained: int = 20_000_000, **changes: Any) -> int:
    return training_bytes(config, weights, trained, **{**STEP, **changes})


# --- the estimate ---


def test_more_of_anything_takes_more() -> None:
    base = estimate()
    for changes in ({"rows": 3}, {"length": 672}, {"trained": 21_000_000}, {"weights": 4 << 30}, {"tower": True}):
        assert estimate(**changes) > base, changes
    for kept in (STOCK, DROPOUT, DORA):
        assert estimate(kept=kept) > base
    assert estimate(kept=STOCK, number=2) < estimate(kept=STOCK)
    deeper = replace(TWO_B, text_config=replace(TWO_B.text_config, num_hidden_layers=20))
    assert estimate(deeper) > base
    assert estimate(replace(TWO_B, text_config=replace(TWO_B.text_config, moe=None))) < base


def test_checkpointing_leaves_one_hidden_state_of_a_layer() -> None:
    """A second pair of layers costs its hidden states alone, and without checkpointing what it keeps."""
    texts = [replace(TWO_B.text_config, num_hidden_layers=layers) for layers in (2, 4)]
    few, more = (replace(TWO_B, text_config=text) for text in texts)
    assert estimate(more, checkpoint=True) - estimate(few, checkpoint=True) == 2 * 2 * 640 * 2048 * 4
    # hidden 7, queries 4, keys 3; up and gate of one dense network and of two experts
    kept = 2 * (7 * 2048 + 4 * 8 * 256 + 3 * 256) + 2 * 16384 + 2 * 2 * 16384
    assert estimate(more) - estimate(few) == 2 * 640 * kept * 4
    assert estimate(checkpoint=True) < estimate() - (3 << 30)


def test_logits_count_where_much_is_learnt() -> None:
    """At a piece of them it ends."""
    short = {"rows": 1, "length": 64, "checkpoint": True}
    text = replace(TWO_B.text_config, num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=1)
    tiny = replace(TWO_B, text_config=text, vision_config=PRESETS["gm-tiny"].vision_config)
    few, piece, all_of_them = (estimate(tiny, **{**short, "rows": 4, "learnt": n}) for n in (1, 64, 256))
    assert few < piece < few + 4 * 64 * 256_064 * 4
    assert all_of_them <= piece + 4 * 256_064 * 4 * 2


# --- against what MLX and the system count ---

LENGTH, ROWS, LEARNT, RANK = 128, 4, 16, 4


def small(layers: int, moe: bool, **text: Any) -> ModelConfig:
    """Wide enough for activations to be what counts."""
    shape = {"hidden_size": 128, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": layers, **text}
    config = tiny_config(moe=MoEConfig() if moe else None)
    return replace(config, text_config=replace(config.text_config, **shape, num_key_value_heads=2))


def step(model: Model, folder: Path, checkpoint: bool, rows: int = ROWS, length: int = LENGTH) -> None:
    """One step of training."""
    config = model.config
    ids = np.random.default_rng(0).integers(10, 300, (rows, length), dtype=np.int32)
    ids[:, 4 : 4 + config.num_image_tokens] = config.image_token_index
    learnt = np.zeros(ids.shape, bool)
    learnt[:, -LEARNT:] = True
    size = config.vision_config.image_size
    batch = Batch(ids, learnt, np.ones_like(learnt), mx.random.normal((rows, size, size, 3)))
    plan = TrainConfig(steps=1, learning_rate=1e-4, checkpoint=checkpoint)
    train(model, AnswerLoss(), lambda number, rank, ranks: batch, plan, folder)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("layers", [2, 8])
def test_layers_of_mlx(
    layers: int, moe: bool, checkpoint: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where nothing is evaluated before its time. What MLX counts is exact."""
    for module in ("lora.layers", "train.checkpointing"):
        monkeypatch.setattr(f"gm_mlx.{module}.runs_on_cpu", lambda: False)
    model = tiny_model(config=small(layers, moe))
    trained = sum(one.parameters for one in add_lora(model, LoRAConfig(rank=RANK)))
    mx.eval(model.parameters())
    mx.clear_cache()
    before = mx.get_active_memory() - 4 * trained
    step(model, tmp_path, checkpoint)
    measured = mx.get_peak_memory() - before
    shape = {"rows": ROWS, "length": LENGTH, "learnt": ROWS * LEARNT, "checkpoint": checkpoint}
    found = training_bytes(model.config, 0, trained, **shape, kept=STOCK) - RUNTIME_BYTES
    assert 0.85 < found / measured < 1.3, (found, measured)


CHILD = """
import json, sys
import gm_mlx
import test_train_memory as here
print(json.dumps(here.resident(*json.loads(sys.argv[1]))))
"""
WIDE = {"intermediate_size": 4096, "hidden_size": 512, "head_dim": 256}


def resident(checkpoint: bool) -> tuple[int, int]:
    """Of this process, by how much memory grew at most in a step of layers of gm_mlx.cpu; and the estimate of it."""
    model = tiny_model(config=small(4, True, **WIDE))
    apply_quantization(model, {"group_size": 32, "bits": 4})
    mx.eval(model.parameters())
    cpu.speed_up(model)
    status, references = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    ctypes.CDLL(None).malloc_trim(0)  # what making the model left behind would be used again, and not be seen
    references.write_text("5")  # the peak is forgotten
    before = 1024 * int(status.read_text().split("VmRSS:")[1].split()[0])
    trained = sum(one.parameters for one in add_lora(model, LoRAConfig(rank=RANK)))
    with tempfile.TemporaryDirectory() as folder:
        step(model, Path(folder), checkpoint, rows=8)
    peak = peak_memory()
    shape = {"rows": 8, "length": LENGTH, "learnt": 8 * LEARNT, "checkpoint": checkpoint}
    return peak - before, training_bytes(model.config, 0, trained, **shape) - RUNTIME_BYTES


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("checkpoint", [False, True])
def test_layers_of_numpy(checkpoint: bool) -> None:
    command = [sys.executable, "-c", CHILD, json.dumps([checkpoint])]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured, found = json.loads(done.stdout.splitlines()[-1])
    assert 0.8 < found / measured < 1.8, (found, measured)  # of so little, much is malloc's


# --- of a run ---


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "tiny", model=model_of())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Rows of which the last is far longer than the others."""
    images_in(tmp_path / "photos", 4)
    records = [
        llava("<image>what is this?", "a dog " * (60 if n == 11 else 1), image=f"{n % 4}.png") for n in range(12)
    ]
    return write_lines(tmp_path / "photos" / "data.jsonl", records)


@pytest.fixture
def prepared(base: Path, data: Path) -> Prepared:
    return prepare([data], Processor.from_folder(base), max_length=256)


CONFIG = TrainConfig(steps=2, learning_rate=1e-3)


def test_what_a_run_asks_for(base: Path, prepared: Prepared) -> None:
    model = load_model(base)
    whole = sum(array.nbytes for array in named_arrays(model).values())
    trained = sum(one.parameters for one in add_lora(model, LoRAConfig(rank=2)))
    demand = Demand.of(model, prepared.train, CONFIG, 8)
    assert (demand.weights_bytes, demand.trained) == (whole, trained)
    assert (demand.rows, demand.images, demand.kept, demand.tower, demand.number) == (8, 8, None, False, 4)
    longest = int(prepared.train.lengths.max())
    assert longest <= demand.length < longest + 32 and demand.length % 32 == 0
    assert demand.learnt == 8 * int(prepared.train.answer_lengths.max())
    assert Demand.of(model, prepared.train, replace(CONFIG, accumulate=3), 8).rows == 3
    assert Demand.of(model, prepared.train, replace(CONFIG, accumulate=2), 8, ranks=2).rows == 2
    assert Demand.of(model, prepared.train, CONFIG, 100).rows == 12  # there are no more
    half = Demand.of(model, prepared.train, replace(CONFIG, precision="bfloat16"), 8)
    assert half.weights_bytes == whole + whole // 2  # with the copies that it computes with


@pytest.mark.parametrize(("more", "kept"), [({"dropout": 0.1}, DROPOUT), ({"dora": True}, DORA)])
def test_lora_that_numpy_does_not_compute(base: Path, prepared: Prepared, more: dict[str, Any], kept: Any) -> None:
    model = load_model(base)
    add_lora(model, LoRAConfig(rank=2, **more))
    assert Demand.of(model, prepared.train, CONFIG, 8).kept is kept


def test_parts_that_learn_whole(base: Path, prepared: Prepared) -> None:
    """They count once: in float32 they are their own masters."""
    model = load_model(base)
    whole = sum(array.nbytes for array in named_arrays(model).values())
    trained = sum(select(model, ["projector", "tower"]).values())
    demand = Demand.of(model, prepared.train, CONFIG, 8)
    assert demand.weights_bytes == whole - 4 * trained and demand.trained == trained and demand.tower


def test_what_would_take_less(base: Path, prepared: Prepared) -> None:
    """Each way as it would be, the best one first; none that changes nothing."""
    model = load_model(base)
    add_lora(model, LoRAConfig(rank=2))
    demand = replace(Demand.of(model, prepared.train, CONFIG, 8), rows=800, learnt=8000, weights_bytes=1 << 32)
    ways, together = savings(demand, model, prepared.train, CONFIG)
    bytes_of = dict(ways)
    median = int(np.median(prepared.train.lengths))
    four_bits = "a model in 4 bits (gm-mlx quantize)"
    assert list(bytes_of.values()) == sorted(bytes_of.values()) and together < min(bytes_of.values())
    assert bytes_of.keys() == {"--grad-checkpoint", "--accumulate 800", f"--max-length {median}", four_bits}
    assert bytes_of["--grad-checkpoint"] == replace(demand, checkpoint=True).bytes
    assert bytes_of["--accumulate 800"] == replace(demand, rows=1, learnt=10, images=1).bytes

    apply_quantization(model := load_model(base), {"group_size": 32, "bits": 4})
    ways, _ = savings(replace(demand, rows=1, checkpoint=True), model, prepared.train, CONFIG)
    assert four_bits not in dict(ways) and "--grad-checkpoint" not in dict(ways)


# --- in the commands ---


@pytest.mark.parametrize("command", ["lora", "train"])
def test_what_the_commands_say(
    command: str,
    base: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """How much it is, always; and a warning where it is too much, which stops nobody."""
    monkeypatch.setattr("gm_mlx.cli.training._draw", lambda run: None)
    stage = ["--stage", "2"] if command == "train" else []
    words = [command, *stage, "--model", str(base), "--data", str(data), "--steps", "1", "--workers", "0", "--json"]
    words += ["--batch-size", "4", "--accumulate", "1", "--hold-out", "0"]
    capsys.readouterr()
    assert main([*words, "-o", str(tmp_path / "a")]) == 0
    said = capsys.readouterr()
    facts = json.loads(said.out)["memory"]
    assert RUNTIME_BYTES < facts["step_bytes"] < 2 * RUNTIME_BYTES and facts["usable_bytes"] > 1 << 30
    assert f"memory: about {facts['step_bytes'] / 2**20:.0f} MB for a step" in said.err.splitlines()
    assert "warning" not in said.err

    monkeypatch.setattr("gm_mlx.cli.training_facts.usable_memory", lambda: 200 << 20)
    assert main([*words, "-o", str(tmp_path / "b")]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["memory"] == {**facts, "usable_bytes": 200 << 20}
    (line,) = [line for line in said.err.splitlines() if line.startswith("warning: ")]
    assert line.startswith("warning: this machine has 200 MB; it takes less with ")
