"""Pictures of a shape that gm-tiny has never seen, with questions: training data in LLaVA's format.

    python examples/new_shape/make_data.py rings

writes ``rings/train.jsonl`` and its images, to learn from, and ``rings/test.jsonl`` with images of its own. Half of
the training rows are scenes of gm-tiny's old shapes: what is not rehearsed is forgotten.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train_gm_tiny"))

from phrasings import PHRASINGS, TRAINING_MIX
from questions import Question, as_typed, questions_for
from scenes import Object, Scene, render, sample_scene, scene_rng

SHAPE = "ring"
SPELLINGS = {"a": f"a {SHAPE}", "no": SHAPE}  # the slots of a question whether there is one
OBJECTS = 2  # at most, in a scene
TRAIN, TEST = 2400, 250  # rows
TURNS = 5  # questions of a training row
NAMED = 3  # of them, at most, that are answered with shapes: with a ring where there is one
SMALLEST = 20.0  # pixels across: in less, the tower does not see the hole
HOLE = 0.56  # of the width
CORNERS = 48


class Ring(Object):
    """An object with an outline of its own: once around outside, and back inside."""

    def outline(self) -> list[tuple[float, float]]:
        """Corner points in image pixels."""
        turns = [2 * math.pi * corner / CORNERS for corner in range(CORNERS + 1)]
        around = [(math.cos(turn), math.sin(turn)) for turn in turns]
        points = [(x / 2, y / 2) for x, y in around] + [(x * HOLE / 2, y * HOLE / 2) for x, y in reversed(around)]
        return [(self.x + x * self.width, self.y + y * self.height) for x, y in points]


def old_scene(rng: random.Random) -> Scene:
    """One of gm-tiny's own scenes with few objects."""
    while not 1 <= len((scene := sample_scene(rng)).objects) <= OBJECTS:
        pass
    return scene


def new_scene(rng: random.Random) -> Scene:
    """The same with a ring in the place of an object that is large enough."""
    while True:
        scene = old_scene(rng)
        index = rng.randrange(len(scene.objects))
        old = scene.objects[index]
        size = min(old.width, old.height)
        if size < SMALLEST:
            continue
        ring = Ring(**{**dataclasses.asdict(old), "shape": SHAPE, "width": size, "height": size})
        objects = (*scene.objects[:index], ring, *scene.objects[index + 1 :])
        return dataclasses.replace(scene, objects=objects)


def training_row(index: int) -> tuple[Scene, list[Question]]:
    """A scene with some questions about what shapes there are, and some of any kind; every other scene has a ring."""
    rng = scene_rng("new shape", 0, index)
    has_ring = index % 2 == 0
    scene = (new_scene if has_ring else old_scene)(rng)
    found = naming(scene, rng, SHAPE if has_ring else "")[:NAMED]
    if rng.random() < 0.5:
        form, answers = rng.choice((("present", ("no", "yes")), ("absent", ("yes", "no"))))
        found.append((rng.choice(PHRASINGS[form]).format(**SPELLINGS), answers[has_ring], form))
    found += questions_for(scene, rng, TURNS - len(found))
    rng.shuffle(found)
    unlike = {question: (as_typed(question, rng), answer, kind) for question, answer, kind in found}
    return scene, list(unlike.values())


def naming(scene: Scene, rng: random.Random, word: str) -> list[Question]:
    """Questions that are answered with shapes, this one among them."""
    return [question for question in questions_for(scene, rng, 8, NAMING) if word in question[1]]


def test_row(index: int) -> tuple[Scene, list[Question]]:
    """A ring, and one question whose answer names it."""
    rng = scene_rng("new shape, held out", 0, index)
    while True:
        scene = new_scene(rng)
        if found := naming(scene, rng, SHAPE):
            return scene, found[:1]


NAMING = {kind: TRAINING_MIX[kind] for kind in ("shape", "at")}
PARTS = {"train": (training_row, TRAIN), "test": (test_row, TEST)}


def write_part(folder: Path, name: str) -> None:
    """Write the images and the rows of a part."""
    make, count = PARTS[name]
    images = folder / f"{name}-images"
    images.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        scene, asked = make(index)
        Image.fromarray(render(scene)).save(images / f"{index}.png")
        turns: list[dict[str, str]] = []
        for question, answer, _ in asked:
            image = "" if turns else "<image>\n"
            turns += [{"from": "human", "value": image + question}, {"from": "gpt", "value": answer}]
        rows.append({"id": f"{name}-{index}", "image": f"{images.name}/{index}.png", "conversations": turns})
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_data(folder: Path) -> None:
    """Write both parts."""
    for name in PARTS:
        write_part(folder, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    write_data(folder)
    print(f"{folder}: {TRAIN} rows to learn from, {TEST} to be asked")


if __name__ == "__main__":
    main()
