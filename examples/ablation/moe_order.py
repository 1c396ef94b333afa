#!/usr/bin/env python3
"""Does the order of the stages matter? Dense first and experts later, against experts from the start, at equal steps.

    python examples/ablation/moe_order.py --out runs/moe-order --easy-vqa easy_vqa.tar.gz

All runs begin with one model: gm-tiny's own tower, a dense decoder that has learnt to answer questions about scenes in
words, and a projector that has learnt from labelled patches (`examples/train_gm_tiny`). From there a run has two
phases. All arms of a seed see the same rows in the same order and at the same rates; what they differ in is the table
``ARMS``. The command can be stopped and given again: it goes on where it was. It takes one CPU core.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # must precede the library's load

import gm_mlx  # isort: skip  # noqa: F401  # loads BLAS, which must happen before anything imports mlx

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from gm_mlx import cpu
from gm_mlx.config import MoEConfig
from gm_mlx.hub import find_model
from gm_mlx.model import Model
from gm_mlx.presets import PRESETS
from gm_mlx.processor import Processor
from gm_mlx.quant.report import markdown
from gm_mlx.train.data import Batch, Example, collate
from gm_mlx.train.loop import TrainConfig, train
from gm_mlx.train.losses import AnswerLoss
from gm_mlx.train.stages import select_stage, upcycle
from gm_mlx.weights import load_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train_gm_tiny"))

from easy_vqa import load_easy_vqa
from evaluate import exact_match
from phrasings import TRAINING_MIX
from pretrain import PatchWords, alignment_loss, select_decoder
from questions import Question, caption, questions_for
from scenes import Scene, patch_labels, render, sample_scene, scene_rng


class Arm(NamedTuple):
    """A way to train.

    Attributes:
        forms: of the feed-forward networks of every other layer in phases 1 and 2: "dense", or experts that begin as
            "copies" of the dense network or "random".
        learns: the stage whose parts learn in phases 1 and 2: 2 is projector and decoder, 3 is experts and routers.
    """

    forms: tuple[str, str]
    learns: tuple[int, int]


ARMS = {
    "dense, then experts": Arm(("dense", "copies"), (2, 3)),
    "experts from the start": Arm(("copies", "copies"), (2, 2)),
    "random experts from the start": Arm(("random", "random"), (2, 2)),
    "dense throughout": Arm(("dense", "dense"), (2, 2)),
}
SEEDS = (0, 1, 2)
BATCH = 12  # scenes of a step
TURNS = (4, 6)  # questions about each
OBJECTS = 2  # in a scene, at most
# What is answered by looking something up. To say yes or no, things must be compared, which takes more steps to learn.
KINDS = ("colour", "shape", "where", "at", "describe")
HELD_OUT = 600  # questions

PRETRAINING = {
    "decoder": TrainConfig(steps=400, learning_rate=1e-3, decay=0.4, keep=1),
    "projector": TrainConfig(steps=250, learning_rate=2e-3, keep=1),
}
# Of MoE-LLaVA's samples stage 2 has 964 thousand and stage 3 has 665 thousand.
PHASES = (
    TrainConfig(steps=150, learning_rate=1e-3, keep=1),
    TrainConfig(steps=100, learning_rate=5e-4, keep=1),
)

CONFIG = PRESETS["gm-tiny"]
MOE = CONFIG.text_config.moe or MoEConfig()
DENSE = dataclasses.replace(CONFIG, text_config=dataclasses.replace(CONFIG.text_config, moe=None))
MIX = {kind: TRAINING_MIX[kind] for kind in KINDS}


class Test(NamedTuple):
    """Images uint8 [64, 64, 3], and a question about each."""

    images: list[np.ndarray]
    questions: list[Question]


def draw(split: str, seed: int, index: int) -> tuple[Scene, list[Question]]:
    """A scene of few objects, and what is asked about it."""
    rng = scene_rng(split, seed, index)
    while True:
        scene = sample_scene(rng)
        if 1 <= len(scene.objects) <= OBJECTS and (asked := questions_for(scene, rng, rng.randint(*TURNS), MIX)):
            return scene, asked


def pixels(scene: Scene) -> np.ndarray:
    """What gm-tiny's processor makes of a scene: float32 [1, 64, 64, 3]."""
    return render(scene)[None].astype(np.float32) / 127.5 - 1


class Data:
    """Batches, each a function of its split, seed and number."""

    def __init__(self, processor: Processor) -> None:
        self.processor = processor

    def labelled(self, number: int, rank: int, ranks: int) -> tuple[mx.array, dict[str, mx.array]]:
        """Images with patch labels, for the projector."""
        scenes = [draw("labelled", 0, 2 * BATCH * number + row)[0] for row in range(2 * BATCH)]
        labels = [patch_labels(scene) for scene in scenes]
        stacked = {key: mx.array(np.stack([label[key] for label in labels])) for key in labels[0]}
        return mx.array(np.concatenate([pixels(scene) for scene in scenes])), stacked

    def described(self, number: int, rank: int, ranks: int) -> Batch:
        """Questions about scenes in words, for the decoder."""
        return self.batch("described", 0, number, with_images=False)

    def asked(self, seed: int, first: int, number: int, rank: int, ranks: int) -> Batch:
        """Scenes with questions; ``first`` is how many batches a run has had before."""
        return self.batch("asked", seed, first + number)

    def batch(self, split: str, seed: int, number: int, *, with_images: bool = True) -> Batch:
        """Conversations about scenes, which are shown or described."""
        examples = []
        for row in range(BATCH):
            scene, turns = draw(split, seed, BATCH * number + row)
            if not with_images:
                turns[0] = (f"the image shows {caption(scene)}.\n{turns[0][0]}", *turns[0][1:])
            messages = []
            for question, answer, _ in turns:
                messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            ids, learnt = self.processor.encode_supervised(messages, num_images=int(with_images))
            examples.append(Example(ids, learnt, pixels(scene) if with_images else None))
        return collate(examples, pad_id=self.processor.tokenizer.pad_id or 0)


def common_start(data: Data, out: Path) -> Model:
    """The dense model that all runs begin with."""
    mx.random.seed(0)
    model = Model(DENSE)
    model.vision_tower.update(load_model(find_model("gm-tiny")).vision_tower.parameters())
    model.vision_tower.set_dtype(mx.float32)
    cpu.speed_up(model)
    mx.eval(model.parameters())
    select_decoder(model)
    train(model, AnswerLoss(), data.described, PRETRAINING["decoder"], out / "decoder")
    select_stage(model, 1)
    words = PatchWords(data.processor.tokenizer)
    train(model, alignment_loss(words), data.labelled, PRETRAINING["projector"], out / "projector")
    return model


def in_form(model: Model, form: str, seed: int) -> Model:
    """A copy of a dense model, with its feed-forward networks in a form of ``Arm``."""
    copy = Model(DENSE)
    copy.update(model.parameters())
    if form == "dense":
        cpu.speed_up(copy)
        return copy
    sparse = upcycle(copy, MOE, seed=seed)
    if form == "random":
        mx.random.seed(seed)
        fresh = Model(CONFIG)
        for layer in CONFIG.text_config.sparse_layers:
            sparse.layers[layer].mlp.switch_mlp.update(fresh.layers[layer].mlp.switch_mlp.parameters())
    cpu.speed_up(sparse)
    mx.eval(sparse.parameters())
    return sparse


def run(name: str, seed: int, start: Model, data: Data, folder: Path) -> Model:
    """Both phases of an arm. Arms with the same first phase share it."""
    arm = ARMS[name]
    model = in_form(start, arm.forms[0], seed)
    select_stage(model, arm.learns[0])
    train(model, AnswerLoss(), partial(data.asked, seed, 0), PHASES[0], folder / f"{arm.forms[0]}, phase 1")
    if arm.forms[1] != arm.forms[0]:
        model = in_form(model, arm.forms[1], seed)
    select_stage(model, arm.learns[1])
    train(model, AnswerLoss(), partial(data.asked, seed, PHASES[0].steps), PHASES[1], folder / name)
    model.eval()
    return model


def held_out() -> Test:
    """Questions about scenes of which none was trained on."""
    scenes = [draw("heldout", 0, index) for index in range(HELD_OUT)]
    return Test([render(scene) for scene, _ in scenes], [asked[0] for _, asked in scenes])


def of_easy_vqa(source: Path, split: str | None) -> Test:
    """Test questions of easy-VQA that are not answered by yes or no, evenly spread."""
    easy = load_easy_vqa(source, split)
    rows = [row for row in easy.questions if row[1] not in ("yes", "no")]
    rows = rows[:: max(1, len(rows) // HELD_OUT)]
    return Test([easy.images[image] for *_, image in rows], [(question, answer, "") for question, answer, _ in rows])


def measure(model: Model, data: Data, tests: dict[str, Test]) -> dict[str, float]:
    """The loss per token of held-out answers, and exact match on each set of questions."""
    sums = np.zeros(2)
    for number in range(20):
        _, count, figures = AnswerLoss()(model, data.batch("heldout", 0, number))
        sums += np.array(mx.stack([figures["answers"], count]))
    shares = {name: exact_match(model, data.processor, *test)[0]["all"] for name, test in tests.items()}
    return {"held-out loss": float(sums[0] / sums[1])} | shares


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """The results by arm in Markdown: mean and standard deviation over seeds, and each seed's figure."""
    columns = list(next(iter(results.values()))[0])
    rows = [(name, [cell([one[key] for one in mine], key) for key in columns]) for name, mine in results.items()]
    return markdown(["", *columns], rows)


def cell(values: Iterable[float], key: str) -> str:
    values = list(values)
    form = "{:.3f}" if "loss" in key else "{:.1%}"
    spread = f" ± {form.format(stdev(values))}" if len(values) > 1 else ""
    return f"{form.format(mean(values))}{spread} ({', '.join(map(form.format, values))})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder; what it has of the runs is not done again")
    parser.add_argument("--easy-vqa", type=Path, required=True, help="easy_vqa.tar.gz or the folder in it")
    parser.add_argument("--split", default="test", help="test; '' when the folder is itself a split")
    arguments = parser.parse_args()
    data = Data(Processor.from_folder(find_model("gm-tiny")))
    tests = {"scenes": held_out(), "easy-VQA": of_easy_vqa(arguments.easy_vqa, arguments.split or None)}
    start = common_start(data, arguments.out)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    for seed in SEEDS:
        folder = arguments.out / f"seed {seed}"
        for name in ARMS:
            file = folder / f"{name}.json"
            if not file.exists():
                figures = measure(run(name, seed, start, data, folder), data, tests)
                file.write_text(json.dumps(figures) + "\n")
            results[name].append(json.loads(file.read_text()))
            print(f"seed {seed}, {name}: {file.read_text()}", end="", flush=True)
    print(f"\n{table(results)}", end="")


if __name__ == "__main__":
    main()
