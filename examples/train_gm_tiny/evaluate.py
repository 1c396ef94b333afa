"""Exact match of a model folder on easy-VQA's published test questions and on held-out generated questions.

python examples/train_gm_tiny/evaluate.py MODEL [--easy-vqa easy_vqa.tar.gz] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gm_mlx.model import Model
from gm_mlx.processor import Processor
from gm_mlx.train.answers import greedy_answers
from gm_mlx.weights import load_model

from easy_vqa import load_easy_vqa  # isort: skip
from questions import heldout  # isort: skip
from scenes import render  # isort: skip


def exact_match(
    model: Model,
    processor: Processor,
    images: Sequence[np.ndarray],
    questions: Sequence[tuple[str, str, str]],
) -> tuple[dict[str, float], list[tuple[str, str, str]]]:
    """Share of answers that are right to the letter, in all and per kind.

    Args:
        model: the model.
        processor: its processor.
        images: uint8 [64, 64, 3], one per question.
        questions: (question, answer, kind).

    Returns:
        The shares, with "all" first, and the (question, expected, given) that were wrong.
    """
    from PIL import Image

    pixels = processor.pixels([Image.fromarray(image) for image in images])
    given = greedy_answers(model, processor, [question for question, _, _ in questions], list(pixels))
    right: dict[str, list[bool]] = defaultdict(list)
    wrong = []
    for (question, answer, kind), found in zip(questions, given, strict=True):
        right["all"].append(found == answer)
        right[kind].append(found == answer)
        if found != answer:
            wrong.append((question, answer, found))
    return {kind: float(np.mean(hits)) for kind, hits in right.items()}, wrong


def evaluate(
    model: Model, processor: Processor, easy_vqa: Path | None, *, split: str | None = "test", limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Both measures of the model card; ``limit`` takes that many questions of each, evenly spread."""
    results = {}
    asked = heldout(1000)
    asked = asked[:: max(1, len(asked) // (limit or len(asked)))]
    results["generated"], _ = exact_match(
        model, processor, [render(scene) for scene, *_ in asked], [tuple(rest) for _, *rest in asked]
    )
    if easy_vqa is not None:
        easy = load_easy_vqa(easy_vqa, split)
        rows = easy.questions[:: max(1, len(easy.questions) // (limit or len(easy.questions)))]
        results["easy-vqa"], _ = exact_match(
            model,
            processor,
            [easy.images[image] for _, _, image in rows],
            [(question, answer, "yes/no" if answer in ("yes", "no") else "open") for question, answer, _ in rows],
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--easy-vqa", type=Path, help="easy_vqa.tar.gz or the folder in it; its test split is used")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    arguments = parser.parse_args()
    results = evaluate(load_model(arguments.model), Processor.from_folder(arguments.model), arguments.easy_vqa)
    for name, shares in results.items():
        print(f"{name}: " + ", ".join(f"{kind} {share:.1%}" for kind, share in shares.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
