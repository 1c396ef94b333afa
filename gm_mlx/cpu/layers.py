"""Which layers of a model have a fast form."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from gm_mlx._mlx_lm import QuantizedSwitchLinear, SwitchLinear
from gm_mlx.activations import ACTIVATIONS
from gm_mlx.cpu.activations import NUMPY_ACTIVATIONS, FastActivation, FastGLU
from gm_mlx.cpu.attention import FastDecoderAttention, FastTowerAttention
from gm_mlx.cpu.cores import is_known, numpy_function, recomputed
from gm_mlx.cpu.experts import FastQuantizedSwitchLinear, FastSwitchLinear
from gm_mlx.cpu.linears import linear
from gm_mlx.cpu.networks import FastMLP, FastSparseMLP
from gm_mlx.decoder import Attention as DecoderAttention
from gm_mlx.decoder import Block, RMSNorm
from gm_mlx.model import Model
from gm_mlx.moe import GLU, MLP, SparseMLP
from gm_mlx.vision import Attention as TowerAttention


class FastLinear(nn.Linear):
    def __call__(self, x: mx.array) -> mx.array:
        y = linear(x, self)
        return super().__call__(x) if y is None else y


class FastQuantizedLinear(nn.QuantizedLinear):
    def __call__(self, x: mx.array) -> mx.array:
        y = linear(x, self)
        return super().__call__(x) if y is None else y


class FastQuantizedEmbedding(nn.QuantizedEmbedding):
    def as_linear(self, x: mx.array) -> mx.array:
        y = linear(x, self)
        return super().as_linear(x) if y is None else y


class FastRMSNorm(RMSNorm):
    def __call__(self, x: mx.array) -> mx.array:
        return recomputed(super().__call__, x) if _is_kept(self, x) else super().__call__(x)


class FastRoPE(nn.RoPE):
    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        turn = super().__call__
        return recomputed(lambda x: turn(x, offset=offset), x) if _is_kept(self, x) else turn(x, offset=offset)


def _is_kept(layer: nn.Module, x: mx.array) -> bool:
    """Whether MLX would keep the steps of a frozen layer: five arrays like x of a norm, and as many of positions."""
    return layer.training and not layer.trainable_parameters() and is_known(x)


class FastBlock(Block):
    """A block that lets go of how its gradient came about.

    What is evaluated while MLX follows a gradient keeps all that it came from: here, the blocks behind this one.
    """

    def __call__(self, x: mx.array, *others: Any, **named: Any) -> mx.array:
        if self.training and is_known(x):
            x = numpy_function(lambda x: (x, None), lambda dx, _: [dx], x)
        return super().__call__(x, *others, **named)


# Bases under which a linear with LoRA is one function.
BASES = (FastLinear, FastQuantizedLinear)

FAST_LAYERS: dict[type, type] = {
    nn.Linear: FastLinear,
    nn.QuantizedLinear: FastQuantizedLinear,
    nn.QuantizedEmbedding: FastQuantizedEmbedding,
    QuantizedSwitchLinear: FastQuantizedSwitchLinear,
    SwitchLinear: FastSwitchLinear,
    MLP: FastMLP,
    SparseMLP: FastSparseMLP,
    RMSNorm: FastRMSNorm,
    nn.RoPE: FastRoPE,
    Block: FastBlock,
    DecoderAttention: FastDecoderAttention,
    TowerAttention: FastTowerAttention,
}


def is_fast(model: Model) -> bool:
    """Whether ``speed_up`` has been at a model, so that its layers evaluate what they are given."""
    return isinstance(model.layers[0], FastBlock)


def speed_up(model: nn.Module) -> None:
    """Give the layers of ``model`` their fast forms, in place; on a GPU nothing is changed.

    Parameters keep their names and values: a model that was sped up is saved as the same file.

    Args:
        model: any module; each layer of ``FAST_LAYERS`` and each activation in it is affected. LoRA that is put on it
            before or afterwards is fast, too.
    """
    if mx.default_device().type != mx.DeviceType.cpu:
        return
    for module in model.modules():
        if fast := FAST_LAYERS.get(type(module)):
            module.__class__ = fast
        activation: Any = getattr(module, "activation", None)
        if type(activation) is GLU and activation.activation in NUMPY_ACTIVATIONS:
            module.activation = FastGLU(activation)
        elif activation in ACTIVATIONS.values():
            module.activation = FastActivation(activation)
