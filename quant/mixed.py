"""Mixed precision: bits for each part of each decoder layer, chosen so that the model fits a budget.

``gm_mlx.quant.sensitivity`` says what each part suffers from each number of bits. The damages are added up as if they
did not meet: right where each is small, and no search over all combinations would be affordable. The choice is then a
knapsack, which dynamic programming solves exactly. So the budget is never exceeded, and with a larger one the expected
damage never grows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gm_mlx.config import ModelConfig
from gm_mlx.errors import UserError
from gm_mlx.footprint import planned_bytes
from gm_mlx.inventory import model_layers
from gm_mlx.processor import Processor
from gm_mlx.quant.calibration import Sample
from gm_mlx.quant.evaluate import Progress
from gm_mlx.quant.recipes import RECIPES, Plan, Precision, fit, quantizable
from gm_mlx.quant.sensitivity import OPTIONS, Damage, kl_damage, layer_damage, parts
from gm_mlx.quant.sizes import component_sizes, file_bytes, total
from gm_mlx.tensors import Tensor

KL_PARAMETERS = 300_000_000  # above, a pass through the model per part and option takes hours
RESOLUTION = 20_000  # steps that the knapsack divides the range of sizes into

Measure = Literal["kl", "layer", "auto"]
MEASURES = {"kl": kl_damage, "layer": layer_damage}


@dataclass(frozen=True)
class MixedPlan(Plan):
    """A plan with the choice behind it.

    Attributes:
        bits: by part.
        damage: what was measured, by part and bits.
        measure: "kl" or "layer".
        expected: the sum of the chosen parts' damages.
        num_bytes: most that the weights' file takes.
    """

    bits: dict[str, int]
    damage: Damage
    measure: str
    expected: float
    num_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"measure": self.measure, "expected": self.expected, "bits": self.bits, "damage": self.damage}


def choose_mixed(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    processor: Processor,
    samples: Sequence[Sample],
    target_bytes: int,
    *,
    measure: Measure = "auto",
    progress: Progress | None = None,
) -> MixedPlan:
    """The best choice of bits whose file is no larger than ``target_bytes``.

    Args:
        config: the model's config, without a quantization table.
        tensors: its tensors, none of them packed.
        processor: its processor.
        samples: calibration prompts.
        target_bytes: most bytes of the weights' file.
        measure: "kl", "layer", or "auto" for the one that suits the model's size.
        progress: told ("measure", steps done, steps).

    Raises:
        UserError: even 2 bits do not fit, with the smallest size that is possible; or a sample does not fit the model.
    """
    smallest = file_bytes(config, _plan(config, dict.fromkeys(parts(config), OPTIONS[0])).table)
    if target_bytes < smallest:
        raise UserError(
            f"--target-size: {target_bytes} bytes are too few: with {OPTIONS[0].bits} bits everywhere the model takes "
            f"{smallest} bytes; ask for at least {_size(smallest)}"
        )
    if measure == "auto":
        measure = "kl" if total(component_sizes(config)).parameters < KL_PARAMETERS else "layer"
    measured = MEASURES[measure](config, tensors, processor, samples, progress)
    bits = solve(_part_bytes(config), measured, target_bytes - smallest)
    chosen = {part: next(option for option in OPTIONS if option.bits == b) for part, b in bits.items()}
    result = _plan(config, chosen)
    return MixedPlan(
        table=result.table,
        adjusted=result.adjusted,
        bits=bits,
        damage=measured,
        measure=measure,
        expected=sum(measured[part][b] for part, b in bits.items()),
        num_bytes=file_bytes(config, result.table),
    )


def solve(sizes: dict[str, dict[int, int]], damage: Damage, extra_bytes: int) -> dict[str, int]:
    """Bits for each part with the least sum of damages.

    Args:
        sizes: bytes by part and bits.
        damage: damage by part and bits. A measurement may say that more bits do more damage; that is noise, and the
            damage of fewer bits is taken to be no less.
        extra_bytes: what all parts together may take beyond their smallest sizes, 0 or more.

    Returns:
        Bits by part. The same measurements with more bytes never give a larger sum.
    """
    spread = sum(max(by_bits.values()) - min(by_bits.values()) for by_bits in sizes.values())
    # The unit does not depend on the budget: what fits a budget fits every larger one.
    unit = max(1, -(-spread // RESOLUTION))
    room = min(extra_bytes, spread + unit * len(sizes)) // unit
    best = np.zeros(room + 1)  # least damage of the parts so far, by units that may be used
    choices: list[np.ndarray] = []
    costs: list[list[int]] = []
    for part, by_bits in sizes.items():
        options = sorted(by_bits)
        # In units, rounded up, beyond the smallest: so the sum in bytes never exceeds the budget.
        cost = [-(-(by_bits[bits] - min(by_bits.values())) // unit) for bits in options]
        worst = [max(damage[part][more] for more in options[i:]) for i in range(len(options))]
        table = np.full((len(options), room + 1), np.inf)
        for row, units, value in zip(table, cost, worst, strict=True):
            if units <= room:
                row[units:] = best[: room + 1 - units] + value
        choices.append(table.argmin(axis=0))
        costs.append(cost)
        best = table.min(axis=0)
    result: dict[str, int] = {}
    for part, choice, cost in reversed(list(zip(sizes, choices, costs, strict=True))):
        option = int(choice[room])
        result[part] = sorted(sizes[part])[option]
        room -= cost[option]
    return {part: result[part] for part in sizes}


def _plan(config: ModelConfig, chosen: Mapping[str, Precision]) -> Plan:
    """The plan that gives each part its precision, and the rest what the recipe says."""
    fixed = RECIPES["mixed"].precisions
    wanted = {path: fixed.get(layer.component) for path, layer in quantizable(config).items()}
    wanted |= {path: chosen[part] for part, paths in parts(config).items() for path in paths}
    return fit(config, wanted)


def _part_bytes(config: ModelConfig) -> dict[str, dict[int, int]]:
    """Bytes by part and bits."""
    layers = model_layers(config)
    found = parts(config)
    sizes: dict[str, dict[int, int]] = {part: {} for part in found}
    for option in OPTIONS:
        num_bytes = planned_bytes(layers, _plan(config, dict.fromkeys(found, option)).table)
        for part, paths in found.items():
            sizes[part][option.bits] = sum(num_bytes[path] for path in paths)
    return sizes


def _size(num_bytes: int) -> str:
    """A size as the option takes it, rounded up."""
    unit, name = (2**30, "GB") if num_bytes >= 2**30 else (2**20, "MB")
    return f"{math.ceil(num_bytes / unit * 100) / 100:.2f}{name}"
