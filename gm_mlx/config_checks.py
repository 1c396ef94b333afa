"""Checks of what a ``config.json`` holds: its keys, the types of its values, its words for activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from gm_mlx.errors import UserError

ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu", "silu")

# Keys of Hugging Face's text and vision configs that a LLaVA-GM has one value for, or that describe and do not shape.
DESCRIPTIVE = frozenset(
    {
        "architectures", "attention_bias", "attention_dropout", "bos_token_id", "dropout", "dtype", "eos_token_id",
        "hidden_activation", "image_seq_length", "initializer_factor", "initializer_range", "layer_norm_epsilon",
        "model_type", "num_channels", "pad_token_id", "projection_dim", "quantization", "rope_parameters",
        "rope_scaling", "torch_dtype", "transformers_version", "use_cache", "vision_use_head",
    }
)  # fmt: skip

T = TypeVar("T")


def build(kind: type[T], data: dict[str, Any], where: str) -> T:
    """Build dataclass ``kind``, refusing keys that would shape a model which this code does not build."""
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := [k for k in data if k not in fields and k not in DESCRIPTIVE]:
        raise UserError(f"{where}.{unknown[0]}: unknown key; the model's shape would be guessed")
    required = [n for n, f in fields.items() if f.default is dataclasses.MISSING]
    if missing := [n for n in required if n not in data]:
        raise UserError(f"{where}.{missing[0]}: missing from the config")
    check_types(kind, data, f"{where}.")
    return kind(**{k: v for k, v in data.items() if k in fields})


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# What JSON may hold for a field, by the field's annotation; annotations that are not here are strings.
JSON_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number", is_int),
    "float": ("a number", lambda value: is_int(value) or isinstance(value, float)),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "tuple[int, ...]": ("a list of whole numbers", lambda v: isinstance(v, list | tuple) and all(map(is_int, v))),
    "MoEConfig | None": ("a table", lambda value: value is None or isinstance(value, dict)),
}


def check_types(kind: type, data: dict[str, Any], where: str) -> None:
    """Refuse a value of the wrong type: "false" in quotes would be true."""
    for f in dataclasses.fields(kind):
        if f.name not in data or f.name in ("text_config", "vision_config"):
            continue
        value = data[f.name]
        name, fits = JSON_TYPES.get(str(f.type), ("a string", lambda value: isinstance(value, str)))
        if not fits(value):
            raise UserError(f"{where}{f.name}: {value!r} is not {name}")
        # Only a hidden state may be counted from the end.
        if f.type == "int" and value < 0 and f.name != "vision_feature_layer":
            raise UserError(f"{where}{f.name}: {value!r} is negative")


def one_of(key: str, value: Any, allowed: Sequence[str]) -> None:
    """Refuse a word that means nothing."""
    if value not in allowed:
        raise UserError(f"{key}: {value!r} is not one of {list(allowed)}")


def check_activation(where: str, name: str) -> None:
    """Refuse an activation that is not built."""
    if name not in ACTIVATIONS:
        raise UserError(f"{where}: activation {name!r} is not one of {list(ACTIVATIONS)}")
