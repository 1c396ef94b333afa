"""``gm-mlx evaluate``: a benchmark's questions asked of a model, and its answers scored."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from gm_mlx import __version__
from gm_mlx.cli import engine_options as shared
from gm_mlx.cli.console import Debug, Progress, note, printable, say, show_problems
from gm_mlx.errors import UserError
from gm_mlx.hub import BUILT_IN

if TYPE_CHECKING:
    from gm_mlx.evaluate.answers import AnswersFile
    from gm_mlx.evaluate.benchmarks import Benchmark
    from gm_mlx.evaluate.prepare import Prepared
    from gm_mlx.evaluate.question import Answered
    from gm_mlx.evaluate.scores import Scores
    from gm_mlx.images import Mode

IMAGE_MODES = ("pad", "crop", "resize")
LINES = 10  # that tell of progress where there is no terminal


def evaluate(
    benchmark: Annotated[
        str,
        typer.Option(
            "--benchmark",
            "-b",
            metavar="NAME",
            help="exact, answers, vqav2, gqa, vizwiz, scienceqa, textvqa, pope, mme, mmbench or mmbench-cn.",
        ),
    ],
    questions: Annotated[Path, typer.Option(metavar="FILE", help="The benchmark's questions; of pope also a folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="The .jsonl file to write answers to.")],
    model: shared.Model = None,
    annotations: Annotated[
        Path | None, typer.Option(metavar="PATH", help="The right answers, where they are not with the questions.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where the images are. [default: where the questions are]"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Ask so many of the questions, evenly spread.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out questions that cannot be asked.")] = False,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Longest answer. [default: the benchmark's, 128 or 1024]")
    ] = None,
    image_mode: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="How images become square: pad, crop or resize. [default: the model's]"),
    ] = None,
    fill: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Of vqav2: all test questions; those not asked are uploaded as empty."),
    ] = None,
    mmproj: shared.MMProj = None,
    gguf_file: shared.GGUFFile = None,
    adapter: shared.Adapter = None,
    lora: shared.LoRA = None,
    kv_bits: shared.CacheBits = None,
    threads: shared.Threads = None,
    n_gpu_layers: shared.GPULayers = None,
    force: Annotated[bool, typer.Option("--force", help="Begin anew if OUT holds answers.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Ask a model a benchmark's questions, and score the answers as the papers do.

    The same command again goes on with a run that was interrupted, and scores one that is finished.
    """
    options = shared.engine_options(locals())
    # Heavy imports only now: a misspelt option is told at once.
    from gm_mlx.evaluate.answers import AnswersFile, write_whole
    from gm_mlx.evaluate.benchmarks import BENCHMARKS
    from gm_mlx.evaluate.identity import model_identity, questions_identity

    if (chosen := BENCHMARKS.get(benchmark)) is None:
        raise UserError(f"--benchmark {benchmark}: unknown; known are {', '.join(BENCHMARKS)}")
    if image_mode is not None and image_mode not in IMAGE_MODES:
        raise UserError(f"--image-mode: {image_mode!r} is not one of {', '.join(IMAGE_MODES)}")
    if fill is not None and not (chosen.fills and fill.is_file()):
        raise UserError(f"--fill {fill}: no such file" if chosen.fills else f"--fill: {benchmark} has no use for it")
    prepared = _prepared(chosen, questions, annotations, images, limit, skip_bad)
    run = {
        "benchmark": chosen.name,
        **model_identity(model, options),
        "kv_bits": options.get("kv_bits"),
        "max_tokens": max_tokens or chosen.max_tokens,
        "image_mode": image_mode,
        "questions": questions_identity(prepared.questions),
    }
    about = {"made_by": f"gm-mlx {__version__}", "model": model, "limit": limit, "file": str(questions)}
    file = AnswersFile(out, run, about, prepared.questions, prepared.order, force=force)
    before = len(file.lines)
    if not file.is_complete:
        _ask(chosen, prepared, file, model, options, run, skip_bad)
    file.sort()
    answers = file.answers
    if not answers:
        raise UserError(f"{out}: none of the questions could be asked; its lines say why")
    scores = None
    if chosen.score is not None and all(answer.question.wanted for answer in answers):
        scores = chosen.score(answers)
    upload = None
    if chosen.upload is not None:
        upload = out.with_suffix(chosen.upload_ending)
        write_whole(upload, chosen.upload(answers, questions, fill))
    facts = _facts(chosen, model, file, prepared, before, scores, upload)
    if as_json:
        print(json.dumps(facts))
    else:
        _show(chosen, facts, answers, scores, upload)


def _prepared(
    benchmark: Benchmark,
    questions: Path,
    annotations: Path | None,
    images: Path | None,
    limit: int | None,
    skip_bad: bool,
) -> Prepared:
    """Reads and checks all questions, and lists those that cannot be asked."""
    from gm_mlx.evaluate.prepare import prepare
    from gm_mlx.train.rows import BadRows

    progress = Progress()
    try:
        with progress.waiting("Reading the questions"):
            prepared = prepare(
                benchmark,
                questions,
                annotations=annotations,
                images=images,
                limit=limit,
                skip_bad=skip_bad,
                progress=lambda rows: progress(f"Checking the questions, {rows:,}", 0, 0),
            )
    except BadRows as error:
        show_problems(error.problems)
        raise
    if prepared.problems:
        show_problems(prepared.problems)
        note(f"{len(prepared.problems)} rows are left out")
    return prepared


def _ask(
    benchmark: Benchmark,
    prepared: Prepared,
    file: AnswersFile,
    model: str | None,
    options: dict[str, Any],
    run: dict[str, Any],
    skip_bad: bool,
) -> None:
    """Asks what has no answer yet.

    Raises:
        typer.Exit: with code 130 after Ctrl-C, when it has been said how to go on.
    """
    from gm_mlx.evaluate.ask import ask
    from gm_mlx.vlm import load

    total, before = len(prepared.questions), len(file.lines)
    progress = Progress()
    try:
        with progress.waiting("load"):
            vlm = load(model, progress=lambda *state: progress(*state) if state[0] == "load" else None, **options)
            try:
                file.begin()
                if before:
                    say(f"going on behind {before:,} of {total:,} answers")
                began = perf_counter()

                def watch(done: int) -> None:
                    left = (perf_counter() - began) / (done - before) * (total - done)
                    progress(f"Answering, {done:,} of {total:,}, {_duration(left)} left", done, total)
                    if not sys.stderr.isatty() and done * LINES // total > (done - 1) * LINES // total:
                        say(f"answered {done:,} of {total:,}")

                ask(
                    vlm.engine,
                    file,
                    max_tokens=run["max_tokens"],
                    image_mode=cast("Mode | None", run["image_mode"]),
                    exif=benchmark.exif,
                    skip_bad=skip_bad,
                    progress=watch,
                    notice=note,
                )
            finally:
                vlm.close()
                file.close()
    except KeyboardInterrupt:
        done = len(file.lines)
        kept = f"{file.path} has {done:,} of {total:,} answers" if done else "no question was answered yet"
        say(f"{kept}; run the same command again to go on")
        raise typer.Exit(130) from None


def _duration(seconds: float) -> str:
    """Returns a time for people who wait."""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _facts(
    benchmark: Benchmark,
    model: str | None,
    file: AnswersFile,
    prepared: Prepared,
    before: int,
    scores: Scores | None,
    upload: Path | None,
) -> dict[str, Any]:
    """Returns everything that is known, as JSON values."""
    metadata = [line["metadata"] for line in file.lines]
    failed = sum("error" in entry for entry in metadata)
    rows = () if scores is None else scores.rows
    return {
        "benchmark": benchmark.name,
        "model": model or BUILT_IN,
        "answers": str(file.path),
        "upload": upload and str(upload),
        "questions": len(prepared.questions),
        "answered_now": len(file.lines) - before,
        "left_out": len(prepared.problems) + failed,
        "failed": failed,
        "cut": sum(entry.get("finish_reason") == "length" for entry in metadata),
        "measure": scores and scores.measure,
        "score": scores and scores.value,
        "parts": {row.name: {"questions": row.questions, **row.measures} for row in rows},
    }


def _show(
    benchmark: Benchmark, facts: dict[str, Any], answers: list[Answered], scores: Scores | None, upload: Path | None
) -> None:
    """Prints the table and what else there is to know."""
    if scores is not None:
        _show_table(scores)
        print(f"{benchmark.name}, {scores.measure}: {scores.value:.2f} ({len(answers):,} questions)")
    else:
        print(f"{facts['answers']}: {len(answers):,} answers")
        if benchmark.score is not None:
            note(f"{benchmark.name} has no score without its right answers; the server that has them takes {upload}")
    if upload is not None and scores is not None:
        say(f"for the benchmark's server: {upload}")
    if facts["failed"]:
        note(f"{facts['failed']:,} questions could not be asked and do not count; their lines say why")
    if facts["cut"]:
        note(f"{facts['cut']:,} answers were cut at --max-tokens")


def _show_table(scores: Scores) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    measures = list(dict.fromkeys(name for row in scores.rows for name in row.measures))
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("part")
    for title in ("questions", *measures):
        grid.add_column(title, justify="right", no_wrap=True)
    for row in scores.rows:
        cells = (f"{row.measures[name]:.2f}" if name in row.measures else "" for name in measures)
        grid.add_row(Text(printable(row.name)), f"{row.questions:,}", *cells)  # a name may look like rich's markup
    Console().print(grid)
