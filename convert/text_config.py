"""The decoder: which family it is, and its ``config.json`` as fields of ``TextConfig``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from gm_mlx.convert.layouts.decoders import DECODERS, GEMMA, LLAMA, REQUIRED, UNSUPPORTED, Decoder
from gm_mlx.convert.values import Values
from gm_mlx.errors import UserError
from gm_mlx.tensors import Tensor

EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"
HEAD_BIAS = "language_model.lm_head.bias"
LAYER = re.compile(r"language_model\.model\.layers\.(\d+)\.(.*)")
TANH_GELU = "gelu_pytorch_tanh"
GELUS = ("gelu", "gelu_new", "gelu_fast", TANH_GELU)
SAME_GELU = ("gelu_new", "gelu_fast")  # transformers has the tanh GELU three times


def find_decoder(config: Values, names: Iterable[str]) -> tuple[Decoder, list[str]]:
    """The family of a checkpoint's decoder, with notes for the user.

    Args:
        config: the decoder's config.
        names: the checkpoint's tensors, as they are called in its files.

    Raises:
        UserError: it is none that can be converted; the message says which it is.
    """
    names = set(names)
    model_type = config.get("model_type", str, "llama" if config.prefix else "llava")
    # "moe_llava_gemma", "llava_gemma" and "gemma" are one decoder in three checkpoints.
    family = re.sub(r"^(?:moe_)?llava(?:_|$)", "", model_type.lower().replace("-", "_"))
    for other in UNSUPPORTED:
        if re.fullmatch(other.model_type, family) or any(re.fullmatch(other.tensor, name) for name in names):
            raise config.error("model_type", f"is {model_type!r}: {other.title} {NOT_SUPPORTED}")
    decoder = next((each for each in DECODERS if re.fullmatch(each.model_type, family)), None)
    if decoder is None:
        raise config.error("model_type", f"is {model_type!r}, which {NOT_SUPPORTED}")
    # Checkpoints of Gemma have been published under Llama's name. No Llama has a GELU and no head of its own.
    headless = not any(name.endswith("lm_head.weight") for name in names)
    if decoder is LLAMA and headless and _activation(config, LLAMA) in GELUS:
        return GEMMA, [f"config.json calls the decoder {model_type!r}; its activation and tied head are Gemma's"]
    return decoder, []


NOT_SUPPORTED = f"is not supported by this version, which converts {', '.join(each.title for each in DECODERS)}"


def text_config(decoder: Decoder, config: Values, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[str]]:
    """The fields of ``TextConfig``, but for the experts and the head, with notes for the user.

    Args:
        decoder: the family.
        config: the decoder's config.
        tensors: the checkpoint's tensors under gm-mlx's names, experts one by one.

    Raises:
        UserError: a value is of the wrong type, means a model that is not built here, or is not that of the tensors.
    """
    config.refuse(decoder.refused)
    fields: dict[str, Any] = dict(decoder.fixed)
    for field, key in decoder.keys.items():
        fields[field] = _field(decoder, config, field, key)
    fields["intermediate_size"] //= decoder.ffn_parts
    fields.setdefault("num_key_value_heads", None)
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if fields["head_dim"] is None:
        fields["head_dim"] = fields["hidden_size"] // max(fields["num_attention_heads"], 1)
    fields["rope_theta"] = _rope_theta(decoder, config, fields["rope_theta"])
    if decoder.bias is not None:
        key, biased, which = decoder.bias
        fields["attention_bias"] = which if config.get(key, bool, biased) else "none"
    fields |= _pangu_layers(tensors)
    _check_dimensions(decoder, config, fields, tensors)

    notes = []
    activation = _activation(config, decoder)
    fields["hidden_act"] = TANH_GELU if activation in SAME_GELU else activation
    if decoder is GEMMA and activation != TANH_GELU:
        fields["hidden_act"] = TANH_GELU
        notes.append(f"config.json says {activation!r}; Gemma was trained with the tanh GELU, which is used")
    window = _window(decoder, config)
    if window and window < fields["max_position_embeddings"]:
        notes.append(
            f"the decoder's attention reaches back {window} positions; the context is limited to that, within which "
            "answers are the same"
        )
        fields["max_position_embeddings"] = window
    return fields, notes


def _field(decoder: Decoder, config: Values, field: str, key: str) -> Any:
    """What a config says of a field, in the family's words or its older ones; else what its class assumes."""
    default = decoder.defaults[field]
    kind = float if field in FRACTIONS else int
    if key == "partial_rotary_factor":  # transformers 5 keeps it in the table that ``_rope_theta`` reads
        config = next((rope for table in ROPE if key in (rope := config.inner(table)).table), config)
    value = config.get(key, kind)
    if value is None and key in decoder.older:
        value = config.get(decoder.older[key], kind)
    if value is None and default == REQUIRED:
        raise config.error(key, f"is missing, and {decoder.title} models differ in it; copy it from the model's source")
    return default if value is None else value


FRACTIONS = ("rms_norm_eps", "rope_theta", "partial_rotary_factor")
ROPE = ("rope_scaling", "rope_parameters")


def _window(decoder: Decoder, config: Values) -> int | None:
    """How far back attention reaches; None for to the beginning. Qwen names a window and says whether it is used."""
    if not config.get("use_sliding_window", bool, decoder.defaults.get("use_sliding_window", True)):
        return None
    if "sliding_window" in config.table:
        return config.get("sliding_window", int)
    return decoder.defaults.get("sliding_window")


def _pangu_layers(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """How many layers have second gates, and how wide the shortcuts of the others are; nothing if there are none."""
    series = {match[1] for name in tensors if (match := LAYER.fullmatch(name)) and ".gate_proj2." in match[2]}
    sizes = [tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".attn_linear.linear_1.weight")]
    return {"series_layers": len(series), "shortcut_size": sizes[0] if sizes else 0} if series or sizes else {}


def _activation(config: Values, decoder: Decoder) -> str:
    """What config.json says; transformers 4.39 introduced ``hidden_activation``, which wins over ``hidden_act``."""
    return config.get("hidden_activation", str) or config.get("hidden_act", str) or decoder.activation


def _rope_theta(decoder: Decoder, config: Values, theta: float) -> float:
    """The base of the rotary positions, which transformers 5 keeps in a table; other kinds of them are refused."""
    for key in ROPE:
        rope = config.inner(key)
        kind = rope.get("rope_type", str) or rope.get("type", str, "default")
        if kind != "default":
            raise config.error(key, f"is of type {kind!r}, which this version cannot convert; it converts plain RoPE")
        if "partial_rotary_factor" not in decoder.keys:
            rope.refuse({"partial_rotary_factor": (None, 1)})
        theta = rope.get("rope_theta", float, theta)
    return float(theta)


# Fields, each with the tensors and the axis that show it.
DIMENSIONS = (
    (("vocab_size",), r"language_model\.model\.embed_tokens\.weight", 0),
    (("hidden_size",), r"language_model\.model\.embed_tokens\.weight", 1),
    (("intermediate_size",), r"language_model\..*\.mlp\.(?:experts\.\d+\.|mlp\.)?(?:gate_proj|fc1)\.weight", 0),
    (("num_attention_heads", "head_dim"), r"language_model\.model\.layers\.\d+\.self_attn\.q_proj\.weight", 0),
    (("num_key_value_heads", "head_dim"), r"language_model\.model\.layers\.\d+\.self_attn\.k_proj\.weight", 0),
)


def _check_dimensions(
    decoder: Decoder, config: Values, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """The tensors are what they are: a config that says otherwise is wrong, and the message says where."""
    for parts, pattern, axis in DIMENSIONS:
        said = 1
        for field in parts:
            said *= fields[field]
        for name, tensor in tensors.items():
            if re.fullmatch(pattern, name) and len(tensor.shape) == 2 and tensor.shape[axis] != said:
                keys = " x ".join(decoder.keys.get(field, field) for field in parts)
                if parts == ("intermediate_size",):
                    said *= decoder.ffn_parts
                    keys += f" (of {decoder.ffn_parts} matrices)" if decoder.ffn_parts > 1 else ""
                what = "rows" if axis == 0 else "columns"
                raise config.error(
                    keys, f"is {said} where {name} has {tensor.shape[axis]} {what}; correct the file or fetch it again"
                )
    layers = {int(match[1]) for name in tensors if (match := LAYER.fullmatch(name))}
    said = fields["num_hidden_layers"]
    if layers != set(range(said)):
        raise config.error(
            decoder.keys["num_hidden_layers"],
            f"is {said} where the tensors are those of {len(layers)} layers, up to number {max(layers, default=0)}; "
            "correct the file or fetch the checkpoint again",
        )


def no_decoder(folder: object) -> UserError:
    """The error for a checkpoint in which there is no language model."""
    return UserError(f"{folder}: holds no language model; give its folder with --base")
