"""LoRA adapters as peft names them: from the tensors of a file to pairs of factors by module.

Two layouts are met. peft keeps the factors in ``adapter_model`` under the names of its wrapper,
``base_model.model.<module>.lora_A.weight``; LLaVA adds ``non_lora_trainables.bin`` with what else it trained. MoE-LLaVA
saves the wrapped model as it is: ``<module>.lora_A.default.weight`` beside ``<module>.base_layer.weight`` or, with
older versions of peft, beside ``<module>.weight``.

gm-mlx writes peft's names too. What peft has no name for is the stack of a layer's experts: their factors are 3-D
tensors of the module ``mlp.switch_mlp.<name>``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gm_mlx.errors import UserError
from gm_mlx.source_names import ANY_DECODER, EXPERT, HF_LLAVA, MOE_LLAVA, renamed
from gm_mlx.tensors import Tensor

LORA_CONFIG = "adapter_config.json"
FLOATS = ("F32", "F16", "BF16")  # what factors may be
WRAPPER = "base_model.model."
# <module>.lora_A[.<adapter>].weight, and the same for embeddings, which peft keeps as bare parameters.
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<kind>(?:embedding_)?[AB]|magnitude_vector)(?P<rest>(?:\.\w+){0,2})")

# A module that peft trains whole: its copy counts, and the original does not.
TRAINED_COPY = re.compile(r"\.modules_to_save(\.default)?\.")
ORIGINAL = ".original_module."

# Keys of adapter_config.json that nothing here has a place for, and what an adapter would be without them.
REFUSED_KEYS = {
    "alora_invocation_tokens": "is at work behind certain tokens only, which is not supported; use it with peft",
    "layer_replication": "has layers that its base has not; merge it with peft first",
}


@dataclass
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


def check_kind(adapter_config: Mapping[str, Any]) -> None:
    """Raises ``UserError`` for an adapter of another kind than LoRA."""
    if (kind := str(adapter_config.get("peft_type") or "LORA")) != "LORA":
        raise UserError(f"{LORA_CONFIG}: peft_type {kind!r} is not supported; merge the adapter with peft first")


def unwrap(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names that they had before peft wrapped the model; raises ``UserError`` when two get the same."""
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


def sort_out(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Factors]]:
    """Plain tensors, and the LoRA factors by module.

    Args:
        tensors: as ``unwrap`` names them.

    Raises:
        UserError: a factor lacks its other one, is of a second adapter, or is of a kind that is not supported.
    """
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


def lora_alone(
    folder: Path,
    adapter: Mapping[str, Tensor],
    config: Mapping[str, Any],
    beside: Mapping[str, Tensor],
    remedy: str,
) -> dict[str, Factors]:
    """The factors by module of an adapter that is nothing else.

    Args:
        folder: where it is; named in errors.
        adapter: the tensors of ``adapter_model``.
        config: ``adapter_config.json``.
        beside: what was trained beside LoRA, by names without a wrapper.
        remedy: what to do with an adapter that is more than LoRA.

    Raises:
        UserError: it is more or less than LoRA on some modules, or how strong it is cannot be known.
    """
    check_kind(config)
    for key, what in REFUSED_KEYS.items():
        if config.get(key):
            raise UserError(f"{LORA_CONFIG}: {key} is set: the adapter {what}")
    whole, factors = sort_out(unwrap(adapter))
    # Of an embedding with LoRA, peft saves the base's weights too.
    others = [name for name in {**whole, **beside} if name.removesuffix(".weight") not in factors]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UserError(f"tensor {others[0]!r}{more}: is no LoRA but was trained whole; {remedy}")
    if not factors:
        raise UserError(f"{folder}: has no LoRA in it; name an adapter's folder")
    if "lora_alpha" not in config:
        raise UserError(
            f"{folder / LORA_CONFIG}: has no lora_alpha, so how strong the adapter is cannot be known; add it "
            "as it was in training"
        )
    for found in factors.values():
        for tensor in found.tensors.values():
            if tensor.dtype not in FLOATS:
                raise UserError(f"tensor {found.name!r}: has dtype {tensor.dtype}; save the adapter unquantized")
    return factors


def module_path(module: str) -> tuple[str, int | None]:
    """gm-mlx's path of a module by any layout's name, and the number of the expert where each is a module of its own.

    Args:
        module: its name as ``unwrap`` gives it, such as "model.layers.0.self_attn.q_proj".
    """
    name = f"{module}.weight"
    try:
        path = renamed(name, HF_LLAVA)
    except KeyError:
        path = renamed(name, MOE_LLAVA)  # it has LLaVA's names too, and takes all others for the decoder's
    path = (renamed(path or name, ANY_DECODER) or name).removesuffix(".weight")
    if expert := EXPERT.fullmatch(path):
        return f"{expert[1]}.switch_mlp.{expert[3]}", int(expert[2])
    return path, None


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern is meant for a module: for its whole path or the end of it (``peft.utils.get_pattern_key``)."""
    return re.fullmatch(rf"(.*\.)?({pattern})", path) is not None


def strength(module: str, rank: int, config: Mapping[str, Any]) -> float:
    """How strong a module's LoRA is: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA.

    Args:
        module: its name as ``unwrap`` gives it, which the patterns of ``alpha_pattern`` are about.
        rank: the factors' own.
        config: ``adapter_config.json``, which has a ``lora_alpha``.

    Raises:
        UserError: a value in the file is not what it should be.
    """
    alpha = config["lora_alpha"]
    try:
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if matches(pattern, module):
                alpha = value
                break
    except (re.error, AttributeError):
        raise UserError(
            f"{LORA_CONFIG}: alpha_pattern is not a table of module names and numbers; correct it"
        ) from None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UserError(f"{LORA_CONFIG}: lora_alpha {alpha!r} is not a number; correct it")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
