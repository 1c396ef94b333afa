"""What ``gm-mlx convert`` does to a model between opening it and writing it, whatever it is written as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from gm_mlx import __version__
from gm_mlx.cli.console import Progress
from gm_mlx.errors import UserError

if TYPE_CHECKING:
    from gm_mlx.config import ModelConfig, MoEConfig
    from gm_mlx.convert.translate import Translation
    from gm_mlx.quant.evaluate import Agreement
    from gm_mlx.tensors import Tensor


@dataclass
class Opened:
    """A model that is not written yet.

    Attributes:
        translation: the model.
        name: what the user called it.
        folders: where its files are, by role: "checkpoint", "vision", "base".
        names: what each role's folder was called.
    """

    translation: Translation
    name: str
    folders: dict[str, Path]
    names: dict[str, str]


@dataclass
class Changed:
    """A model as it is to be written; see ``write_model_folder``."""

    config: ModelConfig
    tensors: Mapping[str, Tensor]
    table: dict[str, Any] | None
    dtype: str | None
    gm: dict[str, Any]
    notes: list[str]


def refuse(options: Mapping[str, Any], why: str) -> None:
    """Refuses options that have been given where they have no meaning."""
    if given := [name for name, value in options.items() if value is not None]:
        raise UserError(f"{given[0]} is about PyTorch checkpoints; leave it out {why}")


def check_recipe(name: str | None) -> None:
    if name is None:
        return
    from gm_mlx.quant.recipes import find_recipe

    if find_recipe(name).calibrated:
        raise UserError(
            f"--quantize {name}: looks at calibration data; convert without it first, and then run `gm-mlx quantize "
            f"OUT -o OUT2 --recipe {name}`"
        )


def open_source(
    source: str,
    vision: str | None,
    base: str | None,
    template: str | None,
    scale_image_features: bool | None,
    new_projector: bool = False,
) -> Opened:
    """Finds a checkpoint or a model folder, and what it lacks."""
    from gm_mlx.convert.source import is_model_folder, reopen
    from gm_mlx.hub import BUILT_IN, find_checkpoint, find_model

    folder = find_model() if source == BUILT_IN and not Path(source).is_dir() else find_checkpoint(source)
    if is_model_folder(folder):
        checkpoint_only = {
            "--vision": vision,
            "--base": base,
            "--scale-image-features": scale_image_features,
            "--new-projector": new_projector or None,
        }
        refuse(checkpoint_only, f"with {source}, which is a gm-mlx model already")
        return Opened(reopen(folder, template=template), source, {"checkpoint": folder}, {"checkpoint": source})
    from gm_mlx.convert.checkpoint import open_checkpoint
    from gm_mlx.convert.towers import missing_tower
    from gm_mlx.convert.translate import translate

    checkpoint = open_checkpoint(folder)
    names = {"checkpoint": source}
    folders = {"checkpoint": folder}
    if base is not None:
        names["base"], folders["base"] = base, find_checkpoint(base)
    if vision is not None:
        names["vision"], folders["vision"] = vision, find_checkpoint(vision)
    elif tower := missing_tower(checkpoint):
        try:
            names["vision"], folders["vision"] = tower, find_checkpoint(tower)
        except UserError as error:
            raise UserError(f"{error}; it is the vision tower of {source}: --vision takes a folder with it") from None
    if new_projector:
        from gm_mlx.convert.new_projector import with_new_projector

        checkpoint = with_new_projector(checkpoint, folders["vision"])
    translation = translate(
        checkpoint,
        vision=folders.get("vision"),
        base=folders.get("base"),
        template=template,
        scale_image_features=scale_image_features,
    )
    if new_projector:
        translation.notes.append("the projector is new, with random weights: train it by gm-mlx train --stage 1")
    return Opened(translation, source, folders, names)


def change(
    opened: Opened,
    moe: MoEConfig | None,
    split: bool,
    router_rank: int | None,
    recipe: str | None,
    dtype: str | None,
) -> Changed:
    """Does what is asked for with a model, in the order in which one thing needs the other."""
    made = opened.translation
    config, tensors, table = made.config, made.tensors, None
    gm: dict[str, Any] = {**made.provenance, "made_by": f"gm-mlx {__version__}"}
    notes = list(made.notes)
    if config.extra.get("quantization") is not None and (recipe or moe):
        option = "--quantize" if recipe else "--upcycle"
        raise UserError(f"{opened.name}: is quantized, which {option} cannot start from; take what it was made from")
    if moe is not None:
        from gm_mlx.upcycle import upcycle

        config, tensors = upcycle(config, tensors, moe, split=split)
        gm["upcycle"] = {**asdict(moe), "from": "parts of dense FFNs" if split else "copies of dense FFNs"}
    if router_rank is not None:
        from gm_mlx.quant.low_rank import low_rank_routers

        config, tensors, report = low_rank_routers(config, tensors, router_rank)
        gm["routers"] = report.to_dict()
    if recipe is not None:
        from gm_mlx.quant.build import file_dtype
        from gm_mlx.quant.recipes import find_recipe, plan

        chosen = plan(config, recipe)
        table, dtype = chosen.table, dtype or file_dtype(tensors)
        gm["quantization"] = {"recipe": recipe, "summary": find_recipe(recipe).summary}
        notes += [f"{path} {what}" for path, what in chosen.adjusted.items()]
    if dtype is not None:
        gm["dtype"] = str(dtype)
    return Changed(config, tensors, table, dtype, {**gm, "notes": notes}, notes)


def agreement(
    dense: Translation, split: Changed, calibration: Path | None, samples: int, progress: Progress
) -> Agreement:
    """Measures what splitting costs before any training; one of the two models is in memory at a time."""
    from gm_mlx.quant.build import build_model
    from gm_mlx.quant.calibration import load_samples
    from gm_mlx.quant.evaluate import compare, record

    with TemporaryDirectory(prefix="gm-mlx-") as folder:
        prompts = load_samples(calibration, samples)
        record(build_model(dense.config, dense.tensors), dense.processor, prompts, Path(folder), progress)
        return compare(build_model(split.config, split.tensors), Path(folder), progress)
