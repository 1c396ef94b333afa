"""Recipes: how a system of the papers is trained, stage by stage, as a YAML file.

    name: My system
    stages:
      1:
        trains: [projector]
        template: plain
        learning_rate: 1e-3
        ...

The recipes in ``examples/recipes`` are known by name. A key that is unknown, or a value of another type, is an error:
a misspelt key would be a silently different training.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml

from gm_mlx.capacity import Capacity
from gm_mlx.chat_template import TEMPLATES
from gm_mlx.config import MoEConfig
from gm_mlx.config_checks import JSON_TYPES, is_int
from gm_mlx.errors import UserError
from gm_mlx.evf import ImgGBPR
from gm_mlx.images import Mode
from gm_mlx.inventory import COMPONENTS
from gm_mlx.lora.config import LoRAConfig
from gm_mlx.train.config import TrainConfig
from gm_mlx.train.stages import WORDS
from gm_mlx.upcycle import parse_upcycle

HERE = Path(__file__).resolve()
# In an installed package, and in the repository.
FOLDERS = (HERE.parents[1] / "recipes", HERE.parents[2] / "examples" / "recipes")

# Keys of TrainConfig that a stage may have; the others depend on the data or on the machine.
HYPERPARAMETERS = (
    "learning_rate", "schedule", "warmup", "decay", "weight_decay", "betas", "eps", "clip", "precision", "checkpoint",
)  # fmt: skip
# How all experts of a token but its first are found.
SECOND_EXPERTS = ("largest", "drawn")


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe. Its keys in the file are ``KEYS`` and ``HYPERPARAMETERS``.

    Attributes:
        hyperparameters: keys of ``TrainConfig`` and their values; ``learning_rate`` is one of them.
        trains: what learns whole: components of ``gm_mlx.inventory``, or ``stages.WORDS``.
        lora: or the LoRA that is trained in its place; the stage then makes an adapter.
        template: the chat template that rows are written with; None for the model's own.
        image_mode: how images become squares; None for the model's own way.
        epochs: how often each row is learnt from.
        batch_size: rows of a step.
        rows: rows that are computed at a time, on each machine: a step is made in as many parts as that takes. What it
            is changes memory and speed, and not what is learnt. None for all rows of a step at once.
        max_length: tokens of a row, or the model's context if that is shorter.
        moe: experts that are made of a dense model before training; None for none. In the file it is ``upcycle``, as
            the option ``--upcycle`` takes it, with ``router_rank`` and ``residual`` beside it.
        aux_loss_coef: weight of the load-balancing loss; None for the model's own.
        z_loss_coef: weight of the router z-loss.
        second_expert: of ``SECOND_EXPERTS``: the one with the second largest probability, or one that is drawn in
            training as DeepSpeed does; see ``moe.set_gumbel``.
        capacity: how many tokens experts take; None for all that come.
        allocation: how positions are allocated to Eve's vision FFNs; None for as they ask.
    """

    hyperparameters: Mapping[str, Any]
    trains: tuple[str, ...] = ()
    lora: LoRAConfig | None = None
    template: str | None = None
    image_mode: str | None = None
    epochs: float = 1.0
    batch_size: int = 8
    rows: int | None = None
    max_length: int = 2048
    moe: MoEConfig | None = None
    aux_loss_coef: float | None = None
    z_loss_coef: float = 0.0
    second_expert: str = SECOND_EXPERTS[0]
    capacity: Capacity | None = None
    allocation: ImgGBPR | None = None

    def parts(self, batch_size: int, ranks: int = 1) -> int:
        """Parts in which so many machines compute a step."""
        return 1 if self.rows is None else -(-batch_size // (self.rows * ranks))


@dataclass(frozen=True)
class Recipe:
    """A system's training.

    Attributes:
        name: the system.
        file: where it was read.
        stages: its stages by number.
        tables: the same, as they stand in the file.
    """

    name: str
    file: Path
    stages: Mapping[int, Stage]
    tables: Mapping[int, Mapping[str, Any]]

    def stage(self, number: int, changes: Mapping[str, Any] | None = None) -> Stage:
        """A stage.

        Args:
            number: its number.
            changes: other values for keys of it; None takes a key away.

        Raises:
            UserError: the recipe has no such stage, or a change is not possible.
        """
        if number not in self.stages:
            there = ", ".join(map(str, self.stages))
            raise UserError(f"--stage {number}: {self.file} has the stages {there}; choose one of them")
        if not changes:
            return self.stages[number]
        table = {**self.tables[number], **changes}
        return parse_stage({key: value for key, value in table.items() if value is not None})


def recipe_names() -> list[str]:
    """The names of the recipes that come with gm-mlx."""
    return sorted({file.stem for folder in FOLDERS for file in folder.glob("*.yaml")})


def read_recipe(name: str) -> Recipe:
    """Read a recipe.

    Args:
        name: one of ``recipe_names``, or a YAML file.

    Raises:
        UserError: there is none, or it is not as this version knows recipes; the message names file and key.
    """
    file = _find(name)
    try:
        table = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML ({' '.join(str(error).split())}); correct it") from None
    with _named(str(file)):
        table = _table(table, ("name", "stages"), "the recipe")
        stages = table.get("stages")
        if not isinstance(table.get("name"), str) or not isinstance(stages, dict) or not stages:
            raise UserError("needs a name, and stages by number; see the recipes of gm-mlx for what they are")
        found = {}
        for number, stage in stages.items():
            if not is_int(number):
                raise UserError(f"stages: {number!r} is not a number")
            with _named(f"stage {number}"):
                found[number] = parse_stage(stage)
        return Recipe(table["name"], file, found, stages)


def parse_stage(table: object) -> Stage:
    """A stage from its keys.

    Raises:
        UserError: a key is unknown, missing, or has a value that is not possible.
    """
    table = _table(table, (*KEYS, *HYPERPARAMETERS), "a stage")
    hyperparameters = {key: table.pop(key) for key in HYPERPARAMETERS if key in table}
    if "learning_rate" not in hyperparameters:
        raise UserError("learning_rate: is missing; every stage has its own")
    TrainConfig(steps=1, **hyperparameters)  # says what is not possible
    if isinstance(hyperparameters.get("betas"), list):
        hyperparameters["betas"] = tuple(hyperparameters["betas"])
    values = {}
    for key, value in table.items():
        with _named(key):
            values[key] = KEYS[key](value)
    if ("trains" in values) == ("lora" in values):
        raise UserError("trains: says what learns whole, lora what gets an adapter; give one of the two")
    if "lora" in values and "upcycle" in values:
        raise UserError("upcycle: an adapter is for a model that is there; make that by gm-mlx convert --upcycle")
    moe = values.pop("upcycle", None)
    shape = {name: values.pop(key) for key, name in MOE.items() if key in values}
    if shape and moe is None:
        raise UserError(f"{next(key for key in MOE if key in table)}: is of experts that are made; give upcycle too")
    if moe is not None:
        balance = values.get("aux_loss_coef", moe.aux_loss_coef)
        values["moe"] = dataclasses.replace(moe, aux_loss_coef=balance, **shape)
    return Stage(hyperparameters, **values)


def _find(name: str) -> Path:
    if Path(name).suffix in (".yaml", ".yml"):
        file = Path(name).expanduser()
        if not file.is_file():
            raise UserError(f"--recipe {name}: no such file")
        return file
    for folder in FOLDERS:
        if name in recipe_names() and (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    raise UserError(f"--recipe {name}: no such recipe; name one of {', '.join(recipe_names())}, or a .yaml file")


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-3 is a number, and a key that stands twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


# YAML 1.2's numbers; PyYAML knows those of 1.1, which need a point.
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+"), list("-+0123456789"))


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Put in front of errors where they come from."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _table(value: object, known: tuple[str, ...], what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"is {value!r} and not a table of keys")
    if unknown := [key for key in value if key not in known]:
        raise UserError(f"{unknown[0]}: {what} has no such key; it may have {', '.join(known)}")
    return dict(value)


T = TypeVar("T")


def _a(kind: type[T]) -> Callable[[object], T]:
    """Makes one of a dataclass from a table."""

    def make(value: object) -> T:
        types = {one.name: str(one.type) for one in fields(kind)}  # type: ignore[arg-type]
        table = _table(value, tuple(types), "this")
        for key, own in table.items():
            what, fits = JSON_TYPES.get(types[key], ("", lambda own: True))
            if not fits(own):
                raise UserError(f"{key}: {own!r} is not {what}")
        return kind(**table)

    return make


def _lora(value: object) -> LoRAConfig:
    if isinstance(value, dict) and "targets" in value:
        with _named("targets"):
            value = {**value, "targets": _words(value["targets"])}
    return _a(LoRAConfig)(value)


def _number(least: float, whole: bool = False) -> Callable[[object], Any]:
    what, fits = JSON_TYPES["int" if whole else "float"]

    def check(value: Any) -> Any:
        if not fits(value) or not least <= value < math.inf:
            raise UserError(f"{value!r} is not {what} of {least:g} or more")
        return value

    return check


def _one_of(*allowed: str) -> Callable[[object], str]:
    def check(value: object) -> str:
        if value not in allowed:
            raise UserError(f"{value!r} is not one of {', '.join(allowed)}")
        return str(value)

    return check


def _yes_or_no(value: object) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{value!r} is not true or false")
    return value


def _words(value: object) -> tuple[str, ...]:
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise UserError(f"{value!r} is not a list of names")
    return tuple(words)


def _trains(value: object) -> tuple[str, ...]:
    return tuple(map(_one_of(*COMPONENTS, *WORDS), _words(value)))


def _upcycle(value: object) -> MoEConfig:
    try:
        return parse_upcycle(str(value))
    except UserError as error:
        raise UserError(str(error).removeprefix("--upcycle ")) from None


# Keys of a stage, and what makes a field's value of a key's.
KEYS: dict[str, Callable[[Any], Any]] = {
    "trains": _trains,
    "lora": _lora,
    "template": _one_of(*TEMPLATES),
    "image_mode": _one_of(*get_args(Mode)),
    "epochs": _number(1e-6),
    "batch_size": _number(1, whole=True),
    "rows": _number(1, whole=True),
    "max_length": _number(1, whole=True),
    "upcycle": _upcycle,
    "router_rank": _number(0, whole=True),
    "residual": _yes_or_no,
    "aux_loss_coef": _number(0),
    "z_loss_coef": _number(0),
    "second_expert": _one_of(*SECOND_EXPERTS),
    "capacity": _a(Capacity),
    "allocation": _a(ImgGBPR),
}
# What else may be said of the experts that are made: keys, and fields of MoEConfig.
MOE = {"router_rank": "router_rank", "residual": "use_residual"}
