"""Runs of the training loop on tiny models, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from fixtures import picture, tiny_folder
from mlx.utils import tree_flatten

from gm_mlx.processor import Processor
from gm_mlx.train.config import TrainConfig
from gm_mlx.train.data import Batch, Example, collate
from gm_mlx.train.events import Event, Finished
from gm_mlx.train.loop import train
from gm_mlx.train.losses import AnswerLoss
from gm_mlx.train.step import Batches

TIME = ("seconds", "tokens_per_second", "peak_memory_bytes")  # what two equal runs may differ in
LOSS = AnswerLoss()


def reader(folder: Path) -> Processor:
    """A processor for ``tiny_model``."""
    return Processor.from_folder(tiny_folder(folder))


def conversations(processor: Processor, rows: int, seed: int = 0) -> list[Example]:
    """Questions of several lengths about pictures, with one answer."""
    random = np.random.default_rng(seed)
    examples = []
    for row in range(rows):
        question = " ".join(random.choice(["what", "is", "this", "red", "circle"], size=3 + row % 3))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "a red circle"}]
        ids, learnt = processor.encode_supervised(messages, num_images=1)
        examples.append(Example(ids, learnt, processor.pixels([picture(seed + row)])))
    return examples


def batches(processor: Processor, rows: int = 4, parts: int = 1) -> Batches:
    """The batch of a number, and the share of it that a rank gets; a step's rows do not depend on ``parts``."""

    def batch(number: int, rank: int, ranks: int) -> Batch:
        step, part = divmod(number, parts)
        return collate(conversations(processor, rows, seed=step)[part * ranks + rank :: parts * ranks], pad_id=0)

    return batch


def run(
    model: nn.Module, data: Batches, config: TrainConfig, folder: Path, **more: Any
) -> tuple[Finished, list[Event]]:
    """Train with the answers' loss; returns the end and all events."""
    events: list[Event] = []
    options = {"describe": LOSS.describe, "watch": events.append, **more}
    return train(model, options.pop("loss", LOSS), data, config, folder, **options), events


def log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a log, without times."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIME} for line in lines]


def losses(folder: Path) -> list[float]:
    """The losses of a log."""
    return [line["loss"] for line in log(folder) if line["kind"] == "log"]


def files(folder: Path) -> set[str]:
    """All that a run has left."""
    return {path.name for path in folder.iterdir()}


def weights(model: nn.Module) -> dict[str, np.ndarray]:
    """All weights, in float32 where they are floats."""
    found = {}
    for name, array in tree_flatten(model.parameters()):
        found[name] = np.array(array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array)
    return found


def assert_same(mine: nn.Module, other: nn.Module) -> None:
    """All weights are equal, to the last bit."""
    expected = weights(other)
    for name, array in weights(mine).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
