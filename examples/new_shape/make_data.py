"""Pictures of a shape that gm-tiny has never seen, with questions: training data in LLaVA's format.

    python examples/new_shape/make_data.py hearts

writes ``hearts/train.jsonl`` and its images, to learn from, and ``hearts/test.jsonl`` with images of its own. Half of
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

SHAPE = "heart"
SPELLINGS = {"a": f"a {SHAPE}", "no": SHAPE}  # the slots of a question whether there is one
OBJECTS = 2  # at most, in a scene
TRAIN, TEST = 2400, 250  # rows
TURNS = 5  # questions of a training row
NAMED = 3  # of them, at most, that ask for a heart where there is one
SMALLEST = 16.0  # pixels across, as for gm-tiny's stars and crosses


class Heart(Object):
    """An object with another outline."""

    def outline(self) -> list[tuple[float, float]]:
        """Corner points in image pixels."""
        turn = math.radians(self.angle)
        cos, sin = math.cos(turn), math.sin(turn)
        points = [(u * self.width, v * self.height) for u, v in HEART]
        return [(self.x + u * cos - v * sin, self.y + u * sin + v * cos) for u, v in points]


def _heart(corners: int = 48) -> list[tuple[float, float]]:
    """The well-known curve in sines and cosines, in a box from -0.5 to 0.5."""
    turns = [2 * math.pi * corner / corners for corner in range(corners)]
    xs = [16 * math.sin(t) ** 3 for t in turns]
    ys = [-13 * math.cos(t) + 5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t) for t in turns]
    return [(x / 32, (y - (max(ys) + min(ys)) / 2) / (max(ys) - min(ys))) for x, y in zip(xs, ys, strict=True)]


HEART = _heart()


def old_scene(rng: random.Random) -> Scene:
    """One of gm-tiny's own scenes with few objects."""
    while not 1 <= len((scene := sample_scene(rng)).objects) <= OBJECTS:
        pass
    return scene


def new_scene(rng: random.Random) -> Scene:
    """The same with a heart in the place of an object that is large enough."""
    while True:
        scene = old_scene(rng)
        index = rng.randrange(len(scene.objects))
        old = scene.objects[index]
        size = min(old.width, old.height)
        if size < SMALLEST:
            continue
        heart = Heart(**{**dataclasses.asdict(old), "shape": SHAPE, "width": size, "height": size})
        objects = (*scene.objects[:index], heart, *scene.objects[index + 1 :])
        return dataclasses.replace(scene, objects=objects)


def training_row(index: int) -> tuple[Scene, list[Question]]:
    """Every other row has a heart, and questions whose answers name it come first to mind there."""
    rng = scene_rng("new shape", 0, index)
    has_heart = index % 2 == 0
    scene = (new_scene if has_heart else old_scene)(rng)
    found = naming(scene, rng)[:NAMED] if has_heart else []
    if rng.random() < 0.5:
        form, answers = rng.choice((("present", ("no", "yes")), ("absent", ("yes", "no"))))
        found.append((rng.choice(PHRASINGS[form]).format(**SPELLINGS), answers[has_heart], form))
    found += questions_for(scene, rng, TURNS - len(found))
    rng.shuffle(found)
    unlike = {question: (as_typed(question, rng), answer, kind) for question, answer, kind in found}
    return scene, list(unlike.values())


def naming(scene: Scene, rng: random.Random) -> list[Question]:
    """Questions whose answer is or names the new shape."""
    return [question for question in questions_for(scene, rng, 8, NAMING) if SHAPE in question[1]]


def test_row(index: int) -> tuple[Scene, list[Question]]:
    """A heart, and one question whose answer names it."""
    rng = scene_rng("new shape, held out", 0, index)
    while True:
        scene = new_scene(rng)
        if found := naming(scene, rng):
            return scene, found[:1]


NAMING = {kind: TRAINING_MIX[kind] for kind in ("shape", "at", "next", "describe")}
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
        turns = []
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
