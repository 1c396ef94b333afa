"""``gm-mlx quantize``: fewer bits for a model folder's weights, and what that costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gm_mlx import __version__
from gm_mlx.cli.console import Debug, Progress, note, parse_size, say
from gm_mlx.errors import UserError

if TYPE_CHECKING:
    from gm_mlx.quant.quantize import Quantized, Source

SAMPLES = 16


def quantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model folder that is not quantized, or a repository with one.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="OUT", help="Where to; without it, recipes are only evaluated."),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RECIPE",
            help="q4 (default), q8, q4-all, q3-experts, mxfp4, mixed, awq or tiny; several with --evaluate.",
        ),
    ] = None,
    target_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="For mixed: most that the weights take, such as 2.9GB.")
    ] = None,
    router_rank: Annotated[int | None, typer.Option(metavar="R", help="Give the routers this rank.")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="A folder of images or a .jsonl file of prompts; drawings without it."),
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", help="Prompts to calibrate and evaluate with.")] = SAMPLES,
    sensitivity: Annotated[
        str, typer.Option(metavar="kl|layer|auto", help="How mixed measures: by answers, or layer by layer.")
    ] = "auto",
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Compare with the unquantized model, and print a table.")
    ] = False,
    questions: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --evaluate: a .jsonl of image, question, answer, for exact match."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Take so many of the questions, evenly spread.")
    ] = None,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Take a quantized MODEL too, and round its weights once more.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is a model folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Quantize a model's weights by a recipe, and say what it costs."""
    recipes = recipe or ["mixed" if target_size is not None else "q4"]
    target_bytes = None if target_size is None else parse_size(target_size, "--target-size")
    _check(recipes, out, target_size, evaluate, questions, limit, sensitivity)
    # Heavy imports only now: a misspelt option is told at once.
    from gm_mlx.hub import find_model
    from gm_mlx.new_folder import check_out
    from gm_mlx.quant.calibration import calibrate, load_samples
    from gm_mlx.quant.evaluate import load_questions
    from gm_mlx.quant.quantize import measure, open_source, prepare, write
    from gm_mlx.quant.recipes import find_recipe
    from gm_mlx.quant.report import model_card, warnings

    calibrated = [name for name in recipes if find_recipe(name).calibrated]
    folder = find_model(model)
    if out is not None:
        check_out(out, force=force, sources=[folder])
    source = open_source(folder, requantize=requantize)
    asked = [] if questions is None else load_questions(questions, limit)
    weighs_routers = router_rank is not None and calibration is not None
    needs_samples = evaluate or bool(calibrated) or weighs_routers
    read = load_samples(calibration, samples) if needs_samples else []

    progress = Progress()
    with progress.waiting("load"):
        seen = None
        if weighs_routers or "awq" in calibrated:
            seen = calibrate(source.model(), source.processor, read, progress)
        results = [
            prepare(
                source,
                name,
                read,
                calibration=seen,
                router_rank=router_rank,
                target_bytes=target_bytes if name == "mixed" else None,
                measure=sensitivity,  # type: ignore[arg-type]
                progress=progress,
            )
            for name in recipes
        ]
        baseline = measure(source, results, read, asked, progress) if evaluate else None
        if out is not None:
            notes = {"made_by": f"gm-mlx {__version__}", "source": model}
            card_file = folder / "README.md"
            old = card_file.read_text(encoding="utf-8", errors="replace") if card_file.is_file() else ""
            card = model_card(old, model, source, results[0], __version__)
            write(source, results[0], out, card, notes, force=force, progress=progress)

    for result in results:
        for warning in warnings(result):
            note(warning)
    if as_json:
        print(json.dumps(_facts(model, out, source, results, len(read), baseline)))
        return
    _show(source, results, baseline)
    if out is not None:
        say(f'{out} is ready: gm-mlx chat --model {out} --image FILE --prompt "..."')


def _check(
    recipes: list[str],
    out: Path | None,
    target_size: str | None,
    evaluate: bool,
    questions: Path | None,
    limit: int | None,
    sensitivity: str,
) -> None:
    """Refuses options that do not go together."""
    if out is None and not evaluate:
        raise UserError("nothing to do: give -o OUT to write a model, or --evaluate to compare recipes")
    if out is not None and len(recipes) > 1:
        raise UserError(f"-o {out}: one folder holds one recipe; give one --recipe, or leave out -o to compare several")
    if (target_size is None) == ("mixed" in recipes):
        raise UserError("--target-size and --recipe mixed need each other; give both, or neither")
    if twice := [name for name in recipes if recipes.count(name) > 1]:
        raise UserError(f"--recipe {twice[0]} is given twice; once is enough")
    if questions is not None and not evaluate:
        raise UserError("--questions: they are asked by --evaluate only; add it")
    if limit is not None and (questions is None or limit < 1):
        raise UserError(f"--limit {limit}: it takes so many of --questions; give a file of them, and 1 or more")
    if sensitivity not in ("kl", "layer", "auto"):
        raise UserError(f"--sensitivity: {sensitivity!r} is not one of kl, layer, auto")


def _facts(
    model: str, out: Path | None, source: Source, results: list[Quantized], samples: int, baseline: float | None
) -> dict[str, Any]:
    """Returns everything that is known, as JSON values."""
    from gm_mlx.quant.sizes import component_sizes, total

    whole = total(component_sizes(source.config))
    return {
        "model": model,
        "out": None if out is None else str(out),
        "samples": samples,
        "unquantized": {
            "parameters": whole.parameters,
            "bytes": whole.bytes,
            **({} if baseline is None else {"exact_match": baseline}),
        },
        "recipes": [result.to_dict() for result in results],
    }


def _show(source: Source, results: list[Quantized], baseline: float | None) -> None:
    """Prints the table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from gm_mlx.quant.report import table

    header, rows = table(source, results, baseline)
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column(header[0])
    for title in header[1:]:
        grid.add_column(title, justify="right", no_wrap=True)
    for name, cells in rows:
        grid.add_row(name, *cells)
    Console().print(grid)
