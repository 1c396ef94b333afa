"""The options that ``gm-mlx lora`` and ``gm-mlx train`` share, and what can be wrong with them.

None stands for what was not given: its default depends on the data, the model or the recipe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from gm_mlx.errors import UserError
from gm_mlx.train.config import TrainConfig

BATCH_SIZE = 8
MAX_LENGTH = 2048  # LLaVA's model_max_length
# TrainConfig's keys whose options have other names.
RENAMED = {"checkpoint": "grad_checkpoint"}

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="PATH|REPO", help="A model folder, or a repository. [default: gm-tiny]"),
]
Data = Annotated[
    list[str],
    typer.Option("--data", metavar="PATH|REPO", help="A file, a folder or a data set; may be repeated."),
]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="The folder to write.")]
Images = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Where the data's images are. [default: where the data is]")
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format", metavar="NAME", help="llava, messages, texts or pairs. [default: what the first row looks like]"
    ),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=NAME", help="For pairs: what its image, question or answer is called; may be repeated."),
]
Split = Annotated[str, typer.Option(metavar="NAME", help="Of a Hugging Face data set.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out rows that cannot be learnt from.")]
HoldOut = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE|N", help="Rows to measure on and not learn from; 0 is none. [default: 0.05, at most 200 rows]"
    ),
]
ValidationData = Annotated[
    list[str] | None,
    typer.Option("--validation", metavar="PATH|REPO", help="Data to measure on, instead of --hold-out."),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help=f"Tokens of a row; longer ones lose turns. [default: {MAX_LENGTH}, or the context]"
    ),
]
Epochs = Annotated[float | None, typer.Option(metavar="N", help="How often each row is learnt from. [default: 3]")]
Steps = Annotated[int | None, typer.Option(min=1, metavar="N", help="Steps, instead of --epochs.")]
BatchSize = Annotated[int | None, typer.Option(min=1, metavar="N", help="Rows that a step learns from.")]
Accumulate = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Compute a step in so many parts, for less memory.")
]
LearningRate = Annotated[
    float | None, typer.Option(metavar="R", help="The highest learning rate. [default: by the model's width]")
]
Schedule = Annotated[str | None, typer.Option(metavar="NAME", help="How it falls: cosine, linear or constant.")]
Warmup = Annotated[float | None, typer.Option(metavar="SHARE", help="Of the steps, over which it rises.")]
WeightDecay = Annotated[float | None, typer.Option(metavar="W", help="AdamW's.")]
Clip = Annotated[float | None, typer.Option(metavar="N", help="Longest gradient; 0 for any.")]
Precision = Annotated[
    str | None, typer.Option(metavar="NAME", help="Of the arithmetic: auto, float32, bfloat16 or float16.")
]
GradCheckpoint = Annotated[
    bool | None,
    typer.Option("--grad-checkpoint/--no-grad-checkpoint", help="Compute blocks twice, for far less memory."),
]
Seed = Annotated[int | None, typer.Option(min=0, max=2**32 - 1, metavar="N", help="Of all that is random.")]
LogEvery = Annotated[int | None, typer.Option(min=1, metavar="N", help="Steps for each line of the log.")]
SaveEvery = Annotated[int | None, typer.Option(min=1, metavar="N", help="Steps between checkpoints.")]
Keep = Annotated[int | None, typer.Option(min=1, metavar="N", help="Checkpoints to keep.")]
ValidateEvery = Annotated[
    int | None,
    typer.Option(min=0, metavar="N", help="Steps between validations; 0 for the end only. [default: five in all]"),
]
Patience = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="Stop after so many validations without a better loss; 0: never.")
]
Workers = Annotated[int, typer.Option(min=0, metavar="N", help="Processes that decode images.")]
Run = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Checkpoints, log and curves. [default: OUT.run beside OUT]")
]
Restart = Annotated[bool, typer.Option("--restart", help="Forget what the run has done so far.")]
ReportTo = Annotated[list[str] | None, typer.Option(metavar="NAME", help="tensorboard, wandb, or both with a comma.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it is an adapter or a model folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")]


@dataclass(frozen=True)
class Options:
    """What both commands are told; fields are the parameters of the same names."""

    data: list[str]
    out: Path
    images: Path | None = None
    format: str | None = None
    columns: list[str] | None = None
    split: str = "train"
    skip_bad: bool = False
    hold_out: str | None = None
    validation: list[str] | None = None
    max_length: int | None = None
    epochs: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    accumulate: int | None = None
    learning_rate: float | None = None
    schedule: str | None = None
    warmup: float | None = None
    weight_decay: float | None = None
    clip: float | None = None
    precision: str | None = None
    grad_checkpoint: bool | None = None
    seed: int | None = None
    log_every: int | None = None
    save_every: int | None = None
    keep: int | None = None
    validate_every: int | None = None
    patience: int | None = None
    workers: int = 2
    run: Path | None = None
    restart: bool = False
    report_to: list[str] | None = None
    force: bool = False
    as_json: bool = False

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> Options:
        """Picks them out of a command's parameters, checked; see ``check``."""
        options = cls(**{field.name: parameters[field.name] for field in fields(cls) if field.name in parameters})
        options.check()
        return options

    @property
    def run_folder(self) -> Path:
        """Where checkpoints and the log go."""
        return self.run or self.out.with_name(f"{self.out.name}.run")

    @property
    def trackers(self) -> list[str]:
        """The names in ``--report-to``."""
        return [name.strip() for text in self.report_to or () for name in text.split(",") if name.strip()]

    @property
    def named_columns(self) -> dict[str, str]:
        """``--columns`` as a table."""
        return dict(text.split("=", 1) for text in self.columns or ())

    @property
    def held_out(self) -> float | int | None:
        """``--hold-out`` as a share or a number of rows; None for the default."""
        if self.validation or self.hold_out is None:
            return 0 if self.validation else None
        return int(self.hold_out) if self.hold_out.isascii() and self.hold_out.isdigit() else float(self.hold_out)

    def check(self) -> None:
        """Refuses what is wrong whatever the model and the data are, with a ``UserError``."""
        from gm_mlx.train.conversations import COLUMNS, KINDS
        from gm_mlx.train.trackers import check_trackers

        if not self.out.name:
            raise UserError(f"--out: {self.out} is no name for a folder; choose one")
        if self.format is not None and self.format not in KINDS:
            raise UserError(f"--format: {self.format!r} is unknown; known are {', '.join(KINDS)}")
        for text in self.columns or ():
            if "=" not in text or text.split("=")[0] not in COLUMNS:
                raise UserError(f"--columns: {text!r} is not KEY=NAME with a key of {', '.join(COLUMNS)}")
        if self.validation and self.hold_out is not None:
            raise UserError("--validation and --hold-out are two ways to say what is measured on; give one of them")
        self._check_hold_out()
        if self.epochs is not None and self.steps is not None:
            raise UserError("--epochs and --steps are two ways to say how long to train; give one of them")
        if self.epochs is not None and not (math.isfinite(self.epochs) and self.epochs > 0):
            raise UserError(f"--epochs: {self.epochs} is not a number above 0")
        # What was not given will be possible.
        later = {"steps": 1, "learning_rate": 1.0, "validate_every": 1}
        self.config(**{key: value for key, value in later.items() if getattr(self, key) is None})
        check_trackers(self.trackers)

    def config(self, **more: Any) -> TrainConfig:
        """The hyperparameters, with defaults where nothing was given.

        Raises:
            UserError: one is not possible; the message names its option.
        """
        given = {field.name: getattr(self, RENAMED.get(field.name, field.name), None) for field in fields(TrainConfig)}
        try:
            return TrainConfig(**{key: value for key, value in {**given, **more}.items() if value is not None})
        except UserError as error:
            key, _, reason = str(error).partition(":")
            raise UserError(f"--{RENAMED.get(key, key).replace('_', '-')}:{reason}") from None

    def _check_hold_out(self) -> None:
        try:
            count = self.held_out
        except ValueError:
            count = -1
        if count is None or (isinstance(count, int) and count >= 0) or (isinstance(count, float) and 0 <= count < 1):
            return
        raise UserError(f"--hold-out: {self.hold_out!r} is neither a share below 1 nor a number of rows")
