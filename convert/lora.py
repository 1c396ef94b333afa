"""Merge LoRA into a checkpoint: ``W + scale * B A`` in the place of ``W``, lazily, tensor by tensor.

The sources: LoRA, eq. 3; DoRA, eq. 5; peft, lora/layer.py. ``gm_mlx.lora.peft`` says how adapters name their tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx

from gm_mlx.errors import UserError
from gm_mlx.lora.peft import LORA_CONFIG, Factors, check_kind, sort_out, strength, unwrap
from gm_mlx.tensors import Tensor

# The wrappers of one LLaVA model under two versions of transformers; an adapter and its base may differ in it.
SYNONYMS = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)

FLOATS = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


def merge_lora(
    tensors: Mapping[str, Tensor],
    adapter: Mapping[str, Tensor],
    adapter_config: Mapping[str, Any],
    non_lora: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The tensors of a model with its LoRA factors merged.

    Args:
        tensors: the base model's by their own names; they may hold LoRA factors themselves (MoE-LLaVA).
        adapter: the tensors of ``adapter_model``, or none.
        adapter_config: ``adapter_config.json``: ``lora_alpha``, ``alpha_pattern``, ``use_rslora``, ``fan_in_fan_out``,
            ... The rank is the factors' own.
        non_lora: the tensors of ``non_lora_trainables.bin``, or none.

    Returns:
        The base model's tensors, merged, and those that only the adapter or ``non_lora`` has, such as a projector. A
        merged tensor is computed in float32 and has the dtype of its base.

    Raises:
        UserError: the adapter is of another kind than LoRA, a LoRA tensor has no target, or shapes do not fit.
    """
    check_kind(adapter_config)
    merged, factors = sort_out(unwrap(tensors))
    inside = bool(factors)
    for names in (unwrap(adapter), unwrap(non_lora)):
        plain, more = sort_out(names)
        for name, tensor in plain.items():
            _replace(merged, name, tensor)
        for module, found in more.items():
            if module in factors:
                raise UserError(f"tensor {found.name!r}: the base model has LoRA of its own for it; merge that first")
            factors[module] = found
    if factors and "lora_alpha" not in adapter_config:
        where = "config.json has no lora.lora_alpha" if inside else f"{LORA_CONFIG} has no lora_alpha"
        raise UserError(
            f"tensor {next(iter(factors.values())).name!r}: how strong LoRA is cannot be known, {where}; "
            "add it as it was in training"
        )
    for module, found in factors.items():
        target = _find(f"{module}.weight", merged)
        if target is None:
            raise UserError(
                f"tensor {found.name!r}: the base model has no {module}.weight; name the base that the adapter was "
                "trained on"
            )
        merged[target] = _merge(merged[target], module, found, adapter_config)
    return merged


def _synonyms(name: str) -> Iterator[str]:
    yield name
    for new, old in SYNONYMS:
        if name.startswith(new):
            yield old + name.removeprefix(new)
        if name.startswith(old):
            yield new + name.removeprefix(old)


def _find(name: str, tensors: Mapping[str, Tensor]) -> str | None:
    """The name that a tensor has in the base model."""
    return next((candidate for candidate in _synonyms(name) if candidate in tensors), None)


def _replace(tensors: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    """Put a tensor that was trained whole in the place of the base model's, or beside it when that has none."""
    target = _find(name, tensors) or name
    old = tensors.get(target)
    # An embedding may have grown by the tokens that training added.
    if old is not None and old.shape[1:] != tensor.shape[1:]:
        raise UserError(f"tensor {name!r}: is {list(tensor.shape)} where the base model has {list(old.shape)}")
    tensors[target] = tensor


def _merge(base: Tensor, module: str, factors: Factors, config: Mapping[str, Any]) -> Tensor:
    down, up = factors.down, factors.up
    if base.dtype not in FLOATS:
        raise UserError(f"tensor {factors.name!r}: its base has dtype {base.dtype}; name an unquantized base model")
    # An embedding's rows are inputs, as with Conv1D's transposed weights.
    transposed = "embedding_A" in factors.tensors or bool(config.get("fan_in_fan_out"))
    shape = (up.shape[0], down.shape[-1])
    if (
        (len(down.shape), len(up.shape), len(base.shape)) != (2, 2, 2)
        or not 0 < down.shape[0] == up.shape[1]
        or base.shape != (shape[::-1] if transposed else shape)
    ):
        raise UserError(
            f"tensor {factors.name!r}: factors {list(up.shape)} and {list(down.shape)} do not fit the base model's "
            f"{list(base.shape)}; name the base that the adapter was trained on"
        )
    scale = strength(module, down.shape[0], config)
    magnitude = factors.tensors.get("magnitude_vector")
    if magnitude is not None and "embedding_A" in factors.tensors:
        raise UserError(f"tensor {factors.name!r}: DoRA of embeddings is not supported; merge it with peft first")
    if magnitude is not None and math.prod(magnitude.shape) != up.shape[0]:
        raise UserError(f"tensor {factors.name!r}: DoRA's lengths are {list(magnitude.shape)}; fetch the adapter again")

    def read() -> mx.array:
        delta = scale * (up.read().astype(mx.float32) @ down.read().astype(mx.float32))  # [out, in]
        weight = base.read().astype(mx.float32) + (delta.T if transposed else delta)
        if magnitude is not None:  # DoRA, eq. 5: the direction is LoRA's, the length of each output's row is learnt
            axis = 0 if transposed else 1
            length = mx.linalg.norm(weight, axis=axis, keepdims=True)
            weight = weight * (magnitude.read().astype(mx.float32).reshape(length.shape) / length)
        return weight.astype(FLOATS[base.dtype])

    return Tensor(base.dtype, base.shape, read)
