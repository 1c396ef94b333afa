"""Adapters merged into the weights that they are at: W + weight * scale * B A, and DoRA's rows at their new length.

Each adapter's change is that of the base's own weight, so that several add up as they do beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from gm_mlx._mlx_lm import QuantizedSwitchLinear, SwitchLinear
from gm_mlx.config import ModelConfig
from gm_mlx.lora.attach import replace_module, wrappers
from gm_mlx.lora.layers import TINY, LoRAEmbedding, LoRASwitchLinear, LowRank, Wrapper, float_weight
from gm_mlx.model import Model
from gm_mlx.router import LowRankRouter, Router
from gm_mlx.weights import PACKED


class Change(NamedTuple):
    """What one adapter does to one matrix: A [r, in], B [out, r], DoRA's lengths [out] or None, all float32."""

    down: mx.array
    up: mx.array
    scale: float
    magnitude: mx.array | None
    weight: float


def merged(matrix: mx.array, changes: Iterable[Change]) -> mx.array:
    """A matrix with all changes made to it.

    Args:
        matrix: W, float32 [out, in].
        changes: of adapters that are at work together.

    Returns:
        float32 [out, in].
    """
    total = matrix
    for one in changes:
        delta = one.scale * (one.up @ one.down)
        if one.magnitude is not None:
            moved = matrix + delta
            lengths = mx.sqrt(mx.maximum((moved**2).sum(axis=1), TINY))
            delta = (one.magnitude / lengths)[:, None] * moved - matrix
        total = total + one.weight * delta
    return total


def fuse(model: Model, *, dequantize: bool = False) -> Model:
    """Merge all adapters of a model into its weights, in place.

    Args:
        model: a model with adapters.
        dequantize: leave the layers that had adapters in floats; else those that were quantized are again, as they
            were, which rounds the adapters' changes.

    Returns:
        The model, whose config says how its layers are packed now. Routers of a low rank all become full ones where
        one has an adapter, since the sum is of no low rank.
    """
    found = wrappers(model)
    for path, wrapper in found.items():
        matrix = _merged_weight(wrapper)
        base = wrapper.base
        if isinstance(base, LowRankRouter):
            base = full_router(base)
            base.weight = matrix
        elif "scales" not in base:
            base.weight = matrix.astype(base.weight.dtype)
        elif dequantize:
            base = _float_layer(base, matrix.astype(model.language_model.dtype))
        else:
            dtype = model.language_model.dtype
            how = {"group_size": base.group_size, "bits": base.bits, "mode": base.mode}
            for name, array in zip(PACKED, mx.quantize(matrix.astype(dtype), **how), strict=False):
                base[name] = array
        mx.eval(base.parameters())
        replace_module(model, path, base)
    routers = any(isinstance(wrapper.base, LowRankRouter) for wrapper in found.values())
    if routers:
        for path, module in model.named_modules():
            if isinstance(module, LowRankRouter):
                replace_module(model, path, full_router(module))
        model.config = with_full_routers(model.config)
    if dequantize and "quantization" in model.config.extra:
        floats = {path: False for path, wrapper in found.items() if "scales" in wrapper.base}
        table = {**model.config.extra["quantization"], **floats}
        model.config = dataclasses.replace(model.config, extra={**model.config.extra, "quantization": table})
    return model


def with_full_routers(config: ModelConfig) -> ModelConfig:
    """The config of a model whose routers are full."""
    text = config.text_config
    assert text.moe is not None
    moe = dataclasses.replace(text.moe, router_rank=0)
    return dataclasses.replace(config, text_config=dataclasses.replace(text, moe=moe))


def full_router(router: LowRankRouter) -> Router:
    """A router [E, D] with the logits of one of a low rank."""
    full = Router(router.u.shape[0], router.v.shape[1])
    full.weight = float_weight(router)
    return full


def _merged_weight(wrapper: Wrapper) -> mx.array:
    """The merged weight of a wrapped layer, float32, of stacked experts [E, out, in]."""
    if isinstance(wrapper, LoRASwitchLinear):
        experts = []
        for expert in range(wrapper.base.num_experts):
            matrix = float_weight(wrapper.base, expert)
            experts.append(merged(matrix, (_change(low, expert) for low in wrapper.adapters)))
            mx.eval(experts)
        return mx.stack(experts)
    matrix = float_weight(wrapper.base)
    changes = [_change(low) for low in wrapper.adapters]
    # An embedding's rows are inputs.
    return merged(matrix.T, changes).T if isinstance(wrapper, LoRAEmbedding) else merged(matrix, changes)


def _change(low: LowRank, expert: int | None = None) -> Change:
    at = ... if expert is None else expert
    magnitude = low.magnitude[at] if "magnitude" in low else None
    return Change(low.lora_a[at], low.lora_b[at], low.scale, magnitude, low.weight)


def _float_layer(layer: nn.Module, weight: mx.array) -> nn.Module:
    """The layer that a quantized one was made from, with another weight."""
    rows, columns = weight.shape[-2:]
    made: nn.Module
    if isinstance(layer, QuantizedSwitchLinear):
        made = SwitchLinear(columns, rows, layer.num_experts, bias="bias" in layer)
    elif isinstance(layer, nn.QuantizedEmbedding):
        made = nn.Embedding(rows, columns)
    else:
        made = nn.Linear(columns, rows, bias="bias" in layer)
    made.weight = weight
    if "bias" in layer:
        made.bias = layer.bias
    made.train(layer.training)
    made.freeze()
    return made
