"""``gm-mlx lora``: an adapter trained on the user's own data."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gm_mlx.cli import training_options as shared
from gm_mlx.cli.console import Debug, Progress, say
from gm_mlx.cli.training import find_base, planned, read_data, report, run_shown, show_outcome
from gm_mlx.cli.training_facts import Learning, show_data, show_learning, show_memory
from gm_mlx.cli.training_options import Options
from gm_mlx.errors import UserError
from gm_mlx.train.config import TrainConfig

if TYPE_CHECKING:
    from gm_mlx.lora.config import LoRAConfig

RANK = 8
LEARNING_RATE, WIDTH = 2e-4, 4096  # of LLaVA's LoRA, and of its decoder


def lora(
    data: shared.Data,
    out: shared.Out,
    model: shared.Model = None,
    rank: Annotated[int | None, typer.Option(min=1, metavar="N", help=f"Of the adapter. [default: {RANK}]")] = None,
    alpha: Annotated[
        float | None, typer.Option(metavar="A", help="Its strength: alpha / rank. [default: twice the rank]")
    ] = None,
    dropout: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Of inputs that it does not see while training. [default: 0]")
    ] = None,
    rslora: Annotated[bool, typer.Option("--rslora", help="alpha / sqrt(rank) as strength, for large ranks.")] = False,
    dora: Annotated[bool, typer.Option("--dora", help="Learn lengths and directions of weights apart.")] = False,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Where to: attention, dense_ffn, experts, projector, embeddings, or a pattern such as q_proj; may be "
            "repeated. [default: the first four]",
        ),
    ] = None,
    router: Annotated[bool, typer.Option("--router", help="The routers too.")] = False,
    tower: Annotated[bool, typer.Option("--tower", help="The vision tower too.")] = False,
    init: Annotated[
        str | None, typer.Option(metavar="FOLDER|REPO", help="Train an adapter on, instead of a new one.")
    ] = None,
    peft: Annotated[bool, typer.Option("--peft", help="Write each expert by itself, as peft has them.")] = False,
    images: shared.Images = None,
    format: shared.Format = None,
    columns: shared.Columns = None,
    split: shared.Split = "train",
    skip_bad: shared.SkipBad = False,
    hold_out: shared.HoldOut = None,
    validation: shared.ValidationData = None,
    max_length: shared.MaxLength = None,
    epochs: shared.Epochs = None,
    steps: shared.Steps = None,
    batch_size: shared.BatchSize = shared.BATCH_SIZE,
    accumulate: shared.Accumulate = TrainConfig.accumulate,
    learning_rate: shared.LearningRate = None,
    schedule: shared.Schedule = TrainConfig.schedule,
    warmup: shared.Warmup = TrainConfig.warmup,
    weight_decay: shared.WeightDecay = TrainConfig.weight_decay,
    clip: shared.Clip = TrainConfig.clip,
    precision: shared.Precision = TrainConfig.precision,
    grad_checkpoint: shared.GradCheckpoint = TrainConfig.checkpoint,
    seed: shared.Seed = TrainConfig.seed,
    log_every: shared.LogEvery = None,
    save_every: shared.SaveEvery = None,
    keep: shared.Keep = TrainConfig.keep,
    validate_every: shared.ValidateEvery = None,
    patience: shared.Patience = TrainConfig.patience,
    workers: shared.Workers = 2,
    run: shared.Run = None,
    restart: shared.Restart = False,
    report_to: shared.ReportTo = None,
    force: shared.Force = False,
    as_json: shared.AsJson = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a model on your own data: train a LoRA adapter, experts included.

    The same command again goes on with a run that was interrupted.
    """
    options = Options.of(locals())
    # Heavy imports only now: a misspelt option is told at once.
    from gm_mlx.config import ModelConfig
    from gm_mlx.lora.attach import add_lora, parts
    from gm_mlx.lora.folder import ADAPTER_FILE, find_adapter, load_adapter, save_adapter
    from gm_mlx.processor import Processor
    from gm_mlx.train.record import record_text
    from gm_mlx.train.run_folder import check_places, fingerprint
    from gm_mlx.weights import load_model, num_parameters, weight_files

    shape = {"rank": rank, "alpha": alpha, "dropout": dropout, "targets": target, "rslora": rslora, "dora": dora}
    config = _config({**shape, "router": router, "tower": tower}, init)
    base, name = find_base(model)
    older = None if init is None else find_adapter(init)
    is_written = check_places(
        out, options.run_folder, force=force, restart=restart, sources=[base, *([older] if older else [])]
    )
    processor = Processor.from_folder(base)
    text_config = ModelConfig.load(base).text_config
    prepared = read_data(options, processor, text_config.max_position_embeddings)
    plan, rows_of_step = planned(options, len(prepared.train), learning_rate=_learning_rate(text_config.hidden_size))
    progress = Progress()
    with progress.waiting("load"):
        learner = load_model(base)
        total = num_parameters(learner)
        if older is None:
            wrapped = add_lora(learner, config, plan.seed)
        else:
            wrapped = load_adapter(learner, older, adapter="default", trainable=True)
        identity = {
            "model": fingerprint(weight_files(base)),
            "lora": dataclasses.asdict(config) if older is None else fingerprint([older / ADAPTER_FILE]),
        }
    facts = show_data(prepared, plan, rows_of_step)
    learning = [Learning(part.component, part.parameters, part.matrices, part.ranks) for part in parts(wrapped)]
    show_learning(learning, total)
    memory = show_memory(learner, prepared, plan, rows_of_step)
    outcome = run_shown(
        options,
        learner,
        processor,
        prepared,
        plan,
        rows_of_step,
        identity=identity,
        table={"command": "lora", "model": name, "out": str(out), "lora": identity["lora"]},
    )
    written = outcome.trained or force or not is_written
    if written:
        training = {"run": outcome.id, **outcome.record}
        save_adapter(
            learner,
            out,
            base=name,
            peft=peft,
            force=force or is_written,
            gm={"training": training},
            about=record_text(outcome.record),
        )
    if as_json:
        more = {
            "facts": facts,
            "memory": memory,
            "parameters": sum(one.parameters for one in learning),
            "model_parameters": total,
        }
        print(json.dumps({"adapter": str(out), "model": name, **report(options, outcome), **more}))
        return
    show_outcome(out, outcome, written)
    _show_use(model or name, out, learning, dora)


def _config(shape: dict[str, Any], init: str | None) -> LoRAConfig:
    """The shape of a new adapter; of one that is trained on, nothing is to be given."""
    from gm_mlx.lora.config import LoRAConfig

    given = {key: value for key, value in shape.items() if value is not None and value is not False}
    if init is not None and given:
        option = next(iter(given)).removesuffix("s")
        raise UserError(f"--{option}: the adapter of --init has its own; leave one of the two out")
    given.setdefault("rank", RANK)
    given.setdefault("alpha", 2.0 * given["rank"])
    try:
        return LoRAConfig(**given)
    except UserError as error:
        option = "" if str(error).partition(":")[0] in shape else "target "
        raise UserError(f"--{option}{error}") from None


def _learning_rate(width: int) -> float:
    """A narrow model needs a higher rate: with LLaVA's, gm-tiny's loss has not come down after three epochs."""
    return float(f"{LEARNING_RATE * (WIDTH / width) ** 0.5:.1g}")


def _show_use(model: str, out: Path, learning: list[Learning], dora: bool) -> None:
    """Says what can be done with the adapter."""
    from gm_mlx.lora.card import FOR_GGUF

    say(f'try it: gm-mlx chat --model {model} --adapter {out} --image FILE --prompt "..."')
    say(f"merge it into the model: gm-mlx fuse {model} {out} -o {out}-fused")
    if FOR_GGUF.issuperset(one.component for one in learning) and not dora:
        say(f"for llama.cpp: gm-mlx convert {out} --to gguf-lora --base {model} -o {out}.gguf")
    else:
        say(f"for llama.cpp, once it is merged: gm-mlx convert {out}-fused --to gguf -o {out}-gguf")
