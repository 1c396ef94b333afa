"""Merge LoRA: ``W + scale * B A`` in the place of ``W``, lazily, tensor by tensor (LoRA, eq. 3; peft, lora/layer.py).

Two layouts are met. peft keeps the factors in ``adapter_model`` under the names of its wrapper,
``base_model.model.<module>.lora_A.weight``; LLaVA adds ``non_lora_trainables.bin`` with what else it trained. MoE-LLaVA
saves the wrapped model as it is: ``<module>.lora_A.default.weight`` beside ``<module>.base_layer.weight`` or, with
older versions of peft, beside ``<module>.weight``.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx

from gm_mlx.errors import UserError
from gm_mlx.tensors import Tensor

WRAPPER = "base_model.model."
# <module>.lora_A[.<adapter>].weight, and the same for embeddings, which peft keeps as bare parameters.
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<kind>(?:embedding_)?[AB]|magnitude_vector)(?P<rest>(?:\.\w+){0,2})")
LORA_CONFIG = "adapter_config.json"

# A module that peft trains whole: its copy counts, and the original does not.
TRAINED_COPY = re.compile(r"\.modules_to_save(\.default)?\.")
ORIGINAL = ".original_module."

# The wrappers of one LLaVA model under two versions of transformers; an adapter and its base may differ in it.
SYNONYMS = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)

FLOATS = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


@dataclasses.dataclass
class Factors:
    """The LoRA tensors of one module, and the name that the first of them has in its file."""

    name: str
    tensors: dict[str, Tensor]

    @property
    def down(self) -> Tensor:
        """A [r, in]; of an embedding [r, V]."""
        return self.tensors["embedding_A" if "embedding_A" in self.tensors else "A"]

    @property
    def up(self) -> Tensor:
        """B [out, r]; of an embedding [D, r]."""
        return self.tensors["embedding_B" if "embedding_B" in self.tensors else "B"]


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
    if (kind := str(adapter_config.get("peft_type") or "LORA")) != "LORA":
        raise UserError(f"{LORA_CONFIG}: peft_type {kind!r} is not supported; merge the adapter with peft first")
    merged, factors = _sort_out(_unwrap(tensors))
    inside = bool(factors)
    for names in (_unwrap(adapter), _unwrap(non_lora)):
        plain, more = _sort_out(names)
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


def _unwrap(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names that they had before peft wrapped the model."""
    names = {name: name.removeprefix(WRAPPER).removeprefix("base_model.") for name in tensors}
    # Without the full prefix, a doubled model. tells that the outer one is peft's (LLaVA, builder.py).
    if any(name.startswith("model.model.") for name in names.values()):
        names = {name: short.removeprefix("model.") for name, short in names.items()}
    copies = {TRAINED_COPY.sub(".", short) for short in names.values() if TRAINED_COPY.search(short)}
    result: dict[str, Tensor] = {}
    for name, short in names.items():
        plain = TRAINED_COPY.sub(".", short).replace(".base_layer.", ".").replace(ORIGINAL, ".")
        if ORIGINAL in short and plain in copies:
            continue
        if plain in result:
            raise UserError(f"tensor {name!r}: the file has another tensor for {plain!r}; save the model again")
        result[plain] = tensors[name]
    return result


def _sort_out(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Factors]]:
    """Plain tensors, and the LoRA factors by module."""
    plain: dict[str, Tensor] = {}
    factors: dict[str, Factors] = {}
    for name, tensor in tensors.items():
        match = FACTOR.fullmatch(name)
        if match is None:
            if ".lora_" in name:
                raise UserError(f"tensor {name!r}: a kind of LoRA that is not supported; merge it with peft first")
            plain[name] = tensor
            continue
        if match["rest"].endswith(".bias"):
            raise UserError(f"tensor {name!r}: LoRA with biases of its own is not supported; merge it with peft first")
        found = factors.setdefault(match["module"], Factors(name, {}))
        if match["kind"] in found.tensors:
            raise UserError(f"tensor {name!r}: a second adapter for this module; keep one of them")
        found.tensors[match["kind"]] = tensor
    for found in factors.values():
        if not {"A", "B"} <= found.tensors.keys() and not {"embedding_A", "embedding_B"} <= found.tensors.keys():
            raise UserError(f"tensor {found.name!r}: the other LoRA factor is missing; fetch the adapter again")
    return plain, factors


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


def _scale(module: str, rank: int, config: Mapping[str, Any]) -> float:
    """How strong a module's LoRA is: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
    alpha = config["lora_alpha"]
    try:
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = value
                break
    except (re.error, AttributeError):
        raise UserError(
            f"{LORA_CONFIG}: alpha_pattern is not a table of module names and numbers; correct it"
        ) from None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise UserError(f"{LORA_CONFIG}: lora_alpha {alpha!r} is not a number; correct it")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


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
    scale = _scale(module, down.shape[0], config)
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
