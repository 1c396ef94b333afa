"""The experts of a DeepSpeed checkpoint: what config and tensors say of them, compared, and stacked.

MoE-LLaVA's config has a table ``moe``. Its lists have one entry per sparse layer. The tensors show which layers are
sparse and how many experts there are, but not how many a token goes to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from gm_mlx.config import LAYER_MODES
from gm_mlx.convert.text_config import LAYER
from gm_mlx.convert.values import Values
from gm_mlx.errors import UserError
from gm_mlx.source_names import EXPERT
from gm_mlx.tensors import Tensor


def moe_config(
    config: Values, tensors: Mapping[str, Tensor], num_layers: int, kind: str = "experts"
) -> tuple[dict[str, Any] | None, list[str]]:
    """The fields of ``MoEConfig``, or None for a dense model, with notes for the user.

    Args:
        config: the checkpoint's config.
        tensors: its tensors under gm-mlx's names, experts one by one.
        num_layers: the decoder's layers.
        kind: what the experts of a layer are; see ``Layout``.

    Raises:
        UserError: the table is missing, is not that of the tensors, or means a gate that is not built here.
    """
    experts = _experts(tensors)
    moe = config.inner("moe")
    if not experts:
        if moe.get("moe_enable", bool, False):
            raise moe.error(
                "moe_enable", "is true but the checkpoint has no experts; it is another model's config.json"
            )
        return None, []
    if not moe.table:
        raise config.error(
            "moe", "is missing, with num_experts and top_k_experts; take config.json from the training run"
        )
    top_k = moe.get("top_k_experts", int, 2)
    if top_k < 1:
        raise moe.error("top_k_experts", f"is {top_k}: DynMoE's gate, which this version cannot convert")
    num_experts = _num_experts(moe, len(experts))
    if top_k > num_experts:
        raise moe.error("top_k_experts", f"is {top_k} of {num_experts} experts; correct the file")
    layers = sorted(experts)
    listed = moe.get("moe_layers_idx", list, layers)
    if sorted(listed, key=str) != sorted(layers, key=str):
        raise moe.error(
            "moe_layers_idx", f"is {listed} where the tensors have experts in layers {layers}; correct the file"
        )
    residual = moe.get("use_residual", bool, False)
    if kind == "evf":
        _check_elastic(moe, num_experts, top_k, residual)
    _check_layers(moe, tensors, experts, num_experts, residual)

    modes = [mode for mode, choose in LAYER_MODES.items() if choose(num_layers) == layers]
    said = moe.get("moe_mode", str)
    mode = said if said in modes else next(iter(modes), "custom")
    fields = {
        "num_experts": num_experts,
        "top_k": top_k,
        "mode": mode,
        "layers_idx": layers if mode == "custom" else [],
        # DeepSpeed divides by the sum of the chosen probabilities from two experts on, and not for one.
        "norm_topk_prob": top_k > 1,
        "use_residual": residual,
        "aux_loss_coef": moe.get("router_aux_loss_coef", float, 0.01),
        "kind": kind,
    }
    return fields, _capacity_note(moe, num_experts, top_k)


def _check_elastic(moe: Values, num_experts: int, top_k: int, residual: bool) -> None:
    """Refuse what is no pair of a language FFN and a vision FFN, as Eve's paper describes it."""
    for key, value, wanted in (("num_experts", num_experts, 2), ("top_k_experts", top_k, 1)):
        if value != wanted:
            raise moe.error(key, f"is {value}, and Eve has a language FFN and a vision FFN and uses one of them; {FIX}")
    if residual:
        raise moe.error(
            "use_residual",
            "is true, which Eve's paper does not have beside its two FFNs; such a model is not known here",
        )


# Eve's experts, by their number.
ELASTIC = ("language_ffn", "vision_ffn")


def name_networks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors, those of Eve's experts by the names of its two FFNs.

    Args:
        tensors: tensors as ``moe_config`` has checked them.
    """
    named = {}
    for name, tensor in tensors.items():
        if match := EXPERT.fullmatch(name):
            name = f"{match[1]}.{ELASTIC[int(match[2])]}.{match[3]}"
        named[name] = tensor
    return named


def stack_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors, those of experts as one [E, out, in] per layer, which is stacked when it is read.

    Args:
        tensors: tensors as ``moe_config`` has checked them.

    Raises:
        UserError: experts of one layer differ in shape or dtype.
    """
    stacked: dict[str, Tensor] = {}
    pieces: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := EXPERT.fullmatch(name):
            pieces.setdefault(f"{match[1]}.switch_mlp.{match[3]}", {})[int(match[2])] = tensor
        else:
            stacked[name] = tensor
    for name, experts in pieces.items():
        parts = [experts[number] for number in sorted(experts)]
        for number, part in enumerate(parts):
            if (part.dtype, part.shape) != (parts[0].dtype, parts[0].shape):
                raise UserError(
                    f"{name}: expert {number} is {part.dtype} {list(part.shape)} where expert 0 is "
                    f"{parts[0].dtype} {list(parts[0].shape)}; fetch the checkpoint again"
                )
        stacked[name] = Tensor(parts[0].dtype, (len(parts), *parts[0].shape), _stacker(parts))
    return stacked


def _stacker(parts: list[Tensor]) -> Any:
    return lambda: mx.stack([part.read() for part in parts])


def _experts(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, set[int]]]:
    """For each sparse layer and each tensor of an expert, the numbers of the experts that have it."""
    experts: dict[int, dict[str, set[int]]] = {}
    for name in tensors:
        layer = LAYER.fullmatch(name)
        if layer and layer[2] == "mlp.gate.weight":
            experts.setdefault(int(layer[1]), {})
        if layer and (expert := EXPERT.fullmatch(name)):
            experts.setdefault(int(layer[1]), {}).setdefault(expert[3], set()).add(int(expert[2]))
    return experts


def _num_experts(moe: Values, num_sparse: int) -> int:
    listed = moe.table.get("num_experts")
    counts = listed if isinstance(listed, list) else [listed]
    if not counts or any(type(count) is not int or count < 1 for count in counts):
        raise moe.error("num_experts", f"is {listed!r} and not a list of whole numbers; correct the file")
    if len(set(counts)) > 1:
        raise moe.error("num_experts", f"is {listed}: layers with different numbers of experts cannot be converted")
    if len(counts) not in (1, num_sparse):
        raise moe.error("num_experts", f"has {len(counts)} entries for {num_sparse} sparse layers; correct the file")
    return counts[0]


def _check_layers(
    moe: Values, tensors: Mapping[str, Tensor], experts: Mapping[int, Mapping[str, set[int]]], num: int, residual: bool
) -> None:
    """Every sparse layer must have its router, all its experts, and a dense FFN beside them if the config says so."""
    for layer, parts in experts.items():
        prefix = f"language_model.model.layers.{layer}.mlp"
        router = tensors.get(f"{prefix}.gate.weight")
        if router is None:
            raise moe.error("num_experts", f"is {num} but layer {layer} has no router ({prefix}.gate.weight); {AGAIN}")
        if router.shape[0] != num:
            raise moe.error(
                "num_experts", f"is {num} where the router of layer {layer} has {router.shape[0]} rows; {FIX}"
            )
        if not parts:
            raise moe.error("num_experts", f"is {num} but layer {layer} has a router and no experts; {AGAIN}")
        for name, numbers in parts.items():
            if numbers != set(range(num)):
                raise moe.error(
                    "num_experts", f"is {num} where layer {layer} has {name} of experts {sorted(numbers)}; {FIX}"
                )
        if residual != (f"{prefix}.coefficient.weight" in tensors):
            has = "no" if residual else "a"
            raise moe.error(
                "use_residual", f"is {str(residual).lower()} but layer {layer} has {has} coefficient; {FIX}"
            )


AGAIN = "fetch the checkpoint again"
FIX = "correct the file or fetch the checkpoint again"


def _capacity_note(moe: Values, num_experts: int, top_k: int) -> list[str]:
    """DeepSpeed drops tokens beyond an expert's capacity, in evaluation too; gm-mlx never does."""
    factor = moe.get("eval_capacity_factor", float, 1.0)
    # A token asks an expert once, so that S tokens need S places: S / E * factor * k, with k = 1 in top-1 gating.
    if factor * top_k >= num_experts:
        return []
    return [
        f"eval_capacity_factor {factor:g} lets DeepSpeed drop tokens when many want one expert; gm-mlx drops none, so "
        "answers to long prompts may differ"
    ]
