#!/usr/bin/env python3
"""Teach gm-tiny a shape that it has never seen, and measure what it learnt and what it forgot.

    python examples/new_shape/run.py --out runs/ring --easy-vqa easy_vqa.tar.gz

The commands that it runs are printed, and are what a user would type: `gm-mlx lora` on 4-bit experts, `gm-mlx fuse`
with and without packing again, and `gm-mlx convert` for llama.cpp. Every form of the model is then asked about rings
in pictures of their own, and easy-VQA's questions about the old shapes. An answer counts when it is right to the
letter.
"""

from __future__ import annotations

import gm_mlx  # isort: skip  # noqa: F401  # loads BLAS, which must happen before anything imports mlx

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from gm_mlx import load
from gm_mlx.hub import BUILT_IN_GGUF, built_in, find_model
from gm_mlx.lora.folder import load_adapter
from gm_mlx.processor import Processor
from gm_mlx.quant.report import markdown, share
from gm_mlx.train.answers import greedy_answers
from gm_mlx.weights import load_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train_gm_tiny"))

from easy_vqa import load_easy_vqa
from make_data import write_data

BASE = "gm-tiny"
BASE_GGUF = built_in(BUILT_IN_GGUF) / "model.gguf"
# llama.cpp has LoRA for the decoder and for nothing else, so the adapter is on the decoder and on nothing else.
TARGETS = ("attention", "dense_ffn", "experts")
SETTINGS = ["--rank", "16", "--learning-rate", "2.5e-3", "--steps", "600", "--batch-size", "8", "--hold-out", "0"]


class Asked(NamedTuple):
    """A question about an image, and the right answer."""

    image: Image.Image
    question: str
    answer: str


class Form(NamedTuple):
    """A form of the model: a folder, or a file for llama.cpp, and an adapter beside it."""

    model: Path
    adapter: Path | None = None


def learn(data: Path, out: Path) -> float:
    """Train the adapter; returns the seconds that the command took."""
    targets = [word for target in TARGETS for word in ("--target", target)]
    return command("lora", "--model", BASE, "--data", data, "-o", out, *targets, *SETTINGS)


def make_forms(out: Path) -> dict[str, Form]:
    """All forms of the model with the adapter in ``out``, the model without it first."""
    adapter, packed, floats, file = (out / name for name in ("ring", "fused", "fused-floats", "ring.gguf"))
    command("fuse", BASE, adapter, "-o", packed)
    command("fuse", BASE, adapter, "-o", floats, "--dequantize")
    command("convert", adapter, "--to", "gguf-lora", "--base", BASE_GGUF, "-o", file)
    base = find_model(BASE)
    return {
        "without the adapter": Form(base),
        "with the adapter": Form(base, adapter),
        "fused": Form(packed),
        "fused, --dequantize": Form(floats),
        "llama.cpp, --lora": Form(BASE_GGUF, file),
    }


def command(*arguments: str | Path) -> float:
    """Run ``gm-mlx`` as a user would; returns the seconds that it took."""
    words = [str(argument) for argument in arguments]
    print(f"$ gm-mlx {' '.join(words)}", flush=True)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "gm_mlx.cli.main", *words], check=True)
    return time.perf_counter() - began


def answers(form: Form, asked: Sequence[Asked]) -> list[str]:
    """What a form of the model answers, each question in a conversation of its own."""
    if form.model.suffix == ".gguf":
        engine = load(str(form.model), lora=[(str(form.adapter), 1.0)] if form.adapter else None)
        try:
            return [str(engine.chat(one.question, [one.image])) for one in asked]
        finally:
            engine.close()
    model, processor = load_model(form.model), Processor.from_folder(form.model)
    if form.adapter:
        load_adapter(model, form.adapter)
    model.eval()
    pixels = processor.pixels([one.image for one in asked])
    return greedy_answers(model, processor, [one.question for one in asked], list(pixels))


def new_shapes(data: Path) -> list[Asked]:
    """The test rows of ``make_data.py``."""
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    turns = [[turn["value"].removeprefix("<image>\n") for turn in row["conversations"]] for row in rows]
    return [
        Asked(Image.open(data / row["image"]), question, answer)
        for row, (question, answer) in zip(rows, turns, strict=True)
    ]


def old_shapes(source: Path, split: str | None, limit: int | None) -> list[Asked]:
    """Test questions of easy-VQA, all or so many, evenly spread."""
    easy = load_easy_vqa(source, split)
    rows = easy.questions[:: max(1, len(easy.questions) // (limit or len(easy.questions)))]
    return [Asked(Image.fromarray(easy.images[image]), question, answer) for question, answer, image in rows]


def share_of_same(given: Sequence[str], others: Sequence[str]) -> float:
    """How many answers are the same to the letter."""
    return sum(one == other for one, other in zip(given, others, strict=True)) / len(given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the data, the adapter and the models")
    parser.add_argument("--easy-vqa", type=Path, required=True, help="easy_vqa.tar.gz or the folder in it")
    parser.add_argument("--split", default="test", help="test; '' when the folder is itself a split")
    parser.add_argument("--limit", type=int, help="so many of easy-VQA's questions, evenly spread; all by default")
    arguments = parser.parse_args()
    write_data(arguments.out / "data")
    seconds = learn(arguments.out / "data" / "train.jsonl", arguments.out / "ring")
    forms = make_forms(arguments.out)
    new = new_shapes(arguments.out / "data")
    old = old_shapes(arguments.easy_vqa, arguments.split or None, arguments.limit)
    print(f"\n`gm-mlx lora` took {seconds:.0f} s. {len(new)} questions about rings, {len(old)} of easy-VQA.\n")
    asked = [*new, *old]
    given = {name: answers(form, asked) for name, form in forms.items()}
    right = [one.answer for one in asked]
    rows = []
    for name, mine in given.items():
        figures = [(mine[: len(new)], right[: len(new)]), (mine[len(new) :], right[len(new) :])]
        figures.append((mine, given["with the adapter"]))
        rows.append((name, [share(share_of_same(*pair)) for pair in figures]))
    print(markdown(["", "rings", "easy-VQA", "as with the adapter"], rows), end="")


if __name__ == "__main__":
    main()
