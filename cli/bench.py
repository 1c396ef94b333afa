"""``gm-mlx bench``: how fast models run here, engine beside engine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gm_mlx.cli.console import Debug, Progress, note, size
from gm_mlx.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from gm_mlx.bench.forms import Costs, Form
    from gm_mlx.bench.report import Expectation, Row
    from gm_mlx.bench.rounds import Outcome, Settings

NO_IMAGE = "none"
# A form in memory: its weights, what is computed with them, and Python.
ROOM_SHARE, ROOM_BYTES = 1.2, 512 << 20
WORDS = ("", "Model", "Engine", "Computed on", "Test")
BUSY = 0.3  # of the cores at work for others when the bench begins


def bench(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL", help="Model folders, .gguf files or repositories. [default: the model in the box]"
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="A preset's shape with random weights, such as llava-gm-2b.")
    ] = None,
    quantize: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES",
            help="Make these forms of MODEL or --preset: recipes such as q4 for MLX, types such as Q4_K_M for "
            "llama.cpp. [default of a preset: q4,Q4_0,Q4_K_M]",
        ),
    ] = None,
    prompt: Annotated[int, typer.Option("-p", "--n-prompt", metavar="N", help="Tokens to read; 0 for none.")] = 256,
    generate: Annotated[int, typer.Option("-n", "--n-gen", metavar="N", help="Tokens to generate; 0 for none.")] = 24,
    rounds: Annotated[int, typer.Option("-r", "--rounds", metavar="N", help="How often to measure everything.")] = 5,
    max_minutes: Annotated[
        float, typer.Option(metavar="M", help="Begin no round that would end later; one is measured in any case.")
    ] = 10,
    image: Annotated[
        str | None,
        typer.Option(
            "--image", "-i", metavar="FILE", help=f"The picture to ask about, or {NO_IMAGE}. [default: noise]"
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="Of llama.cpp. [default: one for each real core]")
    ] = None,
    gpu_layers: Annotated[
        int | None, typer.Option("--n-gpu-layers", "-ngl", metavar="N", help="Of llama.cpp. [default: all]")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of random weights, tokens and noise.")] = 0,
    keep: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep what --preset or --quantize makes in this new folder.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the figures.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Measure how fast models run here, in turns: images, prompts, answers, memory and energy."""
    from gm_mlx.bench.rounds import Settings

    settings = Settings(
        prompt=prompt,
        generate=generate,
        rounds=rounds,
        max_seconds=60 * max_minutes,
        picture=image != NO_IMAGE,
        image=None if image == NO_IMAGE else image,
        threads=threads,
        gpu_layers=gpu_layers,
        seed=seed,
    )
    _check(settings, models or [], preset, quantize, keep)
    from gm_mlx.bench.energy import find_meter
    from gm_mlx.bench.forms import find_form
    from gm_mlx.bench.machine import available_memory, machine_facts
    from gm_mlx.bench.plot import check_plot, write_plot
    from gm_mlx.bench.report import LETTERS, rows, to_dict
    from gm_mlx.cli.bench_forms import DEFAULT, is_checkpoint, made_forms, split_names
    from gm_mlx.hub import BUILT_IN

    if plot is not None:
        check_plot(plot)
    if settings.image is not None:
        from gm_mlx.images import load_image

        load_image(settings.image)
    names = split_names(quantize or (DEFAULT if preset else ()))
    models = models or ([] if preset else [BUILT_IN])
    # With --quantize and no preset, MODEL is what forms are made of.
    source = models[0] if names and preset is None else None
    machine, silence = machine_facts(), find_meter().silence or None
    progress = Progress()
    with ExitStack() as stack:
        forms = [] if source and is_checkpoint(source) else [find_form(name) for name in models]
        if names:
            with progress.waiting("prepare"):
                forms += stack.enter_context(made_forms(source, preset, names, seed, keep, progress))
        if len(forms) > len(LETTERS):
            raise UserError(f"{len(forms)} models at a time are too many; name {len(LETTERS)} at most")
        costs = [form.costs() for form in forms]
        needed = sum(int(ROOM_SHARE * cost.weight_bytes) + ROOM_BYTES for cost in costs)
        outcome = _measure(forms, settings, needed <= available_memory(), progress)
    measured = rows(outcome)
    if not measured:
        raise UserError(next(iter(outcome.failures.values())))
    if plot is not None:
        write_plot(plot, measured, [form.name for form in forms], f"{machine['cpu']}, {machine['cores']} cores")
    if as_json:
        print(json.dumps(to_dict(forms, costs, settings, outcome, machine, silence)))
    else:
        _show(forms, costs, settings, outcome, machine, silence)
    for line in _remarks(forms, settings, outcome, machine):
        note(line)
    if outcome.failures:
        raise UserError("; ".join(outcome.failures.values()))


def _check(
    settings: Settings, models: Sequence[str], preset: str | None, quantize: Sequence[str] | None, keep: Path | None
) -> None:
    """Refuses options that are out of range or mean nothing together."""
    at_least = {
        "-p": (settings.prompt, 0),
        "-n": (settings.generate, 0),
        "-r": (settings.rounds, 1),
        "--max-minutes": (settings.max_seconds / 60, 0),
        "--threads": (settings.threads, 1),
        "--n-gpu-layers": (settings.gpu_layers, 0),
        "--seed": (settings.seed, 0),
    }
    for option, (value, least) in at_least.items():
        if value is not None and not least <= value < float("inf"):
            raise UserError(f"{option}: {value:g} is not {least} or more")
    if not settings.tasks():
        raise UserError(f"-p 0, -n 0 and --image {NO_IMAGE} leave nothing to measure; leave one of them out")
    if quantize and preset is None and len(models) > 1:
        raise UserError("--quantize makes forms of one model or of a --preset; name one of the two")
    if keep is not None and not (quantize or preset):
        raise UserError("--keep is for models that are made for the bench, with --preset or --quantize; leave it out")


def _measure(forms: Sequence[Form], settings: Settings, together: bool, progress: Progress) -> Outcome:
    from gm_mlx.bench.process import Child
    from gm_mlx.bench.report import LETTERS
    from gm_mlx.bench.rounds import Bench

    def start(number: int) -> Child:
        return Child(f"{LETTERS[number]}, {forms[number].name}", forms[number], settings)

    with progress.waiting("load"):
        return Bench(len(forms), settings, start, together=together, progress=progress).run()


def _show(
    forms: Sequence[Form],
    costs: Sequence[Costs],
    settings: Settings,
    outcome: Outcome,
    machine: dict[str, Any],
    silence: str | None,
) -> None:
    from rich.console import Console

    from gm_mlx.bench.report import LETTERS, expectations, rows

    console = Console(highlight=False)
    measured = rows(outcome)
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    print(f"{machine['cpu']}, {machine['cores']} cores; {machine['platform']}\n{versions}")
    print(f"{outcome.rounds} of {settings.rounds} rounds in turns, medians\n")

    lines = []
    for number, (form, cost) in enumerate(zip(forms, costs, strict=True)):
        facts = outcome.facts.get(number, {})
        device = facts.get("device", "not measured")
        threads = f", threads: {facts['threads']}" if device == "CPU" else ""
        lines.append([LETTERS[number], form.name, form.engine, device + threads, size(cost.weight_bytes)])
    console.print(_table(["", "Model", "Engine", "Computed on", "Weights"], lines))
    print()
    console.print(_figures(measured))
    print()
    console.print(_expected(expectations(measured, costs)))
    if silence:
        print(f"\nEnergy: {silence}.")


def _figures(measured: Sequence[Row]) -> Table:
    from statistics import median

    from gm_mlx.bench.report import LETTERS, SPEED, number, scaled

    lines = []
    last = ""
    for row in measured:
        unit, divisor = scaled(row.unit, row.median)
        low, middle, high = (number(value / divisor) for value in (row.low, row.median, row.high))
        energy = f"{number(median(row.joules) / row.tokens)} J" if row.joules else ""
        lines.append(
            [
                "" if row.test == last else row.test,
                LETTERS[row.form],
                f"{middle} {unit}",
                f"{low} – {high}" if len(row.values) > 1 else "",
                f"{row.ratio:.2f}" if row.ratio is not None else "",
                f"{energy}/token" if energy and row.unit == SPEED else energy,
            ]
        )
        last = row.test
    first = LETTERS[min(row.form for row in measured)]
    return _table(["Test", "", "Median", "Min – max", f"/ {first}", "Energy"], lines)


def _expected(expected: Sequence[Expectation]) -> Table:
    from gm_mlx.bench.report import LETTERS, number

    lines = [
        [
            LETTERS[each.form],
            size(each.active_bytes),
            f"{number(each.bytes_per_second / 1e9)} GB/s" if each.bytes_per_second else "",
            f"{each.of_predicted:.0%}" if each.of_predicted else "",
            f"{number(each.prefill_flops / 1e9)} GFLOPs" if each.prefill_flops else "",
            f"{number(each.flops_per_second / 1e9)} GFLOP/s" if each.flops_per_second else "",
        ]
        for each in expected
    ]
    titles = ["", "Read per token", "Speed", "Of predicted", "To read the prompt", "Speed"]
    return _table(titles, lines)


def _table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """A table with words at the left and numbers at the right; columns without a word in them are left out."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    kept = [column for column in range(len(titles)) if any(line[column] for line in lines)]
    for column in kept:
        table.add_column(titles[column], justify="left" if titles[column] in WORDS else "right", overflow="fold")
    for line in lines:
        table.add_row(*(line[column] for column in kept))
    return table


def _remarks(forms: Sequence[Form], settings: Settings, outcome: Outcome, machine: dict[str, Any]) -> Iterator[str]:
    """What a reader of the figures should know."""
    from gm_mlx.bench.report import LETTERS

    if outcome.rounds < settings.rounds:
        yield f"{outcome.rounds} of {settings.rounds} rounds: another would not have ended within --max-minutes"
    if not outcome.together:
        yield "memory is too small for all models at a time, so each was loaded anew for each round"
    blind = [LETTERS[form] for form, facts in outcome.facts.items() if settings.picture and not facts["reads_images"]]
    if blind:
        yield f"{', '.join(blind)} reads no images; there is no mmproj file beside it"
    if settings.threads and any(form.engine == "mlx" for form in forms):
        yield "--threads is llama.cpp's; MLX chooses for itself"
    if machine["load_average"] > BUSY * machine["logical_cores"]:
        yield f"other programs were at work when this began (load {machine['load_average']:.1f}); ratios are safer"
