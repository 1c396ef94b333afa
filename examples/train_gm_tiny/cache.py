"""Generated training scenes on disk, made once by a few processes and made anew when the generator changes.

python examples/train_gm_tiny/cache.py FOLDER [COUNT]
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from questions import Question, as_typed, caption, questions_for
from scenes import LABELS, patch_labels, render, sample_scene, scene_rng

SOURCES = ("scenes.py", "phrasings.py", "questions.py", "cache.py")
CHUNK = 500  # scenes per task of a worker


@dataclass(frozen=True)
class SceneSet:
    """N generated scenes.

    Attributes:
        images: uint8 ``[N, 64, 64, 3]``.
        labels: the arrays of `scenes.patch_labels`, each uint8 ``[N, 64]``.
        captions: one per scene.
        questions: per scene its ``(question, answer, kind)``, the question as `questions.as_typed` leaves it.
    """

    images: NDArray[np.uint8]
    labels: dict[str, NDArray[np.uint8]]
    captions: list[str]
    questions: list[list[Question]]


def cached_scenes(folder: Path, count: int, seed: int = 0, per_scene: int = 12, workers: int = 2) -> SceneSet:
    """Read ``count`` training scenes from ``folder``, generating them first if they are not there.

    The file names carry a hash of the generator's source and of all arguments that matter.

    Args:
        folder: created when missing; about 12.5 kB per scene.
        count: number of scenes.
        seed: of the training split, which shares no scene with the held-out one.
        per_scene: questions per scene, fewer where a scene offers fewer.
        workers: processes; the result does not depend on it.
    """
    stem = folder / f"scenes-{_key(count, seed, per_scene)}"
    arrays, texts = stem.with_suffix(".npz"), stem.with_suffix(".jsonl")
    if not (arrays.exists() and texts.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        _write(arrays, texts, generate(count, seed, per_scene, workers))
    with np.load(arrays) as stored:
        images, labels = stored["images"], {key: stored[key] for key in LABELS}
    lines = [json.loads(line) for line in texts.read_text().splitlines()]
    questions: list[list[Question]] = [[(q, a, kind) for q, a, kind in line["questions"]] for line in lines]
    return SceneSet(images, labels, [line["caption"] for line in lines], questions)


def generate(count: int, seed: int, per_scene: int, workers: int) -> SceneSet:
    """Make the scenes of `cached_scenes` in memory, in ``workers`` fresh processes (none of them for one worker)."""
    starts = range(0, count, CHUNK)
    stops = [min(start + CHUNK, count) for start in starts]
    seeds, each = [seed] * len(starts), [per_scene] * len(starts)
    if workers == 1:
        parts = list(map(_generate_chunk, starts, stops, seeds, each))
    else:
        # Not forked: the caller may have started MLX's threads.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            parts = list(pool.map(_generate_chunk, starts, stops, seeds, each))
    return SceneSet(
        images=np.concatenate([part.images for part in parts]),
        labels={key: np.concatenate([part.labels[key] for part in parts]) for key in LABELS},
        captions=[text for part in parts for text in part.captions],
        questions=[asked for part in parts for asked in part.questions],
    )


def _generate_chunk(start: int, stop: int, seed: int, per_scene: int) -> SceneSet:
    images, labels, captions, questions = [], [], [], []
    for index in range(start, stop):
        rng = scene_rng("train", seed, index)
        scene = sample_scene(rng)
        images.append(render(scene))
        labels.append(patch_labels(scene))
        captions.append(caption(scene))
        questions.append([(as_typed(q, rng), a, kind) for q, a, kind in questions_for(scene, rng, per_scene)])
    stacked = {key: np.stack([label[key] for label in labels]) for key in LABELS}
    return SceneSet(np.stack(images), stacked, captions, questions)


def _key(*arguments: int) -> str:
    digest = hashlib.sha256(repr(arguments).encode())
    for name in SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()[:16]


def _write(arrays: Path, texts: Path, made: SceneSet) -> None:
    """Write both files under other names first: an interrupted run leaves nothing that looks finished."""
    part = arrays.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, images=made.images, **made.labels)  # type: ignore[arg-type]
    os.replace(part, arrays)
    with part.open("w") as file:
        for text, asked in zip(made.captions, made.questions, strict=True):
            file.write(json.dumps({"caption": text, "questions": asked}) + "\n")
    os.replace(part, texts)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: cache.py FOLDER [COUNT]")
    began = time.perf_counter()
    scenes = cached_scenes(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else 30_000)
    asked = sum(map(len, scenes.questions))
    print(f"{len(scenes.images)} scenes, {asked} questions, {time.perf_counter() - began:.0f} s")
