"""``gm-mlx imatrix``: how much each weight's input matters, measured on pictures, for quantizing to GGUF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gm_mlx.cli.console import Debug, Progress, note, say
from gm_mlx.errors import UserError

SAMPLES = 32
FEWEST_BITS = 8  # of a model that reads nearly as the unquantized one does


def imatrix(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model folder, best one that is not quantized, or a repository.")
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="The GGUF file to write.")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="A folder of images or a .jsonl file of prompts; drawings without it."),
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", help="How many prompts to read.")] = SAMPLES,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it is an importance matrix.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Measure an importance matrix on images and prompts, for `gm-mlx convert --to gguf --imatrix`."""
    if out is None:
        raise UserError("name the file to write with -o FILE, such as imatrix.gguf")
    # Heavy imports only now: a misspelt option is told at once.
    from gm_mlx.config import ModelConfig
    from gm_mlx.convert.to_gguf.imatrix import check_imatrix_out, matrix_from_sums, write_imatrix
    from gm_mlx.convert.to_gguf.text import first_block
    from gm_mlx.hub import find_model
    from gm_mlx.processor import Processor
    from gm_mlx.quant.importance import measure_importance
    from gm_mlx.quant.samples import load_samples
    from gm_mlx.weights import load_model

    check_imatrix_out(out, force=force)
    folder = find_model(model)
    config = ModelConfig.load(folder)
    first = first_block(config.text_config)  # refuses what no file can hold
    read = load_samples(calibration, samples)
    progress = Progress()
    with progress.waiting("load"):
        found = measure_importance(load_model(folder), Processor.from_folder(folder), read, progress)
    matrix = matrix_from_sums(
        config.text_config,
        found.sums,
        found.counts,
        dataset="gm-mlx's drawings" if calibration is None else calibration.name,
        num_samples=found.num_samples,
        num_tokens=found.num_tokens,
    )
    write_imatrix(out, matrix)

    bits = config.extra.get("quantization", {}).get("bits", FEWEST_BITS)
    if bits < FEWEST_BITS:
        note(f"{model} is quantized to {bits} bits; the model that it was made from is measured better")
    unseen = matrix.unseen_experts(first)
    for layer, experts in unseen.items():
        few = ", ".join(map(str, experts))
        note(f"layer {layer}: no token reached expert {few}; its channels will count alike, unless more samples do")
    facts = {
        "out": str(out),
        "model": model,
        "samples": found.num_samples,
        "tokens": found.num_tokens,
        "entries": len(matrix.entries),
        "experts_without_tokens": unseen,
    }
    if as_json:
        print(json.dumps(facts))
        return
    print(f"{out}: {facts['entries']} matrices, {found.num_samples} prompts, {found.num_tokens} tokens")
    say(f"use it: gm-mlx convert {model} --to gguf -o OUT --quantize Q4_K_M --imatrix {out}")
