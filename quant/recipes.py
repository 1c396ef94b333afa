"""Quantization recipes: which part of a model gets how many bits. Data, and the table that a model makes of it.

Four fifths of a LLaVA-GM's weights are feed-forward networks, and two thirds are experts of which a token uses half. So
the bytes are saved there, and everything else can afford more bits:

- attention is a small part of the weights (3 % of 2B, 8 % of 7B) and every later token reads its errors: 8 bits;
- Gemma's embeddings are its head too, so their errors go straight into the logits: 8 bits. Widths of 2, 4 and 8 are
  also the ones that ``gm_mlx.cpu`` has a fast path for;
- an image's features enter the prompt as hundreds of tokens, so the tower keeps 8 bits and the projector its floats;
- routers, norms, biases and the patch embedding are no layers that quantize: together they are a few megabytes, and a
  router in 4 bits sends tokens to the wrong experts.

LLaVA-GM-2B takes 3.6 GB (10^9 bytes) as ``q4``, 5.2 bits a weight; 3.1 GB as ``q4-all``, 4.5 bits a weight.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gm_mlx.config import ModelConfig
from gm_mlx.errors import UserError
from gm_mlx.inventory import Layer, model_layers


class Precision(NamedTuple):
    """How a layer's weights are packed, by mlx-lm's names."""

    bits: int
    group_size: int
    mode: str = "affine"

    def to_dict(self) -> dict[str, Any]:
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


FLOAT = None  # the layer keeps its floats, in half precision

# A group has a scale and a bias in half precision: 32 bits, half a bit per weight in groups of 64.
Q2, Q3, Q4, Q6, Q8 = (Precision(bits, 64) for bits in (2, 3, 4, 6, 8))
MXFP4 = Precision(4, 32, "mxfp4")  # a scale of 8 bits per group: 4.25 bits a weight
# Where rows do not divide into the recipe's groups, affine groups of this size are tried before the layer stays float.
SMALLER_GROUP = 32


@dataclass(frozen=True)
class Recipe:
    """A recipe.

    Attributes:
        summary: one line for help texts and model cards.
        precisions: by component of ``gm_mlx.inventory``; one that is not named keeps its floats. Routers and norms
            have no layers that quantize.
        calibrated: whether it looks at calibration data, so that only ``gm-mlx quantize`` can follow it.
    """

    summary: str
    precisions: dict[str, Precision | None] = field(default_factory=dict)
    calibrated: bool = False


# The dense FFN beside experts is a dense FFN, and an untied head counts as embeddings.
_Q4: dict[str, Precision | None] = {
    "experts": Q4,
    "dense_ffn": Q4,
    "attention": Q8,
    "embeddings": Q8,
    "tower": Q8,
    "projector": FLOAT,
}

RECIPES = {
    "q4": Recipe("feed-forward networks in 4 bits, attention, embeddings and tower in 8", _Q4),
    "q8": Recipe("everything but the projector in 8 bits", {**dict.fromkeys(_Q4, Q8), "projector": FLOAT}),
    "q4-all": Recipe("every layer in 4 bits, tower and projector too", dict.fromkeys(_Q4, Q4)),
    "q3-experts": Recipe("q4 with experts in 3 bits", {**_Q4, "experts": Q3}),
    "mxfp4": Recipe("q4 with feed-forward networks in MXFP4", {**_Q4, "experts": MXFP4, "dense_ffn": MXFP4}),
    "tiny": Recipe(
        "experts in 4 bits, the rest of the decoder in 8, tower and projector in floats: what gm-tiny ships with",
        {"experts": Q4, "dense_ffn": Q8, "attention": Q8, "embeddings": Q8, "tower": FLOAT, "projector": FLOAT},
    ),
    # What it says here is what it does not choose.
    "mixed": Recipe(
        "bits for each part of each decoder layer, by measured sensitivity under --target-size",
        {"tower": Q8, "projector": FLOAT},
        calibrated=True,
    ),
    "awq": Recipe("q4 after scaling weights by the activations of calibration data", _Q4, calibrated=True),
}


@dataclass(frozen=True)
class Plan:
    """What a recipe does to a model.

    Attributes:
        table: mlx-lm's quantization table, as ``gm_mlx.weights.apply_quantization`` takes it; it names every layer
            that differs from its defaults.
        adjusted: what became of layers whose rows do not divide as the recipe wants, for the user to read.
    """

    table: dict[str, Any]
    adjusted: dict[str, str]


def find_recipe(name: str) -> Recipe:
    """The recipe of a name; raises ``UserError`` that lists the names there are."""
    if name not in RECIPES:
        raise UserError(f"recipe {name!r} is not one of {', '.join(RECIPES)}")
    return RECIPES[name]


def recipe_table(config: ModelConfig, recipe: str) -> dict[str, Any]:
    """mlx-lm's quantization table of a recipe for a model; see ``plan``."""
    return plan(config, recipe).table


def plan(config: ModelConfig, recipe: str) -> Plan:
    """Apply a recipe to the layers that a model of this config has. No array is computed.

    Args:
        config: the model's config.
        recipe: a name of ``RECIPES``.

    Raises:
        UserError: there is no such recipe, it does not give a table by itself, or the model has no layer that it can
            quantize.
    """
    found = find_recipe(recipe)
    if recipe == "mixed":
        raise UserError(
            "recipe mixed: its bits are measured; run `gm-mlx quantize MODEL --recipe mixed --target-size SIZE`"
        )
    wanted = {path: found.precisions[part.component] for path, part in quantizable(config).items()}
    return fit(config, wanted)


def fit(config: ModelConfig, wanted: dict[str, Precision | None]) -> Plan:
    """The table that gives each layer its precision, or the nearest that the layer's rows allow.

    Args:
        config: the model's config.
        wanted: a precision, or None for floats, by the path of each layer that can be quantized.

    Raises:
        UserError: no layer is left that can be quantized.
    """
    chosen: dict[str, Precision | None] = {}
    adjusted: dict[str, str] = {}
    for path, layer in quantizable(config).items():
        width = layer.arrays["weight"][-1]
        chosen[path] = fitting(wanted[path], width)
        if chosen[path] != wanted[path]:
            got = "stays in floats" if chosen[path] is None else f"takes groups of {SMALLER_GROUP}"
            adjusted[path] = f"{got}: its rows of {width} do not divide into groups of {wanted[path].group_size}"  # type: ignore[union-attr]
    counts = Counter(precision for precision in chosen.values() if precision)
    if not counts:
        raise UserError("no layer of this model has rows that divide into groups of 32; it cannot be quantized")
    # The commonest as the default keeps the table short, which is written into config.json.
    default = counts.most_common(1)[0][0]
    table = default.to_dict()
    for path, precision in chosen.items():
        if precision != default:
            table[path] = precision.to_dict() if precision else False
    return Plan(table, adjusted)


def quantizable(config: ModelConfig) -> dict[str, Layer]:
    """All layers that can be quantized, by path: linears, token embeddings and stacked experts."""
    return {layer.path: layer for layer in model_layers(config) if layer.quantizable}


def fitting(precision: Precision | None, width: int) -> Precision | None:
    """The precision, in smaller groups where rows of ``width`` need them, or None where not even those fit."""
    if precision is None or width % precision.group_size == 0:
        return precision
    # The MX and NV formats have one group size each.
    smaller = precision.mode == "affine" and width % SMALLER_GROUP == 0
    return precision._replace(group_size=SMALLER_GROUP) if smaller else None
