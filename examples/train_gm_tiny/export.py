"""Quantize a trained gm-tiny and write the folder that the package ships.

    python examples/train_gm_tiny/export.py RUN OUT --easy-vqa easy_vqa.tar.gz

RUN is the folder that ``train.py`` filled. OUT gets the model folder with its card, the training log and the figures
that ``evaluate.py`` measures on the quantized weights.
"""

from __future__ import annotations

import gm_mlx  # isort: skip  # loads BLAS, which must happen before anything imports mlx

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map_with_path

from gm_mlx.model import Model
from gm_mlx.processor import Processor
from gm_mlx.quant.recipes import RECIPES, recipe_table
from gm_mlx.weights import apply_quantization, load_model, num_parameters, save_model

from cache import SOURCES  # isort: skip
from evaluate import evaluate  # isort: skip
from tokenizer import word_lists  # isort: skip
from train import RECIPE  # isort: skip

HERE = Path(__file__).parent
RECIPE_NAME = "tiny"
NOTICE = {
    "text": "gm-tiny only knows pictures of a few coloured shapes and will talk nonsense about a photograph; "
    "`gm-mlx chat --model ORG/NAME` fetches a real LLaVA-GM from Hugging Face",
    "min_image_side": 200,
}


def to_half(model: Model) -> None:
    """Everything in float16 that is not packed, but the routers, whose last bits decide."""
    model.update(
        tree_map_with_path(
            lambda name, array: (
                array.astype(mx.float16) if array.dtype == mx.float32 and ".mlp.gate." not in name else array
            ),
            model.parameters(),
        )
    )


def training_log(run: Path) -> list[dict[str, Any]]:
    """The logs of all stages as one list, each entry with its stage."""
    return [
        {"stage": stage, **json.loads(line)}
        for stage in RECIPE
        for line in (run / stage / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def minutes(log: list[dict[str, Any]]) -> float:
    """Time that the logged steps took."""
    total, last = 0.0, {"stage": None, "step": 0}
    for entry in log:
        steps = entry["step"] - (last["step"] if last["stage"] == entry["stage"] else 0)
        total, last = total + steps * entry["seconds_per_step"], entry
    return total / 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--easy-vqa", type=Path, required=True)
    arguments = parser.parse_args()

    model = load_model(arguments.run / "sparse")
    processor = Processor.from_folder(arguments.run / "sparse")
    before = evaluate(model, processor, arguments.easy_vqa, limit=1000)
    apply_quantization(model, recipe_table(model.config, RECIPE_NAME))
    to_half(model)
    partial = arguments.out.with_name(arguments.out.name + ".partial")
    save_model(model, partial, processor)

    figures = evaluate(load_model(partial), Processor.from_folder(partial), arguments.easy_vqa)
    log = training_log(arguments.run)
    weights = partial / "model.safetensors"
    notes = {
        "name": "gm-tiny",
        "made_by": f"gm-mlx {gm_mlx.__version__}, examples/train_gm_tiny",
        "notice": NOTICE,
        "quantization": {"recipe": RECIPE_NAME, "summary": RECIPES[RECIPE_NAME].summary},
        "sha256": {weights.name: hashlib.sha256(weights.read_bytes()).hexdigest()},
        "generator_sha256": {name: hashlib.sha256((HERE / name).read_bytes()).hexdigest() for name in SOURCES},
        "training_minutes": round(minutes(log), 1),
        "exact_match": figures,
        "exact_match_before_quantization": {"questions_of_each": 1000, **before},
    }
    (partial / "gm.json").write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")
    with (partial / "training_log.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in log)
    size = sum(file.stat().st_size for file in partial.iterdir()) / 1e6
    card = (HERE / "model_card.md").read_text(encoding="utf-8")
    card = card.format(
        parameters=num_parameters(model) / 1e6,
        megabytes=size,
        easy_vqa=figures["easy-vqa"]["all"],
        generated=figures["generated"]["all"],
        kinds=", ".join(f"{kind} {share:.0%}" for kind, share in figures["generated"].items() if kind != "all"),
        words=len(word_lists()[0]),
        minutes=notes["training_minutes"],
    )
    (partial / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(arguments.out, ignore_errors=True)
    partial.rename(arguments.out)
    print(f"{arguments.out}: {size:.2f} MB, {notes['training_minutes']} minutes of training")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
