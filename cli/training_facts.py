"""What ``gm-mlx lora`` and ``gm-mlx train`` say before they train: the data, what learns, and the memory of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from gm_mlx.cli.console import note, say, size
from gm_mlx.cli.system import usable_memory

if TYPE_CHECKING:
    from gm_mlx.model import Model
    from gm_mlx.train.config import TrainConfig
    from gm_mlx.train.prepare import Prepared


class Learning(NamedTuple):
    """A component that learns: its parameters and, with LoRA, the matrices that they are at and their ranks."""

    component: str
    parameters: int
    matrices: int | None = None
    ranks: Sequence[int] = ()


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    from gm_mlx.train.ranks import Ranks

    return Ranks().rank == 0


def show_data(prepared: Prepared, config: TrainConfig, batch_size: int) -> dict[str, Any]:
    """Says what there is to learn from; returns it as JSON values."""
    from gm_mlx.train.batches import Plan, padding
    from gm_mlx.train.facts import facts
    from gm_mlx.train.loader import MULTIPLE

    lengths = prepared.train.lengths
    plan = Plan(lengths, batch_size, config.seed)
    table = facts(prepared.train, padding(plan, lengths, config.accumulate, MULTIPLE))
    table["held_out"] = len(prepared.held_out)
    if not is_first():
        return table
    tokens, answers = table["tokens"], table["answer_tokens"]
    say(
        f"{table['rows']:,} rows with {table['images']:,} images to learn from; {table['held_out']:,} held out to "
        "measure on"
    )
    say(
        f"{tokens['total']:,} tokens, {tokens['min']:,} to {tokens['max']:,} in a row; {answers['total']:,} of them "
        f"are answers to learn; {table['padding']:.0%} padding in batches of {batch_size}"
    )
    if table["rows_shortened"]:
        note(f"{table['rows_shortened']:,} rows were too long and lost {table['turns_dropped']:,} turns at their ends")
    if table["duplicates"]:
        note(f"{table['duplicates']:,} rows repeat earlier ones")
    return table


def show_learning(learning: Sequence[Learning], total: int) -> None:
    """Prints a table of what learns.

    Args:
        learning: the components.
        total: parameters of the whole model.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if not is_first():
        return
    with_lora = any(one.ranks for one in learning)
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("learns")
    for title in (*(("matrices", "rank") if with_lora else ()), "parameters", "of the model"):
        grid.add_column(title, justify="right", no_wrap=True)
    whole = Learning("all", sum(one.parameters for one in learning), sum(one.matrices or 0 for one in learning))
    for one in (*learning, *([whole] if len(learning) > 1 else [])):
        lora = (f"{one.matrices:,}", ", ".join(map(str, one.ranks))) if with_lora else ()
        grid.add_row(one.component, *lora, f"{one.parameters:,}", f"{one.parameters / total:.2%}")
    Console(stderr=True).print(grid)


def show_memory(model: Model, prepared: Prepared, config: TrainConfig, batch_size: int) -> dict[str, int]:
    """Says how much memory a step takes, and what takes less if there is not so much; returns it as JSON values.

    An estimate is no reason to refuse a run.

    Args:
        model: with what learns not frozen.
        prepared: the data.
        config: hyperparameters.
        batch_size: rows of a step.
    """
    from gm_mlx.train.memory import Demand, savings
    from gm_mlx.train.ranks import Ranks

    demand = Demand.of(model, prepared.train, config, batch_size, Ranks().size)
    needed, usable = demand.bytes, usable_memory()
    if is_first():
        say(f"memory: about {size(needed)} for a step")
        if needed > usable:
            ways, together = savings(demand, model, prepared.train, config)
            said = ", ".join(f"{way} ({size(least)})" for way, least in ways) or "a smaller model"
            every = f", and with all of them {size(together)}" if len(ways) > 1 else ""
            say(f"warning: this machine has {size(usable)}; it takes less with {said}{every}")
    return {"step_bytes": needed, "usable_bytes": usable}
