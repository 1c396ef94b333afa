"""From peft's tensors to what each matrix of a model gets: pairs of factors by our path, experts apart or stacked.

An expert may have factors of its own, with a rank and a strength of its own, or a layer's experts share one 3-D tensor.
Both come out the same: as pairs by expert, and from there as one stack [E, r, in] and [E, out, r] with the largest
rank. Zeros fill up the others and stand for an expert without LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from gm_mlx.errors import UserError
from gm_mlx.lora.peft import Factors, module_path, strength
from gm_mlx.tensors import Tensor

OTHER_BASE = "name the base that the adapter was trained on"


@dataclass(frozen=True)
class Pair:
    """The factors of one matrix, of one expert or of all of a layer, float32.

    Attributes:
        down: A [r, in], of stacked experts [E, r, in].
        up: B [out, r] or [E, out, r].
        strength: what B A is multiplied by.
        magnitude: DoRA's length of each output's row, [out] or [E, out]; or None.
    """

    down: Tensor
    up: Tensor
    strength: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[-2]


Pairs = dict[str, dict[int, Pair]]
"""Pairs by path and by number of the expert; a matrix that is none of an expert has number 0."""


def pairs_by_path(
    factors: Mapping[str, Factors],
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    why_not: Callable[[str], str],
) -> Pairs:
    """What an adapter has for each matrix of a model.

    Args:
        factors: by module, as ``sort_out`` gives them.
        config: ``adapter_config.json``, which has a ``lora_alpha``.
        shapes: of the matrices that can have LoRA, by our path: [out, in], of stacked experts [E, out, in]; of an
            embedding [D, V], as its factors multiply.
        why_not: the reason and remedy for a path that is not among them.

    Raises:
        UserError: a module has no place in the model or has two pairs, or factors do not fit.
    """
    pairs: Pairs = {}
    for module, found in factors.items():
        path, expert = module_path(module)
        if path not in shapes:
            raise UserError(f"tensor {found.name!r}: {why_not(path)}")
        _check_fit(found, shapes[path], expert)
        power = strength(module, found.up.shape[-1], config)
        for number, pair in _pairs(found, expert, power).items():
            if pairs.setdefault(path, {}).setdefault(number, pair) is not pair:
                raise UserError(f"tensor {found.name!r}: the adapter has other factors for {path}; keep one of them")
    return pairs


def joined(pairs: Mapping[int, Pair], target: str, shape: tuple[int, ...]) -> Pair:
    """One pair for a matrix, in which its experts are stacked.

    Args:
        pairs: by number of the expert.
        target: the matrix's path; named in errors.
        shape: the matrix's.

    Raises:
        UserError: some experts have DoRA and some have not.
    """
    if len(shape) == 2:
        return pairs[0]
    experts, rows, columns = shape
    rank = max(pair.rank for pair in pairs.values())
    strengths = {pair.strength for pair in pairs.values()}
    ups = {i: pair.up for i, pair in pairs.items()}
    if len(strengths) > 1:  # each goes into its own B
        ups = {i: times(pair.up, pair.strength) for i, pair in pairs.items()}
        strengths = {1.0}
    lengths = [pairs[i].magnitude for i in range(experts) if i in pairs]
    magnitude = None
    if any(one is not None for one in lengths):
        if len(lengths) < experts or None in lengths:
            raise UserError(f"{target}: some of its experts have DoRA and some have not, which is not supported")
        parts = [one for one in lengths if one is not None]
        magnitude = Tensor("F32", (experts, rows), lambda: mx.stack([part.read() for part in parts]))
    down = stacked({i: pair.down for i, pair in pairs.items()}, (experts, rank, columns))
    return Pair(down, stacked(ups, (experts, rows, rank)), strengths.pop(), magnitude)


def stacked(parts: Mapping[int, Tensor], shape: tuple[int, ...]) -> Tensor:
    """Experts' factors in one tensor, float32, with zeros where they are smaller or missing."""

    def read() -> mx.array:
        whole = mx.zeros(shape)
        for i, part in parts.items():
            rows, columns = part.shape
            whole[i, :rows, :columns] = part.read()
        return whole

    return Tensor("F32", shape, read)


def times(tensor: Tensor, factor: float) -> Tensor:
    """A tensor's values multiplied."""
    return Tensor(tensor.dtype, tensor.shape, lambda: tensor.read() * factor)


def _check_fit(found: Factors, whole: tuple[int, ...], expert: int | None) -> None:
    down, up = found.down.shape, found.up.shape
    shape = whole if expert is None else whole[1:]
    *stack, rows, columns = shape
    rank = up[-1] if up else 0
    if rank < 1 or down != (*stack, rank, columns) or up != (*stack, rows, rank):
        raise UserError(
            f"tensor {found.name!r}: factors {list(up)} and {list(down)} do not fit the base's {list(shape)}; "
            f"{OTHER_BASE}"
        )
    magnitude = found.tensors.get("magnitude_vector")
    if magnitude is not None and math.prod(magnitude.shape) != math.prod((*stack, rows)):
        raise UserError(f"tensor {found.name!r}: DoRA's lengths are {list(magnitude.shape)}; {OTHER_BASE}")
    if expert is not None and expert >= whole[0]:
        raise UserError(f"tensor {found.name!r}: the base has {whole[0]} experts; {OTHER_BASE}")


def _pairs(found: Factors, expert: int | None, power: float) -> dict[int, Pair]:
    """A module's pairs by number of the expert."""
    *stack, rows, _ = found.up.shape
    magnitude = found.tensors.get("magnitude_vector")

    def pair(part: int | None) -> Pair:
        lengths = None if magnitude is None else _values(found.name, magnitude, (*stack, rows), part)
        down, up = (_values(found.name, tensor, tensor.shape, part) for tensor in (found.down, found.up))
        return Pair(down, up, power, lengths)

    return {i: pair(i) for i in range(stack[0])} if stack else {expert or 0: pair(None)}


def _values(name: str, tensor: Tensor, shape: tuple[int, ...], expert: int | None) -> Tensor:
    """A tensor of an adapter in float32, or one expert's part of it."""

    def read() -> mx.array:
        array = tensor.read().astype(mx.float32).reshape(shape)
        if not mx.isfinite(array).all().item():
            raise UserError(f"tensor {name!r}: it or its other factor is not finite; the training went wrong")
        return array if expert is None else array[expert]

    return Tensor("F32", shape if expert is None else shape[1:], read)
