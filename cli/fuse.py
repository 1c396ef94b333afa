"""``gm-mlx fuse``: LoRA adapters merged into a model's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gm_mlx.cli.console import Debug, Progress, note, say, with_strength

if TYPE_CHECKING:
    from gm_mlx.quant.fuse import Effect


def fuse(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, or a repository with one.")],
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER[=WEIGHT]...", help="Adapters and how strong each is; 1 is as it was trained."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="The model folder to write.")],
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Leave the whole model in floats, so that nothing is rounded again.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is a model folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Merge LoRA adapters into a model, and say what packing the result again costs."""
    # Heavy imports only now: a misspelt option is told at once.
    from gm_mlx.hub import find_model
    from gm_mlx.lora.folder import find_adapter
    from gm_mlx.new_folder import check_out
    from gm_mlx.quant.fuse import fuse_folders, ordered, write_fused

    folder = find_model(model)
    found = [(find_adapter(name), weight) for name, weight in map(with_strength, adapters)]
    check_out(out, force=force, sources=[folder, *(path for path, _ in found)])
    progress = Progress()
    with progress.waiting("load"):
        fused = fuse_folders(folder, found, dequantize=dequantize)
        write_fused(fused, out, model, force=force, progress=progress)

    effects = ordered(fused.effects)
    if as_json:
        print(json.dumps({"model": model, "adapters": fused.adapters, "out": str(out), "parts": _facts(effects)}))
        return
    _show(effects)
    for name, effect in effects.items():
        if effect.rounding > effect.change:
            note(f"{name}: packing rounds away more than the adapters change; add --dequantize, or do not fuse")
    say(f'{out} is ready: gm-mlx chat --model {out} --image FILE --prompt "..."')


def _facts(effects: dict[str, Effect]) -> dict[str, dict[str, float]]:
    """Returns what is known of each component, as JSON values."""
    return {
        name: {"modules": effect.modules, "change": effect.change, "rounding": effect.rounding}
        for name, effect in effects.items()
    }


def _show(effects: dict[str, Effect]) -> None:
    """Prints the table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("part")
    for title in ("modules", "changed by the adapters", "rounding adds"):
        grid.add_column(title, justify="right", no_wrap=True)
    for name, effect in effects.items():
        grid.add_row(name, str(effect.modules), f"{effect.change:.3%}", f"{effect.rounding:.3%}")
    Console().print(grid)
