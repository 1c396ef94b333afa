"""What ``gm-mlx lora`` and ``gm-mlx train`` do alike: find the model, read the data, train, and say how it goes.

Several machines run the same command. Each reads the data and trains; the first alone writes and speaks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gm_mlx.cli.console import Progress, note, say, show_problems
from gm_mlx.cli.training_facts import is_first
from gm_mlx.cli.training_options import BATCH_SIZE, MAX_LENGTH, Options
from gm_mlx.errors import UserError

if TYPE_CHECKING:
    from gm_mlx.model import Model
    from gm_mlx.processor import Processor
    from gm_mlx.train.config import TrainConfig
    from gm_mlx.train.events import Event, Finished, Watch
    from gm_mlx.train.losses import AnswerLoss
    from gm_mlx.train.prepare import Prepared

EPOCHS = 3.0
VALIDATIONS = 5  # in a run
POINTS = 20  # that a curve has at least, if there are as many steps
NOT_GGUF = (
    "is for llama.cpp, which does not train; name the model folder that it was made from, and use the adapter with it "
    "after gm-mlx convert ADAPTER --to gguf-lora"
)


@dataclass(frozen=True)
class Outcome:
    """A run that has ended.

    Attributes:
        id: the run's; see ``run_folder.open_run``.
        finished: how it ended.
        record: see ``train.record``.
        trained: whether steps were done now, and not all of them before.
        curves: the picture, if one was drawn.
    """

    id: str
    finished: Finished
    record: dict[str, Any]
    trained: bool
    curves: Path | None


def find_base(name: str | None) -> tuple[Path, str]:
    """The folder of the model to train, and what an adapter of it calls it: a repository, or a folder's name.

    Raises:
        UserError: it is not there, or is for llama.cpp, which cannot train.
    """
    from gm_mlx.hub import BUILT_IN, find_model

    if name is not None and name.endswith(".gguf"):
        raise UserError(f"{name}: {NOT_GGUF}")
    folder = find_model(name)
    if not (folder / "config.json").is_file() and any(folder.glob("*.gguf")):
        raise UserError(f"{name}: {NOT_GGUF}")
    if name is None or name == BUILT_IN:
        return folder, BUILT_IN
    return folder, folder.resolve().name if Path(name).expanduser().is_dir() else name


def read_data(options: Options, processor: Processor, context: int) -> Prepared:
    """Reads and checks all data, and lists the rows that cannot be learnt from.

    Args:
        options: the command's.
        processor: the model's.
        context: positions that the model was made for.

    Raises:
        UserError: a bad row, unless they are to be skipped; or no data.
    """
    from gm_mlx.train.prepare import Prepared, prepare
    from gm_mlx.train.rows import BadRows

    max_length = options.max_length or min(MAX_LENGTH, context)
    if max_length > context:
        raise UserError(f"--max-length: {max_length} is more than the model's context of {context}")
    progress = Progress()

    def read(sources: list[str], hold_out: float | int | None) -> Prepared:
        return prepare(
            sources,
            processor,
            max_length=max_length,
            images=options.images,
            kind=options.format,
            columns=options.named_columns,
            split=options.split,
            hold_out=hold_out,
            seed=options.seed or 0,
            skip_bad=options.skip_bad,
            progress=lambda rows: progress(f"Reading the data, {rows:,} rows", 0, 0),
        )

    try:
        with progress.waiting("Reading the data"):
            prepared = read(options.data, options.held_out)
            if options.validation:
                apart = read(options.validation, 0)
                prepared = Prepared(prepared.train, apart.train, prepared.problems + apart.problems)
    except BadRows as error:
        show_problems(error.problems)
        raise
    if options.patience and not len(prepared.held_out):
        raise UserError("--patience: counts validations, and no row is held out; hold some out with --hold-out")
    if prepared.problems and is_first():
        show_problems(prepared.problems)
        note(f"{len(prepared.problems)} rows are left out")
    return prepared


def planned(options: Options, rows: int, **defaults: Any) -> tuple[TrainConfig, int]:
    """The hyperparameters for so many rows, and the rows of a step.

    Args:
        options: the command's.
        rows: to learn from.
        defaults: of the command, for what was not given.
    """
    from gm_mlx.train.run import num_steps

    batch_size = options.batch_size or BATCH_SIZE
    steps = options.steps or num_steps(rows, batch_size, options.epochs or EPOCHS)
    defaults = {
        **defaults,
        "log_every": max(1, min(20, steps // POINTS)),
        "save_every": max(1, min(100, steps // 2)),
        "validate_every": math.ceil(steps / VALIDATIONS),
    }
    more = {key: value for key, value in defaults.items() if getattr(options, key) is None}
    return options.config(steps=steps, **more), batch_size


def run_shown(
    options: Options,
    model: Model,
    processor: Processor,
    prepared: Prepared,
    config: TrainConfig,
    batch_size: int,
    *,
    identity: Mapping[str, Any],
    table: Mapping[str, Any],
    loss: AnswerLoss | None = None,
) -> Outcome:
    """Trains, and shows how it goes.

    Args:
        options: the command's.
        model: with what learns not frozen.
        processor: the model's.
        prepared: the data.
        config: hyperparameters.
        batch_size: rows of a step.
        identity: see ``run.fit``.
        table: what ``run.json`` says of the run.
        loss: see ``run.fit``.

    Raises:
        typer.Exit: with code 130 after Ctrl-C, when it has been said how to go on; on all machines but the first, when
            the run has ended.
        UserError: as for ``run.fit``.
    """
    from gm_mlx.train.record import record
    from gm_mlx.train.run import fit
    from gm_mlx.train.run_folder import open_run, remove_run

    run, first = options.run_folder, is_first()
    if options.restart and first:
        remove_run(run)
    run_id = open_run(run, table) if first else ""
    _wait_for_all()
    step, trained = 0, False

    def watch(event: Event) -> None:
        nonlocal step, trained
        step, trained = event.step, trained or event.kind == "step"
        if event.kind == "resumed" and step == config.steps:
            say(f"all {step:,} steps are done already")
            return
        for one in watches:
            one(event)

    with ExitStack() as stack:
        watches = _watches(stack, options, run, table) if first else []
        try:
            finished = fit(
                model,
                processor,
                prepared,
                config,
                run,
                batch_size=batch_size,
                loss=loss,
                identity=identity,
                workers=options.workers,
                watch=watch,
            )
        except (KeyboardInterrupt, SystemExit) as ended:
            stack.close()
            if first:
                done = f"saved step {step:,} of {config.steps:,} in {run}" if step else "no step was done yet"
                say(f"{done}; run the same command again to go on")
            raise typer.Exit(130) if isinstance(ended, KeyboardInterrupt) else ended from None
    if not first:
        raise typer.Exit
    return Outcome(run_id, finished, record(run, finished, config, prepared, batch_size), trained, _draw(run))


def report(options: Options, outcome: Outcome) -> dict[str, Any]:
    """Returns what ``--json`` says of a run."""
    return {
        "run": str(options.run_folder),
        "curves": outcome.curves and str(outcome.curves),
        "exact_match": (outcome.record["validation"] or {}).get("exact_match"),
        **outcome.record,
    }


def show_outcome(out: Path, outcome: Outcome, written: bool) -> None:
    """Prints how a run ended."""
    from gm_mlx.train.record import record_text

    print(record_text(outcome.record))
    if not written:
        say(f"{out} is there already; write it again with --force, or begin anew with --restart --force")


def _watches(stack: ExitStack, options: Options, run: Path, table: Mapping[str, Any]) -> list[Watch]:
    """What follows a run, closed when the stack is."""
    from gm_mlx.cli.training_display import TrainingDisplay
    from gm_mlx.train.trackers import Trackers

    watches: list[Watch] = []
    if options.trackers:
        watches.append(stack.enter_context(Trackers(options.trackers, run, table)))
    watches.append(stack.enter_context(TrainingDisplay()))
    return watches


def _draw(run: Path) -> Path | None:
    if find_spec("matplotlib") is None:
        return None
    from gm_mlx.train.curves import draw_curves

    try:
        return draw_curves(run)
    except UserError as error:  # no reason to lose what was trained
        note(str(error))
        return None


def _wait_for_all() -> None:
    import mlx.core as mx

    mx.eval(mx.distributed.all_sum(mx.array(1.0)))
