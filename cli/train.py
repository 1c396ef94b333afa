"""``gm-mlx train``: a stage of a paper's training, as a recipe has it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gm_mlx.cli import training_options as shared
from gm_mlx.cli.console import Debug, Progress, note, say
from gm_mlx.cli.training import Outcome, find_base, planned, read_data, report, run_shown, show_outcome
from gm_mlx.cli.training_facts import Learning, is_first, show_data, show_learning, show_memory
from gm_mlx.cli.training_options import Options
from gm_mlx.errors import UserError

if TYPE_CHECKING:
    from gm_mlx.model import Model
    from gm_mlx.train.recipes import Recipe, Stage
    from gm_mlx.train.stage_model import Start

RECIPE = "llava-gm"
# Options that a recipe has a value for, and the recipe's key where that is another.
FROM_RECIPE = {
    **{key: key for key in ("learning_rate", "schedule", "warmup", "weight_decay", "clip", "precision")},
    "grad_checkpoint": "checkpoint",
}
NO_OPTION = ("betas", "eps", "decay")  # a recipe's keys that are no options


def train(
    stage: Annotated[int, typer.Option("--stage", min=1, metavar="N", help="Which of the recipe: 1, 2 or 3.")],
    data: shared.Data,
    out: shared.Out,
    model: shared.Model = None,
    recipe: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="How: llava-gm, moe-llava, eve, or a .yaml file.")
    ] = RECIPE,
    trains: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="What learns whole: projector, decoder, moe, all_ffn, or a component such as attention; may be "
            "repeated. [default: the recipe's]",
        ),
    ] = None,
    upcycle: Annotated[
        str | None,
        typer.Option(metavar="ExK[@MODE]", help="Experts to make of a dense model first; none for none."),
    ] = None,
    router_rank: Annotated[int | None, typer.Option(min=0, metavar="R", help="Of their routers; 0 for full.")] = None,
    aux_loss_coef: Annotated[float | None, typer.Option(metavar="C", help="Weight of the load-balancing loss.")] = None,
    z_loss_coef: Annotated[float | None, typer.Option(metavar="C", help="Weight of the router z-loss.")] = None,
    second_expert: Annotated[
        str | None,
        typer.Option(metavar="HOW", help="A token's second expert in training: largest, or drawn as in DeepSpeed."),
    ] = None,
    capacity: Annotated[
        float | None,
        typer.Option(metavar="F", help="Tokens that an expert takes, in fair shares; 0 for all that come."),
    ] = None,
    capacity_by: Annotated[
        str | None, typer.Option(metavar="ORDER", help="Who is served first: position, random or priority.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(metavar="NAME", help="The chat template of the rows: gemma, v1 or plain.")
    ] = None,
    images: shared.Images = None,
    format: shared.Format = None,
    columns: shared.Columns = None,
    split: shared.Split = "train",
    skip_bad: shared.SkipBad = False,
    hold_out: shared.HoldOut = None,
    validation: shared.ValidationData = None,
    max_length: shared.MaxLength = None,
    epochs: Annotated[float | None, typer.Option(metavar="N", help="How often each row is learnt from.")] = None,
    steps: shared.Steps = None,
    batch_size: shared.BatchSize = None,
    accumulate: shared.Accumulate = None,
    learning_rate: Annotated[float | None, typer.Option(metavar="R", help="The highest learning rate.")] = None,
    schedule: shared.Schedule = None,
    warmup: shared.Warmup = None,
    weight_decay: shared.WeightDecay = None,
    clip: shared.Clip = None,
    precision: shared.Precision = None,
    grad_checkpoint: shared.GradCheckpoint = None,
    seed: shared.Seed = None,
    log_every: shared.LogEvery = None,
    save_every: shared.SaveEvery = None,
    keep: shared.Keep = None,
    validate_every: shared.ValidateEvery = None,
    patience: shared.Patience = None,
    workers: shared.Workers = 2,
    run: shared.Run = None,
    restart: shared.Restart = False,
    report_to: shared.ReportTo = None,
    force: shared.Force = False,
    as_json: shared.AsJson = False,
    debug: Debug = False,
) -> None:
    """Train a model as the papers do: the projector, then the decoder, then experts.

    Options win over the recipe, and what they leave open is the recipe's. The same command again goes on with a run
    that was interrupted.
    """
    options = Options.of(locals())
    # Heavy imports only now: a misspelt option is told at once.
    from gm_mlx.config import ModelConfig
    from gm_mlx.train.losses import AnswerLoss
    from gm_mlx.train.ranks import Ranks
    from gm_mlx.train.recipes import read_recipe
    from gm_mlx.train.run_folder import check_places, fingerprint
    from gm_mlx.train.stage_model import Start
    from gm_mlx.weights import num_parameters, weight_files

    read = read_recipe(recipe)
    given = {
        "trains": trains,
        "template": template,
        "router_rank": router_rank,
        "aux_loss_coef": aux_loss_coef,
        "z_loss_coef": z_loss_coef,
        "second_expert": second_expert,
    }
    chosen = _chosen(read, stage, _changes(read.tables.get(stage, {}), given, upcycle, capacity, capacity_by))
    base, name = find_base(model)
    is_written = check_places(out, options.run_folder, force=force, restart=restart, sources=[base])
    start = Start.of(base, chosen, options.seed or 0)
    if chosen.moe is not None and start.moe is None:
        if upcycle is not None:
            raise UserError(f"--upcycle: {name} has experts already; leave it out to train those")
        if is_first():
            note(f"{name} has experts already; they are trained, and no new ones are made")
    context = ModelConfig.load(base).text_config.max_position_embeddings
    options = _with_recipe(options, chosen, context, Ranks().size)
    prepared = read_data(options, start.processor, context)
    plan, rows_of_step = planned(options, len(prepared.train))
    fixed = {key: chosen.hyperparameters[key] for key in NO_OPTION if key in chosen.hyperparameters}
    plan = dataclasses.replace(plan, **fixed)
    progress = Progress()
    with progress.waiting("load"):
        learner = start.model()
        learning = _choose(learner, chosen, plan.seed)
        identity = {"model": fingerprint(weight_files(base)), "stage": _identity(chosen)}
        total = num_parameters(learner)
    facts = show_data(prepared, plan, rows_of_step)
    show_learning(learning, total)
    memory = show_memory(learner, prepared, plan, rows_of_step)
    outcome = run_shown(
        options,
        learner,
        start.processor,
        prepared,
        plan,
        rows_of_step,
        identity=identity,
        table={"command": "train", "model": name, "out": str(out), "recipe": read.name, "stage": stage},
        loss=AnswerLoss(chosen.aux_loss_coef, chosen.z_loss_coef),
    )
    written = outcome.trained or force or not is_written
    about = {"base": name, "recipe": read.name, "stage": stage, "trains": [one.component for one in learning]}
    if written:
        training = {"run": outcome.id, **about, **outcome.record}
        write = _write if chosen.lora is None else _write_adapter
        with progress.waiting("write"):
            write(start, learner, out, training, force or is_written, progress)
    if as_json:
        more = {
            "facts": facts,
            "memory": memory,
            "parameters": sum(one.parameters for one in learning),
            "model_parameters": total,
        }
        print(json.dumps({"out": str(out), **about, **report(options, outcome), **more}))
        return
    _show(out, model or name, written, outcome, chosen)


def _changes(
    table: Any, given: dict[str, Any], upcycle: str | None, capacity: float | None, capacity_by: str | None
) -> dict[str, Any]:
    """The keys of a stage that options change; None takes one away."""
    changes = {key: value for key, value in given.items() if value is not None}
    if "trains" in changes:
        changes["lora"] = None
    if upcycle is not None:
        changes["upcycle"] = None if upcycle == "none" else upcycle
        if upcycle == "none":
            changes |= dict.fromkeys(("router_rank", "residual"))
    room = {key: value for key, value in (("factor", capacity), ("by", capacity_by)) if value is not None}
    if room:
        changes["capacity"] = None if capacity == 0 else {**table.get("capacity", {}), **room}
    return changes


def _chosen(recipe: Recipe, number: int, changes: dict[str, Any]) -> Stage:
    """The stage that options make of a recipe's. The recipe itself is sound, so what is wrong is an option."""
    stage = recipe.stage(number)
    try:
        return recipe.stage(number, changes) if changes else stage
    except UserError as error:
        key, _, reason = str(error).partition(":")
        raise UserError(f"--{key.replace('_', '-')}:{reason}") from None


def _with_recipe(options: Options, stage: Stage, context: int, ranks: int) -> Options:
    """The options, with the recipe's values where nothing was given."""
    batch_size = options.batch_size or stage.batch_size
    values = {
        **{option: stage.hyperparameters.get(key) for option, key in FROM_RECIPE.items()},
        "batch_size": batch_size,
        "accumulate": stage.parts(batch_size, ranks),
        "epochs": None if options.steps else stage.epochs,
        "max_length": min(stage.max_length, context),
    }
    return dataclasses.replace(
        options, **{key: value for key, value in values.items() if getattr(options, key) is None}
    )


def _choose(model: Model, stage: Stage, seed: int) -> list[Learning]:
    """Lets learn what learns."""
    if stage.lora is None:
        from gm_mlx.train.stages import select

        return [Learning(component, count) for component, count in select(model, stage.trains).items()]
    from gm_mlx.lora.attach import add_lora, parts

    wrapped = parts(add_lora(model, stage.lora, seed))
    return [Learning(part.component, part.parameters, part.matrices, part.ranks) for part in wrapped]


def _identity(stage: Stage) -> dict[str, Any]:
    """What of a stage makes a run another one; hyperparameters and data do so by themselves."""
    table = dataclasses.asdict(stage)
    keys = ("trains", "lora", "image_mode", "moe", "second_expert", "capacity", "allocation")
    return {key: table[key] for key in keys}


def _write(start: Start, model: Model, out: Path, training: dict[str, Any], force: bool, progress: Progress) -> None:
    """Writes the model's folder."""
    from gm_mlx.convert.card import model_card
    from gm_mlx.convert.source import licences
    from gm_mlx.folder import write_model_folder

    made = start.result(model, training)
    card = model_card(out.resolve().name, made["config"], made["gm"], start.folder)
    write_model_folder(out, **made, card=card, force=force, extra_files=licences(start.folder), progress=progress)


def _write_adapter(
    start: Start, model: Model, out: Path, training: dict[str, Any], force: bool, progress: Progress
) -> None:
    """Writes the adapter's folder."""
    from gm_mlx.lora.folder import save_adapter
    from gm_mlx.train.record import record_text

    about = f"Stage {training['stage']} of the recipe {training['recipe']}. {record_text(training)}"
    save_adapter(model, out, base=training["base"], force=force, gm={"training": training}, about=about)


def _show(out: Path, model: str, written: bool, outcome: Outcome, stage: Stage) -> None:
    """Says what was done, and what can be done with it."""
    show_outcome(out, outcome, written)
    if stage.lora is not None:
        say(f"merge it into the model: gm-mlx fuse {model} {out} -o {out}-fused")
    what = f"--model {out}" if stage.lora is None else f"--model {model} --adapter {out}"
    say(f'try it: gm-mlx chat {what} --image FILE --prompt "..."')
