"""Measure every quantization recipe on a trained gm-tiny, and print the README's table.

    python examples/train_gm_tiny/recipes.py RUN/sparse --easy-vqa easy_vqa.tar.gz [--limit N] [--target-size 3.5MB]

MODEL is the unquantized folder that ``train.py`` leaves behind, or a quantized one, whose weights are then unpacked
first. Each recipe is held against it on calibration drawings (divergence, routing) and on easy-VQA's test questions.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from gm_mlx.cli.console import parse_size
from gm_mlx.errors import UserError
from gm_mlx.hub import find_model
from gm_mlx.quant.calibration import Sample, calibrate
from gm_mlx.quant.evaluate import Question
from gm_mlx.quant.quantize import measure, open_source, prepare
from gm_mlx.quant.recipes import RECIPES
from gm_mlx.quant.report import markdown, table

from easy_vqa import EasyVQA, load_easy_vqa  # isort: skip
from questions import heldout  # isort: skip
from scenes import render  # isort: skip

BUDGET = "3.5MB"  # about what q4-all and q3-experts take


def calibration_samples(count: int) -> list[Sample]:
    """Generated pictures and questions that training did not see."""
    asked = heldout(count)
    return [Sample(question, [Image.fromarray(render(scene))]) for scene, question, *_ in asked[:count]]


def written_questions(easy: EasyVQA, folder: Path, limit: int | None) -> list[Question]:
    """Test questions whose images are files in a folder; ``limit`` takes so many, evenly spread."""
    rows = easy.questions[:: max(1, len(easy.questions) // (limit or len(easy.questions)))]
    for row in {row for _, _, row in rows}:
        Image.fromarray(easy.images[row]).save(folder / f"{row}.png")
    return [Question(folder / f"{row}.png", question, answer) for question, answer, row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a trained gm-tiny; `gm-tiny` for the one in the box")
    parser.add_argument("--easy-vqa", type=Path, required=True, help="easy_vqa.tar.gz or the folder in it")
    parser.add_argument("--split", default="test", help="test; '' when the folder is itself a split")
    parser.add_argument("--limit", type=int, help="take so many questions, evenly spread; all by default")
    parser.add_argument("--samples", type=int, default=32, help="pictures to calibrate and compare with")
    parser.add_argument("--target-size", default=BUDGET, help=f"the budget of mixed; {BUDGET} by default")
    parser.add_argument("--recipe", action="append", choices=list(RECIPES), help="only these; all by default")
    arguments = parser.parse_args()
    try:
        source = open_source(find_model(arguments.model), requantize=True)
        samples = calibration_samples(arguments.samples)
        recipes = arguments.recipe or list(RECIPES)
        budget = parse_size(arguments.target_size, "--target-size")
        seen = calibrate(source.model(), source.processor, samples) if "awq" in recipes else None
        results = [
            prepare(source, name, samples, calibration=seen if name == "awq" else None, target_bytes=budget)
            for name in recipes
        ]
        with TemporaryDirectory() as folder:
            easy = load_easy_vqa(arguments.easy_vqa, arguments.split or None)
            questions = written_questions(easy, Path(folder), arguments.limit)
            baseline = measure(source, results, samples, questions)
    except UserError as error:
        sys.exit(f"recipes.py: {error}")
    again = " Its weights were unpacked from 4 and 8 bits first." if source.requantized else ""
    print(f"Exact match on {len(questions)} test questions of easy-VQA.{again}\n")
    print(markdown(*table(source, results, baseline)), end="")


if __name__ == "__main__":
    main()
