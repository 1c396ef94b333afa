"""Channel scales folded into a decoder's weights: other numbers, the same model.

Weights that read a channel are multiplied by s, and what produces the channel is divided by it:

- hidden channels of a gated network, per expert: h = act(gate x) * (up x) is linear in up, so rows of ``up_proj`` are
  divided and columns of ``down_proj`` multiplied;
- input channels, per layer: all experts and the router read the same norm, so the norm's weight is divided by one s,
  and the columns of everything that reads it are multiplied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import mlx.core as mx
import numpy as np

from gm_mlx.config import TextConfig
from gm_mlx.errors import UserError
from gm_mlx.quant.calibration import LAYERS
from gm_mlx.tensors import Tensor

INTO, OUT_OF = ("gate_proj", "up_proj"), "down_proj"
Factors = dict[str, list[np.ndarray]]
"""By name of a tensor: float32 arrays that broadcast against it."""


def fold_hidden(factors: Factors, path: str, scales: np.ndarray) -> None:
    """Scale the hidden channels of a gated network, or of all experts of a stack.

    Args:
        factors: what is to be multiplied with which tensor; added to.
        path: module path of the projections.
        scales: float32 [F], or [E, F] for stacked experts; one where a channel stays as it is.
    """
    factors.setdefault(f"{path}.up_proj.weight", []).append(1 / scales[..., :, None])
    factors.setdefault(f"{path}.{OUT_OF}.weight", []).append(scales[..., None, :])


def fold_input(
    factors: Factors,
    text: TextConfig,
    tensors: Mapping[str, Tensor],
    layer: int,
    paths: Iterable[str],
    scales: np.ndarray,
) -> dict[str, Tensor]:
    """Scale what the feed-forward networks of a layer read, its routers included.

    Args:
        factors: as for ``fold_hidden``.
        text: the decoder's config; not one with parallel blocks, whose attention reads the same norm.
        tensors: the model's tensors.
        layer: index of the layer.
        paths: module paths of its networks.
        scales: float32 [D].

    Returns:
        The layer's norm, in its own dtype, and what decides where tokens go, in float32, with the scales in them.
    """
    norm = f"{LAYERS}.{layer}.post_attention_layernorm"
    offset = 1.0 if text.norm == "rms" and text.norm_plus_one else 0.0
    weight, scales = fold_into_norm(read(tensors, f"{norm}.weight"), offset, scales)
    out = {f"{norm}.weight": _constant(tensors[f"{norm}.weight"].dtype, weight)}
    if (name := f"{norm}.bias") in tensors:
        bias = read(tensors, name)
        out[name] = _constant(tensors[name].dtype, (bias.astype(mx.float32) / mx.array(scales)).astype(bias.dtype))
    for path in paths:
        for part in INTO:
            factors.setdefault(f"{path}.{part}.weight", []).append(scales)
    # A rounded logit can be another expert.
    for part, factor in (("gate.weight", scales), ("gate.u", scales[:, None]), ("coefficient.weight", scales)):
        if (name := f"{LAYERS}.{layer}.mlp.{part}") in tensors:
            out[name] = _constant("F32", read(tensors, name).astype(mx.float32) * mx.array(factor))
    return out


def fold_into_norm(weight: mx.array, offset: float, scales: np.ndarray) -> tuple[mx.array, np.ndarray]:
    """Divide what a norm puts out by channel scales.

    Args:
        weight: the norm's weight [D] in the dtype that it is stored in.
        offset: what the norm adds to its weight before it multiplies, 1 in Gemma.
        scales: float32 [D].

    Returns:
        The new weight, in the old one's dtype, and the scales that it truly stands for, float32 [D]: rounding to half
        precision moves them a little, and what reads the norm makes up for that exactly. Channels that the norm
        switches off keep their weight, and one as scale.
    """
    factor = offset + _float64(weight)
    folded = mx.array((factor / scales - offset).astype(np.float32)).astype(weight.dtype)
    rounded = offset + _float64(folded)
    true = np.divide(factor, rounded, out=np.zeros_like(factor), where=rounded != 0)
    sound = (true > scales / 2) & (true < scales * 2)
    return mx.where(mx.array(sound), folded, weight), np.where(sound, true, 1.0).astype(np.float32)


def apply_factors(tensors: Mapping[str, Tensor], factors: Factors) -> dict[str, Tensor]:
    """The tensors that have factors, multiplied when they are read: in float32, and rounded once to their own dtype."""
    return {name: _multiplied(tensors[name], by) for name, by in factors.items()}


def read(tensors: Mapping[str, Tensor], name: str) -> mx.array:
    """A tensor's values.

    Raises:
        UserError: it is missing, or it is a quantized layer's.
    """
    if name not in tensors:
        raise UserError(f"{name}: the model has no such tensor; fetch or convert the model again")
    if f"{name.removesuffix('weight')}scales" in tensors:
        raise UserError(f"{name}: quantized already; scale the model that it was made from")
    return tensors[name].read()


def _multiplied(tensor: Tensor, factors: list[np.ndarray]) -> Tensor:
    def read() -> mx.array:
        weight = tensor.read()
        scaled = weight.astype(mx.float32)
        for factor in factors:
            scaled = scaled * mx.array(factor)
        return scaled.astype(weight.dtype)

    return Tensor(tensor.dtype, tensor.shape, read)


def _constant(dtype: str, value: mx.array) -> Tensor:
    mx.eval(value)
    return Tensor(dtype, value.shape, lambda: value)


def _float64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)
