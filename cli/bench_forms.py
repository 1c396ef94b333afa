"""Models that ``gm-mlx bench`` makes for itself: one source, written once for each name after ``--quantize``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

from gm_mlx.cli.console import Progress
from gm_mlx.errors import UserError
from gm_mlx.new_folder import check_space

if TYPE_CHECKING:
    from gm_mlx.bench.forms import Form
    from gm_mlx.cli.conversion import Opened
    from gm_mlx.config import ModelConfig

# Of a preset: both engines with 4 bits, and llama.cpp's two usual kinds of 4 bits.
DEFAULT = ("q4", "Q4_0", "Q4_K_M")
SPARE = 1.2  # some tensors of a GGUF file have more bits than most


def split_names(given: Sequence[str]) -> list[str]:
    """The names after ``--quantize``, which may be repeated and may be lists with commas.

    Raises:
        UserError: a name is no recipe and no type of llama.cpp, or stands there twice.
    """
    from gm_mlx.cli.conversion import check_recipe
    from gm_mlx.cli.gguf_output import plan_gguf

    names = [name.strip() for text in given for name in text.split(",") if name.strip()]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--quantize {name}: is named twice; once is enough")
        if _is_recipe(name):
            check_recipe(name)
        else:
            plan_gguf(name, None, None)
    return names


@contextmanager
def made_forms(
    source: str | None, preset: str | None, names: Sequence[str], seed: int, keep: Path | None, progress: Progress
) -> Iterator[list[Form]]:
    """Write a model in each form; they are gone at the end of the block, unless they are kept.

    Args:
        source: a checkpoint or a model folder that is not quantized; None with a preset.
        preset: a preset to fill with random weights; None with a source.
        names: from ``split_names``. Recipes give model folders for MLX, types of llama.cpp give GGUF files.
        seed: of random weights.
        keep: a folder for them, which does not exist yet.
        progress: told what is written.

    Raises:
        UserError: the source or preset is not there or cannot take a form, or the disk is too small.
    """
    opened = _open(source, preset, seed)
    _check_gguf(opened.translation.config, names)
    if keep is not None and os.path.lexists(keep):
        raise UserError(f"--keep {keep}: exists; choose another folder, or bench the models in it by their names")
    folder = Path(mkdtemp(prefix="gm-mlx-bench-")) if keep is None else _made(keep)
    done = False
    try:
        check_space(folder / "forms", _room(opened.translation.config, names))
        forms = [_write(folder, name, opened, progress) for name in names]
        done = True
        yield forms
    finally:
        if keep is None or not done:
            shutil.rmtree(folder, ignore_errors=True)


def _check_gguf(config: ModelConfig, names: Sequence[str]) -> None:
    """Refuse types of llama.cpp for a decoder that it does not have, before anything is written."""
    from gm_mlx.convert.to_gguf.text import find_architecture

    recipes = [name for name in names if _is_recipe(name)]
    if len(recipes) == len(names):
        return
    try:
        find_architecture(config.text_config)
    except UserError as error:
        raise UserError(f"{error}: name recipes only, such as --quantize {','.join(recipes) or 'q4'}") from None


def is_checkpoint(source: str) -> bool:
    """Whether a model has to be converted before it can run."""
    from gm_mlx.convert.source import is_model_folder
    from gm_mlx.hub import BUILT_IN, find_checkpoint

    return source != BUILT_IN and not is_model_folder(find_checkpoint(source))


def _made(folder: Path) -> Path:
    try:
        folder.mkdir()
    except OSError as error:
        raise UserError(f"--keep {folder}: cannot be made ({error.strerror}); choose another folder") from None
    return folder


def _room(config: ModelConfig, names: Sequence[str]) -> int:
    """About how many bytes all forms take, with what a quantizer needs on the way."""
    from gm_mlx.convert.to_gguf.types import GGML_TYPES, find_target
    from gm_mlx.footprint import planned_bytes
    from gm_mlx.inventory import model_layers
    from gm_mlx.quant.recipes import recipe_table

    layers = model_layers(config)
    in_floats, weights = sum(planned_bytes(layers, None).values()), sum(layer.total for layer in layers)
    per_weight = {kind: width / block for kind, block, width in GGML_TYPES.values()}
    total, aside = 0.0, 0
    for name in names:
        if _is_recipe(name):
            total += sum(planned_bytes(layers, recipe_table(config, name)).values())
        else:
            target = find_target(name, {})
            total += weights * per_weight[target.main] * SPARE
            aside = max(aside, in_floats if target.needs_llama_cpp else 0)
    return int(total) + aside


def _is_recipe(name: str) -> bool:
    from gm_mlx.quant.recipes import RECIPES

    return name in RECIPES


def _open(source: str | None, preset: str | None, seed: int) -> Opened:
    from gm_mlx.cli.conversion import Opened, open_source

    if preset is None:
        assert source is not None
        return open_source(source, None, None, None, None)
    from gm_mlx.convert.random_model import random_model

    return Opened(random_model(preset, seed), preset, {}, {})


def _write(folder: Path, name: str, opened: Opened, progress: Progress) -> Form:
    """Write one form into a folder of its own."""
    from gm_mlx.bench.forms import Form
    from gm_mlx.cli.conversion import change
    from gm_mlx.convert.card import model_card
    from gm_mlx.folder import write_model_folder

    out = folder / name
    title = f"{opened.name} {name}"
    if _is_recipe(name):
        changed = change(opened, None, False, None, name, None)
        write_model_folder(
            out,
            changed.config,
            changed.tensors,
            processor=opened.translation.processor,
            gm=changed.gm,
            card=model_card(title, changed.config, changed.gm),
            quantization=changed.table,
            dtype=changed.dtype,
            progress=progress,
        )
        return Form(title, "mlx", out)
    from gm_mlx.cli.gguf_output import plan_gguf, write_gguf_form
    from gm_mlx.convert.to_gguf.folder import MMPROJ_FILE, MODEL_FILE

    changed = change(opened, None, False, None, None, None)
    write_gguf_form(out, opened, changed, plan_gguf(name, None, None), force=False, progress=progress)
    return Form(title, "llama.cpp", out / MODEL_FILE, out / MMPROJ_FILE)
