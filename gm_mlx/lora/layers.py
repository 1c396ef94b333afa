"""Layers that compute W x + scale * B (A x): linears, stacked experts, token embeddings and routers.

A layer keeps its base as it is, float or quantized, and has any number of adapters beside it, whose changes add up.
mlx-lm's ``LoRALinear``, ``LoRASwitchLinear``, ``LoRAEmbedding`` and ``DoRALinear`` are close to this and not used:

- they hold one adapter each, and cannot be put on each other;
- their DoRA has no form for experts, takes rows of 3, 5 and 6 bits for shorter than they are, and multiplies by the
  unpacked matrix, so that quantized kernels and ``gm_mlx.cpu`` stand idle;
- A is [in, r] in one and [E, r, in] in another. Here all are as peft's files have them, A [r, in] and B [out, r], with
  the experts in front.

A and B are float32, which small steps of an optimizer need. Products are taken in the dtype of the activations, as the
base's are: a float32 copy of each input would be the largest thing in memory while training.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from gm_mlx import cpu
from gm_mlx._mlx_lm import QuantizedSwitchLinear, SwitchLinear
from gm_mlx.router import LowRankRouter, Router
from gm_mlx.weights import PACKED, runs_on_cpu

TINY = 1e-30  # least square of a row's length: the row of a padded vocabulary may be zero


class LowRank(nn.Module):
    """One adapter at one matrix.

    Attributes:
        adapter: the adapter's name.
        lora_a: A [r, in], of experts [E, r, in].
        lora_b: B [out, r], of experts [E, out, r].
        magnitude: with DoRA, the length of each output's row, [out] or [E, out].
        alpha: see ``scale``.
        rslora: see ``scale``.
        dropout_rate: share of inputs that A does not see while training.
        weight: how strong the user wants the adapter; 1 is as it was trained.
    """

    def __init__(
        self,
        adapter: str,
        lora_a: mx.array,
        lora_b: mx.array,
        alpha: float,
        *,
        rslora: bool = False,
        dropout: float = 0.0,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.adapter = adapter
        self.lora_a, self.lora_b = lora_a, lora_b
        self.alpha, self.rslora, self.weight = alpha, rslora, weight
        self.dropout_rate, self.dropout = dropout, nn.Dropout(dropout)
        self._known: tuple[Any, ...] = ()

    @property
    def rank(self) -> int:
        return self.lora_a.shape[-2]

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def use_dora(self, squares: mx.array, magnitude: mx.array | None = None) -> None:
        """Train lengths and directions of rows apart.

        Args:
            squares: the square of each row's length in the base, float32 [out] or [E, out].
            magnitude: the lengths to begin with; by default the base's own.
        """
        self._squares = squares
        self.magnitude = mx.sqrt(squares) if magnitude is None else magnitude

    def factors(self, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """A and B in the dtype of activations."""
        return self.lora_a.astype(dtype), self.lora_b.astype(dtype)

    def change(self, low: mx.array, plain: mx.array, gain: mx.array | None) -> mx.array:
        """What the adapter adds to an output.

        Args:
            low: B A x, [..., out].
            plain: W x without a bias, [..., out].
            gain: with DoRA, what each row is multiplied by, [..., out] or [out]; see ``gain``.
        """
        low = self.scale * low
        if gain is not None:
            # gain * (W x + low) - W x. Before training the gain is one and this is zero, to the last bit.
            low = (gain - 1) * plain + gain * low
        return (self.weight * low).astype(plain.dtype)

    def gain(self, layer: LoRALinear | LoRASwitchLinear) -> mx.array | None:
        """DoRA's new length of each row over its length in W + scale * B A, float32 [out] or [E, out]; None for LoRA.

        The lengths count as constants for the gradient (DoRA, 4.3). They come from |w|^2 + 2 s b (A w) + s^2 b A A^T b,
        for which W must not be unpacked: A W^T is the base's output for r inputs.
        """
        if "magnitude" not in self:
            return None
        a, b = self.lora_a, self.lora_b
        # All tokens of an answer meet the same factors. Training and loading put new arrays in the place of old ones.
        if self.training or not self._known or self._known[0] is not a or self._known[1] is not b:
            a_, b_ = mx.stop_gradient(a), mx.stop_gradient(b)
            crossed = mx.stop_gradient(layer.product(a_)).swapaxes(-1, -2).astype(mx.float32)  # [..., out, r]
            own = b_ @ (a_ @ a_.swapaxes(-1, -2))  # [..., out, r]
            squares = self._squares + ((2 * self.scale * crossed + self.scale**2 * own) * b_).sum(axis=-1)
            lengths = mx.stop_gradient(mx.sqrt(mx.maximum(squares, TINY)))
            if self.training:
                return self.magnitude / lengths
            self._known = (a, b, lengths)
        return self.magnitude / self._known[2]


class LoRALinear(nn.Module):
    """LoRA on a linear, whatever its weight is packed in."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters: list[LowRank] = []

    def __call__(self, x: mx.array) -> mx.array:
        """[..., in] to [..., out]."""
        if (y := self._at_once(x)) is not None:
            return y
        y = self.base(x)
        plain = y - self.base.bias if "bias" in self.base else y
        for one in self.adapters:
            a, b = one.factors(x.dtype)
            low, gain = one.dropout(x) @ a.T, one.gain(self)
            if gain is None:  # as below, in one product
                y = mx.addmm(y, low, b.T, alpha=one.scale * one.weight)
            else:
                y = y + one.change(low @ b.T, plain, gain)
        return y

    def _at_once(self, x: mx.array) -> mx.array | None:
        """All of ``__call__`` as one function, which MLX's CPU backend has for plain bases and fast ones."""
        return cpu.linear(x, self) if runs_on_cpu() and isinstance(self.base, cpu.BASES) else None

    def product(self, rows: mx.array) -> mx.array:
        """W x without a bias for each row x of [r, in]: [r, out]."""
        y = self.base(rows)
        return y - self.base.bias if "bias" in self.base else y


class LoRARouter(LoRALinear):
    """LoRA on a router, full or of a low rank: in float32 throughout, as the choice of experts hangs on last bits."""

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x.astype(mx.float32))


class LoRASwitchLinear(nn.Module):
    """LoRA on stacked experts, each with factors of its own."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters: list[LowRank] = []

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """[..., 1, in] to [..., 1, out] by the expert that ``indices`` [...] names (``SwitchLinear``)."""
        dtype = mx.float32 if runs_on_cpu() else x.dtype  # the only one that gather_mm has there

        def times(x: mx.array, matrices: mx.array) -> mx.array:
            if runs_on_cpu():
                return cpu.expert_products(x, matrices, indices, sorted_indices)
            return mx.gather_mm(x, matrices.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=sorted_indices)

        y = self.base(x, indices, sorted_indices=sorted_indices)
        plain = y - self.base.bias[indices][..., None, :] if "bias" in self.base else y
        for one in self.adapters:
            a, b = one.factors(dtype)
            low = times(times(one.dropout(x).astype(dtype), a), b)
            gain = one.gain(self)  # [E, out]
            y = y + one.change(low, plain, None if gain is None else gain[indices][..., None, :])
        return y

    def product(self, rows: mx.array) -> mx.array:
        """W_e x without a bias for each expert's rows x, [E, r, in]: [E, r, out]."""
        y = self.base(rows, mx.arange(rows.shape[0]))
        return y - self.base.bias[:, None, :] if "bias" in self.base else y


class LoRAEmbedding(nn.Module):
    """LoRA on token embeddings: A [r, V] is looked up. Where they are the head too, it has the same change."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters: list[LowRank] = []

    def __call__(self, ids: mx.array) -> mx.array:
        """Ids [...] to embeddings [..., D], float32: what MXFP4 is unpacked to by itself has too few bits for a sum."""
        y = self.base(ids).astype(mx.float32)
        for one in self.adapters:
            y = y + one.change(one.lora_a.T[ids] @ one.lora_b.T, y, None)
        return y

    def as_linear(self, x: mx.array) -> mx.array:
        """Hidden states [..., D] to logits [..., V]."""
        y = self.base.as_linear(x)
        for one in self.adapters:
            a, b = one.factors(x.dtype)
            y = y + one.change((x @ b) @ a, y, None)
        return y


Wrapper = LoRALinear | LoRASwitchLinear | LoRAEmbedding
# What wraps a layer; all others are linears.
WRAPPERS: tuple[tuple[tuple[type, ...], type[Wrapper]], ...] = (
    ((SwitchLinear, QuantizedSwitchLinear), LoRASwitchLinear),
    ((nn.Embedding, nn.QuantizedEmbedding), LoRAEmbedding),
    ((Router, LowRankRouter), LoRARouter),
    ((nn.Linear, nn.QuantizedLinear), LoRALinear),
)


def wrap(layer: nn.Module) -> Wrapper:
    """A layer with room for adapters."""
    return next(wrapper for kinds, wrapper in WRAPPERS if isinstance(layer, kinds))(layer)


def float_weight(layer: nn.Module, expert: int | None = None) -> mx.array:
    """A layer's matrix as floats, float32 [out, in]; of stacked experts one of them; of an embedding [V, D]."""
    if isinstance(layer, LowRankRouter):
        return (layer.u.astype(mx.float32) @ layer.v.astype(mx.float32)).T
    parts = [layer[name] for name in PACKED if layer.get(name) is not None]
    weight, *packing = parts if expert is None else [part[expert] for part in parts]
    if not packing:
        return weight.astype(mx.float32)
    scales, *biases = packing
    return mx.dequantize(
        weight,
        scales,
        biases[0] if biases else None,
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        dtype=mx.float32,
    )


def row_squares(layer: nn.Module) -> mx.array:
    """The square of the length of each row of a layer's matrix, float32 [out], of stacked experts [E, out]."""
    if not isinstance(layer, SwitchLinear | QuantizedSwitchLinear):
        return (float_weight(layer) ** 2).sum(axis=-1)
    rows: list[mx.array] = []
    for expert in range(layer.num_experts):
        rows.append((float_weight(layer, expert) ** 2).sum(axis=-1))
        mx.eval(rows)  # one unpacked matrix at a time
    return mx.stack(rows)
