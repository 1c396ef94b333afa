"""``gm-mlx verify``: two forms of one model on the same images and prompts, stage by stage."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gm_mlx.cli.console import Debug, Progress, checked_text, note, one_line, printable
from gm_mlx.errors import UserError

if TYPE_CHECKING:
    from gm_mlx.compare import Comparison
    from gm_mlx.stages import Question, Side

SAMPLES = 2
QUESTION = "Describe the image in one sentence."
DIFFERENT = 1  # exit code


def verify(
    a: Annotated[
        str, typer.Argument(metavar="A", help="The reference: a model folder, a name, a GGUF file, or a PyTorch LLaVA.")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The model that is compared with it.")],
    image: Annotated[
        list[str] | None, typer.Option("--image", "-i", metavar="FILE", help="Ask about this image; repeat for more.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Ask this, and not the built-in questions.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(metavar="N", help=f"Built-in pictures and questions to use; {SAMPLES} by default.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="The longest answer, in tokens.")] = 16,
    tolerance: Annotated[
        float | None,
        typer.Option(metavar="T", help="Largest relative error that passes; by default it depends on the models."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Compare two forms of one model; exit code 1 where they differ by more than rounding."""
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise UserError(f"--tolerance: {tolerance} is not 0 or more")
    if image and samples is not None:
        raise UserError("--samples counts built-in pictures; leave it out with --image")
    if prompt is not None:
        checked_text(prompt, "--prompt")
    progress = Progress()
    with progress.waiting("Comparing the models"):
        from gm_mlx.compare import compare

        sides = [_side(name) for name in (a, b)]
        outcome = compare(
            sides[0],
            sides[1],
            _questions(image or [], prompt, SAMPLES if samples is None else samples),
            max_tokens=max_tokens,
            tolerance=tolerance,
        )
    if as_json:
        print(json.dumps(_facts(a, b, outcome)))
    else:
        _show(outcome)
    if not outcome.agrees:
        raise typer.Exit(DIFFERENT)


def _side(name: str) -> Side:
    """A model by the name that a user gives it, in any form."""
    from gm_mlx.gguf_files import find_gguf
    from gm_mlx.hub import find_model
    from gm_mlx.torch_side import open_side

    files = find_gguf(name)
    if files is None:
        return open_side(name, find_model(name))
    if files.mmproj is None:
        raise UserError(f"{name}: has no vision model beside it; name a file whose mmproj.gguf is in the same folder")
    from gm_mlx.llama.side import GGUFSide

    return GGUFSide(name, files.model, files.mmproj)


def _questions(files: list[str], prompt: str | None, samples: int) -> list[Question]:
    """One question for each file, or the built-in ones."""
    from gm_mlx.stages import Question

    if files:
        return [Question(prompt or QUESTION, [file]) for file in files]
    from gm_mlx.quant.samples import load_samples

    return [Question(prompt or sample.prompt, sample.images) for sample in load_samples(None, samples)]


def _facts(a: str, b: str, outcome: Comparison) -> dict[str, Any]:
    """What ``--json`` prints. JSON has no infinity: an error that cannot be measured is null."""
    stages = []
    for difference in outcome.stages:
        measured = difference.error if difference.error != float("inf") else None
        stages.append({**asdict(difference), "error": measured, "passes": difference.passes})
    return {
        "a": a,
        "b": b,
        "agrees": outcome.agrees,
        "tolerance": outcome.tolerance,
        "parts_at": outcome.parts_at,
        "stages": stages,
        "routing": [asdict(layer) for layer in outcome.routing],
        "answers": [asdict(answer) for answer in outcome.answers],
        "skipped": outcome.skipped,
    }


def _show(outcome: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("Stage")
    for title in ("Error", "Cosine", "Limit"):
        table.add_column(title, justify="right")
    table.add_column("")
    for each in outcome.stages:
        cosine = "" if each.cosine is None else f"{each.cosine:.6f}"
        limit = "" if each.limit is None else f"{each.limit:.2g}"
        mark = "parts here" if each.stage == outcome.parts_at else ""
        table.add_row(each.stage, f"{each.error:.2g}", cosine, limit, mark, style=None if each.passes else "bold")
    console.print(table)
    for stage, reason in outcome.skipped.items():
        note(f"{stage}: {reason}")
    if outcome.routing:
        print("\nTokens that go to the same first expert, and to the same experts:")
        for layer in outcome.routing:
            print(f"layer {layer.layer:<4} {layer.first:8.2%} {layer.chosen:8.2%}")
    print()
    for answer in outcome.answers:
        print(f"{one_line(answer.prompt)}\n  A: {_text(answer.a)}")
        if answer.common_tokens < answer.tokens:
            print(f"  B: {_text(answer.b)}\n  ({answer.common_tokens} of {answer.tokens} tokens, then they part)")
        else:
            print("  B: the same")
    failed = [each.stage for each in outcome.stages if not each.passes]
    print(f"\nThey {f'differ: {failed[0]} is above its limit' if failed else 'agree'}.")


def _text(answer: str) -> str:
    return one_line(printable(answer)) or "(nothing)"
