#!/usr/bin/env python3
"""Train gm-tiny from nothing: two pretrainings, then the papers' three stages, then 4-bit experts.

    python examples/train_gm_tiny/train.py --easy-vqa easy_vqa.tar.gz --out runs/gm-tiny

MLX computes all but matrix products on one CPU core, so the work is shared by one process per core. A run that
was stopped goes on where it was. Every stage leaves ``log.jsonl`` in its folder; ``evaluate.py`` measures the result.
"""

from __future__ import annotations

import os

if "MLX_RANK" in os.environ:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the ranks share the cores; must precede the library's load

import gm_mlx  # isort: skip  # loads BLAS, which must happen before anything imports mlx

import argparse
import dataclasses
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from cache import SceneSet, cached_scenes
from easy_vqa import EasyVQA, load_easy_vqa
from phrasings import PHRASINGS
from pretrain import PatchLabeller, PatchWords, alignment_loss, patch_label_accuracy, patch_label_loss, select_decoder
from questions import as_typed
from tokenizer import main as write_tokenizer

from gm_mlx import _blas
from gm_mlx.chat_template import TEMPLATES
from gm_mlx.images import ImageConfig
from gm_mlx.model import Model
from gm_mlx.presets import PRESETS
from gm_mlx.processor import Processor
from gm_mlx.tokenizer import load_tokenizer
from gm_mlx.train.config import TrainConfig
from gm_mlx.train.data import Batch, Example, collate
from gm_mlx.train.events import Event
from gm_mlx.train.loop import train
from gm_mlx.train.losses import AnswerLoss
from gm_mlx.train.stages import select_stage, upcycle
from gm_mlx.train.step import Batches, Loss
from gm_mlx.weights import save_model

CONFIG = PRESETS["gm-tiny"]
IMAGE = ImageConfig(size=64, mode="pad", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
NUM_SCENES = 60_000
HOLD = 500  # scenes at the end of the set that only measure the tower

# Rows of stages 2 and 3: easy-VQA's pictures, scenes of several objects, and for the rest scenes as they come.
EASY_VQA_SHARE, CROWDED_SHARE = 0.1, 0.7

# Steps are of BATCH images over all ranks.
BATCH = 32
RECIPE = {
    "tower": TrainConfig(steps=2400, learning_rate=1e-3),
    "decoder": TrainConfig(steps=150, learning_rate=1e-3),
    "stage1": TrainConfig(steps=400, learning_rate=2e-3),
    "stage2": TrainConfig(steps=4000, learning_rate=1e-3, decay=0.4),
    "stage3": TrainConfig(steps=250, learning_rate=5e-4),
}


# Freed arrays stay with the process: on Linux, fresh pages for every array take as long as half of the arithmetic.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(8 << 30), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}


class Data:
    """Training rows drawn by step: batch number n is a function of n and nothing else."""

    def __init__(self, scenes: SceneSet, easy: EasyVQA, processor: Processor) -> None:
        self.scenes, self.easy, self.processor = scenes, easy, processor
        rng = random.Random(0)
        # There is more to learn where there are several objects: which of them is meant, and where they are.
        self.crowded = np.flatnonzero((scenes.labels["centre_shape"] > 0).sum(axis=1) > 1).tolist()
        self.asked: list[list[tuple[str, str]]] = [[] for _ in easy.images]
        for question, answer, image in easy.questions:
            self.asked[image].append((as_typed(question, rng), answer))

    def labelled(self, step: int, rank: int, ranks: int) -> tuple[mx.array, dict[str, mx.array]]:
        """Images with patch labels, for the tower."""
        rng = np.random.default_rng([1, step])
        rows = rng.integers(len(self.scenes.images) - HOLD, size=BATCH)[rank::ranks]
        return normalise(self.scenes.images[rows]), {k: mx.array(v[rows]) for k, v in self.scenes.labels.items()}

    def described(self, step: int, rank: int, ranks: int) -> Batch:
        """Questions about scenes in words, for the decoder."""
        return self._batch(2, step, rank, ranks, self._described)

    def questions(self, step: int, rank: int, ranks: int) -> Batch:
        """Images and conversations about them, for stages 2 and 3."""
        return self._batch(3, step, rank, ranks, self._asked)

    def _batch(self, salt: int, step: int, rank: int, ranks: int, draw: Callable[[random.Random], Example]) -> Batch:
        rows = [draw(random.Random(f"{salt}-{step}-{row}")) for row in range(rank, BATCH, ranks)]
        return collate(rows, pad_id=self.processor.tokenizer.pad_id or 0)

    def _example(self, turns: list[tuple[str, str]], image: np.ndarray | None) -> Example:
        messages = []
        for question, answer in turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids, learnt = self.processor.encode_supervised(messages, num_images=int(image is not None))
        return Example(ids, learnt, None if image is None else normalise_array(image[None]))

    def _turns(self, rng: random.Random, found: list, low: int, high: int) -> list[tuple[str, str]]:
        return [(q[0], q[1]) for q in rng.sample(found, min(len(found), rng.randint(low, high)))]

    def _described(self, rng: random.Random) -> Example:
        row = rng.randrange(len(self.scenes.images))
        turns = self._turns(rng, self.scenes.questions[row], 2, 5)
        turns[0] = (f"the image shows {self.scenes.captions[row]}.\n{turns[0][0]}", turns[0][1])
        return self._example(turns, None)

    def _asked(self, rng: random.Random) -> Example:
        source = rng.random()
        if source < EASY_VQA_SHARE:
            row = rng.randrange(len(self.easy.images))
            return self._example(self._turns(rng, self.asked[row], 3, 5), self.easy.images[row])
        crowded = source < EASY_VQA_SHARE + CROWDED_SHARE
        row = rng.choice(self.crowded) if crowded else rng.randrange(len(self.scenes.images))
        turns = self._turns(rng, self.scenes.questions[row], 3, 5)
        if rng.random() < 0.2:
            turns[0] = (rng.choice(PHRASINGS["describe"]), self.scenes.captions[row])
        return self._example(turns, self.scenes.images[row])


def normalise_array(images: np.ndarray) -> np.ndarray:
    """What the processor makes of 64 x 64 images, many at once: float32 [N, 64, 64, 3]."""
    scaled = images.astype(np.float32) * np.float32(1 / 255)
    return (scaled - np.float32(0.5)) / np.float32(0.5)


def normalise(images: np.ndarray) -> mx.array:
    return mx.array(normalise_array(images))


def build_processor(folder: Path) -> Processor:
    """Train the tokenizer and join it with Gemma's chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(str(folder))
    return Processor(
        tokenizer=load_tokenizer(folder, controls=TEMPLATES["gemma"].controls),
        template=TEMPLATES["gemma"],
        image=IMAGE,
        image_token_id=CONFIG.image_token_index,
        tokens_per_image=CONFIG.num_image_tokens,
    )


def run(out: Path, easy_vqa: Path, recipe: dict[str, TrainConfig], num_scenes: int) -> None:
    """All stages in their order; each is skipped when its folder says that it is done."""
    print(f"gm-mlx {gm_mlx.__version__}, BLAS: {_blas.status()}")
    mx.random.seed(0)
    group = mx.distributed.init()
    rank = group.rank()
    if rank == 0:
        cached_scenes(out / "data", num_scenes)  # the other ranks wait for the files below
    mx.eval(mx.distributed.all_sum(mx.array(1.0), group=group))
    processor = build_processor(out / f"processor{rank}")
    data = Data(cached_scenes(out / "data", num_scenes), load_easy_vqa(easy_vqa, "train"), processor)
    dense = dataclasses.replace(CONFIG, text_config=dataclasses.replace(CONFIG.text_config, moe=None))
    model = Model(dense)

    def learn(stage: str, learner: nn.Module, loss: Loss, batches: Batches) -> None:
        def watch(event: Event) -> None:
            if event.kind == "log":
                print(f"{stage}: {json.dumps({'step': event.step, **event.figures})}", flush=True)

        train(learner, loss, batches, recipe[stage], out / stage, watch=watch)

    labeller = PatchLabeller(model.vision_tower, CONFIG.vision_config.hidden_size)
    mx.eval(model.parameters(), labeller.parameters())
    learn("tower", labeller, patch_label_loss, data.labelled)
    held = {k: v[-HOLD:] for k, v in data.scenes.labels.items()}
    say(out, rank, "tower", patch_label_accuracy(labeller, normalise_array(data.scenes.images[-HOLD:]), held))

    select_decoder(model)
    learn("decoder", model, AnswerLoss(), data.described)
    select_stage(model, 1)
    learn("stage1", model, alignment_loss(PatchWords(processor.tokenizer)), data.labelled)
    select_stage(model, 2)
    learn("stage2", model, AnswerLoss(), data.questions)
    save(model, processor, out / "dense", rank)

    assert CONFIG.text_config.moe is not None
    model = upcycle(model, CONFIG.text_config.moe, seed=1)
    mx.eval(model.parameters())
    select_stage(model, 3)
    # Stage 3 sees rows that stage 2 did not.
    offset = recipe["stage2"].steps
    learn("stage3", model, AnswerLoss(), lambda n, r, s: data.questions(n + offset, r, s))
    save(model, processor, out / "sparse", rank)


def launch(workers: int) -> int:
    """Run this command once per worker, joined by MLX's ring backend over the loopback interface."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(workers)]
    hosts = [[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets]
    for s in sockets:
        s.close()
    with tempfile.TemporaryDirectory() as folder:
        hostfile = Path(folder) / "hosts.json"
        hostfile.write_text(json.dumps(hosts))
        processes = [
            subprocess.Popen(
                [sys.executable, *sys.argv],
                env={**os.environ, **KEEP_MEMORY, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)},
            )
            for rank in range(workers)
        ]
        try:
            while all(process.poll() is None for process in processes):
                time.sleep(0.2)
            # A worker that failed leaves the others waiting for it.
            if any(process.poll() for process in processes):
                return 1
            return max(process.wait() for process in processes)
        finally:
            for process in processes:
                process.terminate()


def save(model: Model, processor: Processor, folder: Path, rank: int) -> None:
    if rank == 0:
        save_model(model, folder, processor)


def say(out: Path, rank: int, stage: str, figures: dict[str, float]) -> None:
    if rank == 0:
        line = json.dumps({k: round(v, 4) for k, v in figures.items()})
        print(f"{stage}: {line}", flush=True)
        (out / stage / "result.json").write_text(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--easy-vqa", type=Path, required=True, help="easy_vqa.tar.gz or the folder in it")
    parser.add_argument("--out", type=Path, required=True, help="a folder; a run that it holds is continued")
    parser.add_argument("--scenes", type=int, default=NUM_SCENES, help="generated training scenes")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all steps, for a quick try")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that share the work")
    arguments = parser.parse_args()
    if arguments.workers > 1 and "MLX_RANK" not in os.environ:
        sys.exit(launch(arguments.workers))
    recipe = {
        name: dataclasses.replace(config, steps=max(2, round(config.steps * arguments.scale)))
        for name, config in RECIPE.items()
    }
    run(arguments.out, arguments.easy_vqa, recipe, arguments.scenes)


if __name__ == "__main__":
    main()
