"""``gm-mlx convert --to gguf``: what is asked for, checked before any work, and the folder for llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gm_mlx.cli.conversion import Changed, Opened
from gm_mlx.errors import UserError

if TYPE_CHECKING:
    from gm_mlx.config import ModelConfig
    from gm_mlx.convert.to_gguf.folder import Quantizer
    from gm_mlx.convert.to_gguf.imatrix import ImportanceMatrix
    from gm_mlx.convert.to_gguf.pieces import GGUFModel
    from gm_mlx.convert.to_gguf.types import Target
    from gm_mlx.convert.to_gguf.vision import PositionLayout

GUESSED_LAYOUT = (
    "llama.cpp is not installed here, so where it expects the position of CLIP's class token is a guess; a llama.cpp "
    "that wants the other order gives wrong image features: see --clip-layout"
)
ROUNDED_TWICE = (
    "the source is quantized: what its rounding took does not come back, and further rounding adds to it; convert what "
    "it was made from where you can"
)


@dataclass(frozen=True)
class GGUFPlan:
    """What ``--quantize``, ``--imatrix`` and ``--clip-layout`` ask for.

    Attributes:
        target: the types of tensors; None for the floats that the source has.
        imatrix: how much each input channel matters, or None.
        layout: where the class token's position stands; None to find out.
    """

    target: Target | None
    imatrix: ImportanceMatrix | None
    layout: PositionLayout | None


def plan_gguf(quantize: str | None, imatrix: Path | None, layout: PositionLayout | None) -> GGUFPlan:
    """Read the options; raises ``UserError`` for what cannot be done here, before anything is opened."""
    from gm_mlx.convert.to_gguf.imatrix import read_imatrix
    from gm_mlx.convert.to_gguf.quantize import check_quantizer
    from gm_mlx.convert.to_gguf.types import FLOAT_TYPES, find_target
    from gm_mlx.quant.recipes import RECIPES

    target = None
    if quantize is not None:
        recipes = {name: recipe.precisions for name, recipe in RECIPES.items()}
        target = find_target(quantize, recipes)
    if imatrix is not None and (target is None or target.main in FLOAT_TYPES):
        raise UserError("--imatrix tells a quantizer what matters; say what to make with --quantize, such as Q4_K_M")
    matrix = read_imatrix(imatrix) if imatrix is not None else None
    if target is not None and (target.needs_llama_cpp or matrix is not None):
        check_quantizer(target, matrix is not None)
    return GGUFPlan(target, matrix, layout)


def check_expressible(config: ModelConfig) -> None:
    """Refuse a model that llama.cpp has nothing for, before its files are read; raises ``UserError``."""
    from gm_mlx.convert.to_gguf.text import find_architecture
    from gm_mlx.convert.to_gguf.vision import check_vision

    find_architecture(config.text_config)
    check_vision(config)


def write_gguf_form(
    out: Path,
    opened: Opened,
    changed: Changed,
    plan: GGUFPlan,
    *,
    force: bool,
    progress: Callable[[str, int, int], None],
) -> list[str]:
    """Write OUT; returns notes for the user, which ``gm.json`` holds too, but for those about types of tensors."""
    from gm_mlx.convert.card import GGUF_USE, licence_of, model_card
    from gm_mlx.convert.source import licences
    from gm_mlx.convert.to_gguf.folder import gguf_pair, plain_target, write_gguf_folder
    from gm_mlx.quant.build import dequantized

    config, tensors = dequantized(changed.config, changed.tensors)
    packed = changed.config.extra.get("quantization") is not None
    notes = [ROUNDED_TWICE] if packed and plan.target is not None else []
    layout, guess = _layout(config, plan.layout)
    notes += guess
    folder = opened.folders.get("checkpoint")
    name = out.resolve().name
    pair = gguf_pair(
        config,
        tensors,
        opened.translation.processor,
        name=changed.gm.get("name") or name,
        gm=changed.gm,
        licence=licence_of(folder),
        layout=layout,
    )
    target = plan.target or plain_target(pair.text)
    gm = {**changed.gm, "notes": [*changed.notes, *notes], "clip_layout": pair.vision.metadata["gm.position_layout"]}
    gm["quantization"] = {"recipe": target.name, "summary": f"{target.name}, a type of llama.cpp"}
    return notes + write_gguf_folder(
        out,
        pair,
        gm=gm,
        card=model_card(name, config, gm, folder, library="gguf", use=GGUF_USE),
        target=target,
        quantizer=_quantizer(pair.text, target, plan.imatrix, progress),
        force=force,
        extra_files=licences(*opened.folders.values()),
        progress=progress,
    )


def _layout(config: ModelConfig, asked: PositionLayout | None) -> tuple[PositionLayout, list[str]]:
    """The layout to write, with a note where it is a guess."""
    if asked is not None or not config.vision_config.is_clip:
        return asked or "cls_first", []
    from gm_mlx.llama.probe import needed_layout

    try:
        return needed_layout(), []
    except UserError:
        return "cls_last", [GUESSED_LAYOUT]  # what llama.cpp has needed since 2025


def _quantizer(
    text: GGUFModel,
    target: Target,
    imatrix: ImportanceMatrix | None,
    progress: Callable[[str, int, int], None],
) -> Quantizer | None:
    """llama.cpp's quantizer, where gguf-py cannot write the file by itself."""
    from gm_mlx.convert.to_gguf.folder import Quantizer
    from gm_mlx.convert.to_gguf.quantize import estimate_bytes, imatrix_weights, quantize_gguf

    if not target.needs_llama_cpp and imatrix is None:
        return None
    shapes = {piece.name: piece.tensor.shape for piece in text.pieces}
    if imatrix is not None:
        imatrix_weights(shapes, target, imatrix)  # one of another model is refused before anything is written

    def run(plain: Path, made: Path) -> list[str]:
        return quantize_gguf(plain, made, target, imatrix=imatrix, progress=progress).notes()

    return Quantizer(run, estimate_bytes(shapes, target))
